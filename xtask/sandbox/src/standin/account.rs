//! One pretended Alibaba Cloud account: its roles, and every access key that was ever valid in it.
//! Pure state behind a lock. Shared by the metadata server, which issues the node's keys, and STS, which
//! verifies and issues.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;
use uuid::Uuid;

use super::oidc::{OidcProvider, OidcTrust};
use crate::{clock::Clock, locked};

/// Who a key belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Principal {
    /// A session of a role.
    AssumedRole {
        /// The role's name, with its path.
        role: String,
        /// The session's name.
        session: String,
    },
    /// The ECS instance's role; it has `sts:AssumeRole` unless it was denied that.
    Node,
    /// A RAM user with `AliyunSTSAssumeRoleAccess`, by name.
    User(String),
}

/// An access key and what goes with it.
#[derive(Clone, Debug)]
pub struct AccessKey {
    /// `AccessKeyId`. That of an assumed role starts with `STS.<role name>.`, so that tests can see whose it
    /// is.
    pub id: String,
    /// `AccessKeySecret`. Contains [`AccessKey::SECRET_MARKER`].
    pub secret: String,
    /// `SecurityToken`, which temporary keys have. Contains [`AccessKey::SECRET_MARKER`].
    pub security_token: Option<String>,
    /// When the key was issued.
    pub issued: Timestamp,
    /// When it ends; static keys do not.
    pub expires: Option<Timestamp>,
    /// Who it belongs to.
    pub principal: Principal,
}

impl AccessKey {
    /// Part of every secret and token, for tests that search logs for them.
    pub const SECRET_MARKER: &str = "SaNdBoXsEcReT";
}

/// A RAM role.
#[derive(Clone, Debug)]
pub struct Role {
    /// Its trust policy's `sts:ExternalId` condition.
    pub external_id: Option<String>,
    /// `MaxSessionDuration`.
    pub max_session: Duration,
    /// Whether its own policies allow `sts:AssumeRole`.
    pub may_assume: bool,
    /// Whose tokens its trust policy takes.
    pub oidc: Option<OidcTrust>,
    /// Whether its trust policy names the account's own: the node's role, users, and roles that may assume
    /// others.
    pub trusts_node: bool,
}

impl Default for Role {
    /// What the RAM console creates: one hour, trusting.
    fn default() -> Self {
        Self {
            external_id: None,
            max_session: Duration::from_secs(3600),
            may_assume: false,
            oidc: None,
            trusts_node: true,
        }
    }
}

/// The account.
#[derive(Debug, Default)]
pub struct Accounts {
    clock: Clock,
    keys: Mutex<HashMap<String, AccessKey>>,
    node_is_denied: AtomicBool,
    providers: Mutex<BTreeMap<String, OidcProvider>>,
    roles: Mutex<BTreeMap<String, Role>>,
}

impl Accounts {
    /// The account's UID.
    pub const UID: &str = "1234567890123456";
    /// The name of the node's role.
    pub const NODE_ROLE: &str = "KubernetesWorkerRole-sandbox";

    /// Makes an account without roles or keys.
    pub fn new(clock: Clock) -> Self {
        Self { clock, ..Self::default() }
    }

    /// The clock that all its servers go by.
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// The ARN of a role of this account; `name` may have a path.
    pub fn role_arn(name: &str) -> String {
        format!("acs:ram::{}:role/{name}", Self::UID)
    }

    /// Adds or replaces a role, by ARN.
    pub fn add_role(&self, arn: impl Into<String>, role: Role) {
        locked(&self.roles).insert(arn.into(), role);
    }

    /// The ARN of an OIDC provider of this account.
    pub fn provider_arn(name: &str) -> String {
        format!("acs:ram::{}:oidc-provider/{name}", Self::UID)
    }

    /// Adds or replaces an OIDC provider, by ARN.
    pub fn add_provider(&self, arn: impl Into<String>, provider: OidcProvider) {
        locked(&self.providers).insert(arn.into(), provider);
    }

    /// Takes `sts:AssumeRole` from the node's role.
    pub fn deny_node(&self) {
        self.node_is_denied.store(true, Ordering::Relaxed);
    }

    /// Whether a principal's own policies allow `sts:AssumeRole`.
    pub(super) fn may_assume(&self, principal: &Principal) -> bool {
        match principal {
            Principal::AssumedRole { role, .. } => {
                self.role(&Self::role_arn(role)).is_some_and(|role| role.may_assume)
            }
            Principal::Node => !self.node_is_denied.load(Ordering::Relaxed),
            Principal::User(_) => true,
        }
    }

    /// Removes a role.
    pub fn remove_role(&self, arn: &str) {
        locked(&self.roles).remove(arn);
    }

    /// Makes a key that does not expire, for a RAM user.
    pub fn add_user(&self, name: &str) -> AccessKey {
        self.issue(Principal::User(name.to_owned()), None)
    }

    /// Makes a key that STS will know.
    pub(super) fn issue(&self, principal: Principal, lifetime: Option<Duration>) -> AccessKey {
        let issued = self.clock.now();
        let unique = Uuid::new_v4().simple();
        let id = match &principal {
            Principal::AssumedRole { role, .. } => format!("STS.{role}.{unique}"),
            Principal::Node => format!("STS.{}.{unique}", Self::NODE_ROLE),
            Principal::User(name) => format!("LTAI.{name}.{unique}"),
        };
        let key = AccessKey {
            secret: format!("{}{unique}", AccessKey::SECRET_MARKER),
            // The characters that break a careless signer or header.
            security_token: lifetime.map(|_| format!("CAIS+/{}{unique}=~*", AccessKey::SECRET_MARKER)),
            issued,
            expires: lifetime.map(|lifetime| issued.saturating_add(lifetime).unwrap_or(Timestamp::MAX)),
            principal,
            id,
        };
        locked(&self.keys).insert(key.id.clone(), key.clone());
        key
    }

    /// Ends every key of a principal now.
    pub(super) fn expire(&self, principal: &Principal) {
        let now = self.clock.now();
        for key in locked(&self.keys).values_mut().filter(|key| key.principal == *principal) {
            key.expires = Some(key.expires.map_or(now, |end| end.min(now)));
        }
    }

    pub(super) fn key(&self, id: &str) -> Option<AccessKey> {
        locked(&self.keys).get(id).cloned()
    }

    pub(super) fn provider(&self, arn: &str) -> Option<OidcProvider> {
        locked(&self.providers).get(arn).cloned()
    }

    pub(super) fn role(&self, arn: &str) -> Option<Role> {
        locked(&self.roles).get(arn).cloned()
    }
}
