//! Base credentials on Alibaba Cloud: the environment's variables, and the two origins, RRSA and the node's
//! role. `uri` has what only clients on a workstation use. Depends on `metadata` and the crate's `base`;
//! called by `sts`, composed by `app` and by the authenticator's client.

mod environment;
mod oidc;
mod uri;

use std::sync::Arc;

pub use self::{
    environment::Configured,
    oidc::OidcSettings,
    uri::{CredentialsUri, UriError},
};
use super::metadata::Metadata;
use crate::base::Oidc;
pub use crate::base::{Base, BaseCredentials, BaseError, BaseSource, BaseState, OidcError};
use kube2ram_service::clock::Clock;

/// The source that the environment configures; the node's role without a configuration.
pub fn of_configured(configured: Configured, metadata: Metadata, clock: Arc<dyn Clock>) -> Base {
    match configured {
        Configured::NodeRole => of_node_role(metadata, clock),
        Configured::Oidc(settings) => of_oidc(settings, clock),
        Configured::StaticKeys(keys) => Base::of_keys(keys),
    }
}

/// The role attached to the node; fetched on first use, renewed well ahead of its expiry.
pub fn of_node_role(metadata: Metadata, clock: Arc<dyn Clock>) -> Base {
    Base::renewed(metadata.into_client(), clock)
}

/// The agent's own role; fetched and renewed as the node's.
pub fn of_oidc(settings: OidcSettings, clock: Arc<dyn Clock>) -> Base {
    Base::renewed(Oidc(settings), clock)
}

#[cfg(test)]
mod tests;
