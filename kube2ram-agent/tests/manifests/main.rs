//! What `deploy` holds: kustomize and Helm make the same objects of it, the API server's schemas and the
//! agent's flags know all that is in them, and the agent does its job in exactly the container that they
//! describe.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

mod api_server;
mod chart;
mod container;
mod kube2iam;
mod names;
mod node;
mod overlays;
mod rendered;
mod schema;
mod support;
mod token_rights;
