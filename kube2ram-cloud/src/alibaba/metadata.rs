//! The ECS metadata server as the agent itself uses it: region, account, node role and its credentials.
//! Source: ECS, "Instance metadata". Depends on the crate's `metadata` and `session_token`; called by `base`
//! and, for discovery, by `app`.

use std::sync::Arc;

use super::{
    DIALECT,
    endpoint::Region,
    wire::{Issued, parse_node_credentials},
};
pub use crate::metadata::MetadataError;
use crate::{
    metadata::{Client, NodeRole},
    role::BaseArn,
    session_token::{SessionTokens, Without},
    upstream::Upstream,
};

/// An [`Upstream`] that satisfies hardened mode (`HttpTokens=required`), and works without. Asks for a token
/// on first use only. Source: ECS, "Instance metadata", hardened mode. `server` passes pods' requests through
/// it too.
pub fn hardened_mode(upstream: impl Upstream) -> SessionTokens {
    SessionTokens::new(upstream, &DIALECT.tokens, Without::Pass)
}

/// Asks the metadata server on behalf of the agent. Every answer is bounded in size and time, and parsed
/// strictly.
pub struct Metadata(Client);

impl Metadata {
    /// Asks over `upstream`.
    pub fn new(upstream: Arc<SessionTokens>) -> Self {
        Self(Client::new(upstream, &NODE_ROLE))
    }

    /// The node's region.
    ///
    /// # Errors
    /// See [`MetadataError`].
    pub async fn region_id(&self) -> Result<Region, MetadataError> {
        let text = self.0.text("/latest/meta-data/region-id").await?;
        Region::parse(text.trim()).map_err(MetadataError::Region)
    }

    /// The base ARN of the node's account: `acs:ram::<owner-account-id>:role/`.
    ///
    /// # Errors
    /// See [`MetadataError`].
    pub async fn base_arn(&self) -> Result<BaseArn, MetadataError> {
        let text = format!("acs:ram::{}:role/", self.owner_account_id().await?);
        BaseArn::parse(&text).or(Err(MetadataError::Malformed("account id")))
    }

    /// The account that owns the node: digits.
    ///
    /// # Errors
    /// See [`MetadataError`].
    pub async fn owner_account_id(&self) -> Result<Box<str>, MetadataError> {
        let text = self.0.text("/latest/meta-data/owner-account-id").await?;
        let id = text.trim();
        let fits = (1..=32).contains(&id.len()) && id.bytes().all(|c| c.is_ascii_digit());
        if fits { Ok(id.into()) } else { Err(MetadataError::Malformed("account id")) }
    }

    /// The role attached to the node, also the default role of auto-discovery; `None` when there is none.
    ///
    /// # Errors
    /// See [`MetadataError`].
    pub async fn node_role_name(&self) -> Result<Option<Box<str>>, MetadataError> {
        self.0.node_role_name().await
    }

    /// The credentials of the role attached to the node, as [`node_role_name`](Self::node_role_name) told it.
    ///
    /// # Errors
    /// See [`MetadataError`]; [`Status`](MetadataError::Status) 404 when the role has been detached or
    /// replaced.
    pub async fn node_credentials(&self, role: &str) -> Result<Issued, MetadataError> {
        self.0.node_credentials(role).await
    }

    pub(super) fn into_client(self) -> Client {
        self.0
    }
}

static NODE_ROLE: NodeRole = NodeRole {
    directory: "/latest/meta-data/ram/security-credentials/",
    marks: b".-_",
    parse: parse_node_credentials,
};

#[cfg(test)]
mod tests;
