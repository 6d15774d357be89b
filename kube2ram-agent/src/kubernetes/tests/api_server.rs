//! A stand-in for the API server: lists, watches that resume from a resource version, creates,
//! ServiceAccounts and their tokens; and ways to fail.

use std::{
    collections::{BTreeMap, VecDeque},
    convert::Infallible,
    io,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use futures::channel::mpsc::{UnboundedSender, unbounded};
use futures::{StreamExt, future};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{
    body::{Frame, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::AbortHandle};

type Body = BoxBody<Bytes, Infallible>;

/// How many have been started. Each begins with higher versions than those before, as one cluster does.
static STARTED: AtomicU64 = AtomicU64::new(0);
const VERSIONS: u64 = 1_000_000;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Mode {
    /// Every connection breaks.
    Down,
    /// No request is answered.
    Stalled,
    Up,
}

pub(super) struct ApiServer {
    url: String,
    state: Arc<Mutex<State>>,
    task: AbortHandle,
}

/// By kind and UID.
type Objects = BTreeMap<(&'static str, String), Value>;

struct State {
    mode: Mode,
    stalled: Vec<&'static str>,
    version: u64,
    objects: Objects,
    /// Version, kind, one line of a watch.
    log: Vec<(u64, &'static str, Bytes)>,
    watches: Vec<(&'static str, UnboundedSender<Bytes>)>,
    /// Older versions are refused with the status 410.
    oldest: u64,
    direct_lists: usize,
    cached_lists: usize,
    /// What lists from the cache bring, and their version, if that is not what there is.
    cache: Option<(Objects, u64)>,
    /// The versions than which lists must not be older.
    least_versions: Vec<u64>,
    /// Further items of lists.
    malformed: Vec<(&'static str, Value)>,
    /// After how many seconds watches are to end.
    watch_seconds: Vec<u64>,
    /// The `Retry-After` of all answers, if any.
    overloaded: Option<u64>,
    namespace_pages: usize,
    selectors: BTreeMap<&'static str, String>,
    posted: Vec<Value>,
    patched: Vec<(String, Value)>,
    /// What writes of Events are answered, by method.
    refusals: Vec<(Method, Value)>,
    /// Annotations, by path.
    accounts: BTreeMap<String, Value>,
    /// What reads of accounts are answered instead.
    account_refusal: Option<Value>,
    account_reads: Vec<AccountRequest>,
    /// What the next requests for tokens are answered instead, in this order.
    token_refusals: VecDeque<(Value, Option<u64>)>,
    token_answer: String,
    token_requests: Vec<AccountRequest>,
    /// The `extra` of the agent's own login; `None`: there is no such resource.
    own_extra: Option<Value>,
    reviews: Vec<AccountRequest>,
}

/// A request about a ServiceAccount, or about the agent's own login.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct AccountRequest {
    pub(super) path: String,
    /// The `Impersonate-` headers: names and values.
    pub(super) impersonate: Vec<(String, String)>,
    pub(super) accept: Option<String>,
    pub(super) body: Value,
}

/// A token as the API server makes it, in its form.
pub(super) const TOKEN: &str = "aGVhZGVy.cGF5bG9hZA.c2lnbmF0dXJl";

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl ApiServer {
    pub(super) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(Mutex::new(State {
            mode: Mode::Up,
            stalled: Vec::new(),
            version: 1 + VERSIONS * STARTED.fetch_add(1, Ordering::Relaxed),
            objects: BTreeMap::new(),
            log: Vec::new(),
            watches: Vec::new(),
            oldest: 0,
            direct_lists: 0,
            cached_lists: 0,
            cache: None,
            least_versions: Vec::new(),
            malformed: Vec::new(),
            watch_seconds: Vec::new(),
            overloaded: None,
            namespace_pages: 0,
            selectors: BTreeMap::new(),
            posted: Vec::new(),
            patched: Vec::new(),
            refusals: Vec::new(),
            accounts: BTreeMap::new(),
            account_refusal: None,
            account_reads: Vec::new(),
            token_refusals: VecDeque::new(),
            token_answer: json!({"status": {"token": TOKEN, "expirationTimestamp": "2026-01-01T00:10:00Z"}})
                .to_string(),
            token_requests: Vec::new(),
            own_extra: None,
            reviews: Vec::new(),
        }));
        let shared = Arc::clone(&state);
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let state = Arc::clone(&shared);
                let service = service_fn(move |request| answer(Arc::clone(&state), request));
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        Self { url, state, task: task.abort_handle() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(super) fn url(&self) -> String {
        self.url.clone()
    }

    pub(super) fn set_mode(&self, mode: Mode) {
        let mut state = self.state();
        state.mode = mode;
        if mode != Mode::Up {
            state.watches.clear();
        }
    }

    /// Makes a ServiceAccount, or changes its annotations.
    pub(super) fn put_account(&self, namespace: &str, name: &str, annotations: Value) {
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{name}");
        self.state().accounts.insert(path, annotations);
    }

    /// Answers reads of ServiceAccounts with a `Status` from now on, or as it should.
    pub(super) fn refuse_accounts(&self, status: Option<Value>) {
        self.state().account_refusal = status;
    }

    pub(super) fn account_reads(&self) -> Vec<AccountRequest> {
        self.state().account_reads.clone()
    }

    /// Answers the next request for a token, after those that are refused already, with a `Status`.
    pub(super) fn refuse_token(&self, status: Value, retry_after: Option<u64>) {
        self.state().token_refusals.push_back((status, retry_after));
    }

    /// Answers requests for tokens with this text, as a success.
    pub(super) fn answer_tokens(&self, text: String) {
        self.state().token_answer = text;
    }

    pub(super) fn token_requests(&self) -> Vec<AccountRequest> {
        self.state().token_requests.clone()
    }

    /// What the API server reads of the agent's own token.
    pub(super) fn set_own_extra(&self, extra: Value) {
        self.state().own_extra = Some(extra);
    }

    pub(super) fn reviews(&self) -> Vec<AccountRequest> {
        self.state().reviews.clone()
    }

    /// Leaves the requests for `what` (`accounts`, `namespaces`, `pods`, `direct lists`) unanswered.
    pub(super) fn stall(&self, what: &'static str) {
        self.state().stalled.push(what);
    }

    pub(super) fn put(&self, kind: &'static str, object: Value) {
        self.state().change(kind, object, true);
    }

    pub(super) fn put_unwatched(&self, kind: &'static str, object: Value) {
        self.state().change(kind, object, false);
    }

    /// Open watches do not show it; one that begins later does.
    pub(super) fn put_silently(&self, kind: &'static str, object: Value) {
        let mut state = self.state();
        let watches = std::mem::take(&mut state.watches);
        state.change(kind, object, true);
        state.watches = watches;
    }

    pub(super) fn remove(&self, kind: &'static str, uid: &str) {
        let mut state = self.state();
        let object = state.objects.remove(&(kind, uid.to_owned())).unwrap();
        state.say(kind, "DELETED", object);
    }

    pub(super) fn remove_unwatched(&self, kind: &'static str, uid: &str) {
        let mut state = self.state();
        state.objects.remove(&(kind, uid.to_owned())).unwrap();
        state.version += 1;
    }

    /// Ends all watches as expired: in the stream, or (after an ordinary end) in the status of the next one's
    /// response.
    pub(super) fn expire_watches(&self, as_status: bool) {
        let mut state = self.state();
        state.log.clear();
        if as_status {
            state.oldest = state.version;
        } else {
            let line = json!({"type": "ERROR", "object": gone()}).to_string() + "\n";
            for (_, watch) in &state.watches {
                watch.unbounded_send(line.clone().into()).unwrap();
            }
        }
        state.watches.clear();
    }

    pub(super) fn watches(&self) -> usize {
        self.state().watches.len()
    }

    /// Lists of what is committed, for pods that the watch has not shown.
    pub(super) fn direct_lists(&self) -> usize {
        self.state().direct_lists
    }

    /// Lists from the cache, the first one for the watch included.
    pub(super) fn cached_lists(&self) -> usize {
        self.state().cached_lists
    }

    /// From now on the cache lags behind.
    pub(super) fn freeze_cache(&self) {
        let mut state = self.state();
        state.cache = Some((state.objects.clone(), state.version));
    }

    /// The cache has caught up.
    pub(super) fn thaw_cache(&self) {
        self.state().cache = None;
    }

    /// The versions than which lists from the cache had to be no older, other than "any".
    pub(super) fn least_versions(&self) -> Vec<u64> {
        self.state().least_versions.clone()
    }

    /// Adds an item to all lists.
    pub(super) fn list_malformed(&self, kind: &'static str, item: Value) {
        self.state().malformed.push((kind, item));
    }

    /// Sends an object to the open watches.
    pub(super) fn watch_malformed(&self, kind: &'static str, object: &Value) {
        let line = Bytes::from(json!({"type": "ADDED", "object": object}).to_string() + "\n");
        let state = self.state();
        for (_, watch) in state.watches.iter().filter(|(watched, _)| *watched == kind) {
            watch.unbounded_send(line.clone()).unwrap();
        }
    }

    /// After how many seconds watches were to end.
    pub(super) fn watch_seconds(&self) -> Vec<u64> {
        self.state().watch_seconds.clone()
    }

    /// From now on lists are answered 429, with this `Retry-After` in seconds.
    pub(super) fn overload(&self, retry_after: u64) {
        self.state().overloaded = Some(retry_after);
    }

    /// How many pages of namespaces were asked for.
    pub(super) fn namespace_pages(&self) -> usize {
        self.state().namespace_pages
    }

    /// The field selector of the last list.
    pub(super) fn selector(&self, kind: &'static str) -> String {
        self.state().selectors[kind].clone()
    }

    pub(super) fn posted(&self) -> Vec<Value> {
        self.state().posted.clone()
    }

    /// The patches of Events: paths and bodies.
    pub(super) fn patched(&self) -> Vec<(String, Value)> {
        self.state().patched.clone()
    }

    /// Answers a method of Events with a `Status` from now on, or as it should.
    pub(super) fn refuse(&self, method: &Method, status: Option<Value>) {
        let mut state = self.state();
        state.refusals.retain(|(refused, _)| refused != method);
        state.refusals.extend(status.map(|status| (method.clone(), status)));
    }
}

impl State {
    fn change(&mut self, kind: &'static str, mut object: Value, watched: bool) {
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        let uid = object["metadata"]["uid"].as_str().unwrap().to_owned();
        let old = self.objects.insert((kind, uid), object.clone());
        if watched {
            self.say(kind, if old.is_some() { "MODIFIED" } else { "ADDED" }, object);
        }
    }

    fn say(&mut self, kind: &'static str, event: &str, mut object: Value) {
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        let line = Bytes::from(json!({"type": event, "object": object}).to_string() + "\n");
        self.log.push((self.version, kind, line.clone()));
        for (_, watch) in self.watches.iter().filter(|(watched, _)| *watched == kind) {
            // A dropped receiver is a dropped watch.
            drop(watch.unbounded_send(line.clone()));
        }
    }
}

async fn answer(state: Arc<Mutex<State>>, request: Request<Incoming>) -> io::Result<Response<Body>> {
    let query: BTreeMap<_, _> =
        url::form_urlencoded::parse(request.uri().query().unwrap_or_default().as_bytes())
            .into_owned()
            .collect();
    let kind = match request.uri().path() {
        "/api/v1/namespaces" => "namespaces",
        "/api/v1/pods" => "pods",
        path if path.contains("/serviceaccounts/") => "accounts",
        path if path.ends_with("/selfsubjectreviews") => "reviews",
        _ => "events",
    };
    let watch = query.contains_key("watch");
    let cached = query.contains_key("resourceVersion") && !watch;
    // Also a list for the watch, unless it is the first one.
    let direct = kind == "pods" && !watch && !cached && query.contains_key("limit");
    let mode = {
        let mut state = state.lock().unwrap();
        state.direct_lists += usize::from(direct);
        state.cached_lists += usize::from(cached);
        let stalled = state.stalled.contains(&if direct { "direct lists" } else { kind });
        if stalled { Mode::Stalled } else { state.mode }
    };
    match mode {
        Mode::Down => return Err(io::ErrorKind::ConnectionReset.into()),
        Mode::Stalled => future::pending().await,
        Mode::Up => {}
    }
    if ["accounts", "reviews"].contains(&kind) {
        return Ok(answer_account(&state, request).await);
    }
    if [Method::POST, Method::PATCH].contains(request.method()) {
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        let refusal = state.lock().unwrap().refusals.iter().find(|(refused, _)| *refused == method).cloned();
        if let Some((_, status)) = refusal {
            let code = u16::try_from(status["code"].as_u64().unwrap()).unwrap();
            return Ok(respond(StatusCode::from_u16(code).unwrap(), &status));
        }
        let event: Value = serde_json::from_slice(&request.collect().await.unwrap().to_bytes()).unwrap();
        if method == Method::PATCH {
            state.lock().unwrap().patched.push((path, event.clone()));
            return Ok(respond(StatusCode::OK, &json!({"metadata": {}})));
        }
        state.lock().unwrap().posted.push(event.clone());
        return Ok(respond(StatusCode::CREATED, &event));
    }
    let mut state = state.lock().unwrap();
    if let Some(seconds) = state.overloaded.filter(|_| !watch) {
        let mut response = respond(StatusCode::TOO_MANY_REQUESTS, &json!({"kind": "Status", "code": 429}));
        response.headers_mut().insert("retry-after", seconds.into());
        return Ok(response);
    }
    if !watch {
        state.selectors.insert(kind, query.get("fieldSelector").cloned().unwrap_or_default());
        state.namespace_pages += usize::from(kind == "namespaces");
        let number = |name| query.get(name).and_then(|value| value.parse::<usize>().ok());
        let (from, limit) = (number("continue").unwrap_or(0), number("limit").unwrap_or(usize::MAX));
        let least = query.get("resourceVersion").and_then(|version| version.parse::<u64>().ok());
        let current = state.cache.as_ref().map_or(state.version, |(_, version)| *version);
        if let Some(least) = least.filter(|version| *version > 0) {
            state.least_versions.push(least);
            if least > current {
                return Ok(respond(StatusCode::GATEWAY_TIMEOUT, &too_large(least, current)));
            }
        }
        let cache = state.cache.as_ref().filter(|_| least.is_some());
        let (objects, version) =
            cache.map_or((&state.objects, state.version), |(objects, version)| (objects, *version));
        let all = objects.iter().filter(|(key, _)| key.0 == kind).map(|(_, item)| item);
        let malformed = state.malformed.iter().filter(|(of, _)| *of == kind).map(|(_, item)| item);
        let all = all.chain(malformed);
        let items: Vec<_> = all.clone().skip(from).take(limit).collect();
        let more = from + items.len() < all.count();
        let token = if more { (from + items.len()).to_string() } else { String::new() };
        let metadata = json!({"resourceVersion": version.to_string(), "continue": token});
        return Ok(respond(StatusCode::OK, &json!({"metadata": metadata, "items": items})));
    }
    state.watch_seconds.push(query["timeoutSeconds"].parse().unwrap());
    let from: u64 = query["resourceVersion"].parse().unwrap();
    if from < state.oldest {
        return Ok(respond(StatusCode::GONE, &gone()));
    }
    let (sender, receiver) = unbounded();
    for (_, _, line) in state.log.iter().filter(|(version, logged, _)| *version > from && *logged == kind) {
        sender.unbounded_send(line.clone()).unwrap();
    }
    state.watches.push((kind, sender));
    let body = BodyExt::boxed(StreamBody::new(receiver.map(|line| Ok(Frame::data(line)))));
    let mut response = Response::new(body);
    response.headers_mut().insert("content-type", http::HeaderValue::from_static("application/json"));
    Ok(response)
}

async fn answer_account(state: &Mutex<State>, request: Request<Incoming>) -> Response<Body> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    let text = |value: &http::HeaderValue| value.to_str().unwrap().to_owned();
    let impersonate = head.headers.iter().filter(|(name, _)| name.as_str().starts_with("impersonate-"));
    let asked = AccountRequest {
        path: head.uri.path().to_owned(),
        impersonate: impersonate.map(|(name, value)| (name.to_string(), text(value))).collect(),
        accept: head.headers.get("accept").map(text),
        body: serde_json::from_slice(&body).unwrap_or_default(),
    };
    let refuse = |status: &Value| {
        let code = u16::try_from(status["code"].as_u64().unwrap()).unwrap();
        respond(StatusCode::from_u16(code).unwrap(), status)
    };
    let not_found = |kind: &str| {
        json!({"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404,
            "message": format!("{kind} not found"), "details": {"kind": kind}})
    };
    let mut state = state.lock().unwrap();
    if asked.path.ends_with("/selfsubjectreviews") {
        state.reviews.push(asked);
        return match &state.own_extra {
            Some(extra) => respond(StatusCode::CREATED, &json!({"status": {"userInfo": {"extra": extra}}})),
            None => refuse(&json!({"kind": "Status", "code": 404})),
        };
    }
    if asked.path.ends_with("/token") {
        state.token_requests.push(asked);
        if let Some((status, retry_after)) = state.token_refusals.pop_front() {
            let mut response = refuse(&status);
            if let Some(seconds) = retry_after {
                response.headers_mut().insert("retry-after", seconds.into());
            }
            return response;
        }
        return Response::new(Full::from(state.token_answer.clone()).boxed());
    }
    let annotations = state.accounts.get(&asked.path).cloned();
    state.account_reads.push(asked);
    if let Some(status) = &state.account_refusal {
        return refuse(status);
    }
    let Some(annotations) = annotations else { return refuse(&not_found("serviceaccounts")) };
    respond(
        StatusCode::OK,
        &json!({"kind": "PartialObjectMetadata", "metadata": {"name": "sa", "annotations": annotations}}),
    )
}

fn respond(status: StatusCode, body: &Value) -> Response<Body> {
    let mut response = Response::new(Full::from(body.to_string()).boxed());
    *response.status_mut() = status;
    response.headers_mut().insert("content-type", http::HeaderValue::from_static("application/json"));
    response
}

fn too_large(asked: u64, current: u64) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Timeout", "code": 504,
        "message": format!("Too large resource version: {asked}, current: {current}"),
        "details": {"causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}]}})
}

fn gone() -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Expired", "message": "too old", "code": 410})
}
