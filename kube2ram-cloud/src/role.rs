//! Roles, and the sessions that a cloud issues credentials for. Pure: no I/O, no clock, no logs.
//! Called by the issuers of this crate and, for the types, by the agent's `role`, `policy` and `args`.

use std::time::Duration;

mod arn;
mod session;
mod tags;

pub use self::{
    arn::{ArnStyle, BaseArn, MAX_BYTES as ARN_MAX_BYTES, RoleArn, is_arn},
    session::{
        DURATION_MAX_BYTES, EXTERNAL_ID_MAX_BYTES, ExternalId, MAX_DURATION, MIN_DURATION, POLICY_MAX_BYTES,
        SESSION_NAME_MAX, SessionName, SessionPolicy, SessionRules, SourceIdentity, parse_duration,
    },
    tags::{TAGS_MAX_BYTES, Tag, TagKeys, TagValue},
};

/// Everything that changes what is issued: the key of the credential cache.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RoleSession {
    /// The role to assume.
    pub role: RoleArn,
    /// By what right it is assumed.
    pub grant: Grant,
    /// The session policy, when the pod is annotated with one.
    pub policy: Option<SessionPolicy>,
    /// What the cloud's trail of actions shows.
    pub session_name: SessionName,
    /// `DurationSeconds`, 15 min – 12 h.
    pub duration: Duration,
    /// The session tags, each of them transitive. None on a cloud whose [`SessionRules`] have no keys.
    pub tags: Box<[Tag]>,
    /// The source identity, where the operator wants one and the cloud has it.
    pub source_identity: Option<SourceIdentity>,
}

/// By what right a role is assumed, with what the call takes for it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Grant {
    /// The role trusts the agent's own identity: AssumeRole.
    AssumeRole {
        /// The external id, when the pod is annotated with one.
        external_id: Option<ExternalId>,
    },
    /// The role trusts a ServiceAccount of the cluster: a token of it is exchanged (AssumeRoleWithOIDC on
    /// Alibaba Cloud, AssumeRoleWithWebIdentity on AWS). The agent's own identity has no part in it.
    ServiceAccount(ServiceAccount),
}

/// A ServiceAccount of the cluster, by its name. One that is made again under its name is the same to a
/// cloud.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ServiceAccount {
    /// Its namespace.
    pub namespace: Box<str>,
    /// Its name in there.
    pub name: Box<str>,
}

impl Grant {
    /// By AssumeRole, without an external id.
    pub const ASSUME_ROLE: Self = Self::AssumeRole { external_id: None };

    /// The external id, which only AssumeRole has.
    pub fn external_id(&self) -> Option<&ExternalId> {
        match self {
            Self::AssumeRole { external_id } => external_id.as_ref(),
            Self::ServiceAccount(_) => None,
        }
    }
}

impl ServiceAccount {
    /// The subject of its tokens, which a role's trust policy names:
    /// `system:serviceaccount:<namespace>:<name>`.
    ///
    /// Source: Kubernetes, "Managing Service Accounts" (the claim `sub`).
    pub fn subject(&self) -> String {
        format!("system:serviceaccount:{}:{}", self.namespace, self.name)
    }
}

/// What is wrong with a value. The text continues a sentence that names the value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// A character outside of the alphabet.
    #[error("contains {found:?}; only {legal} are allowed")]
    Character {
        /// The first such character.
        found: char,
        /// The alphabet, for people.
        legal: &'static str,
    },
    /// Not a duration, or out of range.
    #[error("is not a duration between 15m and 12h, such as 90m, 1h30m or 5400 (seconds)")]
    Duration,
    /// Nothing at all.
    #[error("is empty")]
    Empty,
    /// Not a JSON object.
    #[error("is not a JSON object")]
    Json,
    /// Too short or too long.
    #[error("has {found} characters instead of {min} to {max}")]
    Length {
        /// Its length in characters.
        found: usize,
        /// The least allowed.
        min: usize,
        /// The most allowed.
        max: usize,
    },
    /// Not a role's ARN.
    #[error("is not a role's ARN, acs:ram::<account>:role/<name>")]
    NotArn,
    /// Not what a role's ARN can begin with.
    #[error("is not a base ARN, acs:ram::<account>:role/, with or without a path")]
    NotBaseArn,
    /// Not a role's ARN, on AWS.
    #[error("is not an IAM role's ARN, arn:<partition>:iam::<12 digits>:role/<name>")]
    NotIamArn,
    /// Not what a role's ARN can begin with, on AWS.
    #[error("is not a base ARN, arn:<partition>:iam::<12 digits>:role/, with or without a path")]
    NotIamBaseArn,
    /// Not an OIDC provider's ARN.
    #[error("is not an OIDC provider's ARN, acs:ram::<account>:oidc-provider/<name>")]
    NotProviderArn,
    /// An empty or dot segment in the role's path.
    #[error("has an empty, '.' or '..' segment in the role's path")]
    Segment,
}

#[cfg(test)]
mod tests;
