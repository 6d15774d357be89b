use std::{net::TcpListener, os::fd::AsFd as _, time::Duration};

use tempfile::TempDir;

use super::*;
use kube2ram_service::state_dir::StateDir;

const APP: &str = "10.0.0.1:8181";

fn hello(app: &str) -> Hello {
    Hello::new(app.parse().unwrap(), "0.0.0.0:9181".parse().unwrap(), true)
}

fn state() -> (TempDir, StateDir) {
    let directory = tempfile::tempdir().unwrap();
    let state = StateDir::open(&directory.path().join("state")).unwrap();
    (directory, state)
}

/// A running agent, and a standby agent.
async fn agents() -> (TempDir, Standbys, OutgoingAgent) {
    let (directory, state) = state();
    let standby_listener = StandbyListener::open(&state, hello(APP)).unwrap();
    let standbys = standby_listener.standbys();
    drop(tokio::spawn(standby_listener.run()));
    let outgoing = OutgoingAgent::find(&state, &hello(APP)).await.unwrap();
    (directory, standbys, outgoing)
}

/// Stand-ins.
fn handover_state() -> HandoverState {
    let any = || OwnedFd::from(TcpListener::bind("127.0.0.1:0").unwrap());
    HandoverState { lock: any(), app: any(), admin: any() }
}

fn addrs(handover_state: &HandoverState) -> [SocketAddr; 3] {
    let HandoverState { lock, app, admin } = handover_state;
    [lock, app, admin].map(|one| rustix::net::getsockname(one.as_fd()).unwrap().try_into().unwrap())
}

#[tokio::test]
async fn every_listener_arrives_as_what_it_is_and_the_former_agent_waits_until_it_is_served() {
    let (_directory, standbys, mut outgoing) = agents().await;
    let handover_state = handover_state();
    let expected = addrs(&handover_state);
    outgoing.prepared().await.unwrap();

    let handing = tokio::spawn(async move { standbys.hand_over(async || Ok::<_, ()>(handover_state)).await });
    let taken = outgoing.handover_state().await.unwrap();

    assert_eq!(addrs(&taken), expected);
    assert!(!handing.is_finished());
    outgoing.serving().await.unwrap();
    assert_eq!(handing.await.unwrap(), Ok(true));
}

#[tokio::test]
async fn without_an_agent_that_stands_by_nothing_is_let_go_of() {
    let (_directory, standbys, outgoing) = agents().await;

    drop(outgoing);

    let released =
        standbys.hand_over(async || -> Result<HandoverState, ()> { panic!("released to nobody") }).await;
    assert_eq!(released, Ok(false));
}

#[tokio::test]
async fn an_agent_that_ends_while_it_takes_over_is_no_successor() {
    let (_directory, standbys, mut outgoing) = agents().await;
    outgoing.prepared().await.unwrap();

    let handing =
        tokio::spawn(async move { standbys.hand_over(async || Ok::<_, ()>(handover_state())).await });
    drop(outgoing.handover_state().await.unwrap());
    drop(outgoing);

    assert_eq!(handing.await.unwrap(), Ok(false));
}

#[tokio::test]
async fn an_agent_that_hangs_is_not_waited_for_for_ever() {
    let (_directory, standbys, mut outgoing) = agents().await;
    tokio::time::pause();
    let began = tokio::time::Instant::now();

    // It reports neither that it is prepared nor that it serves.
    let handed_over = standbys.hand_over(async || Ok::<_, ()>(handover_state())).await;

    assert_eq!(handed_over, Ok(false));
    assert!(began.elapsed() <= Duration::from_secs(21), "{:?}", began.elapsed());
    assert!(outgoing.handover_state().await.is_ok(), "were it only slow, it would have everything");
}

#[tokio::test]
async fn agents_that_differ_do_not_hand_over() {
    let (_directory, state) = state();
    let standby_listener = StandbyListener::open(&state, hello(APP)).unwrap();
    let standbys = standby_listener.standbys();
    drop(tokio::spawn(standby_listener.run()));
    let no_pod = Hello { is_pod: false, ..hello(APP) };
    let others = [
        hello("10.0.0.1:8182"),
        Hello { protocol: PROTOCOL + 1, ..hello(APP) },
        Hello { layout: ABI_VERSION + 1, ..hello(APP) },
        no_pod.clone(),
    ];

    for other in others {
        let found = OutgoingAgent::find(&state, &other).await;

        assert!(matches!(found, Err(HandoverError::Different)), "{other:?}: {found:?}");
    }
    assert_eq!(
        standbys.hand_over(async || -> Result<HandoverState, ()> { panic!("released") }).await,
        Ok(false)
    );
    assert!(!no_pod.fits(&no_pod), "its listeners are of no use to another agent");
    assert!(OutgoingAgent::find(&state, &hello(APP)).await.is_ok(), "the allowed twin");
}

#[tokio::test]
async fn a_client_with_an_unexpected_message_gets_nothing() {
    let (_directory, state) = state();
    let standby_listener = StandbyListener::open(&state, hello(APP)).unwrap();
    let standbys = standby_listener.standbys();
    drop(tokio::spawn(standby_listener.run()));

    for said in [&[0xff; 64][..], b"\x02\0\0\0{}", b"\x0a\0\0\0\"Prepared\"", b"\x01"] {
        let mut stream = tokio::net::UnixStream::connect(state.socket(SOCKET)).await.unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut stream, said).await.unwrap();
        tokio::io::AsyncWriteExt::shutdown(&mut stream).await.unwrap();
        let mut answer = Vec::new();
        // Closed with or without a greeting; with what was not read, by a reset.
        drop(tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut answer).await);
    }

    assert_eq!(
        standbys.hand_over(async || -> Result<HandoverState, ()> { panic!("released") }).await,
        Ok(false)
    );
}

#[tokio::test]
async fn the_next_agent_listens_where_a_dead_one_did() {
    let (_directory, state) = state();
    drop(StandbyListener::open(&state, hello(APP)).unwrap());

    let dead = OutgoingAgent::find(&state, &hello(APP)).await;
    assert!(matches!(dead, Err(HandoverError::Speak(_))), "{dead:?}");
    let standby_listener = StandbyListener::open(&state, hello(APP)).unwrap();
    drop(tokio::spawn(standby_listener.run()));

    assert!(OutgoingAgent::find(&state, &hello(APP)).await.is_ok());
}
