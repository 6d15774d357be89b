//! What differs between clouds in the metadata service that pods see, as one table for each cloud. Data and
//! pure functions only. Chosen once, by the agent's `args` and `app`; read by its `server`, `role` and
//! `kubernetes`.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, StatusCode};

use crate::{
    MetadataAddr,
    credentials::{Credentials, IssueErrorKind},
    role::{ArnStyle, Grant, SessionRules},
};

/// How one cloud's metadata service speaks. Paths are segments below `/<version>/`, without regard to case.
#[derive(Debug)]
pub struct Dialect {
    /// Where the metadata server usually is.
    pub metadata: MetadataAddr,
    /// The directory that holds [`SECURITY_CREDENTIALS`]. Everything below it is answered by the agent itself
    /// or not at all.
    pub credentials: &'static [&'static str],
    /// What of the real server is closed, and to whom.
    pub items: Items,
    /// The value of the header `Server`.
    pub server: &'static str,
    /// Session tokens.
    pub tokens: TokenHeaders,
    /// Writes the document of temporary credentials, as the cloud's SDKs read it.
    pub document: fn(&Credentials) -> serde_json::Result<Bytes>,
    /// The remedy for a refusal of STS: the end of a sentence that names the role and the code.
    pub advice: fn(IssueErrorKind) -> &'static str,
    /// The same where roles are assumed by ServiceAccounts' tokens ([`Grant::ServiceAccount`]).
    pub exchange_advice: fn(IssueErrorKind) -> &'static str,
    /// How long the cloud's SDKs wait.
    pub patience: Patience,
    /// The usual keys of annotations.
    pub annotations: Annotations,
    /// How roles' ARNs are written.
    pub arns: ArnStyle,
    /// Whom a ServiceAccount's token is to be for: the client id of the cluster's provider.
    pub audience: &'static str,
    /// The key by which conditions of trust policies compare the subject of such a token.
    pub subject_key: &'static str,
    /// What STS accepts in a session's parameters.
    pub sessions: SessionRules,
}

impl Dialect {
    /// The remedy for a refusal of STS, by the right that the role was to be assumed by.
    pub fn advice_by(&self, grant: &Grant, kind: IssueErrorKind) -> &'static str {
        match grant {
            Grant::AssumeRole { .. } => (self.advice)(kind),
            Grant::ServiceAccount(_) => (self.exchange_advice)(kind),
        }
    }
}

/// The directory of a role's credentials, by the same name in all clouds.
pub const SECURITY_CREDENTIALS: &str = "security-credentials";

/// Which items of the real metadata server are closed.
#[derive(Debug)]
pub struct Items {
    /// Dumps of the whole tree, perhaps with credentials: closed to everybody, whatever the policy, at any
    /// depth.
    pub dump: &'static [&'static [&'static str]],
    /// How segments begin that are closed like [`dump`](Self::dump), such as a second tree of credentials.
    /// They are answered like a path that does not exist (404): on another status some clients do not go on
    /// to the usual tree.
    pub closed_prefixes: &'static [&'static str],
    /// Secrets of the node, such as the user data, which carries its join secrets: closed to everybody unless
    /// the policy is `open`, at any depth.
    pub secrets: &'static [&'static [&'static str]],
    /// The directory by which a pod could prove to be the node: closed like secrets, but open to who may have
    /// the node's role.
    pub identity: &'static [&'static str],
    /// What is open in [`identity`](Self::identity) all the same, also under `strict`: paths below the
    /// version, and exactly as written.
    pub open: &'static [&'static [&'static str]],
    /// Items in the directory of credentials that are no credentials: open to who may have the node's role,
    /// and for the others they do not exist. Paths below the version, and exactly as written.
    pub node_role: &'static [&'static [&'static str]],
    /// What the policy `strict` leaves open below `meta-data/`: what SDKs, cloud controllers and schedulers
    /// need to know where they run.
    pub listed: &'static [&'static [&'static str]],
    /// The directory of the network cards below `meta-data/`, which `strict` leaves open as a whole:
    /// addresses and ids, by MAC.
    pub interfaces: &'static [&'static str],
    /// Other directories below `meta-data/` that `strict` leaves open as a whole.
    pub trees: &'static [&'static [&'static str]],
    /// Last names of closed paths. A query must not hold them as a word: some servers know no queries, and
    /// read on behind the `?`.
    pub last_names: &'static [&'static str],
}

/// The headers of session tokens.
#[derive(Debug)]
pub struct TokenHeaders {
    /// Carries a token.
    pub token: HeaderName,
    /// Asks for a token that lasts so many seconds.
    pub ttl: HeaderName,
    /// The longest that the real server issues, in seconds.
    pub longest_ttl: i64,
    /// Whether the answer with a token repeats, in the header of the request, how long it lasts. Clients of
    /// such a server take an answer without for none.
    pub echoes_ttl: bool,
    /// The status of a request without a token, where one is required.
    pub missing: StatusCode,
}

/// How long each step of a request may take, so that the answer arrives before the cloud's SDKs give up.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Waiting for a pod that the agent does not know yet.
    pub lookup: Duration,
    /// Waiting for an agent that has just started: discovery takes some 100 ms when the metadata server is
    /// there.
    pub start: Duration,
    /// Waiting for credentials that are being issued.
    pub answer: Duration,
    /// From a request's head to its response's head: a late answer helps nobody.
    pub request: Duration,
}

/// Keys of annotations.
#[derive(Debug)]
pub struct Annotations {
    /// Of a pod: its role.
    pub role: &'static str,
    /// Of a ServiceAccount, besides [`role`](Self::role) and after it: those of the cloud's own webhook.
    pub account_role: &'static str,
    /// Of a pod: the external id.
    pub external_id: &'static str,
    /// Of a pod: the session policy.
    pub policy: &'static str,
    /// Of a pod: the session's duration.
    pub duration: &'static str,
    /// Of a pod: the session's name.
    pub session_name: &'static str,
    /// Of a namespace: the roles that its pods may have.
    pub allowed_roles: &'static str,
}
