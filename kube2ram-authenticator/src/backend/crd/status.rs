//! An object's status: what it says, what it should say, and the patch between. Pure; used by the parent.
//!
//! Each replica writes the same, so one that finds it written leaves it.

use jiff::{Timestamp, Unit};
use kube2ram_service::telemetry::chain;
use serde_json::{Value, json};

use crate::mapping::{Report, State};

/// What an object's status says, as far as it is ours.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Observed {
    canonical: Option<String>,
    conditions: Vec<Condition>,
    /// Whether there is anything else among the conditions, which is overwritten.
    has_others: bool,
}

/// A condition, as `metav1.Condition`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Condition {
    kind: String,
    status: String,
    reason: String,
    message: String,
    generation: i64,
    since: String,
}

/// A message of a condition may have 32,768 characters (`metav1.Condition`); ours need no more than this.
const MESSAGE_MAX_BYTES: usize = 1024;
const KINDS: [&str; 2] = ["Conflict", "Ready"];

impl Observed {
    /// Reads a status, of which nothing is believed.
    pub(super) fn of(status: &Value) -> Self {
        // What is longer is none of ours, and is written again.
        let text =
            |value: &Value| value.as_str().filter(|text| text.len() <= MESSAGE_MAX_BYTES).map(str::to_owned);
        let listed = status["conditions"].as_array();
        let read = |condition: &Value| {
            let kind = text(&condition["type"]).filter(|kind| KINDS.contains(&kind.as_str()))?;
            Some(Condition {
                kind,
                status: text(&condition["status"])?,
                reason: text(&condition["reason"])?,
                message: text(&condition["message"])?,
                generation: condition["observedGeneration"].as_i64()?,
                since: text(&condition["lastTransitionTime"])?,
            })
        };
        let conditions: Vec<_> = listed.into_iter().flatten().filter_map(read).take(KINDS.len()).collect();
        let has_others = listed.is_some_and(|listed| listed.len() != conditions.len());
        Self { canonical: text(&status["canonicalARN"]), conditions, has_others }
    }

    /// Whether a condition says what it should, whenever it began to.
    fn says(&self, wanted: &Condition) -> bool {
        self.conditions
            .iter()
            .any(|found| Condition { since: wanted.since.clone(), ..found.clone() } == *wanted)
    }

    /// Since when a condition has this status, if it has.
    fn since(&self, kind: &str, status: &str) -> Option<&str> {
        let found = self.conditions.iter().find(|found| found.kind == kind && found.status == status);
        found.map(|found| &*found.since).filter(|since| since.parse::<Timestamp>().is_ok())
    }
}

/// The merge patch that makes a status say what a report says; `None` if it does.
pub(super) fn patch(report: &Report, generation: i64, observed: &Observed, now: Timestamp) -> Option<Value> {
    let canonical = report.canonical.as_deref();
    let wanted = conditions(report, generation);
    let is_said = observed.canonical.as_deref() == canonical
        && !observed.has_others
        && observed.conditions.len() == wanted.len()
        && wanted.iter().all(|condition| observed.says(condition));
    if is_said {
        return None;
    }
    // `metav1.Time` has whole seconds.
    let now = now.round(Unit::Second).unwrap_or(now).to_string();
    let conditions: Vec<Value> = wanted
        .iter()
        .map(|Condition { kind, status, reason, message, generation, since: _ }| {
            json!({
                "type": kind, "status": status, "reason": reason, "message": message,
                "observedGeneration": generation,
                "lastTransitionTime": observed.since(kind, status).unwrap_or(&now),
            })
        })
        .collect();
    Some(json!({ "status": { "canonicalARN": canonical, "conditions": conditions } }))
}

/// The conditions that an object should have, without their time.
fn conditions(report: &Report, generation: i64) -> [Condition; 2] {
    let (is_ready, is_conflict, reason, message) = match &report.state {
        State::Conflict(other) => (
            false,
            true,
            "Conflict",
            format!("{other} maps some of the same identities to another user: they are mapped to nobody"),
        ),
        State::Mapped { warnings } => (true, false, "Mapped", warnings.join("; ")),
        State::Refused(error) => (false, false, "Refused", chain(error)),
    };
    let message = message[..message.floor_char_boundary(MESSAGE_MAX_BYTES)].to_owned();
    let status = |is: bool| String::from(if is { "True" } else { "False" });
    let condition = |kind: &str, is, reason: &str, message: &str| Condition {
        kind: kind.to_owned(),
        status: status(is),
        reason: reason.to_owned(),
        message: message.to_owned(),
        generation,
        since: String::new(),
    };
    let no_conflict = if is_conflict { (reason, &*message) } else { ("NoConflict", "") };
    [
        condition("Conflict", is_conflict, no_conflict.0, no_conflict.1),
        condition("Ready", is_ready, reason, &message),
    ]
}
