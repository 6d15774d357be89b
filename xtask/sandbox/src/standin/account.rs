//! One pretended account of a cloud: its roles, and every access key that was ever valid in it. Pure state
//! behind a lock. Shared by the metadata server, which issues the node's keys, and STS, which verifies and
//! issues.

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
use crate::{Cloud, clock::Clock, locked};

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
    /// The instance's role; it has `sts:AssumeRole` unless it was denied that.
    Node,
    /// A user who has `sts:AssumeRole`, by name.
    User(String),
}

/// An access key and what goes with it.
#[derive(Clone, Debug)]
pub struct AccessKey {
    /// `AccessKeyId`. That of an assumed role is `STS.<role name>.<unique>`, on AWS `ASIA.<role
    /// name>.<unique>`, so that tests can see whose it is.
    pub id: String,
    /// `AccessKeySecret`, on AWS `SecretAccessKey`. Contains [`AccessKey::SECRET_MARKER`].
    pub secret: String,
    /// `SecurityToken`, on AWS `SessionToken`, which temporary keys have. Contains
    /// [`AccessKey::SECRET_MARKER`].
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

/// A role.
#[derive(Clone, Debug)]
pub struct Role {
    /// Whether its trust policy allows `sts:SetSourceIdentity`, on AWS.
    pub allows_source_identity: bool,
    /// Whether its trust policy allows `sts:TagSession`, on AWS.
    pub allows_tags: bool,
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

impl Role {
    /// A role that trusts tokens alone, and nobody of the account.
    pub fn trusting(oidc: OidcTrust) -> Self {
        Self { oidc: Some(oidc), trusts_node: false, ..Self::default() }
    }
}

impl Default for Role {
    /// What the console creates: one hour, trusting, without more.
    fn default() -> Self {
        Self {
            allows_source_identity: false,
            allows_tags: false,
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
    cloud: Cloud,
    keys: Mutex<HashMap<String, AccessKey>>,
    node_is_denied: AtomicBool,
    providers: Mutex<BTreeMap<String, OidcProvider>>,
    roles: Mutex<BTreeMap<String, Role>>,
}

impl Accounts {
    /// The UID of the account of Alibaba Cloud.
    pub const UID: &str = Cloud::Alibaba.account();
    /// The name of the node's role, in any cloud.
    pub const NODE_ROLE: &str = "KubernetesWorkerRole-sandbox";

    /// Makes an account of Alibaba Cloud without roles or keys.
    pub fn new(clock: Clock) -> Self {
        Self::of(Cloud::Alibaba, clock)
    }

    /// Makes an account of a cloud without roles or keys.
    pub fn of(cloud: Cloud, clock: Clock) -> Self {
        Self { clock, cloud, ..Self::default() }
    }

    /// The cloud that it is of.
    pub fn cloud(&self) -> Cloud {
        self.cloud
    }

    /// The clock that all its servers go by.
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// The ARN of a role of the account of Alibaba Cloud; `name` may have a path. That of another cloud is
    /// [`Cloud::role_arn`].
    pub fn role_arn(name: &str) -> String {
        Cloud::Alibaba.role_arn(name)
    }

    /// Adds or replaces a role, by ARN.
    pub fn add_role(&self, arn: impl Into<String>, role: Role) {
        locked(&self.roles).insert(arn.into(), role);
    }

    /// The ARN of an OIDC provider of the account of Alibaba Cloud. That of another cloud is
    /// [`Cloud::provider_arn`].
    pub fn provider_arn(name: &str) -> String {
        Cloud::Alibaba.provider_arn(name)
    }

    /// Adds or replaces an OIDC provider, by ARN.
    pub fn add_provider(&self, arn: impl Into<String>, provider: OidcProvider) {
        locked(&self.providers).insert(arn.into(), provider);
    }

    /// Removes an OIDC provider, by ARN.
    pub fn remove_provider(&self, arn: &str) {
        locked(&self.providers).remove(arn);
    }

    /// Takes `sts:AssumeRole` from the node's role.
    pub fn deny_node(&self) {
        self.node_is_denied.store(true, Ordering::Relaxed);
    }

    /// Whether a principal's own policies allow `sts:AssumeRole`.
    pub(super) fn may_assume(&self, principal: &Principal) -> bool {
        match principal {
            Principal::AssumedRole { role, .. } => {
                self.role(&self.cloud.role_arn(role)).is_some_and(|role| role.may_assume)
            }
            Principal::Node => !self.node_is_denied.load(Ordering::Relaxed),
            Principal::User(_) => true,
        }
    }

    /// Removes a role.
    pub fn remove_role(&self, arn: &str) {
        locked(&self.roles).remove(arn);
    }

    /// Makes a key that does not expire, for a user.
    pub fn add_user(&self, name: &str) -> AccessKey {
        self.issue(Principal::User(name.to_owned()), None)
    }

    /// Makes a key of a session of a role, by name, as AssumeRole does. It ends after an hour.
    pub fn add_session(&self, role: &str, session: &str) -> AccessKey {
        let principal = Principal::AssumedRole { role: role.to_owned(), session: session.to_owned() };
        self.issue(principal, Some(Duration::from_secs(3600)))
    }

    /// Makes a key that STS will know.
    pub(super) fn issue(&self, principal: Principal, lifetime: Option<Duration>) -> AccessKey {
        let issued = self.clock.now();
        let unique = Uuid::new_v4().simple();
        // With the characters that break a careless signer or header, but for those of XML on AWS.
        let (temporary, static_, begin, end) = match self.cloud {
            Cloud::Alibaba => ("STS", "LTAI", "CAIS+/", "=~*"),
            Cloud::Aws => ("ASIA", "AKIA", "IQoJ+/", "=="),
        };
        let id = match &principal {
            Principal::AssumedRole { role, .. } => format!("{temporary}.{}.{unique}", self.id_part(role)),
            Principal::Node => format!("{temporary}.{}.{unique}", Self::NODE_ROLE),
            Principal::User(name) => format!("{static_}.{name}.{unique}"),
        };
        let key = AccessKey {
            secret: format!("{}{unique}", AccessKey::SECRET_MARKER),
            security_token: lifetime.map(|_| format!("{begin}{}{unique}{end}", AccessKey::SECRET_MARKER)),
            issued,
            expires: lifetime.map(|lifetime| issued.saturating_add(lifetime).unwrap_or(Timestamp::MAX)),
            principal,
            id,
        };
        locked(&self.keys).insert(key.id.clone(), key.clone());
        key
    }

    /// What a key's id has of a role's name with its path. A scope of AWS's signature begins with the id, and
    /// slashes separate its parts.
    fn id_part<'a>(&self, role: &'a str) -> &'a str {
        match self.cloud {
            Cloud::Alibaba => role,
            Cloud::Aws => role.rsplit('/').next().unwrap_or(role),
        }
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

    /// All OIDC providers, by ARN.
    pub(super) fn providers(&self) -> BTreeMap<String, OidcProvider> {
        locked(&self.providers).clone()
    }

    pub(super) fn role(&self, arn: &str) -> Option<Role> {
        locked(&self.roles).get(arn).cloned()
    }
}
