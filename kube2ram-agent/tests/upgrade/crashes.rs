//! Agents that hang or die before, during and after a handover: pods are refused at worst, and the next start
//! repairs it.

use std::{thread, time::Duration};

use kube2ram_sandbox::agent::Signal;

use crate::support::{Lab, eventually};

/// From the signal that starts a handover: before it, in its midst, after it. It takes some 100 ms.
const MOMENTS: [u64; 5] = [0, 10, 30, 60, 120];

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_agent_that_hangs_keeps_none_from_following_and_lets_no_pod_through() {
    let mut lab = Lab::with_agent("hung");
    lab.agent().unwrap().signal(Signal::STOP).unwrap();

    let mut next = lab.surge().unwrap();
    next.start_beside().unwrap();

    assert!(next.log().contains("does not answer"), "{}", next.log());
    lab.assert_not_served();
    let mut hung = lab.replace_agent(next).unwrap();
    hung.kill().unwrap(); // as the kubelet does, in the end
    eventually("the next one serves", || lab.is_served());
    assert_eq!(lab.leaks(), []);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_agent_that_hangs_while_it_stands_by_is_not_waited_for() {
    let mut lab = Lab::with_agent("hung-next");
    let mut next = lab.surge().unwrap();
    next.start_beside().unwrap();
    next.signal(Signal::STOP).unwrap();

    let status = lab.agent().unwrap().terminate().unwrap();

    assert_eq!(status.code(), Some(0));
    lab.assert_not_served(); // what it has taken, nobody serves
    next.kill().unwrap();
    lab.agent().unwrap().start().unwrap();
    lab.assert_served();
    assert_eq!(lab.leaks(), []);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_agent_that_dies_while_it_takes_over_leaves_a_node_that_the_next_start_makes_good() {
    let mut lab = Lab::with_agent("next-dies");
    for moment in MOMENTS {
        let mut next = lab.surge().unwrap();
        next.start_beside().unwrap();

        lab.agent().unwrap().signal(Signal::TERM).unwrap();
        thread::sleep(Duration::from_millis(moment));
        next.kill().unwrap();

        assert_eq!(lab.agent().unwrap().wait().unwrap().code(), Some(0), "after {moment} ms");
        lab.assert_not_served();
        lab.remove_agent(next).unwrap();
        lab.agent().unwrap().start().unwrap();
        lab.assert_served();
    }
    assert_eq!(lab.leaks(), []);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_agent_that_dies_while_it_hands_over_is_followed_all_the_same() {
    let mut lab = Lab::with_agent("dies");
    for moment in MOMENTS {
        let mut next = lab.surge().unwrap();
        next.start_beside().unwrap();

        lab.agent().unwrap().signal(Signal::TERM).unwrap();
        thread::sleep(Duration::from_millis(moment));
        lab.agent().unwrap().kill().unwrap();

        let dead = lab.replace_agent(next).unwrap();
        eventually(&format!("the next one serves, after {moment} ms"), || lab.is_served());
        lab.remove_agent(dead).unwrap();
    }
    assert_eq!(lab.leaks(), []);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_agent_that_stands_by_serves_when_the_other_is_killed() {
    let mut lab = Lab::with_agent("spare");
    let mut next = lab.surge().unwrap();
    next.start_beside().unwrap();

    lab.agent().unwrap().kill().unwrap();

    lab.replace_agent(next).unwrap();
    eventually("the next one serves", || lab.is_served());
    assert_eq!(lab.leaks(), []);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_agent_that_listens_elsewhere_starts_when_the_other_has_ended() {
    let mut lab = Lab::with_agent("other-port");
    let mut next = lab.surge().unwrap();
    let port = std::net::TcpListener::bind("0.0.0.0:0").unwrap().local_addr().unwrap().port();
    next.add_arg(&format!("--app-port={port}"));
    next.start_beside().unwrap();
    lab.assert_served();

    assert_eq!(lab.agent().unwrap().terminate().unwrap().code(), Some(0));

    lab.replace_agent(next).unwrap();
    eventually("the next one serves", || lab.is_served());
    assert_eq!(lab.leaks(), []);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn nothing_is_uninstalled_while_an_agent_runs_or_stands_by() {
    let mut lab = Lab::with_agent("overlap");
    let mut next = lab.surge().unwrap();
    next.start_beside().unwrap();

    let refused = "an agent runs on this node";
    assert!(lab.uninstall().unwrap_err().contains(refused));
    next.signal(Signal::STOP).unwrap();
    lab.agent().unwrap().kill().unwrap();
    assert!(
        lab.uninstall().unwrap_err().contains(refused),
        "the one that stands by would make everything anew"
    );
    lab.assert_not_served();

    next.kill().unwrap();
    assert!(lab.uninstall().unwrap().contains("detached"));
    // A mount stays, as a container's would.
    let left: Vec<_> = std::fs::read_dir(lab.state_dir()).into_iter().flatten().collect();
    assert!(left.is_empty(), "{left:?}");
}
