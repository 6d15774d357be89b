//! The network devices of a namespace, as rtnetlink reports them (rtnetlink(7),
//! include/uapi/linux/if_link.h), and which of them bypass the node's network stack. Pure except for the
//! query; depends on `netlink`. Called by `devices`.

use std::{collections::BTreeSet, io};

use crate::{
    datapath::{LinkHeader, WireDevice},
    netlink::{Attribute, Message, Socket, attribute, attributes, half, word},
};

/// A device whose packets bypass, or may bypass, the node's netfilter. The order is that of the labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Device {
    /// One end of a pair; a program at the other end decides where packets go.
    Ebpf,
    /// Shares a card of the host's by address: ipvlan, ipvtap.
    Ipvlan,
    /// Shares a card of the host's by MAC address: macvlan, macvtap.
    Macvlan,
    /// Its own network card, or a VLAN of one of the host's cards.
    Nic,
}

impl Device {
    pub(crate) const ALL: [Self; 4] = [Self::Ebpf, Self::Ipvlan, Self::Macvlan, Self::Nic];

    /// The metrics label.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Ebpf => "ebpf",
            Self::Ipvlan => "ipvlan",
            Self::Macvlan => "macvlan",
            Self::Nic => "nic",
        }
    }
}

/// The attributes of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Link {
    index: u32,
    hardware: u16,
    flags: u32,
    /// The driver's name; network cards have none.
    kind: Option<Vec<u8>>,
    /// The device below, by its index there.
    lower: Option<u32>,
    /// The device below is in another namespace.
    lower_is_elsewhere: bool,
    /// Which one, as this namespace numbers it.
    lower_netns: Option<i32>,
}

/// All devices of one namespace.
#[derive(Debug, Default)]
pub(crate) struct Links(Vec<Link>);

/// Devices by which packets leave, for the wire guard.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct WayOut {
    pub(crate) devices: Vec<WireDevice>,
    /// The index of each device whose link header no program can read.
    pub(crate) unknown: Vec<u32>,
}

impl Links {
    /// Lists the devices of the calling thread's namespace.
    ///
    /// # Errors
    /// As [`Socket::request`]: interrupted when they changed meanwhile, too large when they are too many.
    pub(crate) fn of_this_thread() -> io::Result<Self> {
        let mut found = Self::default();
        Socket::open(None, MAX_DATAGRAMS)?
            .request(&[request()], |kind, payload| found.take(kind, payload))?;
        Ok(found)
    }

    /// Whether the network plugin has finished: a device other than the loopback device is up. The kernel's
    /// own tunnel devices, which every namespace has, are down.
    pub(crate) fn are_set_up(&self) -> bool {
        self.0.iter().any(|link| link.flags & IFF_LOOPBACK == 0 && link.flags & IFF_UP != 0)
    }

    /// Those that lead past the node's stack. Whether they are up is not asked: the pod may set them up
    /// later. What is not known passes for the host's.
    pub(crate) fn devices(&self) -> BTreeSet<Device> {
        self.0.iter().filter_map(|link| self.device(link)).collect()
    }

    /// Their indices.
    pub(crate) fn indices(&self) -> impl Iterator<Item = u32> {
        self.0.iter().map(|link| link.index)
    }

    /// Those by which packets leave the node, for the wire guard: cards, and what is `routed`, which on a
    /// node that is a container is one end of a pair. The rest is on top of these, or leads to pods.
    pub(crate) fn way_out_of_node(&self, routed: &[u32]) -> WayOut {
        self.way_out(|link| link.kind.is_none() || routed.contains(&link.index))
    }

    /// The same for a pod: network cards, and ends of pairs whose other end is neither in this namespace nor
    /// in the node's, which this namespace numbers `node`.
    pub(crate) fn way_out_of_pod(&self, node: Option<i32>) -> WayOut {
        self.way_out(|link| match link.kind.as_deref() {
            None => true,
            Some(b"veth" | b"netkit") => {
                link.lower_is_elsewhere && (node.is_none() || link.lower_netns != node)
            }
            Some(_) => false,
        })
    }

    /// Network cards come first: a pod may create many other devices.
    fn way_out(&self, leads_out: impl Fn(&Link) -> bool) -> WayOut {
        let mut way = WayOut::default();
        let mut links: Vec<_> =
            self.0.iter().filter(|link| link.flags & IFF_LOOPBACK == 0 && leads_out(link)).collect();
        links.sort_by_key(|link| (link.kind.is_some(), link.index));
        for link in links.into_iter().take(MAX_WAYS_OUT) {
            match link.header() {
                Some(header) => way.devices.push(WireDevice { index: link.index, header }),
                None => way.unknown.push(link.index),
            }
        }
        way
    }

    /// The other ends of pairs, by their index in their own namespace: the node's, for pairs that the network
    /// plugin created.
    pub(crate) fn peers(&self) -> impl Iterator<Item = u32> {
        self.pairs().filter_map(|link| link.lower)
    }

    /// Those in the namespace that this one numbers `netns`.
    pub(crate) fn peers_in(&self, netns: Option<i32>) -> impl Iterator<Item = u32> {
        let is_there = move |link: &&Link| netns.is_some() && link.lower_netns == netns;
        self.pairs().filter(is_there).filter_map(|link| link.lower)
    }

    fn pairs(&self) -> impl Iterator<Item = &Link> {
        let is_pair =
            |link: &&Link| link.kind.as_deref().is_some_and(|kind| [&b"veth"[..], b"netkit"].contains(&kind));
        self.0.iter().filter(|link| link.lower_is_elsewhere).filter(is_pair)
    }

    fn device(&self, link: &Link) -> Option<Device> {
        let Some(kind) = &link.kind else {
            let is_card = [ARPHRD_ETHER, ARPHRD_INFINIBAND].contains(&link.hardware);
            return (is_card && link.flags & IFF_LOOPBACK == 0).then_some(Device::Nic);
        };
        let device = match kind.as_slice() {
            b"ipvlan" | b"ipvtap" => Device::Ipvlan,
            b"macvlan" | b"macvtap" => Device::Macvlan,
            b"vlan" | b"ipoib" => Device::Nic,
            // Made to have programs.
            b"netkit" if link.lower_is_elsewhere => Device::Ebpf,
            _ => return None, // veth (but see `routed`), tun and the like end in the host's stack, bridges and tunnels go on through another device
        };
        (!self.is_on_another(link)).then_some(device)
    }

    /// Whether a device is on top of another of this namespace, which then decides where its packets go.
    fn is_on_another(&self, link: &Link) -> bool {
        !link.lower_is_elsewhere
            && link.lower.is_some_and(|lower| {
                lower != link.index
                    && self.0.iter().any(|other| other.index == lower && other.flags & IFF_LOOPBACK == 0)
            })
    }

    fn take(&mut self, kind: u16, payload: &[u8]) {
        if kind == RTM_NEWLINK {
            self.0.extend(link(payload));
        }
    }
}

impl Link {
    /// The link header of its packets, by include/uapi/linux/if_arp.h. `None`: one that the programs cannot
    /// read.
    fn header(&self) -> Option<LinkHeader> {
        const ARPHRD_NONE: u16 = 0xfffe;
        const ARPHRD_PPP: u16 = 512;
        const ARPHRD_RAWIP: u16 = 519;
        const ARPHRD_TUNNELS: [u16; 5] = [768, 769, 776, 778, 823]; // IPv4, IPv6, sit, GRE of both
        match self.hardware {
            ARPHRD_ETHER => Some(LinkHeader::Ethernet),
            ARPHRD_NONE | ARPHRD_PPP | ARPHRD_RAWIP => Some(LinkHeader::None),
            hardware => ARPHRD_TUNNELS.contains(&hardware).then_some(LinkHeader::None),
        }
    }
}

/// Of one namespace: more are not covered.
const MAX_WAYS_OUT: usize = 64;
/// `struct ifinfomsg`.
const IFINFOMSG: usize = 16;
/// A pod that makes devices by the thousand is not followed.
const MAX_DATAGRAMS: usize = 32;

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const IFLA_LINK: u16 = 5;
const IFLA_LINKINFO: u16 = 18;
const IFLA_EXT_MASK: u16 = 29;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_INFO_KIND: u16 = 1;
const RTEXT_FILTER_SKIP_STATS: u32 = 8;
const IFF_UP: u32 = 1;
const IFF_LOOPBACK: u32 = 8;
const ARPHRD_ETHER: u16 = 1;
const ARPHRD_INFINIBAND: u16 = 32;

/// Asks for all devices, without their statistics.
fn request() -> Message {
    let mask = Attribute::Value(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS.to_ne_bytes().into());
    Message::dump(RTM_GETLINK, vec![0; IFINFOMSG], vec![mask])
}

fn link(payload: &[u8]) -> Option<Link> {
    let info = payload.first_chunk::<IFINFOMSG>()?;
    let mut link =
        Link { hardware: half(info, 2), index: word(info, 4), flags: word(info, 8), ..Link::default() };
    for (kind, value) in attributes(&payload[IFINFOMSG..]) {
        match kind {
            IFLA_LINK => link.lower = value.first_chunk().map(|index| u32::from_ne_bytes(*index)),
            IFLA_LINK_NETNSID => {
                link.lower_is_elsewhere = true;
                link.lower_netns = value.first_chunk().map(|id| i32::from_ne_bytes(*id));
            }
            IFLA_LINKINFO => {
                let name = attribute(value, IFLA_INFO_KIND);
                link.kind = name.map(|name| name.strip_suffix(b"\0").unwrap_or(name).into());
            }
            _ => {}
        }
    }
    Some(link)
}

#[cfg(test)]
mod tests;
