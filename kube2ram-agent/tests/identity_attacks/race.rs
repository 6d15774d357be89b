//! An element of the handshake map that is freed is another's at once on Linux 6.1 and later. A handover that
//! reads it meanwhile must not believe it.

use std::{
    net::SocketAddr,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use crate::field::{Client, Field, uptime_ns};

/// Connects and closes as fast as it can, sometimes before the handshake is over, from ports that are this
/// pod's alone.
const FLICKER: &str = "import random\nprint('go', flush=True)\nend = __import__('time').monotonic() + SECONDS\n\
    while __import__('time').monotonic() < end:\n  burst = []\n  for _ in range(16):\n    \
    s = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK)\n    s.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack('ii', 1, 0))\n    \
    try: s.bind(('127.0.0.1', random.randrange(FIRST, FIRST + 9000)))\n    except OSError: continue\n    \
    s.connect_ex(METADATA)\n    s.close() if random.random() < 0.7 else burst.append(s)\n  for s in burst: s.close()";

const DURATION: Duration = Duration::from_secs(8);

#[test]
#[ignore = "needs root: cargo xtask test"]
fn clients_that_close_during_the_handover_never_lend_their_identity() {
    let field = Field::new("race");
    // Packets cross to another processor, so that a client can close while its handshake is completed.
    let steer = "for queue in /sys/class/net/lo/queues/rx-*; do echo ff > $queue/rps_cpus || echo 3 > $queue/rps_cpus; done";
    let steered =
        Command::new("ip").args(["netns", "exec", &field.netns.0, "sh", "-c", steer]).output().unwrap();
    let script = |first: u16| {
        FLICKER.replace("SECONDS", &DURATION.as_secs().to_string()).replace("FIRST", &first.to_string())
    };
    let pods = [("pods/a", 20_000), ("pods/b", 30_000), ("pods/a", 20_000), ("pods/b", 30_000)];
    let mut clients = pods.map(|(pod, first)| field.client(pod, &script(first)));
    clients.iter_mut().for_each(|client| assert_eq!(client.line(), "go"));
    let (mut vouched, mut refused, mut wrong) = (0, 0, 0);

    field.lab.listener.set_nonblocking(true).unwrap();
    let end = Instant::now() + DURATION;
    while Instant::now() < end {
        let Ok((accepted, SocketAddr::V4(peer))) = field.lab.listener.accept() else {
            thread::yield_now();
            continue;
        };
        let expected = field.lab.id(if peer.port() < 30_000 { "pods/a" } else { "pods/b" });
        match field.origin_of(&accepted) {
            Ok(origin) if origin == expected => vouched += 1,
            Ok(_) => wrong += 1,
            Err(_) => refused += 1,
        }
    }

    clients.into_iter().for_each(Client::finish);
    let (steered, lost) = (steered.status.success(), field.counter("not_handed_over"));
    eprintln!(
        "{vouched} vouched for, {refused} refused ({lost} not handed over), {wrong} wrong; steered: {steered}"
    );
    assert_eq!(wrong, 0);
    assert_ne!(vouched, 0);
    let deadline = Instant::now() + Duration::from_secs(10);
    while field.pending() > 0 {
        assert!(Instant::now() < deadline, "left behind, at {} ns:\n{}", uptime_ns(), left_behind(&field));
        while field.lab.listener.accept().is_ok() {}
    }
}

/// The entries that were not removed, the leases that were not given back, every socket of the namespace, and
/// the counters: they show which program failed.
fn left_behind(field: &Field) -> String {
    let handshakes: Vec<_> = field.handshakes().iter().collect();
    let clients: Vec<_> = field.clients().iter().collect();
    let shares: Vec<_> = field.shares().iter().collect();
    let counters: Vec<_> =
        field.datapath.counters().unwrap().read().filter(|(_, count)| *count > 0).collect();
    let sockets =
        Command::new("ip").args(["netns", "exec", &field.netns.0, "ss", "-tanpe"]).output().unwrap();
    format!(
        "handshakes: {handshakes:#?}\nclients: {clients:#?}\nshares: {shares:?}\ncounters: {counters:?}\nsockets:\n{}",
        String::from_utf8_lossy(&sockets.stdout)
    )
}
