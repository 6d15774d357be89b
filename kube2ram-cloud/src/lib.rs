//! What knows a cloud: how its roles are named, how their credentials are issued, what its metadata server is
//! asked and answers, how requests are signed. One module for each cloud, and one
//! [`Dialect`](dialect::Dialect) each: nothing outside of this crate names a cloud, but the place that
//! chooses one. The private modules at the top are what the clouds share. The home of reqwest.

#![deny(unsafe_code)]

mod canonical;
mod metadata_addr;
mod wire;
pub mod role;
pub mod credentials;
pub mod upstream;
pub mod dialect;
mod session_token;
mod endpoint;
mod metadata;
mod sts;
mod base;
mod issuer;
pub mod alibaba;
pub mod aws;
mod cloud;
mod provider;
#[cfg(test)]
mod testing;

pub use self::{
    alibaba::OidcProviderArn,
    base::{Base, BaseCredentials, BaseError, BaseSource, BaseState},
    cloud::Cloud,
    endpoint::{Endpoint, EndpointError, StsEndpoint},
    metadata::MetadataError,
    metadata_addr::MetadataAddr,
    provider::{CloudSettings, ExchangeSettings, Location, Provider, StsRoute},
    sts::{StsClient, StsClientError},
};
