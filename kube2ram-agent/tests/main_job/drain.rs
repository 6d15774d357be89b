//! An agent that is told to end: what it was asked is answered, who asks nothing is hung up on, and nobody keeps it longer than its deadline.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use kube2ram_sandbox::node::PodSpec;

use crate::support::{LIST, Lab, eventually};

/// Longer than the agent's own deadlines, 5 s for connections and 8 s in all, and shorter than what Kubernetes gives.
const LONGEST: Duration = Duration::from_secs(12);

/// Python in a pod that connects, does something, says `ready`, waits for the end of the connection, and says what came by then.
fn client(lab: &Lab, act: &str) -> Child {
    let script = format!(
        "import socket, sys\ns = socket.create_connection(('100.100.100.200', 80))\ns.settimeout(60)\n\
         request = b'GET {LIST} HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n'\n{act}\n\
         print('ready', flush=True)\nrest = b''\ntry:\n  while True:\n    more = s.recv(4096)\n    if not more: break\n    rest += more\n\
         except OSError: pass\nprint('ended', len(rest), flush=True)"
    );
    let mut command = lab.pod("orders").unwrap().pod().command("app", "python3").unwrap();
    command
        .args(["-c", &script])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap()
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn idle_connections_end_at_once_and_stubborn_ones_at_the_deadline() {
    for (what, act, at_most) in [
        ("idle", "s.sendall(request); assert b'orders-role' in s.recv(4096)", Duration::from_secs(3)),
        (
            "stubborn",
            "s.sendall(request); assert b'orders-role' in s.recv(4096); s.sendall(request[:-2])",
            LONGEST,
        ),
    ] {
        let mut lab = Lab::with_agent("drain-idle", &[PodSpec::new("orders").role("orders-role")], &[]);
        let mut client = client(&lab, act);
        let mut said = BufReader::new(client.stdout.take().unwrap());
        let mut line = String::new();
        said.read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n", "{what}");
        eventually(1.0, || lab.metric("kube2ram_connections"));

        let began = Instant::now();
        let status = lab.agent().unwrap().terminate().unwrap();
        let took = began.elapsed();

        println!("{what}: the agent ended after {took:?}");
        assert_eq!(status.code(), Some(0), "{what}");
        assert!(took < at_most, "{what}: {took:?}");
        let mut rest = String::new();
        said.read_to_string(&mut rest).unwrap();
        assert!(rest.starts_with("ended"), "{what}: {rest}");
        drop(client.wait());
    }
}
