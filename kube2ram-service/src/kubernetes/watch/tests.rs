//! An API server that answers by a script, in virtual time.

use std::{
    cell::RefCell,
    collections::VecDeque,
    convert::Infallible,
    future::{pending, ready},
    pin::Pin,
    sync::{Arc, Mutex},
    task,
};

use bytes::Bytes;
use futures::stream;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::Frame;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Client, client::Body};
use serde_json::{Value, json};
use tower_service::Service;

use super::*;

type Answered = Response<UnsyncBoxBody<Bytes, Infallible>>;

#[derive(Clone)]
enum Answer {
    /// Of this version, and empty.
    List(&'static str),
    Never,
    /// A status, a message and a `Retry-After`.
    Refusal(u16, &'static str, Option<u64>),
    /// Lines, and for how long the watch lasts, if not for as long as it was asked for.
    Watch(Vec<Value>, Option<u64>),
}

use Answer::{List, Never, Refusal, Watch};

/// What was asked, such as `watch 7`, and how long after the start.
type Asked = Arc<Mutex<Vec<(Duration, String)>>>;

#[derive(Clone)]
struct Server {
    script: Arc<Mutex<VecDeque<Answer>>>,
    start: Instant,
    asked: Asked,
}

impl Service<Request<Body>> for Server {
    type Response = Answered;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Answered, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut task::Context<'_>) -> task::Poll<Result<(), Infallible>> {
        task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let query = request.uri().query().unwrap_or_default().to_owned();
        let value = |name: &str| query.split('&').find_map(|term| term.strip_prefix(name).map(str::to_owned));
        let kind = if value("watch=").is_some() { "watch" } else { "list" };
        let version = value("resourceVersion=").unwrap_or_else(|| "recent".to_owned());
        self.asked.lock().unwrap().push((self.start.elapsed(), format!("{kind} {version}")));
        let next = self.script.lock().unwrap().pop_front().unwrap_or(Never);
        let (code, retry_after, body) = match next {
            Never => return Box::pin(pending()),
            List(version) => {
                let list = json!({ "metadata": { "resourceVersion": version }, "items": [] });
                (200, None, whole(&list))
            }
            Refusal(code, message, retry_after) => {
                let status =
                    json!({ "kind": "Status", "status": "Failure", "message": message, "code": code });
                (code, retry_after, whole(&status))
            }
            Watch(lines, lasts) => {
                let seconds = lasts.unwrap_or_else(|| value("timeoutSeconds=").unwrap().parse().unwrap());
                let lines: String = lines.iter().map(|line| format!("{line}\n")).collect();
                let end = async move {
                    sleep(Duration::from_secs(seconds)).await;
                    Bytes::new()
                };
                let pieces = stream::iter([Bytes::from(lines)]).chain(stream::once(end));
                (
                    200,
                    None,
                    StreamBody::new(pieces.map(|piece| Ok::<_, Infallible>(Frame::data(piece))))
                        .boxed_unsync(),
                )
            }
        };
        let mut answer = Response::builder().status(code);
        if let Some(seconds) = retry_after {
            answer = answer.header("retry-after", seconds);
        }
        Box::pin(ready(Ok(answer.body(body).unwrap())))
    }
}

fn whole(body: &Value) -> UnsyncBoxBody<Bytes, Infallible> {
    Full::from(body.to_string()).boxed_unsync()
}

fn event(kind: &str, version: &str) -> Value {
    json!({ "type": kind, "object": {
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": version, "resourceVersion": version },
    } })
}

fn unreadable(version: &str) -> Value {
    let mut event = event("MODIFIED", version);
    event["object"]["data"] = "secret".into();
    event
}

const TOO_LARGE: Answer = Refusal(504, "Timeout: Too large resource version: 7, current: 6", None);

fn fails(code: u16) -> Answer {
    Refusal(code, "", None)
}

/// What `follow` has done until the script was at its end, and the next request unanswered for a while.
struct Done {
    at: Vec<Duration>,
    asked: Vec<String>,
    /// Names of objects that a watch has brought.
    applied: Vec<String>,
    errors: Vec<String>,
}

impl Done {
    /// The time between a request and the next one.
    fn after(&self, request: usize) -> Duration {
        self.at[request + 1] - self.at[request]
    }
}

/// The last request of the script is the first one that has no answer: nothing else is asked meanwhile.
async fn done(first: FirstList, script: impl IntoIterator<Item = Answer>) -> Done {
    let script: VecDeque<_> = script.into_iter().collect();
    let requests = script.len() + 1;
    let server =
        Server { script: Arc::new(Mutex::new(script)), start: Instant::now(), asked: Asked::default() };
    let asked = Arc::clone(&server.asked);
    let api: Api<ConfigMap> = Api::namespaced(Client::new(server, "default"), "n");
    let config = FollowConfig { first, ..FollowConfig::default() };
    let applied = RefCell::new(Vec::<String>::new());
    let errors = RefCell::new(Vec::<String>::new());
    let take = |event: Event<ConfigMap>| {
        if let Event::Apply(object) = event {
            applied.borrow_mut().extend(object.metadata.name);
        }
    };
    let failed = |error: &str| errors.borrow_mut().push(error.to_owned());
    let all = async {
        while asked.lock().unwrap().len() < requests {
            sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        () = follow(api, config, take, |_| {}, failed) => unreachable!("it never ends"),
        done = timeout(Duration::from_secs(3600), all) => done.expect("all requests of the script"),
    }
    let (at, asked) = asked.lock().unwrap().iter().cloned().unzip();
    Done { at, asked, applied: applied.into_inner(), errors: errors.into_inner() }
}

fn since(version: &str) -> FirstList {
    FirstList::NotOlderThan(version.into())
}

#[tokio::test(start_paused = true)]
async fn an_event_that_cannot_be_read_is_passed_over_not_quoted_and_made_up_for_by_a_list() {
    let lines = vec![unreadable("2"), event("ADDED", "3")];

    let done = done(FirstList::Any, [List("1"), Watch(lines, None)]).await;

    assert_eq!(done.asked, ["list 0", "watch 1", "list recent"]);
    assert_eq!(done.applied, ["3"]);
    assert_eq!(done.errors.len(), 2, "{:?}", done.errors);
    assert!(done.errors[0].contains("cannot be read") && !done.errors[0].contains("secret"));
}

#[tokio::test(start_paused = true)]
async fn an_event_that_cannot_be_read_is_made_up_for_when_the_watch_is_lost_later() {
    let error = json!({ "type": "ERROR", "object": { "kind": "Status", "code": 500, "message": "lost" } });
    let lines = |first: Value| vec![first, event("ADDED", "3"), error.clone()];

    let missed = done(FirstList::Any, [List("1"), Watch(lines(unreadable("2")), None)]).await;
    let complete = done(FirstList::Any, [List("1"), Watch(lines(event("ADDED", "2")), None)]).await;

    assert_eq!(missed.asked, ["list 0", "watch 1", "list recent"]);
    assert_eq!(missed.errors.len(), 3, "{:?}", missed.errors);
    assert_eq!(complete.asked, ["list 0", "watch 1", "watch 3"]);
}

#[tokio::test(start_paused = true)]
async fn watches_that_bring_nothing_at_once_or_nothing_readable_are_made_less_and_less_often() {
    for (lines, seconds) in [(vec![], 0), (vec![unreadable("2")], 5)] {
        let watch = || Watch(lines.clone(), Some(seconds));

        let done = done(FirstList::Any, [List("1"), watch(), watch(), watch()]).await;

        assert_eq!(done.asked, ["list 0", "watch 1", "watch 1", "watch 1", "watch 1"]);
        for (request, least) in [(1, 400), (2, 800), (3, 1600)] {
            let paused = done.after(request) - Duration::from_secs(seconds);
            assert!(paused >= Duration::from_millis(least), "{request}: {paused:?}");
        }
    }
}

/// As after a restore of etcd from a backup: the version is one of the future, which no cache has.
#[tokio::test(start_paused = true)]
async fn two_whole_watches_without_a_bookmark_lead_to_a_list_of_the_committed_state() {
    let silent = || Watch(vec![], None);

    let done = done(since("9"), [List("9"), silent(), silent(), List("2")]).await;

    assert_eq!(done.asked, ["list 9", "watch 9", "watch 9", "list recent", "watch 2"]);
    assert_eq!(done.errors.len(), 1, "{:?}", done.errors);
}

#[tokio::test(start_paused = true)]
async fn watches_with_bookmarks_or_that_end_early_are_only_made_again() {
    let silent = |seconds| Watch(vec![], seconds);
    let bookmark = Watch(vec![event("BOOKMARK", "2")], None);

    let done = done(
        FirstList::Any,
        [List("1"), silent(None), bookmark, silent(None), silent(Some(20)), silent(Some(20))],
    )
    .await;

    assert_eq!(done.asked, ["list 0", "watch 1", "watch 1", "watch 2", "watch 2", "watch 2", "watch 2"]);
    assert!(done.errors.is_empty(), "{:?}", done.errors);
}

#[tokio::test(start_paused = true)]
async fn what_has_expired_is_listed_soon_and_not_older_than_it_was_known() {
    let until_seven = || Watch(vec![event("BOOKMARK", "7")], None);
    let fault = || fails(500);
    for (first, expected) in
        [(FirstList::Any, "list 7"), (since("0"), "list 7"), (FirstList::MostRecent, "list recent")]
    {
        let script =
            [List("1"), until_seven(), fault(), fault(), fault(), fault(), fault(), fails(410), List("8")];

        let done = done(first, script).await;

        assert_eq!(&done.asked[7..], ["watch 7", expected, "watch 8"]);
        assert!(done.after(6) > Duration::from_secs(5), "{:?}", done.after(6));
        assert!(done.after(7) < Duration::from_secs(1), "{:?}", done.after(7));
    }
}

#[tokio::test(start_paused = true)]
async fn lists_that_no_watch_can_start_from_are_made_less_and_less_often() {
    let rounds = std::iter::repeat_n([List("1"), fails(400)], 6).flatten();

    let done = done(FirstList::Any, rounds).await;

    assert_eq!(&done.asked[..4], ["list 0", "watch 1", "list recent", "watch 1"]);
    assert!(done.after(11) > Duration::from_secs(10), "{:?}", done.after(11));
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_is_refused_for_other_reasons_is_asked_for_again() {
    for code in [401, 403, 404, 429, 500, 503] {
        let done = done(FirstList::Any, [List("1"), fails(code)]).await;

        assert_eq!(done.asked, ["list 0", "watch 1", "watch 1"], "{code}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_list_from_the_cache_is_given_up_when_the_cache_cannot_have_it_and_not_for_overload() {
    let overload = [fails(503), fails(429), fails(504), fails(500), Never];
    let script = overload.into_iter().chain([TOO_LARGE, TOO_LARGE, TOO_LARGE, List("8")]);

    let done_late = done(since("7"), script).await;

    assert_eq!(done_late.asked[..8], ["list 7"; 8]);
    assert_eq!(done_late.asked[8..], ["list recent", "watch 8"]);
    for code in [400, 410] {
        let done = done(since("7"), [fails(code), List("8")]).await;
        assert_eq!(done.asked, ["list 7", "list recent", "watch 8"], "{code}");
    }
}

#[test]
fn a_list_that_is_too_long_for_one_page_is_made_in_pages() {
    let error = FollowError::List(ListError::TooLong { limit_bytes: 1 });
    let gives_up = |first: &FirstList| error.gives_up(first, &mut 0);

    assert!(gives_up(&FirstList::Any) && gives_up(&since("7")));
    assert!(!gives_up(&FirstList::MostRecent));
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_does_not_begin_is_asked_for_again() {
    let done = done(FirstList::Any, [List("1"), Never]).await;

    assert_eq!(done.asked, ["list 0", "watch 1", "watch 1"]);
    assert!(done.after(1) >= ANSWER_TIMEOUT, "{:?}", done.after(1));
    assert!(done.errors[0].contains("does not begin the watch"), "{:?}", done.errors);
}

#[tokio::test(start_paused = true)]
async fn an_overloaded_api_server_is_left_alone_for_as_long_as_it_asks() {
    let done = done(FirstList::Any, [Refusal(429, "", Some(60)), Refusal(503, "", Some(86_400))]).await;

    assert!(done.after(0) >= Duration::from_secs(60), "{:?}", done.after(0));
    assert!((300..310).contains(&done.after(1).as_secs()), "within bounds: {:?}", done.after(1));
}

#[tokio::test(start_paused = true)]
async fn pauses_are_short_again_after_a_list_or_an_event() {
    let faults = || std::iter::repeat_n(fails(500), 5);
    let event = Watch(vec![event("ADDED", "2")], None);
    let script = faults().chain([List("1"), fails(500)]).chain(faults()).chain([event, fails(500)]);

    let done = done(FirstList::Any, script).await;

    assert!(done.after(4) > Duration::from_secs(5), "{:?}", done.after(4));
    assert!(done.after(6) < Duration::from_secs(1), "after the list: {:?}", done.after(6));
    assert!(done.after(11) > Duration::from_secs(5), "{:?}", done.after(11));
    assert!(done.after(13) < Duration::from_secs(1), "after the event: {:?}", done.after(13));
}

#[test]
fn pauses_double_up_to_half_a_minute() {
    let pauses = [0, 1, 5, 6, 1000].map(|failures| pause(failures, 1.0));

    assert_eq!(pauses, [800, 1600, 25_600, 30_000, 30_000].map(Duration::from_millis));
    assert_eq!(pause(0, 0.0), FIRST_PAUSE / 2);
}
