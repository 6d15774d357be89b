//! Reduces lists and watches, as they arrive, to the fields that are used: users who may create pods or
//! ServiceAccounts decide how large these are. What is malformed is replaced, so that the others of its list
//! are read. The only module that uses json-event-parser. Depends on kube's client; called by
//! `kubernetes::cluster` and `kubernetes::account_api`.

mod sieve;

use std::{
    error::Error,
    mem,
    pin::Pin,
    sync::Arc,
    task::{self, Poll},
};

use bytes::Bytes;
use futures::{FutureExt as _, StreamExt as _, stream};
use http::{Request, Response, Uri, header};
use http_body::{Body as HttpBody, Frame};
use http_body_util::{BodyExt, StreamBody, combinators::UnsyncBoxBody};
use json_event_parser::{JsonEvent, LowLevelJsonParser};
use kube::client::Body;
use tower_layer::Layer;
use tower_service::Service;

use self::sieve::{Sieve, TOO_LONG};
use super::{api_activity::is_watch, object::MIRROR_ANNOTATIONS};

type BoxError = Box<dyn Error + Send + Sync>;
type Projected = UnsyncBoxBody<Bytes, BoxError>;

/// A text of the answer that is longer, with its escapes, is not read to its end: nothing that is used is
/// half as long, and one pod can have a text of 9 MiB.
const TEXT_LIMIT_BYTES: usize = 128 * 1024;
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

#[cfg(test)]
mod tests;
