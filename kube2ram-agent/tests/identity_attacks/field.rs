//! The eBPF programs, attached in their own network namespace, and clients in it. Used by all tests here.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    net::{Ipv4Addr, TcpStream},
    os::fd::AsFd as _,
    process::{Child, Command},
};

use aya::maps::{HashMap, Map, MapData};
use kube2ram_agent::{
    datapath::{AcceptedOrigins, Datapath, Origin, OriginError, Origins as _},
    identity::CgroupId,
};
use kube2ram_common::{
    abi::{ConnectRecord, Handshake},
    connection::{addr_be, port_be},
    names,
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::lab::{Lab, METADATA};

/// A namespace for a test's thread and its children, so that ports and sysctls are the test's own. Removed at
/// the end.
pub(crate) struct Netns(pub(crate) String);

impl Netns {
    /// Makes one, with nothing but a loopback device.
    pub(crate) fn new(name: &str) -> Self {
        let name = format!("kube2ram-{name}-{}", std::process::id());
        ip(&["netns", "add", &name]);
        ip(&["-n", &name, "link", "set", "lo", "up"]);
        Self(name)
    }

    fn enter(&self) {
        let file = fs::File::open(format!("/run/netns/{}", self.0)).unwrap();
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        ip(&["netns", "delete", &self.0]);
    }
}

fn ip(arguments: &[&str]) {
    let status = Command::new("ip").args(arguments).status().expect("iproute2");
    assert!(status.success() || std::thread::panicking(), "ip {arguments:?}");
}

/// The attached eBPF programs in their own namespace, with the agent's side of it.
pub(crate) struct Field {
    pub(crate) lab: Lab,
    pub(crate) datapath: Datapath,
    pub(crate) origins: AcceptedOrigins,
    pub(crate) netns: Netns,
}

impl Field {
    pub(crate) fn new(name: &str) -> Self {
        let netns = Netns::new(name);
        netns.enter();
        let lab = Lab::new();
        let datapath = lab.attach();
        Self { origins: datapath.origins().unwrap(), lab, datapath, netns }
    }

    /// Who is behind the next connection, by the directory of the cgroup.
    pub(crate) fn next(&self) -> (TcpStream, Result<CgroupId, OriginError>) {
        let accepted = self.lab.accept();
        let origin = self.origin_of(&accepted);
        (accepted, origin)
    }

    /// Whom the agent takes an accepted connection for.
    pub(crate) fn origin_of(&self, accepted: &TcpStream) -> Result<CgroupId, OriginError> {
        match self.origins.origin_of(accepted.as_fd())? {
            Origin::Task(cgroup) => Ok(cgroup),
            Origin::Pod(uid) => panic!("{uid} has no listener here"),
        }
    }

    /// Starts a client that has these in scope, and controls it line by line.
    pub(crate) fn client(&self, cgroup: &str, script: &str) -> Client {
        let scope = format!(
            "import ctypes, os, struct, sys\nfrom socket import *\nMETADATA = ('{}', {})\nAGENT = ('{}', {})\nPODS = {:?}\n\
             def tcp(port=0, host='127.0.0.1'):\n  s = socket(AF_INET, SOCK_STREAM)\n  s.settimeout(20)\n  s.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)\n  \
             s.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack('ii', 1, 0))\n  s.bind((host, port)) if port else None\n  return s\n\
             def dissolve(s):\n  assert ctypes.CDLL(None, use_errno=True).connect(s.fileno(), bytes(16), 16) == 0\n\
             def move(pod):\n  open(PODS + '/' + pod + '/cgroup.procs', 'w').write(str(os.getpid()))\n\
             def wait():\n  sys.stdin.readline()\n",
            METADATA.ip(),
            METADATA.port(),
            self.lab.agent().ip(),
            self.lab.agent().port(),
            self.lab.cgroup.join("pods"),
        );
        Client::new(self.lab.python(cgroup, &(scope + script)))
    }

    /// Connects from a port as an honest client, and returns whom the agent takes it for.
    pub(crate) fn dial(&self, cgroup: &str, port: u16) -> Result<CgroupId, OriginError> {
        self.dial_from(cgroup, Ipv4Addr::LOCALHOST, port)
    }

    pub(crate) fn dial_from(&self, cgroup: &str, host: Ipv4Addr, port: u16) -> Result<CgroupId, OriginError> {
        let connect = format!("s = tcp({port}, '{host}')\ns.connect(METADATA)\ns.recv(1)\ns.close()");
        let client = self.client(cgroup, &connect);
        let (accepted, origin) = self.next();
        drop(accepted);
        client.finish();
        origin
    }

    pub(crate) fn handshakes(&self) -> HashMap<MapData, Handshake, ConnectRecord> {
        let pin = self.lab.bpf_dir.join("v2/maps").join(names::map::HANDSHAKES);
        HashMap::try_from(Map::from_map_data(MapData::from_pin(pin).unwrap()).unwrap()).unwrap()
    }

    /// Records of client sockets.
    pub(crate) fn clients(&self) -> HashMap<MapData, u64, ConnectRecord> {
        let pin = self.lab.bpf_dir.join("v2/maps").join(names::map::CLIENTS);
        HashMap::try_from(Map::from_map_data(MapData::from_pin(pin).unwrap()).unwrap()).unwrap()
    }

    /// Places of shares that are taken.
    pub(crate) fn shares(&self) -> HashMap<MapData, u64, u64> {
        let pin = self.lab.bpf_dir.join("v2/maps").join(names::map::SHARES);
        HashMap::try_from(Map::from_map_data(MapData::from_pin(pin).unwrap()).unwrap()).unwrap()
    }

    /// What is kept of connections in flight.
    pub(crate) fn pending(&self) -> usize {
        let (handshakes, clients) = (self.handshakes().keys().count(), self.clients().keys().count());
        handshakes.max(clients).max(self.shares().keys().count())
    }

    pub(crate) fn counter(&self, name: &str) -> u64 {
        self.datapath.counters().unwrap().read().find(|(label, _)| *label == name).unwrap().1
    }

    /// The handshake that a client of this namespace has from that port.
    pub(crate) fn handshake(&self, port: u16) -> Handshake {
        self.handshake_from(Ipv4Addr::LOCALHOST, port)
    }

    pub(crate) fn handshake_from(&self, host: Ipv4Addr, port: u16) -> Handshake {
        let agent = self.lab.agent();
        Handshake::new((addr_be(host), port_be(port)), (addr_be(*agent.ip()), port_be(agent.port())))
    }
}

/// As the eBPF programs read the clock.
pub(crate) fn uptime_ns() -> u64 {
    let uptime = fs::read_to_string("/proc/uptime").unwrap();
    let (seconds, _) = uptime.split_once('.').unwrap();
    seconds.parse::<u64>().unwrap() * 1_000_000_000
}

/// A client that waits for us, and that we wait for.
pub(crate) struct Client {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Client {
    fn new(mut child: Child) -> Self {
        Self { lines: BufReader::new(child.stdout.take().unwrap()), child }
    }

    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    pub(crate) fn finish(mut self) {
        drop(self.child.stdin.take());
        let output = self.child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
