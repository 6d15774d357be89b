//! Programs of somebody else's in the same cgroups: where they stand, before ours or after, opens nothing.

use std::{
    io::{BufRead as _, BufReader},
    net::Ipv4Addr,
    os::fd::AsFd as _,
    process::Child,
};

use kube2ram_agent::datapath::{Datapath, Origins as _};

use super::{assert_works, dial};
use crate::lab::{Lab, METADATA};

/// Nobody's: the other program decides where connections to it go.
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 201);

/// Attaches a connect4 program that rewrites one destination to another, as a load balancer does. Attached
/// until it is dropped.
struct Rival(Child);

impl Rival {
    fn attach(lab: &Lab, cgroup: &str, from: Ipv4Addr, to: Ipv4Addr) -> Self {
        // BPF_PROG_LOAD of: r2 = destination; if r2 == from: destination = to; return 1. Then
        // BPF_LINK_CREATE, for as long as this process lives.
        let script = format!(
            "import ctypes, os, socket, struct, sys\nlibc = ctypes.CDLL(None, use_errno=True)\n\
             def bpf(command, attr):\n  b = ctypes.create_string_buffer(attr, len(attr))\n  r = libc.syscall(321, command, b, len(attr))\n\
             \x20 assert r >= 0, ctypes.get_errno()\n  return r\n\
             ip = lambda text: struct.unpack('i', socket.inet_aton(text))[0]\n\
             insns = b''.join(struct.pack('BBhi', *i) for i in [(0x61, 0x12, 4, 0), (0x56, 2, 2, ip('{from}')), (0xb4, 3, 0, ip('{to}')),\n\
             \x20 (0x63, 0x31, 4, 0), (0xb7, 0, 0, 1), (0x95, 0, 0, 0)])\n\
             code, gpl = ctypes.create_string_buffer(insns), ctypes.create_string_buffer(b'GPL')\n\
             attr = struct.pack('IIQQIIQII16sII', 18, len(insns) // 8, ctypes.addressof(code), ctypes.addressof(gpl), 0, 0, 0, 0, 0, b'rival', 0, 10)\n\
             link = bpf(28, struct.pack('IIII', bpf(5, attr), os.open('{}', os.O_RDONLY), 10, 0))\n\
             print('attached', flush=True)\nsys.stdin.read()",
            lab.cgroup.join(cgroup).display()
        );
        let mut process = lab.python("host", &script);
        let mut line = String::new();
        BufReader::new(process.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "attached\n", "{process:?}");
        Self(process)
    }
}

impl Drop for Rival {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// How often something was denied that other programs had left for the last ones: the gate at the root, and
/// egress.
fn denied(datapath: &Datapath) -> u64 {
    let counters = datapath.counters().unwrap();
    counters
        .read()
        .filter(|(name, _)| ["denied_egress", "denied_task"].contains(name))
        .map(|(_, count)| count)
        .sum()
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_program_in_front_that_rewrites_to_the_metadata_address_is_redirected_like_anybody() {
    let lab = Lab::new();
    let mut datapath = lab.attach();
    let origins = datapath.origins().unwrap();
    // Programs of a child run before its parent's.
    let _rival = Rival::attach(&lab, "pods/a", ELSEWHERE, *METADATA.ip());

    let client = lab.python("pods/a", &dial().replace(&METADATA.ip().to_string(), &ELSEWHERE.to_string()));
    let accepted = lab.accept();

    assert_eq!(origins.origin_of(accepted.as_fd()).unwrap(), lab.task("pods/a"));
    drop(accepted);
    assert!(client.wait_with_output().unwrap().status.success());
    assert_works(&lab, &origins);
    assert_eq!(denied(&datapath), 0);
    assert!(datapath.repair(true).repaired.is_empty());
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_program_behind_that_rewrites_to_the_metadata_address_gets_no_packet_out() {
    let lab = Lab::new();
    let mut datapath = lab.attach();
    let origins = datapath.origins().unwrap();
    let _rival = Rival::attach(&lab, "pods", ELSEWHERE, *METADATA.ip());

    let client = lab.python("pods/a", &dial().replace(&METADATA.ip().to_string(), &ELSEWHERE.to_string()));
    let refused = client.wait_with_output().unwrap();

    let stderr = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && denied(&datapath) > 0, "{stderr}");
    // Ours went first where it matters, and still does.
    assert_works(&lab, &origins);
    assert!(datapath.repair(true).repaired.is_empty());
}
