use std::{
    io::{Read as _, Write as _},
    os::unix::{
        fs::PermissionsExt as _,
        net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream},
    },
    time::Instant,
};

use serde_json::json;
use tokio::task::spawn_blocking;

use super::{client::ask_any, *};
use kube2ram_service::state_dir::StateDir;

fn state(directory: &tempfile::TempDir) -> StateDir {
    StateDir::open(&directory.path().join("state")).unwrap()
}

/// Answers with the name of the answering agent, and the request.
fn serve(state: &StateDir, name: &'static str) {
    let control = Control::open(state).unwrap();
    drop(tokio::spawn(control.run(move |request| async move {
        match request {
            Request::LogLevel(_) => Err("not today".to_owned()),
            request => Ok(json!({ "schema": 1, "name": name, "request": request })),
        }
    })));
}

async fn ask_in(directory: &tempfile::TempDir, request: Request) -> Result<serde_json::Value, ControlError> {
    let path = directory.path().join("state");
    spawn_blocking(move || ask_any(&path, &request)).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_question_is_answered_or_refused_with_a_reason() {
    let directory = tempfile::tempdir().unwrap();
    serve(&state(&directory), "one");
    let pod = Request::Explain { namespace: "shop".to_owned(), name: "orders".to_owned() };

    let answer = ask_in(&directory, pod.clone()).await.unwrap();

    assert_eq!(answer["request"], serde_json::to_value(pod).unwrap());
    assert_eq!(ask_in(&directory, Request::Status).await.unwrap()["request"], "status");
    let refused = ask_in(&directory, Request::LogLevel(None)).await.unwrap_err();
    assert_eq!((refused.to_string().as_str(), refused.exit_code()), ("not today", 64));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_that_took_over_answers_and_nobody_but_its_user_can_ask() {
    let directory = tempfile::tempdir().unwrap();
    let state = state(&directory);
    serve(&state, "former");
    assert_eq!(ask_in(&directory, Request::Status).await.unwrap()["name"], "former");

    serve(&state, "next");

    assert_eq!(ask_in(&directory, Request::Status).await.unwrap()["name"], "next");
    let names: Vec<_> =
        std::fs::read_dir(state.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, [SOCKET]);
    assert_eq!(std::fs::metadata(state.path().join(SOCKET)).unwrap().permissions().mode() & 0o777, 0o600);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_hung_up_on_by_an_agent_that_ends_asks_the_next_one() {
    let directory = tempfile::tempdir().unwrap();
    let state = state(&directory);
    let former = StdUnixListener::bind(state.socket(SOCKET)).unwrap();
    let asked = ask_in(&directory, Request::Status);
    let hangs_up = spawn_blocking(move || {
        // Once before the question is read, and once after.
        drop(former.accept().unwrap());
        let mut question = [0; 8];
        former.accept().unwrap().0.read_exact(&mut question).unwrap();
        serve(&state, "next");
    });

    let (answer, hung_up) = tokio::join!(asked, hangs_up);

    hung_up.unwrap();
    assert_eq!(answer.unwrap()["name"], "next");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_an_agent_that_is_reported_and_nothing_is_made() {
    let directory = tempfile::tempdir().unwrap();

    let error = ask_in(&directory, Request::Status).await.unwrap_err();

    assert!(matches!(error, ControlError::NoAgent(_)) && error.exit_code() == 69, "{error}");
    assert!(!directory.path().join("state").exists());
    drop(Control::open(&state(&directory)).unwrap());
    let error = ask_in(&directory, Request::Status).await.unwrap_err();
    assert!(matches!(error, ControlError::NoAgent(_)), "what a dead agent left: {error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_send_nothing_or_too_much_keep_nobody_else_waiting() {
    let directory = tempfile::tempdir().unwrap();
    let state = state(&directory);
    serve(&state, "one");
    let dial = || StdUnixStream::connect(state.socket(SOCKET)).unwrap();
    let _silent: Vec<_> = (0..MAX_CONNECTIONS - 1).map(|_| dial()).collect();

    let mut loud = dial();
    loud.write_all(&vec![b'x'; 2 * MAX_REQUEST_BYTES]).unwrap();
    let answer = spawn_blocking(move || {
        let mut answer = String::new();
        loud.read_to_string(&mut answer).map(|_| answer).unwrap_or_default()
    });
    assert!(!answer.await.unwrap().contains("document"));
    let started = Instant::now();
    assert_eq!(ask_in(&directory, Request::Status).await.unwrap()["name"], "one");
    assert!(started.elapsed() < PATIENCE, "{:?}", started.elapsed());

    // All permits are taken now: a client waits until the silent connections are closed.
    let _another = dial();
    let waits = ask_in(&directory, Request::Status).await;
    assert!(matches!(waits, Ok(_) | Err(ControlError::Silent(_))), "{waits:?}");
    assert_eq!(ask_in(&directory, Request::Status).await.unwrap()["name"], "one");
}

#[test]
fn a_document_of_another_schema_is_not_misread() {
    let of_schema = |schema: u32| json!({ "schema": schema, "level": "info", "until": null });
    let text = |document| show(document, false, |level: &LogLevel| (level.to_string(), 0));

    let shown = text(of_schema(1)).unwrap();
    assert_eq!((shown.text.as_str(), shown.code), ("info, as set by the flags\n", 0));
    assert!(shown.error.is_none());
    assert!(matches!(text(of_schema(2)), Err(ControlError::Foreign(2))));
    assert!(matches!(text(json!({ "schema": 1 })), Err(ControlError::Answer(_))));
}

#[test]
fn json_that_is_not_understood_is_printed_and_the_exit_status_is_not_success() {
    let json = |document: &serde_json::Value| {
        show(document.clone(), true, |level: &LogLevel| (level.to_string(), 0)).unwrap()
    };
    let known = json!({ "schema": 1, "level": "info", "until": null });
    let shown = json(&known);
    assert_eq!((shown.code, shown.error.is_none()), (0, true));

    for document in [json!({ "schema": 2, "problems": [] }), json!({ "schema": 1 }), json!({}), json!([])] {
        let shown = json(&document);

        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown.text).unwrap(), document);
        assert_eq!(shown.code, 76, "EX_PROTOCOL: {document}");
        assert!(shown.error.is_some());
    }
}
