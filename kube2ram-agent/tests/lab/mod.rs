//! The least that the eBPF programs need: cgroups for pods, a pin directory, and the agent's listener. Used
//! by the tests of rung 2.

use std::{
    fs,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{self, Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use kube2ram_agent::{
    datapath::{AgentAddr, Datapath, Origin, Settings},
    identity::CgroupId,
};
use kube2ram_cloud::MetadataAddr;

/// An address of TEST-NET-2: nobody owns it, so a connect that is not redirected harms nobody.
pub(crate) const METADATA: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(198, 51, 100, 200), 80);
/// The same server's IPv6 address, of the documentation prefix. No two of its 32-bit words are equal.
pub(crate) const METADATA6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0x100, 0, 0x64, 0x100, 0x200);

/// A cgroup tree, a pin directory and the agent's listener; removed at the end.
pub(crate) struct Lab {
    pub(crate) cgroup: PathBuf,
    pub(crate) bpf_dir: PathBuf,
    pub(crate) listener: TcpListener,
}

impl Lab {
    pub(crate) fn new() -> Self {
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        let name = format!("kube2ram-test-{}-{}", process::id(), SERIAL.fetch_add(1, Ordering::Relaxed));
        let root = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
            .into_iter()
            .map(Path::new)
            .find(|root| root.join("cgroup.procs").exists())
            .expect("a cgroup2 mount");
        let cgroup = root.join(&name);
        for child in ["pods/a/nested", "pods/b", "host"] {
            fs::create_dir_all(cgroup.join(child)).expect("root may create cgroups");
        }
        let bpf_dir = Path::new("/sys/fs/bpf").join(name);
        Self { cgroup, bpf_dir, listener: TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap() }
    }

    pub(crate) fn agent(&self) -> SocketAddrV4 {
        let SocketAddr::V4(agent) = self.listener.local_addr().unwrap() else {
            unreachable!("bound to IPv4")
        };
        agent
    }

    pub(crate) fn settings(&self) -> Settings {
        Settings {
            bpf_dir: self.bpf_dir.clone(),
            cgroup_root: self.cgroup.parent().unwrap().into(),
            pods_cgroup: self.cgroup.join("pods"),
            other_pods_cgroups: Vec::new(),
            own_cgroup: own_cgroup(&self.cgroup),
            metadata: MetadataAddr { v4: METADATA, v6: Some(METADATA6) },
            agent: AgentAddr(self.agent()),
            keeps_open: false,
            guards_wire: true,
            debug: false,
        }
    }

    pub(crate) fn attach(&self) -> Datapath {
        Datapath::attach(&self.settings()).expect("the eBPF programs attach")
    }

    pub(crate) fn id(&self, cgroup: &str) -> CgroupId {
        CgroupId(fs::metadata(self.cgroup.join(cgroup)).unwrap().ino())
    }

    /// A task of that cgroup.
    #[allow(dead_code, reason = "not in every test that uses the lab")]
    pub(crate) fn task(&self, cgroup: &str) -> Origin {
        Origin::Task(self.id(cgroup))
    }

    /// Runs Python in a cgroup; its sockets are made there. What it reads is ours to write.
    pub(crate) fn python(&self, cgroup: &str, script: &str) -> Child {
        Command::new("sh")
            .args(["-c", r#"echo $$ > "$1/cgroup.procs" && exec python3 -c "$2""#, "sh"])
            .arg(self.cgroup.join(cgroup))
            .arg(script)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    pub(crate) fn accept(&self) -> TcpStream {
        self.listener.set_nonblocking(true).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => return stream,
                Err(error) => assert!(Instant::now() < deadline, "nobody connected: {error}"),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // bpffs refuses nothing that we made: pins first, so that the links go with them.
        drop(fs::remove_dir_all(&self.bpf_dir));
        for child in ["pods/a/nested", "pods/a", "pods/b", "pods", "host", ""] {
            drop(fs::remove_dir(self.cgroup.join(child)));
        }
    }
}

/// The cgroup of this process, which owns the listener.
pub(crate) fn own_cgroup(lab: &Path) -> PathBuf {
    let path = fs::read_to_string("/proc/self/cgroup").unwrap();
    let path = path.lines().find_map(|line| line.strip_prefix("0::/")).unwrap().to_owned();
    lab.parent().unwrap().join(path)
}
