//! Reduces answers, as they arrive, to the fields that are used, before they are collected: users who may
//! create pods or ServiceAccounts decide how large these are, and kube holds each list twice as a whole. The
//! only module that uses json-event-parser. Depends on kube's client; called by `kubernetes::cluster` and
//! `kubernetes::account_api`.

use std::{
    borrow::Cow,
    error::Error,
    pin::Pin,
    sync::Arc,
    task::{self, Poll},
};

use bytes::Bytes;
use futures::{FutureExt as _, StreamExt as _, stream};
use http::{Request, Response, header};
use http_body::{Body as HttpBody, Frame};
use http_body_util::{BodyExt, StreamBody, combinators::UnsyncBoxBody};
use json_event_parser::{JsonEvent, LowLevelJsonParser, LowLevelJsonSerializer};
use kube::client::Body;
use tower_layer::Layer;
use tower_service::Service;

use super::api_activity::is_watch;

type BoxError = Box<dyn Error + Send + Sync>;
type Projected = UnsyncBoxBody<Bytes, BoxError>;

/// Longer annotations are cut to this. It is more than either of the limits that `object` has.
const VALUE_LIMIT_BYTES: usize = 64 * 1024 + 4;
/// The longest text or number, and so what is kept until it is complete. etcd takes no object of more than
/// 1.5 MiB.
const TOKEN_LIMIT_BYTES: usize = 4 * 1024 * 1024;

/// Cuts down the answers that a client is given. Clones share the annotations' names.
#[derive(Clone, Debug)]
pub(super) struct Projection {
    annotations: Arc<[Box<str>]>,
    answers: Answers,
}

/// What a client asks for.
#[derive(Clone, Copy, Debug)]
enum Answers {
    /// Lists of pods and namespaces; what has no `items` stays as it is.
    Lists,
    /// Single objects, of which only the annotations are used.
    Objects,
}

impl Projection {
    /// Of lists: keeps the annotations that are named, and no others.
    pub(super) fn new(annotations: impl IntoIterator<Item = Box<str>>) -> Self {
        Self { annotations: annotations.into_iter().collect(), answers: Answers::Lists }
    }

    /// Of single objects: keeps the annotations that are named, and nothing else.
    pub(super) fn of_objects(annotations: impl IntoIterator<Item = Box<str>>) -> Self {
        Self { annotations: annotations.into_iter().collect(), answers: Answers::Objects }
    }
}

impl<S> Layer<S> for Projection {
    type Service = Projecting<S>;

    fn layer(&self, inner: S) -> Projecting<S> {
        Projecting { inner, projection: self.clone() }
    }
}

/// A client whose answers are reduced.
#[derive(Clone)]
pub(super) struct Projecting<S> {
    inner: S,
    projection: Projection,
}

impl<S, B> Service<Request<Body>> for Projecting<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Future: Send + 'static,
    B: HttpBody<Data = Bytes, Error = BoxError> + Send + Unpin + 'static,
{
    type Response = Response<Projected>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut task::Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let is_read = request.method() == http::Method::GET && !is_watch(request.uri());
        let projection = self.projection.clone();
        let project = move |answer: Response<B>| {
            let is_json = answer
                .headers()
                .get(header::CONTENT_TYPE)
                .is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"));
            if is_read && is_json && answer.status().is_success() {
                answer.map(|body| projected(body, projection))
            } else {
                answer.map(BodyExt::boxed_unsync)
            }
        };
        self.inner.call(request).map(|answer| answer.map(project)).boxed()
    }
}

fn projected<B>(body: B, projection: Projection) -> Projected
where
    B: HttpBody<Data = Bytes, Error = BoxError> + Send + Unpin + 'static,
{
    let mut text = Text::new(projection);
    let pieces = body.into_data_stream().map(|piece| piece.map(Some)).chain(stream::iter([Ok(None)]));
    let frames = pieces.map(move |piece| {
        let rest = match piece? {
            Some(bytes) => text.project(&bytes, false)?,
            None => text.project(&[], true)?,
        };
        Ok(Frame::data(rest))
    });
    StreamBody::new(frames).boxed_unsync()
}

/// A JSON text that comes in pieces.
struct Text {
    parser: LowLevelJsonParser,
    /// What was not complete yet.
    rest: Vec<u8>,
    /// How much data must arrive before it is parsed again: the parser restarts at the beginning of an
    /// incomplete string, so a long string in small pieces would be parsed again and again.
    wanted: usize,
    sieve: Sieve,
}

impl Text {
    fn new(projection: Projection) -> Self {
        let sieve = Sieve {
            projection,
            path: Vec::new(),
            skip: Skip::Nothing,
            writer: LowLevelJsonSerializer::new(),
            output: Vec::new(),
        };
        Self { parser: LowLevelJsonParser::new(), rest: Vec::new(), wanted: 0, sieve }
    }

    fn project(&mut self, piece: &[u8], is_end: bool) -> Result<Bytes, BoxError> {
        self.rest.extend_from_slice(piece);
        if self.rest.len() < self.wanted && !is_end {
            return Ok(Bytes::new());
        }
        let mut read = 0;
        loop {
            let parsed = self.parser.parse_next(&self.rest[read..], is_end);
            read += parsed.consumed_bytes;
            match parsed.event {
                None | Some(Ok(JsonEvent::Eof)) => break,
                Some(event) => self.sieve.take(event?)?,
            }
        }
        self.rest.drain(..read);
        self.wanted = 2 * self.rest.len();
        if self.rest.len() > TOKEN_LIMIT_BYTES {
            return Err("a text in the API server's answer is too long".into());
        }
        Ok(std::mem::take(&mut self.sieve.output).into())
    }
}

/// What is passed over at present.
#[derive(Clone, Copy)]
enum Skip {
    Nothing,
    /// The value that comes next.
    Next,
    /// Everything, until so many objects and arrays have ended.
    Within(usize),
}

struct Sieve {
    projection: Projection,
    /// Of each open object the present key; `None` for an array.
    path: Vec<Option<Box<str>>>,
    skip: Skip,
    writer: LowLevelJsonSerializer,
    output: Vec<u8>,
}

/// How a value is kept.
enum Kept {
    No,
    AsItIs,
    /// A string. The API has nothing else there; any other value becomes this string, which is no valid
    /// value.
    Text(JsonEvent<'static>),
}

impl Sieve {
    fn take(&mut self, event: JsonEvent<'_>) -> std::io::Result<()> {
        use JsonEvent::{EndArray, EndObject, ObjectKey, StartArray, StartObject, String};
        let (is_start, is_end) =
            (matches!(event, StartArray | StartObject), matches!(event, EndArray | EndObject));
        match self.skip {
            Skip::Within(depth) => {
                let depth = depth + usize::from(is_start) - usize::from(is_end);
                self.skip = if depth == 0 { Skip::Nothing } else { Skip::Within(depth) };
                return Ok(());
            }
            Skip::Next => {
                self.skip = if is_start { Skip::Within(1) } else { Skip::Nothing };
                return Ok(());
            }
            Skip::Nothing => {}
        }
        let event = match event {
            ObjectKey(key) => {
                if let Some(last) = self.path.last_mut() {
                    *last = Some((*key).into());
                }
                if matches!(self.kept(), Kept::No) {
                    self.skip = Skip::Next;
                    return Ok(());
                }
                ObjectKey(key)
            }
            EndArray | EndObject => {
                self.path.pop();
                event
            }
            event => match (self.kept(), event) {
                (Kept::Text(_), String(text)) => String(cut(text)),
                (Kept::Text(instead), _) => {
                    if is_start {
                        self.skip = Skip::Within(1);
                    }
                    instead
                }
                (_, event) => {
                    if is_start {
                        self.path.push(None);
                    }
                    event
                }
            },
        };
        self.writer.serialize_event(event, &mut self.output)
    }

    /// How the value at the present path is kept.
    fn kept(&self) -> Kept {
        let path: Vec<&str> = self.path.iter().filter_map(Option::as_deref).collect();
        let any = |is_any: bool| if is_any { Kept::AsItIs } else { Kept::No };
        let annotation = |key: &str| {
            let is_named = self.projection.annotations.iter().any(|name| **name == *key);
            if is_named { Kept::Text(JsonEvent::String("".into())) } else { Kept::No }
        };
        if matches!(self.projection.answers, Answers::Objects) {
            return match path[..] {
                ["metadata", "annotations", key] => annotation(key),
                [] | ["metadata"] | ["metadata", "annotations"] => Kept::AsItIs,
                _ => Kept::No,
            };
        }
        match path[..] {
            ["items", "metadata", "annotations", key] => annotation(key),
            ["items", "metadata", "annotations"] => Kept::AsItIs,
            [
                "items",
                "metadata",
                "creationTimestamp" | "deletionTimestamp" | "name" | "namespace" | "uid",
            ] => Kept::Text(JsonEvent::Null),
            ["items", key] => any(["apiVersion", "kind", "metadata", "spec", "status"].contains(&key)),
            ["items", "spec", key] => any(["hostNetwork", "nodeName", "serviceAccountName"].contains(&key)),
            ["items", "status", key] => any(["containerStatuses", "phase", "podIP"].contains(&key)),
            ["items", "status", "containerStatuses", "state"]
            | ["items", "status", "containerStatuses", "state", "running"] => Kept::AsItIs,
            ["items", _, ..] => Kept::No,
            _ => Kept::AsItIs,
        }
    }
}

fn cut(text: Cow<'_, str>) -> Cow<'_, str> {
    if text.len() <= VALUE_LIMIT_BYTES {
        return text;
    }
    text[..text.floor_char_boundary(VALUE_LIMIT_BYTES)].to_owned().into()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn project_in_pieces(text: &str, size: usize) -> Result<Value, BoxError> {
        project_by(Projection::new(["role".into()]), text, size)
    }

    fn project_by(projection: Projection, text: &str, size: usize) -> Result<Value, BoxError> {
        let body = StreamBody::new(stream::iter(
            text.as_bytes()
                .chunks(size)
                .map(|piece| Ok::<_, BoxError>(Frame::data(Bytes::copy_from_slice(piece))))
                .collect::<Vec<_>>(),
        ));
        let collected = projected(body, projection).collect().now_or_never().unwrap()?;
        Ok(serde_json::from_slice(&collected.to_bytes())?)
    }

    fn project(value: &Value) -> Value {
        project_in_pieces(&value.to_string(), usize::MAX).unwrap()
    }

    fn pods() -> (Value, Value) {
        let full = json!({
            "kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": "7", "continue": "x"},
            "items": [{
                "metadata": {"name": "a", "namespace": "n", "uid": "u", "creationTimestamp": "2025-12-01T00:00:00Z",
                    "deletionTimestamp": "2026-01-01T00:00:00Z",
                    "annotations": {"role": "r\u{00e9}\n", "other": "x"}, "managedFields": [{"fieldsV1": {"f:x": {}}}], "labels": {"name": "l"}},
                "spec": {"nodeName": "m", "hostNetwork": true, "serviceAccountName": "s", "containers": [{"name": "c", "env": [{"name": "metadata", "value": "secret"}]}]},
                "status": {"phase": "Running", "podIP": "10.0.0.1", "conditions": [{}],
                    "containerStatuses": [{"name": "c", "state": {"running": {"startedAt": "t"}}}, {"state": {"waiting": {"message": "m"}}}]},
            }, {"metadata": {"name": "b", "annotations": {}}, "spec": {}}],
        });
        let kept = json!({
            "kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": "7", "continue": "x"},
            "items": [{
                "metadata": {"name": "a", "namespace": "n", "uid": "u", "creationTimestamp": "2025-12-01T00:00:00Z",
                    "deletionTimestamp": "2026-01-01T00:00:00Z", "annotations": {"role": "r\u{00e9}\n"}},
                "spec": {"nodeName": "m", "hostNetwork": true, "serviceAccountName": "s"},
                "status": {"phase": "Running", "podIP": "10.0.0.1", "containerStatuses": [{"state": {"running": {}}}, {"state": {}}]},
            }, {"metadata": {"name": "b", "annotations": {}}, "spec": {}}],
        });
        (full, kept)
    }

    #[test]
    fn keeps_what_is_used_and_the_annotations_that_are_named_in_whatever_pieces_it_comes() {
        let (full, kept) = pods();
        let text = full.to_string();

        for size in 1..200 {
            assert_eq!(project_in_pieces(&text, size).unwrap(), kept, "in pieces of {size} bytes");
        }
        assert_eq!(project(&full), kept);
        assert_eq!(
            project_in_pieces(&format!("{text}\n"), 64).unwrap(),
            kept,
            "the API server ends with a new line"
        );
    }

    #[test]
    fn what_is_no_list_stays_as_it_is() {
        for value in [
            json!({"kind": "Node", "metadata": {"name": "n", "labels": {"a": "b"}}, "spec": {"taints": [{"key": "k"}]}}),
            json!([1, "a"]),
            json!("x"),
        ] {
            assert_eq!(project(&value), value);
        }
    }

    #[test]
    fn keeps_of_a_single_object_the_annotations_that_are_named_and_nothing_else() {
        let full = json!({
            "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "items": [{"metadata": {"name": "x"}}],
            "metadata": {"name": "a", "labels": {"role": "l"}, "managedFields": [{"fieldsV1": {"f:metadata": {}}}],
                "annotations": {"role": "r", "other": "x", "kubectl.kubernetes.io/last-applied-configuration": "{}"}},
            "secrets": [{"name": "s"}],
        });
        let kept = json!({"metadata": {"annotations": {"role": "r"}}});
        let text = full.to_string();

        for size in [1, 7, 64, usize::MAX] {
            let projected = project_by(Projection::of_objects(["role".into()]), &text, size).unwrap();
            assert_eq!(projected, kept, "in pieces of {size} bytes");
        }
        for (odd, kept) in [
            (
                json!({"metadata": {"annotations": {"role": {"a": [1]}}}}),
                json!({"metadata": {"annotations": {"role": ""}}}),
            ),
            (json!({"metadata": {}}), json!({"metadata": {}})),
            (json!({"kind": "Status"}), json!({})),
        ] {
            let projection = Projection::of_objects(["role".into()]);
            assert_eq!(project_by(projection, &odd.to_string(), 64).unwrap(), kept);
        }
    }

    /// A value that should be a string and is none must not prevent the others from being read.
    #[test]
    fn what_should_be_a_text_and_is_none_is_replaced() {
        let item = |name: Value, role: Value| json!({"items": [{"metadata": {"name": name, "annotations": {"role": role}}}, {"metadata": {"name": "next"}}]});

        for odd in [json!(1), json!({"a": [1]}), json!([{"a": 1}]), json!(true), json!(null)] {
            assert_eq!(project(&item(odd.clone(), odd)), item(Value::Null, json!("")));
        }
    }

    #[test]
    fn cuts_long_annotations_and_refuses_endless_texts_and_broken_ones() {
        let long = "\u{00fc}".repeat(100_000);
        let value = json!({"items": [{"metadata": {"annotations": {"role": long}}}]});
        assert_eq!(
            project(&value)["items"][0]["metadata"]["annotations"]["role"].as_str().unwrap().len(),
            VALUE_LIMIT_BYTES
        );

        let endless = format!("{{\"items\":[{{\"spec\":{{\"x\":\"{}", "a".repeat(2 * TOKEN_LIMIT_BYTES));
        let error = project_in_pieces(&endless, 64 * 1024).unwrap_err();
        assert_eq!(error.to_string(), "a text in the API server's answer is too long");
        let (full, _) = pods();
        let text = full.to_string();
        assert!(project_in_pieces(&text[..text.len() - 1], 64).is_err(), "it broke off");
        assert!(project_in_pieces(&text.replace("\"spec\":", "\"spec\""), 64).is_err());
    }
}
