//! Responses of the agent's own. Depends on nothing of ours; called by `connection` and
//! `error`. hyper adds `Content-Length` and `Date`.

use bytes::Bytes;
use http::{HeaderValue, Response, header};
use http_body_util::Full;

/// A 200 of plain text.
pub(super) fn text(body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    reply("text/plain; charset=utf-8", body.into())
}

/// A 200 of JSON.
pub(super) fn json(body: Bytes) -> Response<Full<Bytes>> {
    reply("application/json", body)
}

fn reply(content_type: &'static str, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
