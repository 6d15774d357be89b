//! One WATCH: a line of JSON per event, until `timeoutSeconds`, expiry or the client's end.
//! Depends on the store. Called by the API server stand-in.

use std::{collections::HashMap, convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::stream;
use http::{HeaderValue, Response, StatusCode, header};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use serde_json::{Value, json};
use tokio::{sync::watch, time::Instant};

use super::{
    status_object,
    store::{Selector, Store},
};
use crate::standin::server::Body;

struct Watch {
    /// Whether the client takes them.
    bookmarks: bool,
    changed: watch::Receiver<()>,
    /// When the last bookmark is due, until it is sent.
    closing_bookmark: Option<Instant>,
    deadline: Instant,
    done: bool,
    /// What a streaming list begins with.
    initial: Option<String>,
    selector: Selector,
    store: Arc<Store>,
    version: u64,
}

/// The real server's default is random between 30 and 60 minutes.
const DEFAULT_TIMEOUT_SECONDS: u64 = 1800;
/// So long before its end a watch has its last bookmark (`nextBookmarkTime` of the real server's cache).
const CLOSING_BOOKMARK: Duration = Duration::from_secs(2);

pub(super) fn answer(
    store: Arc<Store>,
    selector: Selector,
    query: &HashMap<String, String>,
) -> Result<Response<Body>, StatusCode> {
    let number = |name: &str, default| match query.get(name).map(String::as_str) {
        None | Some("") => Ok(default),
        Some(text) => text.parse::<u64>().or(Err(StatusCode::BAD_REQUEST)),
    };
    let timeout = Duration::from_secs(number("timeoutSeconds", DEFAULT_TIMEOUT_SECONDS)?);
    let mut version = number("resourceVersion", 0)?;
    let changed = store.subscribe();

    // "Any" and "most recent" begin with what exists, as synthetic ADDED events.
    let mut initial = None;
    let send_initial_events = query.get("sendInitialEvents").is_some_and(|value| value == "true");
    if version == 0 || send_initial_events {
        let (objects, at) = store.list(&selector);
        version = at;
        let mut lines = objects.iter().map(|object| line("ADDED", object)).collect::<String>();
        if send_initial_events {
            let end = json!({ "k8s.io/initial-events-end": "true" });
            lines += &line("BOOKMARK", &selector.bookmark(version, &end));
        }
        initial = Some(lines);
    }

    let bookmarks = query.get("allowWatchBookmarks").is_some_and(|value| value == "true");
    let deadline = Instant::now() + timeout;
    let closing_bookmark = (timeout > CLOSING_BOOKMARK).then(|| deadline - CLOSING_BOOKMARK);
    let watch = Watch {
        bookmarks,
        changed,
        closing_bookmark,
        deadline,
        done: false,
        initial,
        selector,
        store,
        version,
    };
    let frames = stream::unfold(watch, |mut watch| async move {
        let lines = watch.next().await?;
        Some((Ok::<_, Infallible>(Frame::data(Bytes::from(lines))), watch))
    });
    let mut response = Response::new(StreamBody::new(frames).boxed_unsync());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

impl Watch {
    async fn next(&mut self) -> Option<String> {
        if let Some(lines) = self.initial.take().filter(|lines| !lines.is_empty()) {
            return Some(lines);
        }
        while !self.done {
            self.changed.borrow_and_update();
            let Some((changes, version)) = self.store.since(&self.selector, self.version) else {
                self.done = true;
                return Some(line("ERROR", &status_object(StatusCode::GONE, "too old resource version")));
            };
            self.version = version;
            if !changes.is_empty() {
                return Some(changes.iter().map(|(verb, object)| line(verb, object)).collect());
            }
            let regular = Instant::now() + self.store.bookmark_interval();
            let bookmark_at = self.closing_bookmark.map_or(regular, |closing| closing.min(regular));
            let until = if self.bookmarks { bookmark_at.min(self.deadline) } else { self.deadline };
            match tokio::time::timeout_at(until, self.changed.changed()).await {
                Ok(Ok(())) => {}
                Err(_) if until < self.deadline => {
                    self.closing_bookmark = self.closing_bookmark.filter(|closing| until < *closing);
                    return Some(line("BOOKMARK", &self.selector.bookmark(version, &json!({}))));
                }
                _ => self.done = true,
            }
        }
        None
    }
}

fn line(verb: &str, object: &Value) -> String {
    format!("{}\n", json!({ "type": verb, "object": object }))
}
