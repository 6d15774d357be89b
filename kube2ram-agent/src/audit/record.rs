//! One record: a line of JSON, whose fields are those of the log line. Its types cannot hold secrets. Pure;
//! used by the siblings, and by `app` for `explain`.

use jiff::{Timestamp, Unit};
use serde::{Deserialize, Serialize};

use crate::{identity::PodUid, pod::Pod};
use kube2ram_cloud::{
    credentials::Credentials,
    role::{Grant, RoleSession},
};

/// What happened to a session. Fields are only ever added.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// When, by the node's clock.
    pub at: Timestamp,
    /// What.
    pub event: Event,
    /// The name of the Node object.
    pub node: Box<str>,
    /// The session's AccessKeyId, by which the cloud's trail of actions has all that is done with it.
    pub access_key_id: Box<str>,
    /// The id of the call to STS that issued it.
    pub request_id: Option<Box<str>>,
    /// The role's ARN.
    pub role: Box<str>,
    /// The session's name. A pod's author can choose it.
    pub session: Box<str>,
    /// By what right the role was assumed.
    pub grant: GrantKind,
    /// The pod for which the session was issued, or to which its credentials were given.
    #[serde(flatten)]
    pub pod: PodNames,
    /// When the session ends.
    pub expires_at: Timestamp,
    /// How many records before this one the file lacks: the queue was full, or the disk.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub lost: u64,
}

/// What a record is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// A pod is given the credentials, for the first time.
    Delivered,
    /// STS has issued the session.
    Issued,
    /// This pod and possibly others are given the credentials, and none of them is recorded after this: more
    /// pods have them than are remembered.
    NotRecorded,
}

/// By what right a role was assumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GrantKind {
    /// By the agent's own: AssumeRole.
    AssumeRole,
    /// By the pod's ServiceAccount, whose token was exchanged.
    ServiceAccount,
}

/// A pod. Only its UID is known once the API server and the agent have forgotten it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodNames {
    /// Its ServiceAccount, as `<namespace>/<name>`.
    pub service_account: Option<Box<str>>,
    /// Its namespace.
    #[serde(rename = "pod.namespace")]
    pub namespace: Option<Box<str>>,
    /// Its name.
    #[serde(rename = "pod.name")]
    pub name: Option<Box<str>>,
    /// Its UID.
    #[serde(rename = "pod.uid")]
    pub uid: PodUid,
}

impl Event {
    /// As in the JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Delivered => "delivered",
            Self::Issued => "issued",
            Self::NotRecorded => "not_recorded",
        }
    }
}

impl GrantKind {
    /// As in the JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AssumeRole => "assume_role",
            Self::ServiceAccount => "service_account",
        }
    }
}

impl Record {
    pub(super) fn new(
        event: Event,
        at: Timestamp,
        node: &str,
        session: &RoleSession,
        credentials: &Credentials,
        (uid, pod): (&PodUid, Option<&Pod>),
    ) -> Self {
        let (grant, granted_to) = match &session.grant {
            Grant::AssumeRole { .. } => (GrantKind::AssumeRole, None),
            Grant::ServiceAccount(account) => {
                (GrantKind::ServiceAccount, Some((&account.namespace, &account.name)))
            }
        };
        // Without a grant to it, it is only what the pod runs as.
        let account = granted_to.or(pod.map(|pod| (&pod.namespace, &pod.service_account)));
        Self {
            at: rounded(at),
            event,
            node: node.into(),
            access_key_id: clipped(&credentials.access_key_id),
            request_id: credentials.request_id.as_deref().map(clipped),
            role: session.role.as_str().into(),
            session: session.session_name.as_str().into(),
            grant,
            pod: PodNames {
                service_account: account.map(|(namespace, name)| format!("{namespace}/{name}").into()),
                namespace: pod.map(|pod| pod.namespace.clone()),
                name: pod.map(|pod| pod.name.clone()),
                uid: uid.clone(),
            },
            expires_at: rounded(credentials.expires_at),
            lost: 0,
        }
    }

    /// Its line, with the line break.
    pub(super) fn line(&self) -> serde_json::Result<Vec<u8>> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        Ok(line)
    }

    /// The memory that its texts take.
    pub(super) fn text_bytes(&self) -> usize {
        let fixed = [&self.node, &self.access_key_id, &self.role, &self.session];
        let fixed: usize = fixed.iter().map(|text| text.len()).sum();
        fixed + self.request_id.as_ref().map_or(0, |text| text.len()) + self.pod.text_bytes()
    }
}

impl PodNames {
    /// The memory that its texts take.
    pub(super) fn text_bytes(&self) -> usize {
        let texts = [&self.service_account, &self.namespace, &self.name];
        texts.iter().filter_map(|text| text.as_deref()).map(str::len).sum::<usize>() + self.uid.as_str().len()
    }
}

/// What STS sends has no bound but that of its answer.
fn clipped(text: &str) -> Box<str> {
    text.chars().take(CLIP).collect()
}

fn rounded(at: Timestamp) -> Timestamp {
    at.round(Unit::Millisecond).unwrap_or(at)
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// As long as an AccessKeyId can be (AWS: 128 characters).
const CLIP: usize = 128;
