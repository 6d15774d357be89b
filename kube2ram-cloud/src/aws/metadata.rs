//! The EC2 metadata server as the agent itself uses it: region, partition, account, node role and its
//! credentials. Nothing of EC2's API is asked. Source: EC2 user guide, "Instance metadata categories".
//! Depends on the crate's `metadata` and `session_token`; called by `base` and, for discovery, by `app`.

use std::sync::Arc;

use super::{
    DIALECT,
    endpoint::{Partition, Region},
    wire::{parse_node_credentials, parse_profile_arn},
};
pub use crate::metadata::MetadataError;
use crate::{
    metadata::{Client, NodeRole},
    role::{ArnStyle, BaseArn},
    session_token::{SessionTokens, Without},
    upstream::Upstream,
};

/// An [`Upstream`] that speaks version 2 of the metadata service, and never version 1: a policy can give keys
/// that were fetched by version 1 fewer rights (`ec2:RoleDelivery`). Asks for a token on first use only.
/// `server` passes pods' requests through it too. Source: EC2 user guide, "Use the Instance Metadata Service
/// to access instance metadata".
pub fn imdsv2(upstream: impl Upstream) -> SessionTokens {
    SessionTokens::new(upstream, &DIALECT.tokens, Without::Fail)
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
    pub async fn region(&self) -> Result<Region, MetadataError> {
        let text = self.0.text("/latest/meta-data/placement/region").await?;
        Region::parse(text.trim()).map_err(MetadataError::Region)
    }

    /// The node's partition, for a region whose name tells none.
    ///
    /// # Errors
    /// See [`MetadataError`]; [`Malformed`](MetadataError::Malformed) for a partition whose hosts are not
    /// known.
    pub async fn partition(&self) -> Result<&'static Partition, MetadataError> {
        let text = self.0.text("/latest/meta-data/services/partition").await?;
        Partition::named(text.trim()).ok_or(MetadataError::Malformed("partition"))
    }

    /// The base ARN of the node's account, by its instance profile.
    ///
    /// # Errors
    /// See [`MetadataError`]; [`Status`](MetadataError::Status) 404 when the node has no instance profile.
    pub async fn base_arn(&self) -> Result<BaseArn, MetadataError> {
        let body = self.0.get("/latest/meta-data/iam/info").await?;
        let profile = parse_profile_arn(&body).map_err(MetadataError::Profile)?;
        base_of_profile(&profile).ok_or(MetadataError::Malformed("instance profile"))
    }

    /// The role attached to the node, also the default role of auto-discovery; `None` when there is none.
    ///
    /// # Errors
    /// See [`MetadataError`].
    pub async fn node_role_name(&self) -> Result<Option<Box<str>>, MetadataError> {
        self.0.node_role_name().await
    }

    pub(super) fn into_client(self) -> Client {
        self.0
    }
}

/// The base ARN of the account that an instance profile's ARN is in: `arn:<partition>:iam::<account>:role/`.
/// The profile's path, and its name, which is often the role's and need not be, say nothing.
pub fn base_of_profile(arn: &str) -> Option<BaseArn> {
    let (account, _) = arn.split_once(":instance-profile/")?;
    BaseArn::parse_in(ArnStyle::Aws, &format!("{account}:role/")).ok()
}

static NODE_ROLE: NodeRole = NodeRole {
    directory: "/latest/meta-data/iam/security-credentials/",
    // IAM API, "CreateRole".
    marks: b"_+=,.@-",
    parse: parse_node_credentials,
};

#[cfg(test)]
mod tests;
