use std::{io::Write as _, os::unix::net::UnixListener as StdUnixListener, thread};

use tokio::task::spawn_blocking;

use super::*;

/// The timeout of probes that get no answer.
const LITTLE: Duration = Duration::from_millis(50);

fn paths(directory: &tempfile::TempDir) -> SocketPaths {
    SocketPaths::new(directory.path(), Path::new("/nonexistent"))
}

#[tokio::test(flavor = "multi_thread")]
async fn each_pod_reaches_its_own_agent() {
    let (one, other, neither) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (readiness, unready) = (Readiness::default(), Readiness::default());
    let (pods, _links) = (readiness.wait_for("pods"), unready.wait_for("links"));
    for (directory, readiness) in [(&one, &readiness), (&other, &unready)] {
        drop(tokio::spawn(Probe::open(&paths(directory)).unwrap().run(readiness.clone())));
    }
    let ask = |directory| {
        let paths = paths(directory);
        spawn_blocking(move || ask(&paths, PATIENCE))
    };

    assert_eq!(ask(&one).await.unwrap().unwrap(), "pods");
    pods.ready();
    assert_eq!(ask(&one).await.unwrap().unwrap(), "");
    assert_eq!(ask(&other).await.unwrap().unwrap(), "links");
    assert!(matches!(ask(&neither).await.unwrap(), Err(ProbeError::Silent(_))));
}

#[tokio::test]
async fn a_container_that_is_started_again_replaces_its_socket() {
    let directory = tempfile::tempdir().unwrap();
    let paths = paths(&directory);
    drop(Probe::open(&paths).unwrap());
    assert!(matches!(ask(&paths, PATIENCE), Err(ProbeError::Silent(_))), "what a dead agent left is silent");

    let _next = Probe::open(&paths).unwrap();

    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn under_a_manifest_without_a_directory_of_the_pod_it_goes_by_the_mount_namespace() {
    let shared = tempfile::tempdir().unwrap();
    let paths = SocketPaths::new(Path::new("/nonexistent"), shared.path());
    drop(tokio::spawn(Probe::open(&paths).unwrap().run(Readiness::default())));

    let own = std::process::Command::new("readlink").arg("/proc/self/ns/mnt").output().unwrap().stdout;
    let own = String::from_utf8(own).unwrap();
    let inode: String = own.chars().filter(char::is_ascii_digit).collect();

    assert!(shared.path().join(format!("ready-{inode}")).exists());
    assert_eq!(spawn_blocking(move || ask(&paths, PATIENCE)).await.unwrap().unwrap(), "");
}

/// The probe's result for an agent that sends this and closes.
fn hear_of_one_that_says(said: &'static [u8]) -> Result<String, ProbeError> {
    let directory = tempfile::tempdir().unwrap();
    let paths = paths(&directory);
    let listener = StdUnixListener::bind(directory.path().join(NAME)).unwrap();
    let agent = thread::spawn(move || listener.accept().unwrap().0.write_all(said));
    let heard = ask(&paths, PATIENCE);
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
    let paths = paths(&directory);
    let listener = StdUnixListener::bind(directory.path().join(NAME)).unwrap();

    // One waits in the backlog without being accepted; one was accepted, and is never answered.
    let hanging = ask(&paths, LITTLE);
    let agent = thread::spawn(move || [listener.accept().unwrap(), listener.accept().unwrap()]);
    let forgotten = ask(&paths, LITTLE);

    for heard in [hanging, forgotten] {
        let Err(ProbeError::Silent(error)) = heard else { panic!("{heard:?}") };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
    drop(agent.join().unwrap());
}
