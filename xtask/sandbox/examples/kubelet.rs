//! Stands for the kubelet of a node that reboots: makes pods as soon as it starts, has them try everything
//! that a socket can, and prints on the console what arrived at the metadata server. Runs in a virtual
//! machine only: `cargo xtask test --kernels`, which lays out /proof.

use std::{
    env, fs,
    io::{Write as _, stdout},
    mem::MaybeUninit,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream, UdpSocket},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use kube2ram_sandbox::{
    Sandbox,
    node::{CgroupDriver, Node, PodSpec},
    standin::{Accounts, Role},
};
use socket2::{Domain, Protocol, Socket, Type};

const AGENT: &str = "/proof/kube2ram";
const ROLE: &str = "pod-role";
const LIST: &str = "/latest/meta-data/ram/security-credentials/";
/// An emulated processor on a busy machine takes its time.
const READY_DEADLINE: Duration = Duration::from_secs(300);
const METADATA: SocketAddrV4 = SocketAddrV4::new(Node::METADATA_IP, 80);
/// The host's file system as a container has it.
const HOST: &str = "/host";
/// What `boot-guard install` puts there.
const INSTALLED: [&str; 3] = [
    "/opt/kube2ram/bin/kube2ram",
    "/etc/systemd/system/kube2ram-boot-guard.service",
    "/etc/systemd/system/multi-user.target.wants/kube2ram-boot-guard.service",
];
/// Cgroups of containers that are not below the kubelet's, and whether they have their own network there.
const STRAYS: [(&str, bool); 5] = [
    ("kubepods.slice/kubepods-besteffort.slice/cri-containerd-1.scope", false),
    ("kubepods/burstable/pod1/1", false),
    ("default/1", false),
    ("machine.slice/libpod-1.scope", false),
    // A runtime whose driver is not the kubelet's: below its own service, where only the network
    // distinguishes them.
    ("system.slice/containerd.service/kubepods-besteffort-pod1.slice:cri-containerd:1", true),
];

fn main() -> Result<()> {
    if env::args().nth(1).as_deref() == Some("try") {
        return try_everything();
    }
    let (boot, outcome) = match Path::new(INSTALLED[1]).exists() {
        false => ("unguarded", unguarded()),
        true => ("guarded", guarded()),
    };
    let is_right = outcome.is_ok();
    if let Err(error) = &outcome {
        say(&format!("{boot}: {error:#}").replace('\n', "\nk2r-says "))?;
    }
    writeln!(stdout(), "\nk2r-result {boot} {}", u8::from(!is_right))?;
    run(Command::new("systemctl").arg(if is_right && boot == "unguarded" { "reboot" } else { "poweroff" }))
        .map(drop)
}

/// The first boot, and the control: what pods send arrives. Then the guard is installed.
fn unguarded() -> Result<()> {
    let sandbox = node()?;
    let sent = reached(&sandbox)?;
    for (who, packets) in &sent {
        say(&format!("unguarded {who}: {packets} packets"))?;
        ensure!(*packets > 0, "nothing of {who} arrives without a guard either: this proves nothing");
    }
    ensure!(sent.len() == 4 + STRAYS.len());
    fs::create_dir_all(HOST)?;
    run(Command::new("mount").args(["--bind", "/", HOST]))?;
    run(Command::new(AGENT).args(["boot-guard", "install", "--host-root", HOST]))?;
    let again = run(Command::new(AGENT).args(["boot-guard", "install", "--host-root", HOST]))?;
    ensure!(again.contains("is installed already"), "{again}");
    run(&mut Command::new("sync")).map(drop)
}

/// The second boot: the pods are here before any agent, and nothing of theirs arrives. Then an agent takes
/// over.
fn guarded() -> Result<()> {
    let state =
        run(Command::new("systemctl").args(["show", "-P", "ActiveState", "kube2ram-boot-guard.service"]))?;
    ensure!(state.trim() == "active", "the boot guard is {state}");
    let mut sandbox = node()?;
    let preflight = |sandbox: &Sandbox| {
        let mut command = Command::new(AGENT);
        command.arg("preflight").arg("--pods-cgroup").arg(sandbox.node().pods_cgroup());
        command.output().map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
    };
    for (who, packets) in reached(&sandbox)? {
        say(&format!("guarded {who}: {packets} packets"))?;
        ensure!(packets == 0, "{packets} packets of {who} arrive");
    }
    host_daemon_reaches()?;
    let before = preflight(&sandbox)?;
    ensure!(before.contains("active until an agent takes over"), "{before}");

    let bpf_dir = "--bpf-dir=/sys/fs/bpf/kube2ram";
    let agent = sandbox.add_agent(AGENT.as_ref(), &["--auto-discover-base-arn", bpf_dir])?;
    agent.spawn()?;
    let deadline = Instant::now() + READY_DEADLINE;
    while !agent.admin("/readyz").is_ok_and(|reply| reply.status == 200) {
        ensure!(
            Instant::now() < deadline,
            "the agent is not ready after {READY_DEADLINE:?}: {}",
            agent.log()
        );
        sleep(Duration::from_millis(100));
    }
    for pod in ["pod", "static"] {
        let reply = sandbox.pod(pod)?.curl(LIST)?;
        ensure!(reply.body == ROLE, "{pod} gets {reply:?}");
    }
    let ip = sandbox.pod("pod")?.pod().ip();
    let of_pod = sandbox.node().sniffer().packets_from(ip);
    ensure!(of_pod.is_empty(), "{of_pod:?}");
    host_daemon_reaches()?;
    let after = preflight(&sandbox)?;
    ensure!(after.contains("an agent took over"), "{after}");
    ensure!(
        run(Command::new(AGENT).args(["boot-guard", "apply"]))?.contains("an agent's programs are active")
    );
    say("guarded: the agent took over")?;

    run(Command::new("mount").args(["--bind", "/", HOST]))?;
    run(Command::new(AGENT).args(["boot-guard", "remove", "--host-root", HOST]))?;
    let left: Vec<_> = INSTALLED.into_iter().filter(|path| fs::symlink_metadata(path).is_ok()).collect();
    ensure!(left.is_empty(), "left: {left:?}");
    Ok(())
}

/// A node with pods, and nothing that protects them.
fn node() -> Result<Sandbox> {
    let mut sandbox = Sandbox::create_of_machine("reboot", CgroupDriver::Systemd)?;
    sandbox.accounts().add_role(Accounts::role_arn(ROLE), Role::default());
    sandbox.add_pod(&PodSpec::new("pod").role(ROLE))?;
    sandbox.add_pod(&PodSpec::new("static").role(ROLE).static_pod())?;
    sandbox.add_pod(&PodSpec::new("network").host_network())?;
    Ok(sandbox)
}

/// How many packets of whom arrive when everything is tried.
fn reached(sandbox: &Sandbox) -> Result<Vec<(String, usize)>> {
    let this = env::current_exe()?;
    let mut sent = Vec::new();
    let mut attempt = |who: &str, command: &mut Command| -> Result<()> {
        let before = sandbox.node().sniffer().packets().len();
        let output = command.arg("try").stdin(Stdio::null()).output()?;
        ensure!(output.status.success(), "{who}: {}", told(&output));
        say(&format!("{who}: {}", told(&output)))?;
        // What is on its way arrives: one machine, no queue.
        sleep(Duration::from_millis(200));
        sent.push((who.to_owned(), sandbox.node().sniffer().packets().len() - before));
        Ok(())
    };
    for pod in ["pod", "static", "network"] {
        attempt(pod, &mut sandbox.pod(pod)?.pod().command("app", &this)?)?;
    }
    let nested = sandbox.pod("pod")?.pod().nested_command("app", "nested/deeper", &this)?;
    attempt("pod/nested", &mut { nested })?;
    let netns = sandbox.pod("pod")?.pod().netns().context("the pod has a network of its own")?;
    for (cgroup, own_network) in STRAYS {
        let cgroup = sandbox.node().cgroup_root().join(cgroup);
        attempt(&cgroup.display().to_string(), &mut stray(&cgroup, own_network.then_some(&netns), &this)?)?;
    }
    Ok(sent)
}

/// A program in a cgroup of any name.
fn stray(cgroup: &Path, netns: Option<&PathBuf>, program: &Path) -> Result<Command> {
    fs::create_dir_all(cgroup)?;
    let mut command = Command::new("sh");
    command.args(["-c", r#"echo $$ > "$1" && shift && exec "$@""#, "sh"]).arg(cgroup.join("cgroup.procs"));
    if let Some(netns) = netns {
        command.arg("nsenter").arg(format!("--net={}", netns.display())).arg("--");
    }
    command.arg(program);
    Ok(command)
}

/// A daemon of the host: this process, below system.slice.
fn host_daemon_reaches() -> Result<()> {
    let cgroup = fs::read_to_string("/proc/self/cgroup")?;
    ensure!(cgroup.trim() == "0::/system.slice/kubelet.service", "{cgroup}");
    let answers = tcp(METADATA.into());
    ensure!(answers == "connected", "a daemon of the host is {answers}");
    Ok(())
}

/// What a socket can try; one line has the result of each.
fn try_everything() -> Result<()> {
    let mapped = SocketAddr::from((Ipv4Addr::to_ipv6_mapped(METADATA.ip()), METADATA.port()));
    let udp = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let outcomes = [
        ("tcp", tcp(METADATA.into())),
        ("mapped", tcp(mapped)),
        ("datagram", outcome(udp.send_to(b"x", METADATA))),
        ("connected datagram", outcome(udp.connect(METADATA).and_then(|()| udp.send(b"x")))),
        ("raw", outcome(ping())),
    ];
    let outcomes: Vec<_> = outcomes.map(|(what, outcome)| format!("{what} {outcome}")).into();
    Ok(writeln!(stdout(), "{}", outcomes.join(", "))?)
}

fn tcp(to: SocketAddr) -> String {
    match TcpStream::connect_timeout(&to, Duration::from_secs(3)) {
        Ok(_) => "connected".to_owned(),
        Err(error) => error.to_string(),
    }
}

/// An echo request, RFC 792.
fn ping() -> std::io::Result<usize> {
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    socket.send_to(&[8, 0, 0xf7, 0xff, 0, 0, 0, 0], &SocketAddr::from(METADATA).into())?;
    socket.recv(&mut [MaybeUninit::uninit(); 64])
}

fn outcome(result: std::io::Result<usize>) -> String {
    result.map_or_else(|error| error.to_string(), |_| "sent".to_owned())
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}", told(&output));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn told(output: &Output) -> String {
    let text = [output.stdout.as_slice(), &output.stderr].concat();
    String::from_utf8_lossy(&text).trim().to_owned()
}

fn say(what: &str) -> Result<()> {
    Ok(writeln!(stdout(), "k2r-says {what}")?)
}
