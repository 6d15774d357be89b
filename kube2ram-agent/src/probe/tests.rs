use std::{io::Write as _, os::unix::net::UnixListener as StdUnixListener, thread};

use tokio::task::spawn_blocking;

use super::*;

const OWN: CgroupId = CgroupId(7);
const OTHER: CgroupId = CgroupId(8);
/// Of whoever is to be disappointed.
const LITTLE: Duration = Duration::from_millis(50);

fn state(directory: &tempfile::TempDir) -> StateDir {
    StateDir::open(&directory.path().join("state")).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_container_hears_of_its_own_agent() {
    let directory = tempfile::tempdir().unwrap();
    let (readiness, unready) = (Readiness::default(), Readiness::default());
    let (pods, _links) = (readiness.wait_for("pods"), unready.wait_for("links"));
    for (own, readiness) in [(OWN, &readiness), (OTHER, &unready)] {
        drop(tokio::spawn(Probe::open(&state(&directory), own).unwrap().run(readiness.clone())));
    }
    let state = state(&directory);
    let path = state.path().to_owned();
    let ask = |own| {
        let path = path.clone();
        spawn_blocking(move || ask_agent(&StateDir::open(&path).unwrap(), own, PATIENCE))
    };

    assert_eq!(ask(OWN).await.unwrap().unwrap(), "pods");
    pods.ready();
    assert_eq!(ask(OWN).await.unwrap().unwrap(), "");
    assert_eq!(ask(OTHER).await.unwrap().unwrap(), "links");
    assert!(matches!(ask(CgroupId(9)).await.unwrap(), Err(ProbeError::Silent(_))));
}

#[tokio::test]
async fn what_dead_agents_left_is_silent_and_goes_with_the_next_start() {
    let directory = tempfile::tempdir().unwrap();
    let state = state(&directory);
    let dead = Probe::open(&state, OWN).unwrap();
    assert!(any_agent(&state).unwrap(), "the twin");

    drop(dead);

    assert!(!any_agent(&state).unwrap());
    assert!(matches!(ask_agent(&state, OWN, PATIENCE), Err(ProbeError::Silent(_))));
    let _next = Probe::open(&state, OTHER).unwrap();
    assert_eq!(sockets(&state).unwrap(), ["ready-8"]);
    let _again = Probe::open(&state, OWN).unwrap();
}

/// What is heard of an agent that says this and hangs up.
fn hear_of_one_that_says(said: &'static [u8]) -> Result<String, ProbeError> {
    let directory = tempfile::tempdir().unwrap();
    let state = state(&directory);
    let listener = StdUnixListener::bind(state.socket("ready-7")).unwrap();
    let agent = thread::spawn(move || listener.accept().unwrap().0.write_all(said));
    let heard = ask_agent(&state, OWN, PATIENCE);
    agent.join().unwrap().unwrap();
    heard
}

#[test]
fn an_answer_is_a_whole_line() {
    let why = |said| match hear_of_one_that_says(said) {
        Err(ProbeError::Silent(error)) => error.kind(),
        heard => panic!("{heard:?}"),
    };

    assert_eq!(hear_of_one_that_says(b"pods, links\n").unwrap(), "pods, links");
    assert_eq!(hear_of_one_that_says(b"\n").unwrap(), "");
    for cut_off in [b"".as_slice(), b"pods, lin"] {
        assert_eq!(why(cut_off), io::ErrorKind::UnexpectedEof);
    }
    assert_eq!(why(b"\xff\n"), io::ErrorKind::InvalidData);
    assert_eq!(why(&[b'x'; MAX_ANSWER_BYTES]), io::ErrorKind::Other);
}

#[test]
fn an_agent_that_hangs_is_waited_for_no_longer_than_that() {
    let directory = tempfile::tempdir().unwrap();
    let state = state(&directory);
    let listener = StdUnixListener::bind(state.socket("ready-7")).unwrap();

    // In the queue of its socket, which nobody looks at; and accepted, and then forgotten.
    let hanging = ask_agent(&state, OWN, LITTLE);
    let agent = thread::spawn(move || [listener.accept().unwrap(), listener.accept().unwrap()]);
    let forgotten = ask_agent(&state, OWN, LITTLE);

    for heard in [hanging, forgotten] {
        let Err(ProbeError::Silent(error)) = heard else { panic!("{heard:?}") };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
    drop(agent.join().unwrap());
}
