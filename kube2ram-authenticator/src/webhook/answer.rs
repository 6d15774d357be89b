//! What a refusal means for the API server: a denial, or a later attempt. The only place that chooses
//! statuses and texts. Pure, but for the spread of `Retry-After`. Depends on `verify`; called by the parent.

use std::{borrow::Cow, sync::Arc, time::Duration};

use http::StatusCode;
use kube2ram_cloud::alibaba::caller_identity::CallErrorKind;

use crate::{identity::Identity, token::TokenError, verify::VerifyError};
use kube2ram_service::clock::jitter;

/// Why a token is not granted.
#[derive(Debug)]
pub(super) enum Refusal {
    /// The mappings contradict each other.
    Conflict { identity: Arc<Identity>, why: Box<str> },
    /// No mappings were read yet.
    NotLoaded(Arc<Identity>),
    /// The identity is not mapped.
    NotMapped(Arc<Identity>),
    /// Nobody was named.
    Unverified(VerifyError),
}

/// What the API server reads.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// A definite no. The reason is for the API server's log, where the operator wants it there.
    Denied(Cow<'static, str>),
    /// No decision. With `retry_after` the API server asks again by itself.
    Later { status: StatusCode, text: &'static str, retry_after: Option<Duration> },
}

impl Refusal {
    /// The metrics label.
    pub(super) fn label(&self) -> &'static str {
        match self {
            Self::Conflict { .. } => "conflict",
            Self::NotLoaded(_) => "not_loaded",
            Self::NotMapped(_) => "unknown_user",
            Self::Unverified(error) => error.as_str(),
        }
    }

    /// All labels.
    pub(super) const LABELS: [&'static str; 14] = [
        "conflict",
        "expired_token",
        "foreign_token",
        "malformed_token",
        "not_loaded",
        "other_cluster",
        "rate_limited",
        "sts_nonsense",
        "sts_refused",
        "sts_throttled",
        "sts_unavailable",
        "sts_unexpected",
        "success",
        "unknown_user",
    ];

    pub(super) fn said(&self) -> Said {
        match self {
            Self::Conflict { .. } => {
                Said::Denied(format!("{PREFIX}invalid token. ARN is mapped twice").into())
            }
            Self::NotMapped(_) => Said::Denied(format!("{PREFIX}invalid token. ARN is not mapped").into()),
            Self::NotLoaded(_) => {
                later(StatusCode::SERVICE_UNAVAILABLE, "no mappings are loaded yet\n", None)
            }
            Self::Unverified(error) => of_verification(error),
        }
    }
}

fn of_verification(error: &VerifyError) -> Said {
    let call = match error {
        VerifyError::Token(error) => return Said::Denied(of_token(*error)),
        // Possibly one of a flood: the API server would repeat it ten times. Possibly a user, too, whom a
        // denial would keep out for as long as the API server remembers it.
        VerifyError::Limited { retry_after: None, .. } => {
            return no_decision(StatusCode::SERVICE_UNAVAILABLE, "too many tokens to verify\n");
        }
        VerifyError::Limited { retry_after, .. } => {
            return later(StatusCode::TOO_MANY_REQUESTS, "too many tokens to verify\n", *retry_after);
        }
        VerifyError::Identity(_) => {
            return no_decision(StatusCode::SERVICE_UNAVAILABLE, "the answer of STS is not understood\n");
        }
        VerifyError::Sts(call) => call,
    };
    match call.kind {
        CallErrorKind::Refused => {
            let code = &call.code;
            Said::Denied(format!("{PREFIX}call sts.GetCallerIdentity failed: (Code: {code})").into())
        }
        CallErrorKind::Throttled => later(StatusCode::TOO_MANY_REQUESTS, "STS throttles\n", call.retry_after),
        CallErrorKind::Unavailable => {
            later(StatusCode::SERVICE_UNAVAILABLE, "STS does not answer\n", Some(LONGEST))
        }
        // A repetition does not help, and the API server would make ten.
        CallErrorKind::Unexpected => {
            no_decision(StatusCode::SERVICE_UNAVAILABLE, "STS answers with an unknown error\n")
        }
    }
}

fn of_token(error: TokenError) -> Cow<'static, str> {
    format!("{PREFIX}parse token failed. input token was not properly formatted: {error}").into()
}

/// The API server repeats such an answer up to ten times, and waits for `Retry-After` each time; 30 s in
/// all. Spread, so that those who were refused together do not come back together.
fn later(status: StatusCode, text: &'static str, wanted: Option<Duration>) -> Said {
    let wanted = wanted.unwrap_or_default().clamp(SHORTEST, LONGEST);
    let spread = (LONGEST - wanted).mul_f64(jitter());
    let seconds = (wanted + spread).as_millis().div_ceil(1000).try_into().unwrap_or(LONGEST.as_secs());
    Said::Later { status, text, retry_after: Some(Duration::from_secs(seconds)) }
}

/// The API server neither repeats nor remembers such an answer.
fn no_decision(status: StatusCode, text: &'static str) -> Said {
    Said::Later { status, text, retry_after: None }
}

const PREFIX: &str = "[ack-ram-authenticator] ";
const SHORTEST: Duration = Duration::from_secs(2);
const LONGEST: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use kube2ram_cloud::alibaba::caller_identity::CallError;

    use super::*;
    use crate::verify::Budget;

    fn of(kind: CallErrorKind, retry_after: Option<Duration>) -> Said {
        let code = "Some.Code".into();
        let error = CallError { kind, code, message: "a message".into(), request_id: None, retry_after };
        Refusal::Unverified(VerifyError::Sts(error)).said()
    }

    fn status_and_wait(said: Said) -> (u16, Option<u64>) {
        match said {
            Said::Later { status, retry_after, .. } => (status.as_u16(), retry_after.map(|d| d.as_secs())),
            Said::Denied(reason) => panic!("{reason}"),
        }
    }

    #[test]
    fn definite_refusals_are_denials_and_outages_are_not() {
        assert!(matches!(of(CallErrorKind::Refused, None), Said::Denied(_)));
        let expired = Refusal::Unverified(VerifyError::Token(TokenError::Expired)).said();
        assert!(matches!(expired, Said::Denied(_)));

        assert_eq!(status_and_wait(of(CallErrorKind::Throttled, None)).0, 429);
        assert_eq!(status_and_wait(of(CallErrorKind::Unavailable, None)).0, 503);
        assert_eq!(status_and_wait(of(CallErrorKind::Unexpected, None)), (503, None));
        let limited =
            |retry_after| Refusal::Unverified(VerifyError::Limited { budget: Budget::Unknown, retry_after });
        assert_eq!(status_and_wait(limited(Some(Duration::from_millis(1))).said()).0, 429);
        assert_eq!(status_and_wait(limited(None).said()), (503, None), "not repeated and not remembered");
    }

    #[test]
    fn the_api_server_is_sent_away_for_a_few_seconds() {
        for wanted in [None, Some(0), Some(1), Some(3), Some(3600)] {
            for _ in 0..100 {
                let said = of(CallErrorKind::Throttled, wanted.map(Duration::from_secs));
                let (_, seconds) = status_and_wait(said);
                let least = wanted.unwrap_or_default().clamp(2, 5);
                assert!((least..=5).contains(&seconds.unwrap()), "{wanted:?}: {seconds:?}");
            }
        }
    }

    #[test]
    fn a_reason_holds_codes_and_no_message() {
        let Said::Denied(reason) = of(CallErrorKind::Refused, None) else { panic!("no denial") };

        assert_eq!(reason, "[ack-ram-authenticator] call sts.GetCallerIdentity failed: (Code: Some.Code)");
    }
}
