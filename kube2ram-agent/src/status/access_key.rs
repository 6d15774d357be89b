//! Which pods were given the credentials with an AccessKeyId. Used through the parent.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Paint, text};

/// The pods of one session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessKeyReport {
    /// [`SCHEMA`](super::SCHEMA).
    pub schema: u32,
    /// When the document was created.
    pub at: Timestamp,
    /// What was asked for.
    pub access_key_id: String,
    /// Where the session was found; absent when it was not.
    pub source: Option<Source>,
    /// The session.
    pub session: Option<IssuedSession>,
    /// The pods that were given its credentials, the first one first.
    pub pods: Vec<Holder>,
    /// Whether these are all: otherwise, records can be missing.
    #[serde(default)]
    pub is_complete: bool,
    /// The result as a sentence.
    pub summary: String,
    /// What to do, where something should be done.
    pub remedy: Option<String>,
}

/// Where a session was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// In the file of `--audit-file`.
    File,
    /// In the agent's memory.
    Memory,
}

/// A session that STS has issued.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IssuedSession {
    /// The role's ARN.
    pub role: String,
    /// The session's name. A pod's author can choose it.
    pub session: String,
    /// By what right the role was assumed: `assume_role`, or `service_account`.
    pub grant: String,
    /// The id of the call to STS.
    pub request_id: Option<String>,
    /// The Node object's name.
    pub node: String,
    /// When it was issued; absent when only deliveries are known.
    pub issued_at: Option<Timestamp>,
    /// When it ends.
    pub expires_at: Timestamp,
    /// The pod for which it was fetched.
    pub fetched_for: Option<Holder>,
}

/// A pod, and when its record was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The pod's namespace.
    pub namespace: Option<String>,
    /// The pod's name.
    pub name: Option<String>,
    /// The pod's UID.
    pub uid: String,
    /// The pod's ServiceAccount, as `<namespace>/<name>`.
    pub service_account: Option<String>,
    /// When.
    pub at: Timestamp,
}

impl AccessKeyReport {
    /// The process's exit status: 0 when the session is found, 66 (`EX_NOINPUT`) when it is not.
    pub fn exit_code(&self) -> u8 {
        if self.session.is_some() { 0 } else { 66 }
    }

    /// For people.
    pub fn to_text(&self, paint: Paint) -> String {
        text::access_key(self, paint)
    }
}

impl Holder {
    /// Its names, as far as they are known.
    pub(super) fn label(&self) -> String {
        let Self { namespace, name, uid, service_account, .. } = self;
        let named = match (namespace, name) {
            (Some(namespace), Some(name)) => format!("{namespace}/{name} (UID {uid})"),
            _ => format!("UID {uid}"),
        };
        match service_account {
            Some(account) => format!("{named}, ServiceAccount {account}"),
            None => named,
        }
    }
}
