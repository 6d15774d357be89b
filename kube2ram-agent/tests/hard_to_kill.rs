//! One pod against the agent's memory: the real agent with the manifest's memory limit on its cgroup, which
//! counts what the kernel keeps for its sockets and maps as well. Where there is no memory controller of
//! cgroup v2, the attacks run without the limit.

#![expect(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, reason = "test support")]

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use kube2ram_common::abi::{LISTENER_PORTS, MAX_HANDSHAKES_OF_POD};
use kube2ram_sandbox::{
    Sandbox,
    agent::Agent,
    client::{Holder, LoadReport},
    kernel,
    node::PodSpec,
    quiet::{Probes, is_quiet},
    standin::{AccessKey, Accounts, PodManifest},
};

const AGENT: &str = env!("CARGO_BIN_EXE_kube2ram");
const MANIFEST: &str = include_str!("../../deploy/helm/kube2ram/values.yaml");
const METADATA: &str = "100.100.100.200:80";
const LIST: &str = "/latest/meta-data/ram/security-credentials/";
/// On a machine without other work, 99 % of another pod's answers come sooner.
const QUIET_PATIENCE: Duration = Duration::from_millis(100);
const MIB: u64 = 1024 * 1024;
/// Of one attack; and on an emulated processor, where clients that fill buffers take their time, and answers
/// too.
const DURATION: Duration = Duration::from_secs(6);
const EMULATED_DURATION: Duration = Duration::from_secs(30);
/// How long an agent under attack, on an emulated processor as well, may take to show its metrics.
const METRICS_DEADLINE: Duration = Duration::from_mins(2);
/// More than one pod may have.
const ONE_PODS_CONNECTIONS: usize = 512;
const ATTACKERS: usize = 8;
/// What the kernel may keep of a connection, both ways.
const BUFFERS_BYTES: u64 = 32 * 1024;

/// The limit of the agent's container, in bytes.
fn limit() -> u64 {
    let line = MANIFEST.lines().find(|line| line.contains("limits: { memory:")).unwrap();
    let (_, value) = line.split_once("memory: ").unwrap();
    value.trim_end_matches([' ', '}']).strip_suffix("Mi").unwrap().parse::<u64>().unwrap() * MIB
}

/// The agent's cgroup, with the limit, if the kernel can count.
struct Container {
    cgroup: PathBuf,
    counts: bool,
}

impl Container {
    fn of(sandbox: &mut Sandbox) -> Self {
        let cgroup = sandbox.agent().unwrap().pod().container_cgroup("agent").unwrap().to_owned();
        let mut above: Vec<&Path> =
            cgroup.ancestors().skip(1).take_while(|path| path.join("cgroup.procs").exists()).collect();
        above.reverse();
        let controllers = fs::read_to_string(above[0].join("cgroup.controllers")).unwrap();
        let counts = controllers.split_whitespace().any(|controller| controller == "memory");
        if counts {
            for path in above {
                fs::write(path.join("cgroup.subtree_control"), "+memory").unwrap();
            }
            fs::write(cgroup.join("memory.max"), limit().to_string()).unwrap();
        } else {
            kernel::skip("the agent's memory", "memory-controller");
        }
        Self { cgroup, counts }
    }

    fn number(&self, file: &str, key: &str) -> u64 {
        if !self.counts {
            return 0;
        }
        let text = fs::read_to_string(self.cgroup.join(file)).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        line.trim().parse().unwrap()
    }

    fn pid(&self) -> u32 {
        fs::read_to_string(self.cgroup.join("cgroup.procs")).unwrap().trim().parse().expect("one process")
    }
}

fn is_emulated() -> bool {
    fs::read_to_string("/proc/cpuinfo").unwrap().contains("QEMU TCG")
}

/// What the kernel keeps for each connection at a port: how much it may, and how much it does.
fn kept(mut ss: Command, port: u16) -> Vec<(u64, u64)> {
    let output =
        ss.args(["-Htmn", "state", "established", &format!("( sport = :{port} )")]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let sockets = text.split("skmem:(").skip(1).map(|socket| socket.split_once(')').unwrap().0);
    sockets
        .map(|socket| {
            let number = |key: &str| {
                let field = socket.split(',').find_map(|field| field.strip_prefix(key)?.parse::<u64>().ok());
                field.unwrap()
            };
            (number("rb") + number("tb"), number("r") + number("w"))
        })
        .collect()
}

/// Another pod's clients, until their standard input ends.
fn victims(sandbox: &Sandbox) -> Child {
    let mut load = sandbox.pod("victim").unwrap().client("app").unwrap();
    load.args(["load", "--connect", METADATA, "--expect=victim-role"]);
    load.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
}

/// Asks for both probes of the agent. Returns whether it is ready: its self-test may be late.
fn probe(agent: &Agent) -> anyhow::Result<bool> {
    let (ready, live) = (agent.admin("/readyz"), agent.live());
    live?;
    Ok(ready?.status == 200)
}

/// How many requests of pods the agent has answered: all of them, and those above the rate.
fn answered(agent: &Agent) -> [f64; 2] {
    let deadline = Instant::now() + METRICS_DEADLINE;
    let metrics = loop {
        match agent.admin("/metrics") {
            Ok(reply) if reply.status == 200 => break reply.body,
            other => assert!(Instant::now() < deadline, "no metrics: {other:?}"),
        }
        thread::sleep(Duration::from_millis(100));
    };
    let samples = metrics.lines().filter(|line| line.starts_with("kube2ram_http_requests_total{"));
    samples.fold([0.0; 2], |[all, refused], sample| {
        let count: f64 = sample.rsplit_once(' ').unwrap().1.parse().unwrap();
        let is_refused = sample.contains(r#"status="429""#);
        [all + count, if is_refused { refused + count } else { refused }]
    })
}

/// Serves another pod for the time of an attack: how long that takes, and the most memory. `ss` looks where
/// the attackers' connections arrive. Returns how many requests were above the rate.
fn endure(sandbox: &Sandbox, container: &Container, what: &str, ss: impl Fn() -> Command, port: u16) -> f64 {
    let agent = sandbox.agent_if_any().unwrap();
    let duration = if is_emulated() { EMULATED_DURATION } else { DURATION };
    let victims = victims(sandbox);
    let [all_before, refused_before] = answered(agent);
    let begun = Instant::now();
    let (mut most, mut connections) = (0, Vec::new());
    let (mut probes, mut asked, mut failed, mut unready) = (Probes::default(), 0, 0, 0);
    while begun.elapsed() < duration {
        asked += 1;
        let outcome = probe(agent);
        let answer = if is_emulated() { outcome.ok() } else { probes.judge(what, outcome) };
        failed += usize::from(answer.is_none());
        unready += usize::from(answer == Some(false));
        most = most.max(container.number("memory.current", ""));
        connections.extend(kept(ss(), port));
    }
    let ([all, refused], took) = (answered(agent), begun.elapsed());
    let (all, refused) = (all - all_before, refused - refused_before);
    let report = LoadReport::of(victims).unwrap();
    let [middle, most_answers, slowest] =
        [50, 99, 100].map(|percent| report.percentile(percent).unwrap_or_default());
    let may = connections.iter().map(|(may, _)| *may).max().expect("the attackers have connections");
    let does = connections.iter().map(|(_, does)| *does).max().unwrap();
    println!(
        "{what}: {} answers to another pod, p50 {middle:?}, p99 {most_answers:?}, longest {slowest:?}; \
         {:.0} requests/s of all pods, {:.0}/s of them above the rate; \
         {asked} probes, {failed} of them failed, {unready} not ready; \
         a connection at most {does} bytes of {may}; memory.current at most {} KiB, sockets {} KiB, kernel {} KiB",
        report.ok,
        all / took.as_secs_f64(),
        refused / took.as_secs_f64(),
        most / 1024,
        container.number("memory.stat", "sock ") / 1024,
        container.number("memory.stat", "slab ") / 1024,
    );
    assert_eq!(report.wrong, 0, "{what}: {:?}", report.samples);
    if !is_emulated() {
        // The longest one is printed only: other tests have the processors as well.
        report.assert_served(what, QUIET_PATIENCE);
    }
    assert!(may <= BUFFERS_BYTES, "{what}: {may} bytes");
    assert!(most * 4 <= limit() * 3, "{what}: {most} bytes leave less than a quarter of the limit");
    assert_eq!(container.number("memory.events", "oom_kill "), 0, "{what}");
    refused
}

/// The other pod is served, without delay, when the attack is over.
fn assert_recovers(sandbox: &Sandbox, what: &str) {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match sandbox.pod("victim").unwrap().curl(LIST) {
            Ok(reply) if reply.status == 200 => return,
            other => assert!(Instant::now() < deadline, "{what}: {other:?}"),
        }
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn no_pod_takes_the_agents_memory_or_another_pods_answers() {
    let mut sandbox = Sandbox::create("memory").unwrap();
    let attackers: Vec<String> = (0..ATTACKERS).map(|n| format!("attacker-{n}")).collect();
    for name in attackers.iter().map(String::as_str).chain(["victim"]) {
        sandbox.accounts().add_role(Accounts::role_arn(&format!("{name}-role")), Default::default());
        sandbox.add_pod(&PodSpec::new(name).role(&format!("{name}-role"))).unwrap();
    }
    let daemon = PodSpec::new("daemon").role("daemon-role").host_network();
    sandbox.accounts().add_role(Accounts::role_arn("daemon-role"), Default::default());
    sandbox.add_pod(&daemon).unwrap();
    sandbox.add_agent(Path::new(AGENT), &["--auto-discover-base-arn"]).unwrap();
    let container = Container::of(&mut sandbox);
    sandbox.agent().unwrap().start().unwrap();
    let pid = container.pid();
    while sandbox.pod("victim").unwrap().curl(&format!("{LIST}victim-role")).unwrap().status == 503 {}
    let document = sandbox.pod("victim").unwrap().curl(&format!("{LIST}victim-role")).unwrap().body;
    assert!(document.contains(AccessKey::SECRET_MARKER), "{document}");
    let (app, admin) = (sandbox.agent().unwrap().app_addr(), sandbox.agent().unwrap().admin_addr());
    let client = |pod: &str| sandbox.pod(pod).unwrap().client("app").unwrap();

    println!("memory.current before: {} KiB", container.number("memory.current", "") / 1024);
    let nothing = String::new();
    let pipelined = |target: &str| format!("GET {target} HTTP/1.1\r\nHost: x\r\n\r\n").repeat(100);
    let unread = pipelined(&format!("{LIST}attacker-0-role"));
    let passed = pipelined("/latest/meta-data/instance-id");
    let half = format!("GET {LIST} HTTP/1.1\r\nX: {}", "a".repeat(6000));
    let metrics = pipelined("/metrics");
    let half_metrics = half.replace(LIST, "/metrics");
    let one = || vec![client("attacker-0")];
    let all = || attackers.iter().map(|name| client(name)).collect::<Vec<_>>();
    let in_pod = || sandbox.pod("attacker-0").unwrap().pod().command("app", "ss").unwrap();
    let on_node = || sandbox.node().host_command("ss");
    let (own, host, operators) = (LISTENER_PORTS.0, app.port(), admin.port());
    let admin = admin.to_string();
    let (inside, outside): (&dyn Fn() -> Command, &dyn Fn() -> Command) = (&in_pod, &on_node);
    for (what, clients, address, connections, request, ss, port) in [
        ("idle connections", one(), METADATA, 64, &nothing, inside, own),
        ("unread answers of one pod", one(), METADATA, ONE_PODS_CONNECTIONS, &unread, inside, own),
        ("unread answers that are passed on", one(), METADATA, ONE_PODS_CONNECTIONS, &passed, inside, own),
        ("unread answers of eight pods", all(), METADATA, 64, &unread, inside, own),
        ("half-sent heads of eight pods", all(), METADATA, 64, &half, inside, own),
        (
            "unread answers at the host listener",
            vec![client("daemon")],
            METADATA,
            ONE_PODS_CONNECTIONS,
            &unread,
            outside,
            host,
        ),
        ("unread metrics", all(), &admin, 64, &metrics, outside, operators),
        ("half-sent heads at the admin port", all(), &admin, 64, &half_metrics, outside, operators),
    ] {
        let attacks: Vec<_> = clients
            .into_iter()
            .map(|client| Holder::start(client, address, connections, request, request).unwrap())
            .collect();
        endure(&sandbox, &container, what, ss, port);
        drop(attacks);
        assert_recovers(&sandbox, what);
    }
    let mut flood = client("attacker-0");
    flood.args(["storm", "--connects=1000000", "--concurrency=32", "--expect=attacker-0-role"]);
    let mut flood = flood.arg("http://100.100.100.200").stdout(Stdio::null()).spawn().unwrap();
    let refused = endure(&sandbox, &container, "connections and requests without end", inside, own);
    flood.kill().unwrap();
    flood.wait().unwrap();
    // On a busy machine the flood may not get there.
    assert!(is_emulated() || !is_quiet() || refused > 0.0, "the flood was not above the rate");
    assert_recovers(&sandbox, "after a flood");

    assert_eq!(container.pid(), pid, "the same process");
}

/// Connects, dissolves the connection by AF_UNSPEC and keeps the socket, again and again; a line for each
/// thousand. Ends with its standard input.
const HOARD: &str = r#"
import ctypes, resource, socket, sys
sockets = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (sockets + 100, sockets + 100))
dissolve = ctypes.CDLL(None, use_errno=True).connect
kept = []
for number in range(1, sockets + 1):
    s = socket.socket()
    s.setblocking(False)
    s.connect_ex(("100.100.100.200", 80))
    assert dissolve(s.fileno(), bytes(16), 16) == 0, ctypes.get_errno()
    kept.append(s)
    if number % 1000 == 0:
        print(number, flush=True)
sys.stdin.read()
"#;

/// Once the kernel's storage for these sockets was the agent's memory, without a bound.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn sockets_that_pods_connect_dissolve_and_keep_take_nothing_from_the_agent() {
    const REDIRECTED: &str = r#"kube2ram_kernel_outcomes_total{outcome="redirected"}"#;
    let sockets: u32 = if is_emulated() { 2_000 } else { 10_000 };
    // The attacker's share, and that of the agent's own pod for its self-test.
    let most_entries = 2.0 * MAX_HANDSHAKES_OF_POD as f64;
    let mut sandbox = Sandbox::create("hoard").unwrap();
    for name in ["attacker", "victim", "daemon"] {
        sandbox.accounts().add_role(Accounts::role_arn(&format!("{name}-role")), Default::default());
        let spec = PodSpec::new(name).role(&format!("{name}-role"));
        sandbox.add_pod(&if name == "daemon" { spec.host_network() } else { spec }).unwrap();
    }
    sandbox.add_agent(Path::new(AGENT), &["--auto-discover-base-arn"]).unwrap();
    let container = Container::of(&mut sandbox);
    sandbox.agent().unwrap().start().unwrap();
    let pid = container.pid();
    assert_recovers(&sandbox, "before");

    let slab = || container.number("memory.stat", "slab ");

    // By the in-pod listener, and by the host listener.
    for attacker in ["attacker", "daemon"] {
        let slab_before = slab();
        let redirected = sandbox.agent().unwrap().metric(REDIRECTED).unwrap();
        let mut python = sandbox.pod(attacker).unwrap().pod().command("app", "python3").unwrap();
        python.args(["-c", HOARD, &sockets.to_string()]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut hoarder = python.spawn().unwrap();
        let mut lines = BufReader::new(hoarder.stdout.take().unwrap()).lines();
        let (mut entries, mut memory) = (0.0_f64, 0);
        for number in (1..=sockets / 1000).map(|thousands| thousands * 1000) {
            assert_eq!(lines.next().unwrap().unwrap(), number.to_string(), "{attacker}");
            for map in ["clients", "handshakes", "shares"] {
                let sample = format!(r#"kube2ram_host_listener_map_entries{{map="{map}"}}"#);
                entries = entries.max(sandbox.agent().unwrap().metric(&sample).unwrap());
            }
            memory = memory.max(container.number("memory.current", ""));
        }

        // All sockets are kept meanwhile.
        assert_recovers(&sandbox, attacker);
        assert_keeps_nothing_of(sockets, slab_before, slab, attacker);
        let seen = sandbox.agent().unwrap().metric(REDIRECTED).unwrap() - redirected;
        println!("{attacker}: {seen} connections, at most {entries} entries, {} KiB", memory / 1024);
        assert!(seen >= f64::from(sockets), "{attacker}: {seen} connections");
        assert!(entries <= most_entries, "{attacker}: {entries} entries");
        assert!(
            memory * 4 <= limit() * 3,
            "{attacker}: {memory} bytes leave less than a quarter of the limit"
        );
        drop(hoarder.stdin.take());
        assert!(hoarder.wait().unwrap().success());
    }

    assert_eq!(container.number("memory.events", "oom_kill "), 0);
    assert_eq!(container.pid(), pid, "the same process");
}

/// Asserts that the agent's cgroup is not charged for storage of these sockets. The kernel frees the memory
/// of ended connections within moments, and a socket's storage not before the socket.
fn assert_keeps_nothing_of(sockets: u32, before: u64, slab: impl Fn() -> u64, what: &str) {
    // Without its value, an element of a map of type BPF_MAP_TYPE_SK_STORAGE has a cache line.
    const LEAST_STORAGE_BYTES: u64 = 64;
    if before == 0 {
        println!("{what}: slab is not judged: the kernel does not count it by cgroup here");
        return;
    }
    let bound = before + u64::from(sockets) * LEAST_STORAGE_BYTES;
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let now = slab();
        if now < bound {
            println!("{what}: slab {before} bytes before, {now} bytes with {sockets} sockets");
            return;
        }
        assert!(Instant::now() < deadline, "{what}: slab {before} bytes before, {now} bytes after");
        thread::sleep(Duration::from_millis(100));
    }
}

/// Whoever may create pods decides how large they are: in fields that the agent does not use, and in the
/// annotations that it does.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn large_pods_do_not_move_the_agents_memory() {
    // Reading takes minutes on an emulated processor.
    let pods = if is_emulated() { 6 } else { 60 };
    let mut sandbox = Sandbox::create("large-pods").unwrap();
    sandbox.accounts().add_role(Accounts::role_arn("victim-role"), Default::default());
    sandbox.add_pod(&PodSpec::new("victim").role("victim-role")).unwrap();
    sandbox.add_agent(Path::new(AGENT), &["--auto-discover-base-arn"]).unwrap();
    let container = Container::of(&mut sandbox);
    sandbox.agent().unwrap().spawn().unwrap();
    await_pods(&mut sandbox, 1);
    assert_serves_victim(&sandbox);
    let small = peak_kib(&container);
    sandbox.agent().unwrap().terminate().unwrap();

    for n in 0..pods {
        sandbox.api().apply(large_pod(n, "listed")).unwrap();
    }
    sandbox.agent().unwrap().spawn().unwrap();
    await_pods(&mut sandbox, pods + 1);
    assert_serves_victim(&sandbox);
    let listed = peak_kib(&container);
    for n in 0..pods {
        sandbox.api().apply(large_pod(n, "watched")).unwrap();
    }
    sandbox.api().apply(large_pod(pods, "last")).unwrap();
    await_pods(&mut sandbox, pods + 2);
    assert_serves_victim(&sandbox);
    let watched = peak_kib(&container);

    println!(
        "{pods} large pods; resident at most {listed} KiB, after changes of all {watched} KiB; without {small} KiB"
    );
    assert!(listed < small + GROWTH_KIB, "{listed} KiB, without large pods {small} KiB");
    assert!(watched < small + GROWTH_KIB, "{watched} KiB, without large pods {small} KiB");
    assert_eq!(container.number("memory.events", "oom_kill "), 0);
}

/// What large pods may add to the agent's memory: a buffer each for what is read at a time, and 10 KiB a pod
/// for its annotations.
const GROWTH_KIB: u64 = 8 * 1024;

/// With all annotations that count, of 50 KiB each, and 1 MiB in an environment variable. Every tenth has
/// characters there that take six bytes each on the way.
fn large_pod(n: u32, change: &str) -> serde_json::Value {
    let keys = ["role", "external-id", "policy", "session-duration", "session-name"];
    let manifest = PodManifest {
        annotations: keys.map(|key| (format!("ram.aliyuncs.com/{key}"), change.repeat(50 * 1024 / 8))).into(),
        host_network: false,
        name: format!("large-{n}"),
        namespace: "default".to_owned(),
        node: Sandbox::NODE.to_owned(),
        service_account: "default".to_owned(),
        uid: format!("00000000-0000-4000-8000-{n:012x}"),
    };
    let mut pod = manifest.to_json();
    let value = if n.is_multiple_of(10) { "\u{1}" } else { "y" }.repeat(1024 * 1024);
    pod["spec"]["containers"] = serde_json::json!([{"name": "c", "env": [{"name": "V", "value": value}]}]);
    pod
}

fn await_pods(sandbox: &mut Sandbox, pods: u32) {
    let deadline = Instant::now() + Duration::from_secs(300);
    let known = |agent: &mut Agent| agent.metric("kube2ram_kubernetes_pods").unwrap_or_default();
    while known(sandbox.agent().unwrap()) < f64::from(pods) {
        assert!(
            Instant::now() < deadline,
            "the pods have not been read:\n{}",
            sandbox.agent().unwrap().log()
        );
        thread::sleep(Duration::from_millis(100));
    }
}

fn assert_serves_victim(sandbox: &Sandbox) {
    assert_recovers(sandbox, "large pods");
    let reply = sandbox.pod("victim").unwrap().curl(LIST).unwrap();
    assert_eq!((reply.status, reply.body.as_str()), (200, "victim-role"));
}

/// The most memory that has been resident.
fn peak_kib(container: &Container) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", container.pid())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    peak.trim().trim_end_matches(" kB").parse().unwrap()
}
