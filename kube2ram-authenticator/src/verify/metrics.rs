//! What verification counts. Depends on prometheus-client only; written by the parent.

use std::time::Duration;

use kube2ram_cloud::alibaba::{
    caller_identity::{CallError, CallErrorKind},
    endpoint::EndpointKind,
};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use super::{Budget, Source};

#[derive(Debug)]
pub(super) struct Metrics {
    asked: Family<ResultLabels, Counter>,
    answers: Family<AnswerLabels, Counter>,
    asked_seconds: Histogram,
    answered: [Counter; 3],
    limited: Family<BudgetLabels, Counter>,
    /// Answers that are remembered.
    pub(super) remembered: Gauge,
    /// How many seconds STS's clock is ahead.
    pub(super) clock_offset: Gauge,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabels {
    result: &'static str,
}

/// Text of STS is in none of them, whatever it answers.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AnswerLabels {
    code: &'static str,
    endpoint: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SourceLabels {
    cache: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BudgetLabels {
    budget: &'static str,
}

impl Metrics {
    /// `endpoints` are those that are asked.
    pub(super) fn new(registry: &mut Registry, endpoints: &[EndpointKind]) -> Self {
        let asked = Family::<ResultLabels, Counter>::default();
        registry.register("sts_requests", "Calls of GetCallerIdentity, by result", asked.clone());
        let answers = Family::<AnswerLabels, Counter>::default();
        registry.register(
            "sts_answers",
            "Calls of GetCallerIdentity, by the kind of the endpoint that answered and by the code of the error",
            answers.clone(),
        );
        let asked_seconds = Histogram::new([0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0]);
        registry.register(
            "sts_request_duration_seconds",
            "Time until STS answered, all endpoints that were tried included",
            asked_seconds.clone(),
        );
        let answered = Family::<SourceLabels, Counter>::default();
        registry.register(
            "verifications",
            "Tokens with an outcome of STS, by whether it was asked, was being asked or had answered before",
            answered.clone(),
        );
        let limited = Family::<BudgetLabels, Counter>::default();
        registry.register(
            "rate_limited",
            "Tokens that STS was not asked about because of a limit, by limit",
            limited.clone(),
        );
        let remembered = Gauge::default();
        registry.register("remembered_answers", "Answers of STS that are remembered", remembered.clone());
        let clock_offset = Gauge::default();
        registry.register(
            "sts_clock_offset_seconds",
            "How far the clock of STS is ahead of this machine's; 0 within 3 seconds",
            clock_offset.clone(),
        );
        // Or an alert on an increase would miss the first.
        for result in std::iter::once(OK).chain(CallErrorKind::ALL.map(CallErrorKind::as_str)) {
            drop(asked.get_or_create(&ResultLabels { result }));
        }
        let codes = || CODES.into_iter().chain([OK, OTHER]);
        for kind in endpoints {
            for code in codes() {
                drop(answers.get_or_create(&AnswerLabels { code, endpoint: kind.as_str() }));
            }
        }
        for code in UNANSWERED {
            drop(answers.get_or_create(&AnswerLabels { code, endpoint: NONE }));
        }
        for budget in Budget::ALL.map(Budget::as_str) {
            drop(limited.get_or_create(&BudgetLabels { budget }));
        }
        let answered =
            Source::ALL.map(|source| answered.get_or_create_owned(&SourceLabels { cache: source.as_str() }));
        Self { asked, answers, asked_seconds, answered, limited, remembered, clock_offset }
    }

    /// Counts a call with its error, if it has failed, and the endpoint that answered.
    pub(super) fn asked(&self, error: Option<&CallError>, endpoint: Option<EndpointKind>, took: Duration) {
        let result = error.map_or(OK, |error| error.kind.as_str());
        self.asked.get_or_create(&ResultLabels { result }).inc();
        let (code, endpoint) = (error.map_or(OK, code_of), endpoint.map_or(NONE, EndpointKind::as_str));
        self.answers.get_or_create(&AnswerLabels { code, endpoint }).inc();
        self.asked_seconds.observe(took.as_secs_f64());
    }

    pub(super) fn answered(&self, source: Source) {
        // By their order in `ALL`.
        self.answered[source as usize].inc();
    }

    pub(super) fn limited(&self, budget: Budget) {
        self.limited.get_or_create(&BudgetLabels { budget: budget.as_str() }).inc();
    }
}

/// The label of a code: text of STS, or of whoever answers in its place, becomes no label.
fn code_of(error: &CallError) -> &'static str {
    CODES.into_iter().find(|code| **code == *error.code).unwrap_or(OTHER)
}

/// The codes that are told apart. Those of STS are the ones that concern a signed call without parameters.
/// Source: STS API 2015-04-01, "Error codes"; ack-ram-authenticator's `pkg/token`, which names the same. The
/// others are `kube2ram-cloud`'s.
const CODES: [&str; 22] = [
    "Connect",
    "ContentMD5NotMatched",
    "InternalError",
    "InvalidAccessKeyId.Inactive",
    "InvalidAccessKeyId.NotFound",
    "InvalidSecurityToken.Expired",
    "InvalidSecurityToken.Malformed",
    "InvalidSecurityToken.MismatchWithAccessKey",
    "InvalidSignatureMethod",
    "InvalidTimeStamp.Expired",
    "InvalidTimeStamp.Format",
    "MissingSecurityToken",
    "NoPermission",
    "Nonsense",
    "ServiceUnavailable",
    "SignatureDoesNotMatch",
    "SignatureNonceUsed",
    "Throttling",
    "Throttling.Api",
    "Throttling.User",
    "Timeout",
    "Transport",
];
/// Those of a call that no endpoint has answered.
const UNANSWERED: [&str; 3] = ["Connect", "Timeout", "Transport"];
const OK: &str = "ok";
const OTHER: &str = "other";
const NONE: &str = "none";
