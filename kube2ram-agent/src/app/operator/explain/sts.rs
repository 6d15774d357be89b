//! The steps of `kube2ram explain` that STS decides. Pure; called by the parent.

use std::{sync::Arc, time::Duration};

use super::Judged;
use crate::{
    app::operator::rounded,
    credentials::{CredentialError, Failure, SessionState},
    server::RequestError,
    status::{Outcome, Stage, Step, Verdict},
};
use kube2ram_cloud::{
    credentials::{IssueError, IssueErrorKind},
    dialect::Dialect,
    role::{Grant, RoleSession},
};

/// The last step, where nothing was asked of STS.
pub(super) fn not_requested(mut steps: Vec<Step>, session: &RoleSession) -> Judged {
    let says = "not requested yet: for a pod without annotation, nothing is fetched before it asks";
    steps.push(Step::new(Stage::Sts, Outcome::Waiting, says, &facts_of(session)));
    let summary = format!("it gets credentials of {} when it requests them", session.role);
    Judged::stop(steps, Verdict::Pending, summary, None)
}

/// The last two steps.
pub(super) fn issued_or_not(
    mut steps: Vec<Step>,
    session: &RoleSession,
    state: SessionState,
    dialect: &Dialect,
) -> Judged {
    let SessionState { held, failure, is_fetching, next_in } = state;
    let again = match next_in {
        Some(span) => format!("; the agent asks again within {} s", span.as_secs() + 1),
        None if is_fetching => "; the agent is asking now".to_owned(),
        None => "; the agent asks again when the pod does".to_owned(),
    };
    let mut facts = facts_of(session);
    if let Some((issued, expires)) = held {
        facts.extend([
            ("issued_at", Some(rounded(issued).to_string())),
            ("expires_at", Some(rounded(expires).to_string())),
        ]);
    }
    let failed = failure.as_ref().map(|failure| {
        facts.extend([
            ("code", Some(failure.code.to_string())),
            ("message", Some(failure.message.clone())),
            ("failed_at", Some(rounded(failure.at).to_string())),
            ("request_id", failure.request_id.as_ref().map(ToString::to_string)),
        ]);
        let id = failure.request_id.as_ref().map(|id| format!(" (request id {id})")).unwrap_or_default();
        // The API server may be what refused, or STS.
        let who = match (failure.kind, subject(session)) {
            (IssueErrorKind::ClusterConfiguration | IssueErrorKind::Token, Some(subject)) => {
                format!("no credentials by a token of {subject}: ")
            }
            _ => "answered ".to_owned(),
        };
        format!("{who}{} at {}: {}{id}{again}", failure.code, rounded(failure.at), failure.message)
    });
    let remedy = failure.as_ref().map(|failure| dialect.advice_by(&session.grant, failure.kind).to_owned());
    let role = &session.role;
    let (outcome, says) = match (held, &failed) {
        (Some((issued, expires)), None) => (
            Outcome::Passed,
            format!(
                "issued {} as session {}{}, until {}",
                rounded(issued),
                session.session_name,
                subject(session).map(|subject| format!(" for a token of {subject}")).unwrap_or_default(),
                rounded(expires)
            ),
        ),
        (Some((_, expires)), Some(failed)) => {
            (Outcome::Waiting, format!("{failed}; what was issued before lasts until {}", rounded(expires)))
        }
        (None, Some(failed)) => (Outcome::Failed, failed.clone()),
        (None, None) => (Outcome::Waiting, format!("has not answered yet{again}")),
    };
    steps.push(Step::new(Stage::Sts, outcome, says, &facts));
    match (held, failure) {
        (Some((_, expires)), failure) => {
            let answer = format!("the pod gets credentials of {role}, good until {}", rounded(expires));
            steps.push(Step::new(
                Stage::Answer,
                Outcome::Passed,
                answer,
                &[("status", Some("200".to_owned()))],
            ));
            let but = if failure.is_some() { ", which STS does not renew at the moment" } else { "" };
            let summary = format!("it gets credentials of {role}{but}");
            Judged { held, ..Judged::stop(steps, Verdict::Granted, summary, remedy) }
        }
        (None, None) => {
            let summary = format!("it gets credentials of {role} as soon as STS answers");
            Judged::stop(steps, Verdict::Pending, summary, None)
        }
        (None, Some(failure)) => {
            let is_transient = failure.kind.is_transient();
            let verdict = if is_transient { Verdict::Unavailable } else { Verdict::Denied };
            let summary = format!("STS issues no credentials of {role}: {}", failure.code);
            Judged::stop(steps, verdict, summary, remedy)
                .refused(&RequestError::Credentials(as_error(failure, next_in)))
        }
    }
}

/// The error that the pod would be answered with.
fn as_error(failure: Failure, next_in: Option<Duration>) -> CredentialError {
    let Failure { kind, code, message, request_id, .. } = failure;
    let source =
        IssueError { kind, code, message: message.into(), request_id, retry_after: None, source: None };
    CredentialError::Issue { source: Arc::new(source), retry_after: next_in.unwrap_or_default() }
}

/// What STS receives of the pod.
fn facts_of(session: &RoleSession) -> Vec<(&'static str, Option<String>)> {
    let tags: Vec<_> = session.tags.iter().map(|tag| format!("{}={}", tag.key, tag.value)).collect();
    let source_identity = session.source_identity.as_ref().map(|identity| identity.as_str().to_owned());
    vec![
        ("session", Some(session.session_name.to_string())),
        ("subject", subject(session)),
        ("source_identity", source_identity),
        ("tags", (!tags.is_empty()).then(|| tags.join(", "))),
    ]
}

/// The subject of the token that is exchanged, where one is.
fn subject(session: &RoleSession) -> Option<String> {
    match &session.grant {
        Grant::AssumeRole { .. } => None,
        Grant::ServiceAccount(account) => Some(account.subject()),
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use kube2ram_cloud::{
        Cloud,
        role::{RoleArn, ServiceAccount, SessionName, SourceIdentity, Tag, TagValue},
    };

    fn session() -> RoleSession {
        RoleSession {
            role: RoleArn::parse("arn:aws:iam::123456789012:role/app").unwrap(),
            grant: Grant::ASSUME_ROLE,
            policy: None,
            session_name: SessionName::parse("mine").unwrap(),
            duration: Duration::from_hours(1),
            tags: [("a", "shop"), ("b", "web")]
                .map(|(key, value)| Tag { key, value: TagValue::parse(value).unwrap() })
                .into(),
            source_identity: Some(SourceIdentity::fit("shop.web")),
        }
    }

    #[test]
    fn a_refusal_has_the_remedy_of_the_agents_own_cloud() {
        for dialect in Cloud::ALL.map(Cloud::dialect) {
            for kind in IssueErrorKind::ALL {
                let (code, message) = ("SomeCode".into(), "some words".into());
                let failure = Failure { at: Timestamp::UNIX_EPOCH, kind, code, message, request_id: None };
                let state =
                    SessionState { held: None, failure: Some(failure), is_fetching: false, next_in: None };

                let judged = issued_or_not(Vec::new(), &session(), state, dialect);

                assert_eq!(judged.remedy.as_deref(), Some((dialect.advice)(kind)));
                let verdict = if kind.is_transient() { Verdict::Unavailable } else { Verdict::Denied };
                assert_eq!(judged.verdict, verdict, "{kind:?}");
            }
        }
    }

    #[test]
    fn facts_have_what_sts_receives_of_the_pod_and_nothing_that_it_does_not() {
        let plain = RoleSession { tags: [].into(), source_identity: None, ..session() };

        let [full, plain] = [session(), plain].map(|session| {
            let judged = not_requested(Vec::new(), &session);
            judged.steps[0].facts.clone()
        });

        let expected = [("session", "mine"), ("source_identity", "shop.web"), ("tags", "a=shop, b=web")];
        assert_eq!(full, expected.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
        assert_eq!(plain.into_keys().collect::<Vec<_>>(), ["session"]);
    }

    #[test]
    fn a_token_is_named_by_its_subject_and_its_failure_is_not_called_an_answer_of_sts() {
        let account = ServiceAccount { namespace: "shop".into(), name: "web".into() };
        let session = RoleSession { grant: Grant::ServiceAccount(account), ..session() };
        let dialect = Cloud::Aws.dialect();
        let state = |held, kind: Option<IssueErrorKind>| {
            let failure = kind.map(|kind| {
                let (code, message) = ("Forbidden".into(), "some words".into());
                Failure { at: Timestamp::UNIX_EPOCH, kind, code, message, request_id: None }
            });
            SessionState { held, failure, is_fetching: false, next_in: None }
        };
        let says = |state| {
            let judged = issued_or_not(Vec::new(), &session, state, dialect);
            (judged.steps[0].says.clone(), judged.steps[0].facts["subject"].clone())
        };
        let epoch = Timestamp::UNIX_EPOCH;

        let (issued, subject) = says(state(Some((epoch, epoch)), None));
        let (denied, _) = says(state(None, Some(IssueErrorKind::Denied)));

        assert_eq!(subject, "system:serviceaccount:shop:web");
        assert!(issued.contains(" for a token of system:serviceaccount:shop:web, until "), "{issued}");
        assert!(denied.starts_with("answered Forbidden at "), "{denied}");
        for kind in [IssueErrorKind::ClusterConfiguration, IssueErrorKind::Token] {
            let (failed, _) = says(state(None, Some(kind)));
            let expected = "no credentials by a token of system:serviceaccount:shop:web: Forbidden at ";
            assert!(failed.starts_with(expected), "{failed}");
        }
    }
}
