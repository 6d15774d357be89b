//! Why a request is not answered as asked, and the only mapping of that to HTTP: status, message, kind,
//! retry. Depends on the errors of all earlier steps; called by `connection`. Messages name no other pod,
//! role or path, and quote no other party.

use std::{borrow::Cow, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use http_body_util::Full;

use super::{
    pass_through_limiter::PassThroughLimitError,
    path::TargetError,
    reply,
    route::{READ, Refusal},
    token::{IssueError, TokenError},
};
use crate::{
    credentials::CredentialError, identity::IdentityError, kubernetes::PodError, policy::Denial,
    role::RoleError,
};
use kube2ram_cloud::upstream::UpstreamError;

/// Why a request failed, by the step that failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    #[error("cannot get credentials")]
    Credentials(#[source] CredentialError),
    #[error("no answer within the deadline")]
    Deadline,
    #[error("the policy denies the role")]
    Denied(#[source] Denial),
    #[error("cannot write the credentials document")]
    Document(#[source] serde_json::Error),
    #[error("cannot identify the caller's pod")]
    Identity(#[source] IdentityError),
    #[error("no session token is issued")]
    NoToken(#[source] IssueError),
    #[error("too many requests")]
    OverRate {
        /// When it may ask again.
        retry_after: Duration,
    },
    #[error("cannot look up the caller's pod")]
    Pod(#[source] PodError),
    #[error("the pod has reached its limit of requests to the metadata server")]
    PassThroughLimit(#[source] PassThroughLimitError),
    #[error("not served")]
    Refused(Refusal),
    #[error("the agent does not know its account and region yet")]
    Starting,
    #[error("cannot determine the pod's role")]
    Role(#[source] RoleError),
    #[error("cannot read the request target")]
    Target(#[source] TargetError),
    #[error("the session token is not accepted")]
    Token(#[source] TokenError),
    #[error("the agent is not a tunnel")]
    Tunnel,
    #[error("no connect hook has recorded this connection")]
    Unvouched,
    #[error("cannot pass the request on")]
    Upstream(#[source] UpstreamError),
}

/// The closed set of reasons: in the access log and as a metrics label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ErrorKind {
    AssumeRoleDenied,
    CredentialsUnavailable,
    Deadline,
    Internal,
    MalformedAllowList,
    MalformedAnnotation,
    MalformedTarget,
    MalformedTtl,
    MethodNotAllowed,
    NamespaceForbids,
    NamespaceUnknown,
    NoBaseArn,
    NoRole,
    NotFound,
    NotListed,
    OtherRole,
    OverRate,
    PodUnavailable,
    Proxied,
    Sensitive,
    Starting,
    TokenExpired,
    TokenForeign,
    TokenMissing,
    TooManyUnderWay,
    UnknownCaller,
    Unvouched,
    UpstreamFailed,
    UpstreamTimeout,
}

impl ErrorKind {
    /// Kinds that are answered with 401 or 403.
    pub(super) const DENIALS: [Self; 14] = [
        Self::AssumeRoleDenied,
        Self::MalformedAllowList,
        Self::MalformedAnnotation,
        Self::NamespaceForbids,
        Self::NoBaseArn,
        Self::NotListed,
        Self::OtherRole,
        Self::Proxied,
        Self::Sensitive,
        Self::TokenExpired,
        Self::TokenForeign,
        Self::TokenMissing,
        Self::UnknownCaller,
        Self::Unvouched,
    ];

    /// The metrics label.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::AssumeRoleDenied => "assume_role_denied",
            Self::CredentialsUnavailable => "credentials_unavailable",
            Self::Deadline => "deadline",
            Self::Internal => "internal",
            Self::MalformedAllowList => "malformed_allow_list",
            Self::MalformedAnnotation => "malformed_annotation",
            Self::MalformedTarget => "malformed_target",
            Self::MalformedTtl => "malformed_ttl",
            Self::MethodNotAllowed => "method_not_allowed",
            Self::NamespaceForbids => "namespace_forbids",
            Self::NamespaceUnknown => "namespace_unknown",
            Self::NoBaseArn => "no_base_arn",
            Self::NoRole => "no_role",
            Self::NotFound => "not_found",
            Self::NotListed => "not_listed",
            Self::OtherRole => "other_role",
            Self::OverRate => "over_rate",
            Self::PodUnavailable => "pod_unavailable",
            Self::Proxied => "proxied",
            Self::Sensitive => "sensitive",
            Self::Starting => "starting",
            Self::TokenExpired => "token_expired",
            Self::TokenForeign => "token_foreign",
            Self::TokenMissing => "token_missing",
            Self::TooManyUnderWay => "too_many_under_way",
            Self::UnknownCaller => "unknown_caller",
            Self::Unvouched => "unvouched",
            Self::UpstreamFailed => "upstream_failed",
            Self::UpstreamTimeout => "upstream_timeout",
        }
    }
}

/// What clients wait, when nothing better is known, before they ask again.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// The most that clients are asked to wait.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

impl RequestError {
    /// The one mapping to HTTP.
    fn http(&self) -> (StatusCode, ErrorKind, Cow<'static, str>) {
        use ErrorKind as Kind;
        let (status, kind, message) = match self {
            Self::Credentials(error) if error.is_transient() => {
                (503, Kind::CredentialsUnavailable, "credentials are not ready")
            }
            Self::Credentials(_) => (403, Kind::AssumeRoleDenied, "the role cannot be assumed"),
            Self::Deadline => (503, Kind::Deadline, "not ready in time"),
            // Its watch event may be a moment late; a final answer would be kept by the client.
            Self::Denied(denial @ Denial::NamespaceUnknown) => {
                (503, Kind::NamespaceUnknown, denial.external_message())
            }
            Self::Denied(denial) => (403, denial_kind(denial), denial.external_message()),
            Self::Document(_) => (500, Kind::Internal, "internal error"),
            // Out of descriptors or memory, which is unrelated to the caller.
            Self::Identity(IdentityError::Open { .. }) => {
                (503, Kind::PodUnavailable, "the caller's pod is not known yet")
            }
            Self::Identity(_) => (403, Kind::UnknownCaller, "the caller is not a pod of this node"),
            // As the real server: "400 - Missing or Invalid Parameters", "403 - Forbidden".
            Self::NoToken(IssueError::Proxied) => (403, Kind::Proxied, "tokens are not issued to proxies"),
            Self::NoToken(IssueError::Ttl(header)) => {
                let message = format!("missing or invalid {header}");
                return (StatusCode::BAD_REQUEST, Kind::MalformedTtl, message.into());
            }
            // A static pod runs before the API server has its mirror, and for as long as its namespace is
            // missing.
            Self::Pod(PodError::Unknown(uid)) if uid.is_config_hash() => {
                (503, Kind::PodUnavailable, "the caller's pod is not known yet")
            }
            Self::Pod(PodError::Unavailable { .. }) => {
                (503, Kind::PodUnavailable, "the caller's pod is not known yet")
            }
            Self::Pod(PodError::Ambiguous(_) | PodError::Unknown(_)) => {
                (403, Kind::UnknownCaller, "the caller is not a pod of this node")
            }
            Self::OverRate { .. } | Self::PassThroughLimit(PassThroughLimitError::Rate { .. }) => {
                (429, Kind::OverRate, "too many requests")
            }
            Self::PassThroughLimit(PassThroughLimitError::InFlight) => {
                (503, Kind::TooManyUnderWay, "too many requests under way")
            }
            Self::Refused(Refusal::Method { .. }) => (405, Kind::MethodNotAllowed, "method not allowed"),
            Self::Refused(Refusal::NotFound) => (404, Kind::NotFound, "not found"),
            Self::Refused(Refusal::NotListed) => (403, Kind::NotListed, "this item is closed to pods"),
            Self::Refused(Refusal::Sensitive) => (403, Kind::Sensitive, "this item is closed to pods"),
            // Its ServiceAccount is read when the pod appears; a final answer would be kept by the client.
            Self::Role(RoleError::AccountUnknown) => {
                (503, Kind::PodUnavailable, "the caller's pod is not known yet")
            }
            Self::Role(RoleError::Malformed { key: setting, .. }) => {
                let key = setting.key();
                let message = match setting.account() {
                    Some(_) => format!("the pod's service account's annotation {key} is malformed"),
                    None => format!("the pod's annotation {key} is malformed"),
                };
                return (StatusCode::FORBIDDEN, Kind::MalformedAnnotation, message.into());
            }
            Self::Role(RoleError::NoExternalId { key, .. }) => {
                let message = format!("the pod's annotation {key} cannot be used with this agent");
                return (StatusCode::FORBIDDEN, Kind::MalformedAnnotation, message.into());
            }
            Self::Role(RoleError::NoBaseArn { .. }) => {
                (403, Kind::NoBaseArn, "the pod's role is a bare name and the agent knows no base ARN")
            }
            Self::Role(RoleError::NoRole | RoleError::NoServiceAccount) => {
                (404, Kind::NoRole, "the pod has no role")
            }
            Self::Starting => (503, Kind::Starting, "the agent is starting"),
            // The answer for pods whose http_proxy is the agent and whose no_proxy does not exclude other
            // hosts.
            Self::Target(TargetError::Authority) => {
                (400, Kind::MalformedTarget, "only the metadata server is served")
            }
            Self::Target(_) => (400, Kind::MalformedTarget, "ambiguous request target"),
            // As the real server: a status of the cloud's own without a token in token-only mode, 401 with a
            // wrong one in either.
            Self::Token(TokenError::Expired) => (401, Kind::TokenExpired, "the session token has expired"),
            Self::Token(TokenError::Foreign) => (401, Kind::TokenForeign, "the session token is not valid"),
            Self::Token(TokenError::Missing(status)) => {
                (status.as_u16(), Kind::TokenMissing, "a session token is required")
            }
            Self::Tunnel => (405, Kind::MethodNotAllowed, "method not allowed"),
            Self::Unvouched => (403, Kind::Unvouched, "the kernel has no record of the caller"),
            Self::Upstream(UpstreamError::Timeout) => {
                (504, Kind::UpstreamTimeout, "the metadata server did not answer in time")
            }
            Self::Upstream(UpstreamError::Connect(_) | UpstreamError::Exchange(_)) => {
                (502, Kind::UpstreamFailed, "the metadata server is not available")
            }
        };
        (StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), kind, message.into())
    }

    /// Status and message, for `kube2ram explain`.
    pub(crate) fn told(&self) -> (u16, Cow<'static, str>) {
        let (status, _, message) = self.http();
        (status.as_u16(), message)
    }

    pub(super) fn kind(&self) -> ErrorKind {
        self.http().1
    }

    /// The response to the client. A caller without identity, one that sends too many requests, and one whose
    /// request is ambiguous are also disconnected.
    pub(super) fn response(&self) -> Response<Full<Bytes>> {
        let (status, _, message) = self.http();
        let mut response = reply::text(format!("{message}\n"));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        if matches!(status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS) {
            headers.insert(header::RETRY_AFTER, self.retry_after_seconds().into());
        }
        match self {
            Self::Refused(Refusal::Method { allow }) => {
                headers.insert(header::ALLOW, HeaderValue::from_static(allow));
            }
            Self::Tunnel => drop(headers.insert(header::ALLOW, HeaderValue::from_static(READ))),
            _ => {}
        }
        let is_closed = matches!(
            self,
            Self::Identity(_) | Self::OverRate { .. } | Self::Target(_) | Self::Tunnel | Self::Unvouched
        );
        if is_closed {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    fn retry_after_seconds(&self) -> u64 {
        let asked = match self {
            Self::Credentials(error) => error.retry_after().unwrap_or(RETRY_AFTER),
            Self::OverRate { retry_after }
            | Self::PassThroughLimit(PassThroughLimitError::Rate { retry_after }) => *retry_after,
            _ => RETRY_AFTER,
        };
        asked.clamp(RETRY_AFTER, RETRY_AFTER_MAX).as_millis().div_ceil(1000).try_into().unwrap_or(1)
    }
}

fn denial_kind(denial: &Denial) -> ErrorKind {
    match denial {
        Denial::MalformedAllowList { .. } => ErrorKind::MalformedAllowList,
        Denial::NamespaceForbids { .. } => ErrorKind::NamespaceForbids,
        Denial::NamespaceUnknown => ErrorKind::NamespaceUnknown,
        Denial::OtherRole { .. } => ErrorKind::OtherRole,
    }
}
