//! What the metadata service counts. Depends on `error` for the reasons; written by `server` and
//! `connection`.

use std::time::Duration;

use http::StatusCode;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::{Family, MetricConstructor},
        gauge::Gauge,
        histogram::Histogram,
    },
    registry::{Registry, Unit},
};

use super::{error::ErrorKind, identities::Identities};

/// The metrics of the metadata service.
#[derive(Clone, Debug)]
pub(super) struct Metrics {
    pub(super) connections: Gauge,
    pub(super) connections_displaced: Counter,
    pub(super) connections_refused: Counter,
    pub(super) identities: Identities,
    pub(super) log_lines_suppressed: Counter,
    pub(super) unvouched_connections: Counter,
    denials: Family<DenialLabels, Counter>,
    pass_through: Family<PassThroughLabels, Counter>,
    requests: Family<RequestLabels, Counter>,
    durations: Family<RouteLabels, Histogram, DurationBuckets>,
    /// By [`RouteLabel`], looked up once, because a request costs only microseconds.
    routes: [Route; RouteLabel::ALL.len()],
}

#[derive(Clone, Debug)]
struct Route {
    answered: Counter,
    durations: Histogram,
}

impl Route {
    /// Starts at zero.
    fn new(
        route: RouteLabel,
        requests: &Family<RequestLabels, Counter>,
        durations: &Family<RouteLabels, Histogram, DurationBuckets>,
    ) -> Self {
        let route = route.as_str();
        let answered = RequestLabels { route, status: StatusCode::OK.as_u16() };
        Self {
            answered: requests.get_or_create_owned(&answered),
            durations: durations.get_or_create_owned(&RouteLabels { route }),
        }
    }
}

/// What a request was about: a closed set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RouteLabel {
    CredentialDirectory,
    Credentials,
    PassThrough,
    Refused,
    RoleList,
    Token,
}

/// What came of a pass-through: a closed set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PassThroughResult {
    Failed,
    Relayed,
    Throttled,
    TimedOut,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DenialLabels {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PassThroughLabels {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    route: &'static str,
    status: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RouteLabels {
    route: &'static str,
}

impl RouteLabel {
    const ALL: [Self; 6] = [
        Self::CredentialDirectory,
        Self::Credentials,
        Self::PassThrough,
        Self::Refused,
        Self::RoleList,
        Self::Token,
    ];

    fn as_str(self) -> &'static str {
        match self {
            Self::Credentials => "credentials",
            Self::PassThrough => "pass_through",
            Self::CredentialDirectory => "ram_list",
            Self::Refused => "refused",
            Self::RoleList => "role_list",
            Self::Token => "token",
        }
    }
}

impl PassThroughResult {
    const ALL: [Self; 4] = [Self::Failed, Self::Relayed, Self::Throttled, Self::TimedOut];

    fn as_str(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::Relayed => "relayed",
            Self::Throttled => "throttled",
            Self::TimedOut => "timed_out",
        }
    }
}

/// From a cached answer (tens of µs) to the 1 s at which SDKs give up.
#[derive(Clone, Copy, Debug, Default)]
struct DurationBuckets;

impl MetricConstructor<Histogram> for DurationBuckets {
    fn new_metric(&self) -> Histogram {
        Histogram::new([0.000_05, 0.000_1, 0.000_5, 0.001, 0.005, 0.01, 0.05, 0.1, 0.3, 1.0])
    }
}

impl Metrics {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let requests = Family::<RequestLabels, Counter>::default();
        let durations = Family::new_with_constructor(DurationBuckets);
        let routes = RouteLabel::ALL.map(|route| Route::new(route, &requests, &durations));
        let metrics = Self {
            connections: Gauge::default(),
            connections_displaced: Counter::default(),
            connections_refused: Counter::default(),
            identities: Identities::new(registry),
            log_lines_suppressed: Counter::default(),
            unvouched_connections: Counter::default(),
            denials: Family::default(),
            pass_through: Family::default(),
            requests,
            durations,
            routes,
        };
        registry.register("connections", "Open connections of pods", metrics.connections.clone());
        registry.register(
            "connections_displaced",
            "Idle connections closed to make room, because their caller, or all callers together, had too many",
            metrics.connections_displaced.clone(),
        );
        registry.register(
            "connections_refused",
            "Connections refused because their caller had too many, none of them idle",
            metrics.connections_refused.clone(),
        );
        registry.register(
            "log_lines_suppressed",
            "Requests without a line in the access log because their caller sent too many",
            metrics.log_lines_suppressed.clone(),
        );
        registry.register(
            "unvouched_connections",
            "Connections that no connect hook has recorded",
            metrics.unvouched_connections.clone(),
        );
        registry.register("denials", "Requests refused, by reason", metrics.denials.clone());
        registry.register(
            "pass_through",
            "Requests passed to the real metadata server",
            metrics.pass_through.clone(),
        );
        registry.register("http_requests", "Requests of pods", metrics.requests.clone());
        registry.register_with_unit(
            "http_request_duration",
            "Time from a request's head to its response's head",
            Unit::Seconds,
            metrics.durations.clone(),
        );
        metrics.start_at_zero();
        metrics
    }

    /// Or an alert on an increase would miss the first.
    fn start_at_zero(&self) {
        for reason in ErrorKind::DENIALS.map(ErrorKind::as_str) {
            drop(self.denials.get_or_create(&DenialLabels { reason }));
        }
        for result in PassThroughResult::ALL.map(PassThroughResult::as_str) {
            drop(self.pass_through.get_or_create(&PassThroughLabels { result }));
        }
        for route in RouteLabel::ALL.map(RouteLabel::as_str) {
            for status in [403, 503] {
                drop(self.requests.get_or_create(&RequestLabels { route, status }));
            }
        }
        // Who is over the request rate is not asked what for.
        for route in [RouteLabel::Refused, RouteLabel::PassThrough].map(RouteLabel::as_str) {
            drop(self.requests.get_or_create(&RequestLabels { route, status: 429 }));
        }
        for status in [502, 504] {
            let route = RouteLabel::PassThrough.as_str();
            drop(self.requests.get_or_create(&RequestLabels { route, status }));
        }
    }

    /// Counts one answered request.
    pub(super) fn observe(&self, route: RouteLabel, status: StatusCode, took: Duration) {
        let Route { answered, durations } = &self.routes[route as usize];
        if status == StatusCode::OK {
            answered.inc();
        } else {
            let labels = RequestLabels { route: route.as_str(), status: status.as_u16() };
            self.requests.get_or_create(&labels).inc();
        }
        durations.observe(took.as_secs_f64());
    }

    /// Counts one denial.
    pub(super) fn deny(&self, reason: ErrorKind) {
        self.denials.get_or_create(&DenialLabels { reason: reason.as_str() }).inc();
    }

    /// Counts one pass-through.
    pub(super) fn pass_through(&self, result: PassThroughResult) {
        let result = result.as_str();
        self.pass_through.get_or_create(&PassThroughLabels { result }).inc();
    }
}
