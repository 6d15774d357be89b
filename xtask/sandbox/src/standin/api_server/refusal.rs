//! A failure as the real API server reports it: a `Status` object with reason and details. Pure. Called by
//! all of the API server stand-in.

use http::{HeaderValue, Response, StatusCode, header};
use serde_json::{Value, json};

use super::json_reply;
use crate::standin::server::Body;

/// A request that failed.
#[derive(Clone, Debug)]
pub(super) struct Refusal {
    details: Value,
    message: String,
    retry_after_seconds: Option<u32>,
    pub(super) status: StatusCode,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { details: Value::Null, message: message.into(), retry_after_seconds: None, status }
    }

    /// With the object that it is about. `kind` is what the real server writes there: `pods`, `Pod`, ….
    pub(super) fn about(mut self, kind: &str, name: &str) -> Self {
        self.details = json!({ "kind": kind, "name": name });
        self
    }

    pub(super) fn retry_after(mut self, seconds: Option<u32>) -> Self {
        self.retry_after_seconds = seconds;
        self
    }

    pub(super) fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, message)
    }

    pub(super) fn not_found(kind: &str, name: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, format!("{kind} {name:?} not found")).about(kind, name)
    }

    pub(super) fn conflict(kind: &str, name: &str, what: &str) -> Self {
        let message = format!("Operation cannot be fulfilled on {kind} {name:?}: {what}");
        Self::new(StatusCode::CONFLICT, message).about(kind, name)
    }

    pub(super) fn into_response(self) -> Response<Body> {
        let mut object = status_object(self.status, &self.message);
        if !self.details.is_null() {
            object["details"] = self.details;
        }
        if let Some(seconds) = self.retry_after_seconds {
            object["details"]["retryAfterSeconds"] = seconds.into();
        }
        let mut response = json_reply(self.status, &object);
        if let Some(seconds) = self.retry_after_seconds {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

impl From<StatusCode> for Refusal {
    fn from(status: StatusCode) -> Self {
        Self::new(status, "the stand-in says no")
    }
}

/// A `Status`, as every failure is told.
pub(super) fn status_object(status: StatusCode, message: &str) -> Value {
    let reason = match status {
        StatusCode::CONFLICT => "Conflict",
        StatusCode::FORBIDDEN => "Forbidden",
        StatusCode::GONE => "Expired",
        StatusCode::INTERNAL_SERVER_ERROR => "InternalError",
        StatusCode::NOT_FOUND => "NotFound",
        StatusCode::SERVICE_UNAVAILABLE => "ServiceUnavailable",
        StatusCode::TOO_MANY_REQUESTS => "TooManyRequests",
        StatusCode::UNAUTHORIZED => "Unauthorized",
        StatusCode::UNPROCESSABLE_ENTITY => "Invalid",
        _ => "BadRequest",
    };
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": status.as_u16(),
    })
}
