//! Agents of different map layouts after each other, and the directory that all of them share.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::fd::AsFd as _,
    process::Child,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use kube2ram_agent::datapath::{
    AcceptedOrigins, AgentAddr, Datapath, DatapathError, Layout, Origins as _, Settings, remove,
};

use super::{assert_works, pinned_links};
use crate::lab::{Lab, METADATA};

/// An agent's listener, which answers `1` to whom it was told who it is.
struct Server {
    addr: SocketAddr,
    origins: Arc<OnceLock<AcceptedOrigins>>,
    served: Arc<AtomicUsize>,
}

impl Server {
    /// Those who are early wait for `origins`.
    fn start(expected: kube2ram_agent::datapath::Origin) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let addr = listener.local_addr().unwrap();
        let (origins, served) = (Arc::new(OnceLock::<AcceptedOrigins>::new()), Arc::new(AtomicUsize::new(0)));
        let (read, counted) = (Arc::clone(&origins), Arc::clone(&served));
        thread::spawn(move || {
            use std::io::Write as _;
            for connection in listener.incoming() {
                let mut connection = connection.unwrap();
                let origin = read.wait().origin_of(connection.as_fd());
                let answer = if origin.is_ok_and(|origin| origin == expected) { b"1" } else { b"0" };
                drop(connection.write_all(answer));
                counted.fetch_add(1, Ordering::Relaxed);
            }
        });
        Self { addr, origins, served }
    }

    fn agent(&self) -> AgentAddr {
        let SocketAddr::V4(addr) = self.addr else { unreachable!("bound to IPv4") };
        AgentAddr(addr)
    }
}

/// Connects again and again until its standard input ends; prints how often it was told the right thing, and
/// what else happened.
fn storm(lab: &Lab) -> Child {
    let script = format!(
        "import select, socket, sys\nok, bad = 0, []\nwhile not select.select([sys.stdin], [], [], 0)[0]:\n\
         \x20try:\n  s = socket.socket()\n  s.settimeout(5)\n  s.connect(('{}', {}))\n  r = s.recv(1)\n\
         \x20 if r == b'1': ok += 1\n  else: bad.append(repr(r))\n  s.close()\n\
         \x20except OSError as e: bad.append(repr(e))\nprint(ok, len(bad), bad[:3])",
        METADATA.ip(),
        METADATA.port()
    );
    lab.python("pods/a", &script)
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn no_connect_is_lost_or_wrong_while_layouts_change() {
    const CHANGES: u32 = 12;
    let lab = Lab::new();
    let server = || Server::start(lab.task("pods/a"));
    let attach = |server: &Server, layout| {
        let settings = Settings { agent: server.agent(), ..lab.settings() };
        let datapath = Datapath::attach_layout(&settings, Layout(layout)).unwrap();
        server.origins.set(datapath.origins().unwrap()).ok().unwrap();
        datapath
    };
    let mut servers = vec![server()];
    let mut datapath = attach(&servers[0], 1);
    let clients: Vec<_> = (0..3).map(|_| storm(&lab)).collect();

    for change in 1..=CHANGES {
        eventually(|| servers.last().unwrap().served.load(Ordering::Relaxed) >= 50);
        // The former agent goes on serving what reaches it, but writes nothing any more.
        drop(datapath);
        servers.push(server());
        datapath = attach(servers.last().unwrap(), 1 + change % 2);
        let pins = pinned_links(&lab.bpf_dir);
        let ours = format!("/v{}/", 1 + change % 2);
        assert!(pins.len() >= 11 && pins.iter().all(|pin| pin.to_str().unwrap().contains(&ours)), "{pins:?}");
    }
    eventually(|| servers.last().unwrap().served.load(Ordering::Relaxed) >= 50);

    let reports: Vec<_> = clients
        .into_iter()
        .map(|client| String::from_utf8(client.wait_with_output().unwrap().stdout).unwrap())
        .collect();
    for report in &reports {
        assert!(report.trim().ends_with(" 0 []"), "{reports:?}");
    }
    let counters: Vec<_> = datapath.counters().unwrap().read().collect();
    assert!(counters.contains(&("denied_egress", 0)) && counters.contains(&("ambiguous", 0)), "{counters:?}");
    println!("{CHANGES} changes of layout under load: {reports:?}");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn removal_takes_every_layout() {
    let lab = Lab::new();
    // Both at once is what an agent leaves that was killed before it took the other layout's programs out.
    drop(lab.attach());
    fs::rename(lab.bpf_dir.join("v2"), lab.bpf_dir.join("v7")).unwrap();
    let other = Lab::new();
    drop(Datapath::attach(&Settings { bpf_dir: other.bpf_dir.clone(), ..lab.settings() }).unwrap());
    fs::rename(other.bpf_dir.join("v2"), lab.bpf_dir.join("v2")).unwrap();
    let links = pinned_links(&lab.bpf_dir).len();
    assert!(links >= 22);

    let removed = remove(&lab.bpf_dir).unwrap();

    assert_eq!(removed.links, links);
    assert!(!lab.bpf_dir.exists());
    // And a start where both are.
    drop(lab.attach());
    fs::rename(lab.bpf_dir.join("v2"), lab.bpf_dir.join("v7")).unwrap();
    assert_works(&lab, &lab.attach().origins().unwrap());
    assert!(!lab.bpf_dir.join("v7").exists());
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_agent_that_runs_has_its_directory_however_often_somebody_removes_it() {
    const STARTS: usize = 12;
    let lab = Lab::new();
    let ended = AtomicUsize::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            while ended.load(Ordering::Relaxed) == 0 {
                match remove(&lab.bpf_dir) {
                    Ok(_) | Err(DatapathError::Locked(_)) => {}
                    Err(error) => panic!("{error:?}"),
                }
            }
        });
        let _ends = Ends(&ended);
        let mut started = 0;
        while started < STARTS {
            let datapath = match Datapath::attach(&lab.settings()) {
                Ok(datapath) => datapath,
                Err(DatapathError::Locked(_)) => continue,
                Err(error) => panic!("{error:?}"),
            };
            assert!(pinned_links(&lab.bpf_dir).len() >= 11, "start {started}");
            assert!(matches!(remove(&lab.bpf_dir), Err(DatapathError::Locked(_))));
            drop(datapath);
            started += 1;
        }
    });
}

/// Ends the other thread even if this one fails.
struct Ends<'a>(&'a AtomicUsize);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(1, Ordering::Relaxed);
    }
}

fn eventually(done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < deadline, "not done in time");
        thread::sleep(Duration::from_millis(1));
    }
}
