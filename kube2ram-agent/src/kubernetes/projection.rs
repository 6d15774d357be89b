//! Reduces lists and watches, as they arrive, to the fields that are used: users who may create pods or
//! ServiceAccounts decide how large these are. What is malformed is replaced, so that the others of its list
//! are read. The only module that uses json-event-parser. Depends on kube's client; called by
//! `kubernetes::cluster` and `kubernetes::account_api`.

use std::{
    borrow::Cow,
    error::Error,
    io, mem,
    pin::Pin,
    sync::Arc,
    task::{self, Poll},
};

use bytes::Bytes;
use futures::{FutureExt as _, StreamExt as _, stream};
use http::{Request, Response, Uri, header};
use http_body::{Body as HttpBody, Frame};
use http_body_util::{BodyExt, StreamBody, combinators::UnsyncBoxBody};
use jiff::Timestamp;
use json_event_parser::{JsonEvent, LowLevelJsonParser, LowLevelJsonSerializer};
use kube::client::Body;
use tower_layer::Layer;
use tower_service::Service;

use super::{
    api_activity::is_watch,
    object::{CUT, MIRROR_ANNOTATIONS},
};

type BoxError = Box<dyn Error + Send + Sync>;
type Projected = UnsyncBoxBody<Bytes, BoxError>;

/// A text of the answer that is longer, with its escapes, is not read to its end: nothing that is used is
/// half as long, and one pod can have a text of 9 MiB.
const TEXT_LIMIT_BYTES: usize = 128 * 1024;
/// What such a text becomes. Whoever writes the same is treated alike.
const TOO_LONG: &str = "\u{fffd}the text is too long";
/// The longest text of a field: names, phases, addresses and times are shorter.
const FIELD_LIMIT_BYTES: usize = 1024;
/// More than anything that is used is nested, and less than serde_json reads.
const DEPTH_LIMIT: usize = 64;
/// Of both mirror annotations: the name of a cgroup is shorter.
const MIRROR_LIMIT_BYTES: usize = 256;
/// The most that one answer takes of memory at a time: the HTTP client's buffer, one text (in a buffer that
/// has grown by doubling), and what is kept of one piece and of one item.
#[cfg(test)]
pub(super) const READER_BYTES: usize = 512 * 1024 + 4 * TEXT_LIMIT_BYTES;

/// Annotations, and how many bytes are kept of each.
type Keys = Arc<[(Box<str>, usize)]>;

/// Cuts down the answers that a client is given. Clones share the annotations' names.
#[derive(Clone, Debug)]
pub(super) struct Projection {
    answers: Answers,
}

/// What a client asks for.
#[derive(Clone, Debug)]
enum Answers {
    /// Lists and watches; what has no `items` and is no watch stays as it is.
    Collections { pods: Keys, namespaces: Keys },
    /// Single objects, of which only the annotations are used.
    Objects(Keys),
}

/// Where the objects are in a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    /// In `items`.
    List,
    /// The text is the object.
    Object,
    /// In `object` of each of many texts.
    Watch,
}

impl Projection {
    /// Of lists and watches: keeps the annotations that are named, and no others. Of pods also those of
    /// mirrors.
    pub(super) fn new(
        pods: impl IntoIterator<Item = (Box<str>, usize)>,
        namespaces: impl IntoIterator<Item = (Box<str>, usize)>,
    ) -> Self {
        let mirrors = MIRROR_ANNOTATIONS.map(|key| (Box::<str>::from(key), MIRROR_LIMIT_BYTES));
        let pods = pods.into_iter().chain(mirrors).collect();
        Self { answers: Answers::Collections { pods, namespaces: namespaces.into_iter().collect() } }
    }

    /// Of single objects: keeps the annotations that are named, and nothing else.
    pub(super) fn of_objects(annotations: impl IntoIterator<Item = (Box<str>, usize)>) -> Self {
        Self { answers: Answers::Objects(annotations.into_iter().collect()) }
    }

    /// How the answer to a read of `uri` is cut down.
    fn of_answer(&self, uri: &Uri) -> (Shape, Keys) {
        match &self.answers {
            Answers::Objects(keys) => (Shape::Object, Arc::clone(keys)),
            Answers::Collections { pods, namespaces } => {
                let keys = if uri.path().ends_with("/namespaces") { namespaces } else { pods };
                let shape = if is_watch(uri) { Shape::Watch } else { Shape::List };
                (shape, Arc::clone(keys))
            }
        }
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
        let is_read = request.method() == http::Method::GET;
        let (shape, keys) = self.projection.of_answer(request.uri());
        let project = move |answer: Response<B>| {
            let is_json = answer
                .headers()
                .get(header::CONTENT_TYPE)
                .is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"));
            if is_read && is_json && answer.status().is_success() {
                answer.map(|body| projected(body, shape, keys))
            } else {
                answer.map(BodyExt::boxed_unsync)
            }
        };
        self.inner.call(request).map(|answer| answer.map(project)).boxed()
    }
}

fn projected<B>(body: B, shape: Shape, keys: Keys) -> Projected
where
    B: HttpBody<Data = Bytes, Error = BoxError> + Send + Unpin + 'static,
{
    let mut text = Text::new(shape, keys);
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

/// A JSON text that comes in pieces, or one after another.
struct Text {
    parser: LowLevelJsonParser,
    /// What was not complete yet.
    rest: Vec<u8>,
    /// How much data must arrive before it is parsed again: the parser restarts at the beginning of an
    /// incomplete string, so a long string in small pieces would be parsed again and again.
    wanted: usize,
    /// How many objects and arrays are open.
    depth: usize,
    /// The string that has begun.
    string: Option<OpenString>,
    /// Whether a text was complete.
    has_ended: bool,
    sieve: Sieve,
}

struct OpenString {
    /// Where it begins in `rest`.
    start: usize,
    is_escaped: bool,
    /// Whether it was too long, and is passed over.
    is_passed_over: bool,
}

impl Text {
    fn new(shape: Shape, keys: Keys) -> Self {
        Self {
            parser: LowLevelJsonParser::new(),
            rest: Vec::new(),
            wanted: 0,
            depth: 0,
            string: None,
            has_ended: false,
            sieve: Sieve::new(shape, keys),
        }
    }

    fn project(&mut self, piece: &[u8], is_end: bool) -> Result<Bytes, BoxError> {
        for byte in piece {
            if self.take(*byte) {
                self.parse(true)?;
                self.start_next();
            }
        }
        let is_open = self.depth > 0 || !self.rest.is_empty();
        // A list is one text, and none is an error; a watch may end at once.
        let is_missing = !self.has_ended && self.sieve.shape != Shape::Watch;
        if is_end && (is_open || is_missing) {
            self.parse(true)?;
        } else if self.rest.len() >= self.wanted {
            self.parse(false)?;
            self.wanted = 2 * self.rest.len();
        }
        if self.rest.len() > 2 * TEXT_LIMIT_BYTES {
            return Err("a number in the API server's answer is too long".into());
        }
        Ok(mem::take(&mut self.sieve.output).into())
    }

    /// Takes a byte. Returns whether it ends an object or array that is a whole text.
    fn take(&mut self, byte: u8) -> bool {
        let Some(string) = &mut self.string else { return self.take_outside(byte) };
        let is_last = byte == b'"' && !string.is_escaped;
        string.is_escaped = byte == b'\\' && !string.is_escaped;
        if !string.is_passed_over {
            self.rest.push(byte);
            if !is_last && self.rest.len() - string.start > TEXT_LIMIT_BYTES {
                string.is_passed_over = true;
                // The parser has not read any of it: it waits for the end of a string.
                self.rest.truncate(string.start);
                self.rest.push(b'"');
                self.rest.extend_from_slice(TOO_LONG.as_bytes());
                self.rest.push(b'"');
                self.wanted = 0;
            }
        }
        if is_last {
            self.string = None;
        }
        false
    }

    fn take_outside(&mut self, byte: u8) -> bool {
        if byte.is_ascii_whitespace() && self.depth == 0 {
            return false;
        }
        if byte == b'"' {
            let start = self.rest.len();
            self.string = Some(OpenString { start, is_escaped: false, is_passed_over: false });
        }
        self.rest.push(byte);
        match byte {
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => {
                self.depth = self.depth.saturating_sub(1);
                return self.depth == 0;
            }
            _ => {}
        }
        false
    }

    fn parse(&mut self, is_end: bool) -> Result<(), BoxError> {
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
        if let Some(string) = &mut self.string {
            string.start = string.start.saturating_sub(read);
        }
        Ok(())
    }

    /// The next text of a watch begins.
    fn start_next(&mut self) {
        self.parser = LowLevelJsonParser::new();
        self.sieve.start_next();
        (self.wanted, self.has_ended) = (0, true);
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
    shape: Shape,
    keys: Keys,
    /// Of each open object the present key; `None` for an array.
    path: Vec<Option<Box<str>>>,
    skip: Skip,
    item: Item,
    writer: LowLevelJsonSerializer,
    output: Vec<u8>,
}

/// What the present object has had so far.
#[derive(Debug, Default)]
struct Item {
    has_metadata: bool,
    has_spec: bool,
    has_status: bool,
    /// Whether it had another value where only an object can be. Its `spec` becomes one that cannot be read,
    /// so that it counts as malformed and not as an object without annotations.
    is_malformed: bool,
}

/// How a value is kept.
enum Kept {
    No,
    AsItIs,
    /// So many bytes of a string. Any other value becomes an empty string, which is no valid value.
    Annotation(usize),
    /// A string, number, boolean or null. Anything else, and a long string, becomes an empty array, which is
    /// no valid value.
    Field,
    /// An object of the list or watch. Any other value becomes one that cannot be read.
    Item,
    /// An object. Any other value becomes an empty one, and makes the item malformed, unless it is null.
    Object,
    /// As it is, but an array becomes an empty one.
    Part,
    /// A string. Any other value, and a long string, becomes null.
    Text,
    /// A time. Any other value becomes null.
    Time,
}

impl Sieve {
    fn new(shape: Shape, keys: Keys) -> Self {
        Self {
            shape,
            keys,
            path: Vec::new(),
            skip: Skip::Nothing,
            item: Item::default(),
            writer: LowLevelJsonSerializer::new(),
            output: Vec::new(),
        }
    }

    fn start_next(&mut self) {
        self.path.clear();
        self.skip = Skip::Nothing;
        self.writer = LowLevelJsonSerializer::new();
        self.output.push(b'\n');
    }

    fn take(&mut self, event: JsonEvent<'_>) -> io::Result<()> {
        use JsonEvent::{EndArray, EndObject, ObjectKey, StartArray, StartObject};
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
        match event {
            ObjectKey(key) => {
                if let Some(last) = self.path.last_mut() {
                    *last = Some((*key).into());
                }
                if matches!(self.kept(), Kept::No) || self.is_repeated(&key) {
                    self.skip = Skip::Next;
                    return Ok(());
                }
                self.write(ObjectKey(key))
            }
            EndArray | EndObject => {
                self.path.pop();
                if self.is_at_item() {
                    self.complete_item()?;
                }
                self.write(event)
            }
            event => self.take_value(event),
        }
    }

    fn take_value(&mut self, event: JsonEvent<'_>) -> io::Result<()> {
        use JsonEvent::{Null, StartArray, StartObject, String};
        let is_start = matches!(event, StartArray | StartObject);
        if is_start && self.path.len() >= DEPTH_LIMIT {
            return self.replace(true, &[Null]);
        }
        let kept = self.kept();
        match (kept, event) {
            (Kept::Annotation(limit), String(text)) => self.write(String(cut(text, limit))),
            (Kept::Annotation(_), _) => self.replace(is_start, &[String("".into())]),
            (Kept::Field | Kept::Text, String(text)) if is_field(&text) => self.write(String(text)),
            (Kept::Time, String(text)) if is_field(&text) && text.parse::<Timestamp>().is_ok() => {
                self.write(String(text))
            }
            (Kept::Text | Kept::Time, _) => self.replace(is_start, &[Null]),
            (Kept::Field, StartArray | StartObject | String(_)) => self.empty_array(is_start),
            (Kept::Part, StartArray) => self.empty_array(true),
            (Kept::Item, StartObject) => {
                self.item = Item::default();
                self.open(StartObject)
            }
            (Kept::Item, _) => {
                self.item = Item { is_malformed: true, ..Item::default() };
                self.write(StartObject)?;
                self.complete_item()?;
                self.replace(is_start, &[JsonEvent::EndObject])
            }
            (Kept::Object, event) if !matches!(event, StartObject) => {
                self.item.is_malformed |= !matches!(event, Null);
                self.replace(is_start, &[StartObject, JsonEvent::EndObject])
            }
            (_, event) if is_start => self.open(event),
            (_, event) => self.write(event),
        }
    }

    /// Writes `instead` of the value that begins.
    fn replace(&mut self, is_start: bool, instead: &[JsonEvent<'static>]) -> io::Result<()> {
        if is_start {
            self.skip = Skip::Within(1);
        }
        instead.iter().try_for_each(|event| self.write(event.clone()))
    }

    fn empty_array(&mut self, is_start: bool) -> io::Result<()> {
        self.replace(is_start, &[JsonEvent::StartArray, JsonEvent::EndArray])
    }

    fn open(&mut self, event: JsonEvent<'_>) -> io::Result<()> {
        self.path.push(None);
        self.write(event)
    }

    fn write(&mut self, event: JsonEvent<'_>) -> io::Result<()> {
        self.writer.serialize_event(event, &mut self.output)
    }

    /// Whether the value at the present path is an object of the list or watch.
    fn is_at_item(&self) -> bool {
        match (self.shape, &self.path[..]) {
            (Shape::List, [Some(key), None]) => **key == *"items",
            (Shape::Watch, [Some(key)]) => **key == *"object",
            _ => false,
        }
    }

    /// Notes a key of an item. Returns whether the item has had it already: serde refuses that.
    fn is_repeated(&mut self, key: &str) -> bool {
        let depth = match self.shape {
            Shape::List => 3,
            Shape::Watch => 2,
            Shape::Object => return false,
        };
        if self.path.len() != depth {
            return false;
        }
        match key {
            "metadata" => mem::replace(&mut self.item.has_metadata, true),
            // It is written at the end.
            "spec" if self.item.is_malformed => true,
            "spec" => mem::replace(&mut self.item.has_spec, true),
            "status" => mem::replace(&mut self.item.has_status, true),
            _ => false,
        }
    }

    /// Adds what an object cannot be read without. Its `spec` is then none, so that it counts as malformed.
    fn complete_item(&mut self) -> io::Result<()> {
        let item = mem::take(&mut self.item);
        if !item.has_metadata {
            self.write(JsonEvent::ObjectKey("metadata".into()))?;
            self.replace(false, &[JsonEvent::StartObject, JsonEvent::EndObject])?;
        }
        let missing = match item {
            Item { has_spec: false, .. } => "spec",
            Item { is_malformed: true, has_status: false, .. } => "status",
            _ => return Ok(()),
        };
        self.write(JsonEvent::ObjectKey(missing.into()))?;
        self.empty_array(false)
    }

    /// How the value at the present path is kept.
    fn kept(&self) -> Kept {
        if self.is_at_item() {
            return Kept::Item;
        }
        let path: Vec<&str> = self.path.iter().filter_map(Option::as_deref).collect();
        match (self.shape, &path[..]) {
            (Shape::Object, ["metadata", "annotations", key]) => self.annotation(key),
            (Shape::Object, [] | ["metadata"] | ["metadata", "annotations"]) => Kept::AsItIs,
            (Shape::Object, _) => Kept::No,
            (Shape::List, ["items", path @ ..]) => self.kept_of_item(path),
            (Shape::Watch, ["object", path @ ..]) => match path {
                // Of a bookmark; and of an error, which is a `Status`.
                ["apiVersion" | "kind" | "message" | "reason"] => Kept::Text,
                ["code"] => Kept::AsItIs,
                _ => self.kept_of_item(path),
            },
            _ => Kept::AsItIs,
        }
    }

    fn kept_of_item(&self, path: &[&str]) -> Kept {
        match path {
            ["metadata", "annotations", key] => self.annotation(key),
            ["metadata"] | ["metadata", "annotations"] => Kept::Object,
            ["metadata", "creationTimestamp" | "deletionTimestamp"] => Kept::Time,
            ["metadata", "name" | "namespace" | "resourceVersion" | "uid"] => Kept::Text,
            ["spec" | "status"] => Kept::Part,
            ["spec", "hostNetwork" | "nodeName" | "serviceAccountName"] => Kept::Field,
            ["status", "phase" | "podIP"] => Kept::Field,
            []
            | ["status", "containerStatuses"]
            | ["status", "containerStatuses", "state"]
            | ["status", "containerStatuses", "state", "running"] => Kept::AsItIs,
            _ => Kept::No,
        }
    }

    fn annotation(&self, key: &str) -> Kept {
        let limits = self.keys.iter().filter(|(name, _)| **name == *key).map(|(_, limit)| *limit);
        limits.max().map_or(Kept::No, Kept::Annotation)
    }
}

fn is_field(text: &str) -> bool {
    text.len() <= FIELD_LIMIT_BYTES
}

/// A value that is too long is as long as before the limit for whoever reads it, and ends in a mark that no
/// valid value has. So does one with a control character, which takes six bytes of JSON: no valid value has
/// one either.
fn cut(text: Cow<'_, str>, limit_bytes: usize) -> Cow<'_, str> {
    if text == TOO_LONG {
        return CUT.to_string().repeat(limit_bytes / CUT.len_utf8() + 1).into();
    }
    let is_control = |c: char| c < ' ' && !matches!(c, '\t' | '\n' | '\r');
    let end = text.find(is_control).unwrap_or(text.len()).min(text.floor_char_boundary(limit_bytes));
    if end == text.len() {
        return text;
    }
    format!("{}{CUT}", &text[..end]).into()
}

#[cfg(test)]
mod tests;
