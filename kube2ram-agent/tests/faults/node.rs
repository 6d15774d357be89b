//! A sandbox with one pod that tries all the time, an agent that strace can run, and queries of what is
//! attached.

use std::{
    collections::HashSet,
    fs,
    io::{BufRead as _, BufReader},
    net::TcpListener,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use kube2ram_sandbox::{
    Sandbox,
    node::{Packet, PodSpec},
    standin::{Accounts, Role},
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::steps::{Step, read, traced};

const AGENT: &str = env!("CARGO_BIN_EXE_kube2ram");
const LIST: &str = "/latest/meta-data/ram/security-credentials/";
pub(crate) const ROLE: &str = "pod-role";
const POD: &str = "pod";

pub(crate) struct Node {
    pub(crate) sandbox: Sandbox,
    prober: Child,
    rounds: Arc<AtomicUsize>,
}

/// How a start under strace ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    Ended,
    Ready,
}

impl Node {
    /// No agent runs yet. `guard` is the value of `--forward-guard` and `--wire-guard`: where it is `off`,
    /// what denies is the programs alone.
    pub(crate) fn new(name: &str, guard: &str) -> Self {
        let mut sandbox = Sandbox::create(name).unwrap();
        sandbox.accounts().add_role(Accounts::role_arn(ROLE), Role::default());
        sandbox.add_pod(&PodSpec::new(POD).role(ROLE)).unwrap();
        let wrapper = sandbox.node().directory().join("agent.sh");
        let script = format!(
            "#!/bin/sh\n[ -z \"$CGROUP_PROCS\" ] || echo $$ > $CGROUP_PROCS\n\
             [ -z \"$STRACE\" ] || exec strace $STRACE {AGENT} \"$@\"\nexec {AGENT} \"$@\"\n"
        );
        fs::write(&wrapper, script).unwrap();
        fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).unwrap();
        let (forward, wire) = (format!("--forward-guard={guard}"), format!("--wire-guard={guard}"));
        sandbox.add_agent(&wrapper, &["--auto-discover-base-arn", &forward, &wire]).unwrap();
        let (prober, rounds) = probe(&sandbox);
        let node = Self { sandbox, prober, rounds };
        node.has_arrived_everywhere();
        node
    }

    /// Waits until the pod has arrived at both addresses in each of its ways. Before that, a packet may wait
    /// for a neighbour's address, long after the programs let it pass.
    fn has_arrived_everywhere(&self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        let kinds = || -> HashSet<_> {
            self.leaks().iter().map(|packet| (packet.source.is_ipv6(), packet.protocol)).collect()
        };
        while kinds().len() < 6 {
            assert!(Instant::now() < deadline, "the pod does not arrive: {:?}", kinds());
            thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn bpf_dir(&self) -> PathBuf {
        self.sandbox.node().bpffs().join("kube2ram")
    }

    /// Starts the agent, and waits until it is ready or has ended.
    pub(crate) fn start(&mut self, strace: &[String]) -> Start {
        self.set_strace(strace);
        if self.sandbox.agent().unwrap().start().is_ok() { Start::Ready } else { Start::Ended }
    }

    /// Starts the agent, and waits for nothing.
    pub(crate) fn spawn(&mut self, strace: &[String]) {
        self.set_strace(strace);
        self.sandbox.agent().unwrap().spawn().unwrap();
    }

    /// Waits for a start's end: ready, or not in time.
    pub(crate) fn wait(&mut self) -> Start {
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            if self.sandbox.agent().unwrap().admin("/readyz").is_ok_and(|reply| reply.status == 200) {
                return Start::Ready;
            }
            thread::sleep(Duration::from_millis(5));
        }
        Start::Ended
    }

    fn set_strace(&mut self, strace: &[String]) {
        let mut line = Command::new("strace");
        traced(&mut line, strace, "");
        let line: Vec<_> = line.get_args().map(|argument| argument.to_str().unwrap()).collect();
        let line = if strace.is_empty() { String::new() } else { line.join(" ") };
        self.sandbox.agent().unwrap().set_env("STRACE", &line);
    }

    /// A start without faults, which must serve the pod its role.
    pub(crate) fn start_plainly(&mut self, why: &str) {
        assert_eq!(self.start(&[]), Start::Ready, "{why}: {}", self.sandbox.agent().unwrap().log());
        assert_eq!(self.role(), ROLE, "{why}");
    }

    /// Kills the agent, and strace if that is between us.
    pub(crate) fn kill(&mut self) {
        let agent = self.sandbox.agent().unwrap();
        let procs = agent.pod().container_cgroup("agent").unwrap().join("cgroup.procs");
        // Next to other work the kernel takes its time to end a process that is traced.
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let pids = fs::read_to_string(&procs).unwrap_or_default();
            for pid in pids.lines().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)) {
                let _it_may_have_ended = kill_process(pid, Signal::KILL);
            }
            agent.kill().unwrap();
            // The kernel lists no process that is about to end, but that has its port still.
            if pids.is_empty() && TcpListener::bind(agent.app_addr()).is_ok() {
                return;
            }
            assert!(Instant::now() < deadline, "it does not go: {pids}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    pub(crate) fn uninstall(&self, strace: &[String]) -> Output {
        let host = self.sandbox.node();
        let mut command;
        if strace.is_empty() {
            command = host.host_command(AGENT);
        } else {
            command = host.host_command("strace");
            traced(&mut command, strace, AGENT);
        }
        command.arg("uninstall").arg("--bpf-dir").arg(self.bpf_dir()).output().unwrap()
    }

    pub(crate) fn uninstall_plainly(&self, why: &str) {
        let output = self.uninstall(&[]);
        assert!(output.status.success(), "{why}: {output:?}");
        assert!(!self.bpf_dir().exists(), "{why}");
    }

    /// Runs something under strace and returns its steps.
    pub(crate) fn steps(&mut self, run: impl FnOnce(&mut Self, &[String])) -> Vec<Step> {
        let steps = self.steps_of_thread(Step::changes, run);
        assert!(steps.iter().filter(|step| step.changes()).count() >= 20, "{steps:?}");
        steps
    }

    /// The same, of the thread that does most of a kind.
    pub(crate) fn steps_of_thread(
        &mut self,
        kind: impl Fn(&Step) -> bool,
        run: impl FnOnce(&mut Self, &[String]),
    ) -> Vec<Step> {
        let trace = self.sandbox.node().directory().join("trace");
        run(self, &[format!("--output={}", trace.display())]);
        let steps = read(&trace, kind);
        fs::remove_file(trace).unwrap();
        steps
    }

    pub(crate) fn role(&self) -> String {
        let reply = self.sandbox.pod(POD).unwrap().curl(LIST);
        reply.map_or_else(|error| format!("{error:#}"), |reply| reply.body)
    }

    /// Attempts of the pod that have arrived at the metadata server. Not what the kernel itself acknowledges
    /// for a connection of before: such a socket is in TIME_WAIT, of no cgroup, and carries nothing.
    pub(crate) fn leaks(&self) -> Vec<Packet> {
        const SYN: u8 = 2;
        let pod = self.sandbox.pod(POD).unwrap().pod();
        let sniffer = self.sandbox.node().sniffer();
        let mut packets = sniffer.packets_from(pod.ip());
        packets.extend(sniffer.packets_from(pod.ip6()));
        packets
            .retain(|packet| i32::from(packet.protocol) != libc::IPPROTO_TCP || packet.tcp_flags & SYN != 0);
        packets
    }

    /// How many attempts have arrived, after what was on its way has.
    pub(crate) fn leaks_so_far(&self) -> usize {
        self.tries_again();
        self.leaks().len()
    }

    /// Waits until the pod has tried everything again.
    pub(crate) fn tries_again(&self) {
        let (now, deadline) = (self.rounds.load(Ordering::Relaxed), Instant::now() + Duration::from_secs(60));
        while self.rounds.load(Ordering::Relaxed) < now + 2 {
            assert!(Instant::now() < deadline, "the pod does not try");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Ends the process that tries all the time.
    pub(crate) fn stop_trying(&mut self) {
        drop(self.prober.kill());
        drop(self.prober.wait());
    }

    /// Has the agent run where host daemons do from the next start on, and empties its pod: nothing of the
    /// pods' cgroup is in use by it then.
    pub(crate) fn move_agent_out(&mut self) {
        let host = self.sandbox.node().pods_cgroup().parent().unwrap().join("host/cgroup.procs");
        let agent = self.sandbox.agent().unwrap();
        agent.set_env("CGROUP_PROCS", host.to_str().unwrap());
        let pause = agent.pod().container_cgroup("pause").unwrap().join("cgroup.procs");
        for pid in fs::read_to_string(pause).unwrap().lines() {
            fs::write(&host, pid).unwrap();
        }
    }

    /// Whether the program that lets nothing out is attached to the pods' cgroup.
    pub(crate) fn denies(&self) -> bool {
        let pin = self.bpf_dir().join("v2/links/pods/k2r_egress");
        let pods = fs::metadata(self.sandbox.node().pods_cgroup()).unwrap().ino();
        pin.exists() && bpftool(&["link", "show", "pinned", pin.to_str().unwrap()])["cgroup_id"] == pods
    }

    pub(crate) fn links(&self) -> Vec<PathBuf> {
        pinned_links(&self.bpf_dir())
    }

    /// A sample of the agent's metrics; zero when there is none.
    pub(crate) fn metric(&mut self, sample: &str) -> f64 {
        self.sandbox.agent().unwrap().metric(sample).unwrap()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        drop(self.prober.kill());
        drop(self.prober.wait());
        self.kill();
    }
}

/// A process of the pod that tries TCP, UDP and a raw socket to both addresses, again and again.
fn probe(sandbox: &Sandbox) -> (Child, Arc<AtomicUsize>) {
    const SCRIPT: &str = "import socket, time\nV4, V6 = ('100.100.100.200', 80), ('fd00:100::100:200', 80)\n\
        def attempt(family, kind, protocol, act):\n  s = socket.socket(family, kind, protocol)\n  s.settimeout(0.05)\n\
        \x20 try: act(s)\n  except OSError: pass\n  s.close()\n\
        def ping(family, to, protocol, echo): attempt(family, socket.SOCK_RAW, protocol, lambda s: s.sendto(echo, (to[0], 0)))\n\
        while True:\n\
        \x20 for family, to in (socket.AF_INET, V4), (socket.AF_INET6, V6):\n\
        \x20   attempt(family, socket.SOCK_STREAM, 0, lambda s: s.connect(to))\n\
        \x20   attempt(family, socket.SOCK_DGRAM, 0, lambda s: s.sendto(b'x', to))\n\
        \x20 ping(socket.AF_INET, V4, socket.IPPROTO_ICMP, b'\\x08\\0\\xf7\\xff\\0\\0\\0\\0')\n\
        \x20 ping(socket.AF_INET6, V6, socket.IPPROTO_ICMPV6, b'\\x80' + bytes(7))\n\
        \x20 print(flush=True)\n  time.sleep(0.005)";
    let mut command = sandbox.pod(POD).unwrap().pod().command("app", "python3").unwrap();
    let mut prober = command.args(["-c", SCRIPT]).stdout(Stdio::piped()).spawn().unwrap();
    let (rounds, lines) = (Arc::new(AtomicUsize::new(0)), BufReader::new(prober.stdout.take().unwrap()));
    let counted = Arc::clone(&rounds);
    thread::spawn(move || {
        for _ in lines.lines() {
            counted.fetch_add(1, Ordering::Relaxed);
        }
    });
    (prober, rounds)
}

pub(crate) fn bpftool(arguments: &[&str]) -> Value {
    let output = Command::new("bpftool").arg("-j").args(arguments).output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

pub(crate) fn pinned_links(bpf_dir: &Path) -> Vec<PathBuf> {
    let pins = Command::new("find").arg(bpf_dir).args(["-path", "*/links/*/*"]).output().unwrap();
    let mut pins: Vec<_> = String::from_utf8(pins.stdout).unwrap().lines().map(PathBuf::from).collect();
    pins.sort();
    pins
}
