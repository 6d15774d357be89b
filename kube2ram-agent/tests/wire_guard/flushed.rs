//! Other software flushes the netfilter ruleset: until the agent has written its tables again, the wire guard
//! drops what the node forwards.

use std::time::Instant;

use kube2ram_sandbox::Sandbox;

use super::{SOON, run, sandbox, say, sender::Sender};

/// The number of flushes, at least. After each, the netfilter rules are missing for some milliseconds; on a
/// busy machine, no packet may be sent in that time.
const FLUSHES: usize = 100;
const REPAIRS: &str = "kube2ram_forward_guard_repairs_total";

fn flush() {
    run("nft", &["flush", "ruleset"]);
}

/// A pod that sends packets for the node to forward, by a packet socket.
fn sender(sandbox: &Sandbox) -> Sender {
    let pod = sandbox.pod("pod").unwrap().pod();
    let python = pod.command("app", "python3").unwrap();
    let sender = Sender::start(python, &["forwarded", &pod.ip().to_string()], vec![String::new()]);
    sender.await_more(1);
    sender
}

fn arrived(sandbox: &Sandbox) -> usize {
    let pod = sandbox.pod("pod").unwrap().pod().ip();
    sandbox.node().sniffer().packets_from(pod).len()
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn no_packet_is_forwarded_while_others_flush_the_ruleset() {
    let mut sandbox = sandbox("wire-flush");
    // The control: by the netfilter rules alone, packets get through after a flush.
    sandbox.agent().unwrap().set_env("KUBE2RAM_WIRE_GUARD", "off");
    sandbox.agent().unwrap().start().unwrap();
    let senders = sender(&sandbox);
    let (begun, mut flushes, before) = (Instant::now(), 0, arrived(&sandbox));
    while arrived(&sandbox) == before {
        assert!(begun.elapsed() < SOON, "the control: no packet after {flushes} flushes");
        flush();
        flushes += 1;
    }
    drop(senders);
    let agent = sandbox.agent().unwrap();
    agent.terminate().unwrap();
    agent.set_env("KUBE2RAM_WIRE_GUARD", "auto");
    agent.start().unwrap();
    let senders = sender(&sandbox);
    let (before, sent_before) = (arrived(&sandbox), senders.sent());

    let repeated = FLUSHES.max(2 * flushes);
    for _ in 0..repeated {
        flush();
    }
    senders.await_more(1);

    let packets = arrived(&sandbox) - before;
    say(&format!(
        "without the wire guard a packet passed after {flushes} flushes; with it {packets} of {} in {repeated}",
        senders.sent() - sent_before
    ));
    assert_eq!(packets, 0);
    // The rules were missing, and are back.
    assert_ne!(sandbox.agent().unwrap().metric(REPAIRS).unwrap(), 0.0);
    sandbox.agent().unwrap().await_metric("kube2ram_forward_guard_in_force", 1.0).unwrap();
}
