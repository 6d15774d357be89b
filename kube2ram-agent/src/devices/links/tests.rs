//! The attributes of devices: as a table, as bytes, and from the running kernel.

use std::{fs, path::Path, process::Command};

use proptest::prelude::*;

use super::*;
use crate::{
    listeners::Netns,
    netlink::{HEADER, encode},
};

const LO: u32 = IFF_LOOPBACK | IFF_UP;

/// The kernel's attributes of a device, behind the message's header.
fn told(index: u32, flags: u32, hardware: u16, attributes: &[Attribute]) -> Vec<u8> {
    let mut info = vec![0; 2];
    info.extend(hardware.to_ne_bytes());
    [index, flags, 0].iter().for_each(|word| info.extend(word.to_ne_bytes()));
    payload(info, attributes)
}

fn payload(head: Vec<u8>, attributes: &[Attribute]) -> Vec<u8> {
    let message = Message { kind: RTM_NEWLINK, flags: 2, head, attributes: attributes.into() };
    encode(&[message], 0)[HEADER..].to_vec()
}

fn kind(name: &str) -> Attribute {
    Attribute::Nest(IFLA_LINKINFO | 0x8000, vec![Attribute::text(IFLA_INFO_KIND, name)])
}

fn lower(index: u32) -> Attribute {
    Attribute::Value(IFLA_LINK, index.to_ne_bytes().into())
}

fn elsewhere() -> Attribute {
    Attribute::Value(IFLA_LINK_NETNSID, vec![0; 4])
}

fn read(messages: &[Vec<u8>]) -> Links {
    let mut links = Links::default();
    messages.iter().for_each(|message| links.take(RTM_NEWLINK, message));
    links
}

#[test]
fn finds_where_packets_go() {
    use Device::{Ebpf, Ipvlan, Macvlan, Nic};
    let lo = told(1, LO, 772, &[]);
    let veth = told(3, IFF_UP, ARPHRD_ETHER, &[kind("veth"), lower(9), elsewhere()]);
    let of_host = |name| told(2, IFF_UP, ARPHRD_ETHER, &[kind(name), lower(2), elsewhere()]);
    // 2 is nothing here, or the device itself: the parent's number in its own namespace, from a kernel that
    // names no namespace.
    let unnamed = |name, parent| told(2, IFF_UP, ARPHRD_ETHER, &[kind(name), lower(parent)]);
    let of_pod = |name| told(4, IFF_UP, ARPHRD_ETHER, &[kind(name), lower(3)]);
    let table: [(_, _, &[Device]); 21] = [
        ("nothing yet", vec![lo.clone()], &[]),
        ("veth", vec![lo.clone(), veth.clone()], &[]),
        ("netkit", vec![lo.clone(), of_host("netkit")], &[Ebpf]),
        ("netkit's other end in the pod", vec![lo.clone(), unnamed("netkit", 3)], &[]),
        ("tun", vec![veth.clone(), told(5, IFF_UP, 65534, &[kind("tun")])], &[]),
        ("bridge in the pod", vec![veth.clone(), told(5, IFF_UP, 1, &[kind("bridge")])], &[]),
        ("the kernel's own", vec![veth.clone(), told(5, 0, 768, &[kind("ipip")])], &[]),
        ("no card", vec![veth.clone(), told(5, 0, 779, &[])], &[]),
        ("ipvlan", vec![lo.clone(), of_host("ipvlan")], &[Ipvlan]),
        ("ipvtap", vec![of_host("ipvtap")], &[Ipvlan]),
        ("ipvlan, older kernel", vec![lo.clone(), unnamed("ipvlan", 7)], &[Ipvlan]),
        ("ipvlan, same number", vec![lo.clone(), unnamed("ipvlan", 2)], &[Ipvlan]),
        ("ipvlan, loopback's number", vec![lo.clone(), unnamed("ipvlan", 1)], &[Ipvlan]),
        ("macvlan", vec![lo.clone(), of_host("macvlan")], &[Macvlan]),
        ("macvtap", vec![of_host("macvtap")], &[Macvlan]),
        ("macvlan in the pod", vec![veth.clone(), of_pod("macvlan")], &[]),
        ("VLAN", vec![of_host("vlan")], &[Nic]),
        ("VLAN in the pod", vec![veth.clone(), of_pod("vlan")], &[]),
        ("card", vec![lo, told(2, IFF_UP, ARPHRD_ETHER, &[])], &[Nic]),
        ("card that is down", vec![veth.clone(), told(4, 0, ARPHRD_ETHER, &[])], &[Nic]),
        ("two networks", vec![veth, of_host("macvlan"), told(5, 0, 32, &[])], &[Macvlan, Nic]),
    ];

    for (what, messages, expected) in table {
        let devices = read(&messages).devices();

        assert!(devices.iter().eq(expected), "{what}: {devices:?}");
    }
}

#[test]
fn finds_the_other_ends_of_pairs() {
    let veth = told(3, IFF_UP, ARPHRD_ETHER, &[kind("veth"), lower(9), elsewhere()]);
    let netkit = told(4, IFF_UP, ARPHRD_ETHER, &[kind("netkit"), lower(8), elsewhere()]);
    let inner = told(5, IFF_UP, ARPHRD_ETHER, &[kind("veth"), lower(6)]);
    let ipvlan = told(7, IFF_UP, ARPHRD_ETHER, &[kind("ipvlan"), lower(2), elsewhere()]);

    let links = read(&[veth, netkit, inner, ipvlan]);

    assert_eq!(links.peers().collect::<Vec<_>>(), [9, 8]);
    // The number that `elsewhere` has.
    assert_eq!(links.peers_in(Some(0)).collect::<Vec<_>>(), [9, 8]);
    assert_eq!(links.peers_in(Some(1)).chain(links.peers_in(None)).count(), 0);
}

#[test]
fn devices_are_set_up_when_one_is_up() {
    let lo = told(1, LO, 772, &[]);
    let tunnel = told(2, 0, 768, &[kind("ipip")]);
    let veth = told(3, IFF_UP, ARPHRD_ETHER, &[kind("veth")]);

    assert!(!read(&[lo.clone(), tunnel.clone()]).are_set_up());
    assert!(read(&[lo, tunnel, veth]).are_set_up());
}

#[test]
fn other_messages_are_no_devices() {
    let mut links = Links::default();

    links.take(RTM_GETLINK, &told(3, IFF_UP, ARPHRD_ETHER, &[]));

    assert!(!links.are_set_up());
}

proptest! {
    #[test]
    fn reads_any_bytes(bytes: Vec<u8>, cut in 0..100_usize) {
        let attributes = [Attribute::Value(IFLA_LINKINFO, bytes.clone()), kind("ipvlan")];
        let whole = told(2, 0, ARPHRD_ETHER, &attributes);
        let cut = whole[..cut.min(whole.len())].to_vec();

        for message in [bytes, whole, cut] {
            let links = read(&[message]);
            links.devices();
            links.are_set_up();
        }
    }
}

/// A namespace with a name, removed at the end.
struct Named(String);

impl Named {
    fn new(name: &str) -> Self {
        let name = format!("kube2ram-{name}-{}", std::process::id());
        ip(&format!("netns add {name}")).unwrap();
        Self(name)
    }

    fn links(&self) -> Links {
        let netns = Netns::open(&Path::new("/run/netns").join(&self.0)).unwrap();
        netns.within(Links::of_this_thread).unwrap()
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        drop(ip(&format!("netns delete {}", self.0)));
    }
}

/// iproute2, or what it complained of.
fn ip(arguments: &str) -> Result<(), String> {
    let output = Command::new("ip").args(arguments.split(' ')).output().expect("iproute2");
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into()) }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_kernel_distinguishes_shared_devices_from_the_hosts() {
    let (host, pod) = (Named::new("links-host"), Named::new("links-pod"));
    assert!(!pod.links().are_set_up(), "nothing but the loopback device");
    ip(&format!("-n {} link add up0 type veth peer eth0 netns {}", host.0, pod.0)).unwrap();
    ip(&format!("-n {} link set eth0 up", pod.0)).unwrap();
    let within = pod.links();
    assert!(within.are_set_up());
    assert_eq!(within.devices(), BTreeSet::new(), "a pod like most");
    ip(&format!("-n {} link add link eth0 name own0 type macvlan", pod.0)).unwrap();
    assert_eq!(pod.links().devices(), BTreeSet::new(), "made by the pod, on its veth");

    for (kind, device) in
        [("macvlan", Device::Macvlan), ("ipvlan", Device::Ipvlan), ("vlan id 7", Device::Nic)]
    {
        let add = format!("-n {} link add link up0 name net1 netns {} type {kind}", host.0, pod.0);
        if let Err(error) = ip(&add) {
            assert!(error.contains("Unknown device type"), "{kind}: {error}");
            eprintln!("skipped {kind}: not in this kernel");
            continue;
        }
        assert_eq!(pod.links().devices(), BTreeSet::from([device]), "{kind}");
        ip(&format!("-n {} link delete net1", pod.0)).unwrap();
    }
}

#[test]
fn the_kernel_identifies_cards() {
    let is_card = |path: &Path| {
        let hardware = fs::read_to_string(path.join("type")).unwrap_or_default();
        path.join("device").exists() && hardware.trim() == "1"
    };
    let devices = fs::read_dir("/sys/class/net").unwrap();
    let has_card = devices.filter_map(Result::ok).any(|entry| is_card(&entry.path()));

    let links = Links::of_this_thread().unwrap();

    assert!(!has_card || links.devices().contains(&Device::Nic), "{links:?}");
}
