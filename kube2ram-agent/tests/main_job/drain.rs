//! An agent that is told to end: who asks nothing, or not to the end, is hung up on and does not keep it.
//! What it was asked is answered: see `lifecycle`; what does not end by itself is cut off at the deadline:
//! see the server's own tests.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use kube2ram_sandbox::node::PodSpec;

use crate::support::{LIST, Lab, eventually};

/// Far below the deadlines of a drain, 5 s for connections and 8 s in all.
const AT_ONCE: Duration = Duration::from_secs(3);

/// Python in a pod that connects, does something, prints `ready`, waits for the end of the connection, and
/// prints what it received.
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
fn neither_idle_connections_nor_halves_of_requests_keep_an_agent_that_is_to_end() {
    for (what, act) in [
        ("idle", "s.sendall(request); assert b'orders-role' in s.recv(4096)"),
        (
            "half a request",
            "s.sendall(request); assert b'orders-role' in s.recv(4096); s.sendall(request[:-2])",
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
        assert!(took < AT_ONCE, "{what}: {took:?}");
        let mut rest = String::new();
        said.read_to_string(&mut rest).unwrap();
        assert!(rest.starts_with("ended"), "{what}: {rest}");
        drop(client.wait());
    }
}
