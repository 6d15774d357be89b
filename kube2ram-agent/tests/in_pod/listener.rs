//! What a pod sees of the listener in its network namespace, and what it can do to it.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    process::{Child, Stdio},
};

use jiff::{SignedDuration, Timestamp};
use kube2ram_sandbox::node::PodSpec;

use crate::{
    LIST, pods,
    support::{Lab, eventually, output},
};

/// Runs Python in a pod's container to its end: what it printed.
fn python(lab: &Lab, pod: &str, script: &str) -> String {
    let mut python = lab.pod(pod).unwrap().pod().command("app", "python3").unwrap();
    output(python.args(["-c", script]))
}

/// A process of a pod that has printed its first line, until it is killed.
pub(crate) fn holding(lab: &Lab, pod: &str, script: &str) -> Child {
    let mut python = lab.pod(pod).unwrap().pod().command("app", "python3").unwrap();
    let mut child = python.args(["-c", script]).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "held\n");
    child
}

pub(crate) fn end(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_client_sees_the_address_that_it_asked_for() {
    let lab = Lab::with_agent("in-pod-peer", &pods());
    lab.own_target("orders");
    let peer = |family: &str, address: &str, option: &str| {
        let script = format!(
            "import socket\ns = socket.socket(socket.{family})\n{option}\ns.connect(('{address}', 80))\n\
             s.sendall(b'GET {LIST} HTTP/1.0\\r\\n\\r\\n')\nprint(s.getpeername()[:2], s.recv(4096).split(b'\\r\\n')[-1].decode())"
        );
        python(&lab, "orders", &script)
    };
    let told = |address: &str| format!("('{address}', 80) orders-role\n");

    for address in ["100.100.100.200", "::ffff:100.100.100.200", "fd00:100::100:200"] {
        let family = if address.contains(':') { "AF_INET6" } else { "AF_INET" };
        assert_eq!(peer(family, address, ""), told(address));
    }
    let only = "s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)";
    assert_eq!(peer("AF_INET6", "fd00:100::100:200", only), told("fd00:100::100:200"), "of IPv6 alone");
    // The pod's own services at the loopback device are what they were.
    let own = "import socket\nl = socket.create_server(('127.0.0.1', 0))\ns = socket.create_connection(l.getsockname())\n\
               print(s.getpeername() == l.getsockname())";
    assert_eq!(python(&lab, "orders", own), "True\n");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_application_has_every_port_but_the_one_that_nobody_wants() {
    let mut lab = Lab::without_agent("in-pod-ports", &pods());
    let taken = holding(
        &lab,
        "orders",
        "import socket, time\ns = socket.create_server(('0.0.0.0', 225))\nprint('held', flush=True)\ntime.sleep(600)",
    );
    lab.start();

    assert_eq!(lab.own_target("orders").port, 226, "where one is taken, the next");
    assert_eq!(lab.own_target("billing").port, 225);
    assert_eq!(lab.role("orders"), "orders-role");
    // A dual-stack socket as well, which takes the port of both.
    let bind_all = "import socket\nrefused = []\nfor family, any in (socket.AF_INET, '0.0.0.0'), (socket.AF_INET6, '::'):\n  \
        for port in range(1, 65536):\n    s = socket.socket(family)\n    try: s.bind((any, port)); s.listen()\n    \
        except OSError: refused.append(port)\n    s.close()\nprint(refused)";
    assert_eq!(python(&lab, "billing", bind_all), "[225, 225]\n");
    assert_eq!(lab.role("billing"), "billing-role");
    end(taken);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_application_that_comes_second_has_every_port_but_the_listeners() {
    let lab = Lab::with_agent("in-pod-second", &pods());
    let target = lab.own_target("orders");
    let own = lab.pod("orders").unwrap().pod().ip();
    // Each address with each set of options; what comes of bind(2) and listen(2).
    let binds = format!(
        "import errno, itertools, socket\noptions = (socket.SO_REUSEADDR, socket.SO_REUSEPORT)\n\
         def outcome(address, kind, given):\n  s = socket.socket(socket.AF_INET6 if ':' in address else socket.AF_INET, kind)\n  \
         for option in given: s.setsockopt(socket.SOL_SOCKET, option, 1)\n  try:\n    s.bind((address, {port}))\n    \
         if kind == socket.SOCK_STREAM: s.listen()\n    return 'has it'\n  except OSError as e: return errno.errorcode[e.errno]\n  \
         finally: s.close()\nfor kind, address in itertools.product((socket.SOCK_STREAM, socket.SOCK_DGRAM), \
         ('0.0.0.0', '::', '127.0.0.1', '::1', '{own}')):\n  seen = set()\n  for n in range(3):\n    \
         for given in itertools.combinations(options, n): seen.add(outcome(address, kind, given))\n  \
         print(kind.name, address, *sorted(seen))",
        port = target.port
    );

    let outcomes = python(&lab, "orders", &binds);

    let refused =
        ["0.0.0.0", "::", "127.0.0.1", "::1"].map(|address| format!("SOCK_STREAM {address} EADDRINUSE"));
    let datagrams =
        ["0.0.0.0", "::", "127.0.0.1", "::1"].map(|address| format!("SOCK_DGRAM {address} has it"));
    let own = ["SOCK_STREAM", "SOCK_DGRAM"].map(|kind| format!("{kind} {own} has it"));
    let mut expected: Vec<_> = [&refused[..], &datagrams, &own].concat();
    let mut outcomes: Vec<_> = outcomes.lines().map(str::to_owned).collect();
    expected.sort();
    outcomes.sort();
    assert_eq!(outcomes, expected);
    assert_eq!((lab.own_target("orders"), lab.role("orders").as_str()), (target, "orders-role"));
}

/// Destroys a pod's listener from inside the pod.
fn destroy(lab: &Lab, pod: &str, port: u16) {
    let mut ss = lab.pod(pod).unwrap().pod().command("app", "ss").unwrap();
    let killed = output(ss.args(["--kill", "--listening", "--tcp", "src", &format!("127.0.0.1:{port}")]));
    assert!(killed.contains("127.0.0.1"), "{killed}");
}

/// When the agent logged a line.
fn logged_at(line: &str) -> Timestamp {
    line.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_listener_that_a_pod_destroys_for_the_first_time_is_open_again_within_a_second() {
    // On a busy machine any of them may be late.
    const PODS: [&str; 3] = ["one", "two", "three"];
    let is_emulated = fs::read_to_string("/proc/cpuinfo").unwrap().contains("QEMU TCG");
    let limit = SignedDuration::from_secs(if is_emulated { 10 } else { 1 });
    let specs = PODS.map(|pod| PodSpec::new(pod).role(&format!("{pod}-role")));
    let mut lab = Lab::without_agent("in-pod-reopened", &specs);
    let flags = ["--auto-discover-base-arn", "--log-level=debug"];
    lab.start_agent(env!("CARGO_BIN_EXE_kube2ram").as_ref(), &flags).unwrap();

    // All listeners are open first: a first opening must not count as one after a destruction.
    let targets = PODS.map(|pod| (pod, lab.own_target(pod).port));
    let took = targets.map(|(pod, port)| {
        let before = lab.agent().unwrap().log().lines().count();
        let uid = format!("pod.uid={}", lab.pod(pod).unwrap().pod().spec().uid);
        let cgroup = format!("cgroup.id={}", lab.cgroup(pod));
        destroy(&lab, pod, port);
        eventually(|| {
            let log = lab.agent().unwrap().log();
            let mut lines = log.lines().skip(before);
            let mut line_of = |message: &str, field: &str| {
                lines.find(|line| line.contains(message) && line.split_whitespace().any(|word| word == field))
            };
            let ended = line_of("destroyed the in-pod listener", &uid)?;
            let open = line_of("in-pod listener open", &cgroup)?;
            Some(logged_at(open).duration_since(logged_at(ended)))
        })
    });

    println!("open again after {took:?}");
    assert!(took.iter().any(|time| *time <= limit), "{took:?}");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_listener_that_a_pod_destroys_again_and_again_is_back_each_time_and_logged_once() {
    let mut lab = Lab::with_agent("in-pod-destroyed", &pods());
    let target = lab.own_target("orders");
    let ended = r#"kube2ram_pod_listener_failures_total{step="ended"}"#;

    for times in 1..=3 {
        destroy(&lab, "orders", target.port);
        eventually(|| (lab.metric(ended) == f64::from(times)).then_some(()));
        assert_eq!(lab.role("orders"), "orders-role", "by whichever listener");
        eventually(|| lab.target("orders"));
        assert_eq!(lab.role("orders"), "orders-role");
    }

    assert_eq!(lab.role("billing"), "billing-role");
    let log = lab.agent().unwrap().log();
    assert_eq!(log.matches("destroyed the in-pod listener").count(), 1, "{log}");
    assert_eq!(log.matches("cannot accept a connection").count(), 0);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_namespace_of_two_pods_has_no_listener_until_it_is_ones_again() {
    let mut lab = Lab::without_agent("in-pod-two", &pods());
    // As a runtime that put a pod's first process into another pod's namespace.
    let orders = lab.pod("orders").unwrap().pod();
    let netns = format!("--net={}", orders.netns().unwrap().display());
    let pause = lab.pod("billing").unwrap().pod().container_cgroup("pause").unwrap().join("cgroup.procs");
    output(std::process::Command::new("kill").arg(fs::read_to_string(&pause).unwrap().trim()));
    eventually(|| fs::read_to_string(&pause).unwrap().is_empty().then_some(()));
    let mut intruder = lab.pod("billing").unwrap().pod().command("app", "nsenter").unwrap();
    let intruder = intruder.args([&netns, "sleep", "600"]).spawn().unwrap();

    lab.start();
    let contested = r#"kube2ram_pod_listener_failures_total{step="contested"}"#;
    eventually(|| (lab.metric(contested) >= 1.0).then_some(()));

    assert_eq!((lab.target("orders"), lab.target("billing")), (None, None));
    assert_eq!(lab.role("orders"), "orders-role", "by the host listener");
    assert_eq!(lab.metric("kube2ram_pod_listeners"), 0.0);
    assert_eq!(lab.agent().unwrap().log().matches("another pod's process is in this pod's").count(), 2);
    end(intruder);
    lab.remove_pod("billing").unwrap();
    crate::support::eventually_within(crate::support::NEXT_PASS, || lab.target("orders"));
    assert_eq!(lab.role("orders"), "orders-role");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_socket_that_a_pod_is_given_serves_nobody_but_the_pod_that_connects_it() {
    let lab = Lab::with_agent("in-pod-passed", &pods());
    for pod in ["orders", "billing"] {
        lab.own_target(pod);
    }
    let path = lab.node().directory().join("passed");
    // `orders` makes it, `billing` connects it: to the metadata server, and to the listener itself.
    let give = format!(
        "import array, socket, time\nu = socket.socket(socket.AF_UNIX)\nu.bind('{0}')\nu.listen()\nprint('held', flush=True)\n\
         c = u.accept()[0]\nfds = [socket.socket() for _ in range(2)]\nsocket.send_fds(c, [b'x'], [s.fileno() for s in fds])\ntime.sleep(600)",
        path.display()
    );
    let giver = holding(&lab, "orders", &give);
    let take = format!(
        "import socket\nu = socket.socket(socket.AF_UNIX)\nu.connect('{}')\nfds = socket.recv_fds(u, 1, 2)[1]\n\
         for fd, to in zip(fds, [('100.100.100.200', 80), ('127.0.0.1', 225)]):\n  s = socket.socket(fileno=fd)\n  s.settimeout(3)\n  \
         try:\n    s.connect(to)\n    s.sendall(b'GET {LIST} HTTP/1.0\\r\\n\\r\\n')\n    print(s.recv(4096).split(b'\\r\\n')[-1].decode())\n  \
         except OSError as error: print(error.errno)",
        path.display()
    );

    assert_eq!(python(&lab, "billing", &take), "billing-role\n1\n", "by the host listener; not permitted");
    end(giver);
    assert_eq!(lab.role("orders"), "orders-role");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn rules_in_one_pod_that_swallow_the_trial_take_nothing_from_the_others() {
    for rule in [
        "type filter hook output priority 0; tcp dport 225-232 tcp flags & (syn | ack) == ack drop",
        "type nat hook output priority -100; tcp dport 225-232 redirect to :9",
    ] {
        let mut lab = Lab::without_agent("in-pod-swallow", &pods());
        let elsewhere = "import socket, time\nl = socket.create_server(('127.0.0.1', 9))\nprint('held', flush=True)\ntime.sleep(600)";
        let elsewhere = holding(&lab, "billing", elsewhere);
        let netns = lab.pod("billing").unwrap().pod().netns().unwrap();
        let mut nft = lab.node().host_command("nsenter");
        let rules = format!("table ip t {{ chain c {{ {rule}; }}; }}");
        assert!(
            nft.arg(format!("--net={}", netns.display())).args(["nft", &rules]).status().unwrap().success()
        );

        lab.start();
        lab.own_target("orders");
        eventually(|| {
            (lab.metric(r#"kube2ram_pod_listener_failures_total{step="listen"}"#) >= 1.0).then_some(())
        });

        assert_eq!(lab.target("billing"), None, "{rule}");
        assert_eq!(lab.role("orders"), "orders-role", "{rule}");
        lab.add(&PodSpec::new("late").role("late-role"));
        lab.own_target("late");
        // And at the handover.
        let next = lab.surge().unwrap();
        let mut next = next;
        next.start_beside().unwrap();
        let mut former = lab.replace_agent(next).unwrap();
        assert_eq!(former.terminate().unwrap().code(), Some(0));
        lab.remove_agent(former).unwrap();
        assert_eq!(lab.role("orders"), "orders-role", "{rule}");
        assert_eq!(lab.role("late"), "late-role", "{rule}");
        end(elsewhere);
    }
}
