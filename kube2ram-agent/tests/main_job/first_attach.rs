//! The first agent of a node next to pods that have connections to the metadata server open.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    process::{Child, Command, Stdio},
};

use kube2ram_sandbox::{node::PodSpec, standin::Accounts};

use crate::support::{LIST, Lab, eventually};

/// Connects, waits for an error or for the end of its standard input, asks on the same connection, and prints
/// what comes of it: a status, or an error's name.
const CLIENT: &str = r#"
import errno, select, socket, sys
connection = socket.create_connection(("100.100.100.200", 80), 5)
print("connected", flush=True)
try:
    # Without a word of ours: the error comes by itself.
    ready, _, _ = select.select([connection, sys.stdin], [], [])
    if connection in ready:
        connection.recv(1)
    connection.sendall(b"GET /latest/meta-data/instance-id HTTP/1.1\r\nHost: x\r\n\r\n")
    connection.settimeout(5)
    print(connection.recv(4096).split(b" ")[1].decode())
except socket.timeout:
    print("timeout")
except OSError as error:
    print(errno.errorcode[error.errno])
"#;

struct Client(Child, BufReader<std::process::ChildStdout>);

impl Client {
    fn start(mut command: Command) -> Self {
        command.args(["-c", CLIENT]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        assert_eq!(line, "connected\n");
        Self(child, stdout)
    }

    /// What came of it: at once if the connection has failed, or else after it has asked.
    fn outcome(mut self) -> String {
        drop(self.0.stdin.take());
        let mut said = String::new();
        self.1.read_to_string(&mut said).unwrap();
        self.0.wait().unwrap();
        said.trim().to_owned()
    }
}

fn clients(lab: &Lab) -> [Client; 3] {
    let in_pod = |pod: &str| Client::start(lab.pod(pod).unwrap().pod().command("app", "python3").unwrap());
    // The host's own, in its network namespace.
    [in_pod("orders"), in_pod("daemon"), Client::start(lab.node().host_command("python3"))]
}

fn lab(name: &str) -> Lab {
    let pods = [
        PodSpec::new("orders").role("orders-role"),
        PodSpec::new("daemon").role("daemon-role").host_network(),
    ];
    Lab::new(name, &pods)
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn connections_that_the_first_attach_cuts_fail_at_once_and_the_hosts_go_on() {
    let mut lab = lab("cut");
    let [orders, daemon, host] = clients(&lab);

    lab.start(&[]);

    assert_eq!([orders.outcome(), daemon.outcome()], ["ECONNABORTED"; 2]);
    assert_eq!(host.outcome(), "200");
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
    assert!(lab.agent().unwrap().log().contains("connections=2"), "{}", lab.agent().unwrap().log());
    // A restart cuts nothing, and has nothing to end.
    lab.agent().unwrap().restart(None).unwrap();
    assert_eq!(lab.agent().unwrap().log().matches("closed pods' connections").count(), 1);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_client_that_listed_at_the_real_server_raises_no_event_and_one_that_goes_on_does() {
    let mut lab = lab("listed-before");
    assert_eq!(lab.ask("orders", LIST).body, Accounts::NODE_ROLE, "before the agent");

    lab.start(&[]);

    assert_eq!(lab.credentials("orders", Accounts::NODE_ROLE), "403");
    assert_eq!(lab.ask("orders", LIST).body, "orders-role");
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
    eventually(true, || lab.agent().unwrap().log().contains("request refused"));
    let told = |lab: &Lab| {
        let events = lab.api().events().into_iter();
        events.map(|event| format!("{} {}", event["regarding"]["name"], event["reason"])).collect::<Vec<_>>()
    };
    // A denial that comes later and is told: one before it has been told by then, or never is.
    lab.add_pod(&PodSpec::new("broken").role("not a role")).unwrap();
    eventually("403".to_owned(), || lab.credentials("broken", "not-a-role"));
    eventually(vec![r#""broken" "MalformedAnnotation""#.to_owned()], || told(&lab));
    // Under this one nobody can have listed there.
    lab.agent().unwrap().restart(None).unwrap();
    assert_eq!(lab.credentials("orders", Accounts::NODE_ROLE), "403");
    eventually(true, || told(&lab).contains(&r#""orders" "RoleDenied""#.to_owned()));
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn connections_that_are_to_be_kept_are_not_ended() {
    let mut lab = lab("keep");
    let [orders, daemon, host] = clients(&lab);

    lab.start(&["--open-connections=keep"]);

    // The netfilter rules stop connections to the real server that a pod with its own network has open.
    assert_eq!(orders.outcome(), "timeout");
    assert_eq!([daemon.outcome(), host.outcome()], ["200"; 2]);
}
