//! Another process changes something; a check repairs it, and reports what it was.

use std::{fs, process::Command};

use kube2ram_agent::{
    datapath::{Datapath, DatapathError, Drift, Found, PodTarget},
    identity::CgroupId,
};

use super::{assert_works, bpftool, link, pinned_links};
use crate::lab::Lab;

#[track_caller]
fn assert_repaired(found: &Found, expected: &[Drift]) {
    assert!(found.failed.is_empty(), "{found:?}");
    assert_eq!(found.repaired, expected);
}

fn pin(lab: &Lab, below: &str) -> String {
    lab.bpf_dir.join("v2").join(below).into_os_string().into_string().unwrap()
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn finds_nothing_where_nothing_is_amiss() {
    let lab = Lab::new();
    let mut datapath = lab.attach();

    for _ in 0..2 {
        assert_repaired(&datapath.repair(true), &[]);
    }
    assert_works(&lab, &datapath.origins().unwrap());
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_link_detached_by_force_is_attached_again() {
    let lab = Lab::new();
    let mut datapath = lab.attach();
    let origins = datapath.origins().unwrap();
    let pins = pinned_links(&lab.bpf_dir);
    assert!(pins.len() >= 11, "{pins:?}");

    for pin in &pins {
        let before = link(pin, "id");
        bpftool(&["link", "detach", "pinned", pin.to_str().unwrap()]);
        assert_eq!(link(pin, "cgroup_id"), 0, "{}", pin.display());

        assert_repaired(&datapath.repair(false), &[Drift::Detached]);

        assert_ne!(link(pin, "id"), before);
        assert_ne!(link(pin, "cgroup_id"), 0, "{}", pin.display());
    }
    assert_works(&lab, &origins);
    assert_repaired(&datapath.repair(true), &[]);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_program_swapped_by_another_is_swapped_back() {
    let (lab, other) = (Lab::new(), Lab::new());
    let (mut datapath, _others) = (lab.attach(), other.attach());
    let (ours, theirs) = (pin(&lab, "links/pods/k2r_connect4"), pin(&other, "links/pods/k2r_connect4"));
    let program = link(ours.as_ref(), "prog_id");
    let pinned = other.bpf_dir.join("program").into_os_string().into_string().unwrap();
    bpftool(&["prog", "pin", "id", &link(theirs.as_ref(), "prog_id").to_string(), &pinned]);
    // BPF_OBJ_GET of both, then BPF_LINK_UPDATE.
    let script = "import ctypes, struct, sys\nlibc = ctypes.CDLL(None, use_errno=True)\n\
        def bpf(command, attr):\n  b = ctypes.create_string_buffer(attr, len(attr))\n  r = libc.syscall(321, command, b, len(attr))\n  \
        assert r >= 0, ctypes.get_errno()\n  return r\n\
        def get(path):\n  p = ctypes.create_string_buffer(path.encode())\n  return bpf(7, struct.pack('QII', ctypes.addressof(p), 0, 0))\n\
        bpf(29, struct.pack('IIII', get(sys.argv[1]), get(sys.argv[2]), 0, 0))";
    let swapped = Command::new("python3").args(["-c", script, &ours, &pinned]).status().unwrap();
    assert!(swapped.success());
    assert_ne!(link(ours.as_ref(), "prog_id"), program);

    assert_repaired(&datapath.repair(false), &[Drift::Program]);

    assert_eq!(link(ours.as_ref(), "prog_id"), program);
    assert_works(&lab, &datapath.origins().unwrap());
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_removed_pin_detaches_nothing_and_is_restored() {
    let lab = Lab::new();
    let mut datapath = lab.attach();
    let origins = datapath.origins().unwrap();
    for below in ["links/pods/k2r_egress", "links/pods/k2r_connect4"] {
        let id = link(pin(&lab, below).as_ref(), "id");
        fs::remove_file(pin(&lab, below)).unwrap();
        assert_works(&lab, &origins);

        assert_repaired(&datapath.repair(false), &[Drift::LinkPin]);

        assert_eq!(link(pin(&lab, below).as_ref(), "id"), id, "the same link");
    }
    let clients = pin(&lab, "maps/k2r_clients");
    let id = bpftool(&["map", "show", "pinned", &clients])["id"].clone();
    fs::remove_file(&clients).unwrap();

    assert_repaired(&datapath.repair(false), &[Drift::MapPin]);

    assert_eq!(bpftool(&["map", "show", "pinned", &clients])["id"], id, "the same map");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn another_objects_pin_gives_way() {
    let lab = Lab::new();
    let mut datapath = lab.attach();
    let (one, other) = (pin(&lab, "links/pods/k2r_sendmsg4"), pin(&lab, "links/pods/k2r_sendmsg6"));
    let ids = [link(one.as_ref(), "id"), link(other.as_ref(), "id")];
    fs::rename(&one, &other).unwrap();

    assert_repaired(&datapath.repair(false), &[Drift::LinkPin, Drift::LinkPin]);

    assert_eq!([link(one.as_ref(), "id"), link(other.as_ref(), "id")], ids);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_whole_directory_comes_back_and_with_it_the_lock() {
    let lab = Lab::new();
    let mut datapath = lab.attach();
    let (pins, origins) = (pinned_links(&lab.bpf_dir), datapath.origins().unwrap());
    fs::remove_dir_all(&lab.bpf_dir).unwrap();
    assert_works(&lab, &origins);

    let found = datapath.repair(false);

    assert!(found.failed.is_empty(), "{found:?}");
    assert_eq!(pinned_links(&lab.bpf_dir), pins);
    let second = Datapath::attach(&lab.settings()).map(drop).unwrap_err();
    assert!(matches!(second, DatapathError::Locked(_)), "{second}");
    drop(datapath);
    assert_works(&lab, &lab.attach().origins().unwrap());
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn another_agent_that_took_the_directory_keeps_it() {
    let lab = Lab::new();
    let mut former = lab.attach();
    fs::remove_dir_all(&lab.bpf_dir).unwrap();
    let latter = lab.attach();
    let pins = pinned_links(&lab.bpf_dir);
    let ids: Vec<_> = pins.iter().map(|pin| link(pin, "id")).collect();

    let found = former.repair(true);

    assert!(matches!(found.failed[..], [DatapathError::Locked(_)]) && found.repaired.is_empty(), "{found:?}");
    drop(former);
    assert_eq!(pins.iter().map(|pin| link(pin, "id")).collect::<Vec<_>>(), ids);
    assert_works(&lab, &latter.origins().unwrap());
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_changed_configuration_is_written_again() {
    let lab = Lab::new();
    let mut datapath = lab.attach();
    let zeros = ["0"; size_of::<kube2ram_common::abi::Config>()];
    let update =
        ["map", "update", "pinned", &pin(&lab, "maps/k2r_config"), "key", "0", "0", "0", "0", "value"];
    bpftool(&[&update[..], &zeros].concat());

    assert_repaired(&datapath.repair(false), &[Drift::Config]);

    assert_works(&lab, &datapath.origins().unwrap());
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn targets_are_those_that_were_written_and_no_others() {
    let lab = Lab::new();
    let mut datapath = lab.attach();
    let targets = datapath.targets();
    let somewhere = PodTarget { netns: 7, port: 225, has_ipv6: true };
    let [removed, altered] = [CgroupId(u64::MAX - 1), CgroupId(u64::MAX - 2)];
    for pod in [removed, altered] {
        targets.insert(pod, somewhere).unwrap();
    }
    let map = pin(&lab, "maps/k2r_targets");
    let dump = || {
        let mut entries = bpftool(&["map", "dump", "pinned", &map]).as_array().unwrap().clone();
        entries.sort_by_key(|entry| entry["key"].to_string());
        entries
    };
    let whole = dump();
    let key = |cgroup: u64| cgroup.to_ne_bytes().map(|byte| byte.to_string());
    let change = |what: &str, cgroup: u64, value: &[&str]| {
        let key = key(cgroup);
        let key: Vec<_> = key.iter().map(String::as_str).collect();
        bpftool(&[&["map", what, "pinned", &map, "key"][..], &key, value].concat());
    };
    let nowhere = [&["value"][..], &["0"; 16]].concat();
    change("delete", removed.0, &[]);
    change("update", altered.0, &nowhere);
    change("update", 12345, &nowhere); // of a dead cgroup

    assert_repaired(&datapath.repair(true), &[Drift::Targets]);

    assert_eq!(dump(), whole);
    assert_works(&lab, &datapath.origins().unwrap());
    // The look that leaves them out.
    targets.remove(removed).unwrap();
    change("delete", altered.0, &[]);
    assert_repaired(&datapath.repair(false), &[]);
    assert_repaired(&datapath.repair(true), &[Drift::Targets]);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_cgroup_made_again_gets_its_programs_and_a_missing_one_is_reported() {
    let lab = Lab::new();
    let mut datapath = lab.attach();
    for cgroup in ["pods/a/nested", "pods/a", "pods/b", "pods"] {
        fs::remove_dir(lab.cgroup.join(cgroup)).unwrap();
    }

    let found = datapath.repair(false);
    assert!(found.repaired.is_empty() && found.failed.len() == 10, "configuration and nine links: {found:?}");
    fs::create_dir_all(lab.cgroup.join("pods/a")).unwrap();

    assert_repaired(&datapath.repair(false), &[&[Drift::Config][..], &[Drift::Cgroup; 9]].concat());

    assert_works(&lab, &datapath.origins().unwrap());
    assert_repaired(&datapath.repair(true), &[]);
}
