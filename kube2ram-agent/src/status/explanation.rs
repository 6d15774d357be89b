//! Why a pod gets what it gets, step by step. Used through the parent.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Paint, text};

/// Why one pod gets what it gets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// [`SCHEMA`](super::SCHEMA).
    pub schema: u32,
    /// When the document was created.
    pub at: Timestamp,
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// The steps in the order of a request, up to the one that decides.
    pub steps: Vec<Step>,
    /// What it comes to.
    pub verdict: Verdict,
    /// The same as a sentence.
    pub summary: String,
    /// What to do, where something should be done.
    pub remedy: Option<String>,
}

/// One step of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// Which one.
    pub stage: Stage,
    /// How it ends.
    pub outcome: Outcome,
    /// In words.
    pub says: String,
    /// The same for programs; which keys there are depends on the stage.
    pub facts: BTreeMap<String, String>,
}

/// The steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// What the pod is answered now.
    Answer,
    /// Cgroup → pod, and where its connections go.
    Identity,
    /// Is the pod known. Facts: `uid`, `presence`, `service_account`, `node`.
    Pod,
    /// Annotation → ARN. Facts: `annotation`, `value`, `annotation_of` if it is a ServiceAccount's, `role`,
    /// `completed_by`, `base_arn`.
    Role,
    /// What permits or denies the role. Facts: `rule`, `pattern`.
    Rule,
    /// The answer of STS. Facts: `code`, `message`, `failed_at`, `request_id`, `issued_at`, `expires_at`,
    /// `session`, `subject` of the ServiceAccount's token if one is exchanged, `source_identity`, `tags`.
    Sts,
}

/// How a step ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It stops here.
    Failed,
    /// On to the next one.
    Passed,
    /// Not yet.
    Waiting,
}

/// What a pod gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// 403: it may not have its role, or the annotation cannot be used, or STS refuses.
    Denied,
    /// 200: credentials of its role.
    Granted,
    /// 404: it has no role.
    NoRole,
    /// The node's own role, through the real metadata server: an unannotated hostNetwork pod.
    NodeRole,
    /// Nothing is fetched yet, nor has anything failed: credentials come when it asks, or before.
    Pending,
    /// 503: it may have them, and they cannot be had now.
    Unavailable,
    /// The agent knows no such pod on this node.
    Unknown,
}

impl Verdict {
    /// As in the JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Denied => "denied",
            Self::Granted => "granted",
            Self::NoRole => "no_role",
            Self::NodeRole => "node_role",
            Self::Pending => "pending",
            Self::Unavailable => "unavailable",
            Self::Unknown => "unknown",
        }
    }
}

impl Stage {
    /// As in the JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Answer => "answer",
            Self::Identity => "identity",
            Self::Pod => "pod",
            Self::Role => "role",
            Self::Rule => "rule",
            Self::Sts => "sts",
        }
    }
}

impl Explanation {
    /// The process's exit status: 0 when the pod gets credentials, 66 (`EX_NOINPUT`) when there is no such
    /// pod on this node, else 1.
    pub fn exit_code(&self) -> u8 {
        match self.verdict {
            Verdict::Granted | Verdict::NodeRole | Verdict::Pending => 0,
            Verdict::Unknown => 66,
            Verdict::Denied | Verdict::NoRole | Verdict::Unavailable => 1,
        }
    }

    /// For people.
    pub fn to_text(&self, paint: Paint) -> String {
        text::explanation(self, paint)
    }
}

impl Step {
    /// A step with these facts; facts without a value are left out.
    pub fn new(
        stage: Stage,
        outcome: Outcome,
        says: impl Into<String>,
        facts: &[(&str, Option<String>)],
    ) -> Self {
        let facts = facts.iter().filter_map(|(name, value)| Some(((*name).to_owned(), value.clone()?)));
        Self { stage, outcome, says: says.into(), facts: facts.collect() }
    }
}
