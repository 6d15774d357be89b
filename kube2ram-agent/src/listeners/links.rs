//! The network devices of a namespace, as rtnetlink tells them (rtnetlink(7), include/uapi/linux/if_link.h), and which of them lead past the node's own
//! network stack. Pure but for the question itself; depends on nothing of ours. Called by `devices`.

use std::{collections::BTreeSet, io};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};

/// A device whose packets the node's netfilter does not see. The order is that of the labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Device {
    /// Shares a card of the host's by address: ipvlan, ipvtap.
    Ipvlan,
    /// Shares a card of the host's by MAC address: macvlan, macvtap.
    Macvlan,
    /// A card of its own, or a VLAN of one of the host's.
    Nic,
}

impl Device {
    pub(super) const ALL: [Self; 3] = [Self::Ipvlan, Self::Macvlan, Self::Nic];

    /// The metrics label.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Ipvlan => "ipvlan",
            Self::Macvlan => "macvlan",
            Self::Nic => "nic",
        }
    }
}

/// What is told of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Link {
    index: u32,
    hardware: u16,
    flags: u32,
    /// The driver's name; cards have none.
    kind: Option<Vec<u8>>,
    /// The device below, by its index there.
    lower: Option<u32>,
    /// The device below is in another namespace.
    lower_is_elsewhere: bool,
}

/// All that one namespace has.
#[derive(Debug, Default)]
pub(super) struct Links {
    links: Vec<Link>,
    outcome: Option<io::Result<()>>,
}

impl Links {
    /// Asks for those of the calling thread's namespace.
    ///
    /// # Errors
    /// The kernel's; [`io::ErrorKind::Interrupted`] when they changed meanwhile; [`io::ErrorKind::FileTooLarge`] when they are too many.
    pub(super) fn of_this_thread() -> io::Result<Self> {
        // No protocol is NETLINK_ROUTE.
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        send(&socket, &request(), SendFlags::empty())?;
        let mut found = Self::default();
        let mut buffer = vec![0; DATAGRAM_MAX];
        // The kernel answers within send(2), and goes on with a dump within recv(2): nothing to read is a fault, not a reason to wait.
        for _ in 0..MAX_DATAGRAMS {
            let (length, _) = recv(&socket, buffer.as_mut_slice(), RecvFlags::DONTWAIT)?;
            found.read(&buffer[..length]);
            if let Some(outcome) = found.outcome.take() {
                return outcome.map(|()| found);
            }
        }
        Err(io::ErrorKind::FileTooLarge.into())
    }

    /// Whether the network plugin is done: a device is up beside the loopback device. The kernel's own tunnel devices, which every namespace has, are down.
    pub(super) fn are_set_up(&self) -> bool {
        self.links.iter().any(|link| link.flags & IFF_LOOPBACK == 0 && link.flags & IFF_UP != 0)
    }

    /// Those that lead past the node's stack. Whether they are up is not asked: the pod may set them up later. What is not known passes for the host's.
    pub(super) fn devices(&self) -> BTreeSet<Device> {
        self.links.iter().filter_map(|link| self.device(link)).collect()
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
            _ => return None, // veth, netkit, tun and the like end in the host's stack, bridges and tunnels go on through another device
        };
        (!self.is_on_another(link)).then_some(device)
    }

    /// Whether a device is on top of another of this namespace, which then decides where its packets go.
    fn is_on_another(&self, link: &Link) -> bool {
        !link.lower_is_elsewhere
            && link.lower.is_some_and(|lower| {
                lower != link.index
                    && self.links.iter().any(|other| other.index == lower && other.flags & IFF_LOOPBACK == 0)
            })
    }

    /// Reads a datagram, as far as it is well-formed.
    fn read(&mut self, mut bytes: &[u8]) {
        while let Some(header) = bytes.first_chunk::<HEADER>() {
            let length = usize::try_from(word(header, 0)).unwrap_or(usize::MAX);
            let Some(payload) = bytes.get(HEADER..length) else { return };
            if self.outcome.is_none() {
                self.take(half(header, 4), half(header, 6), payload);
            }
            bytes = bytes.get(length.next_multiple_of(ALIGN)..).unwrap_or_default();
        }
    }

    fn take(&mut self, kind: u16, flags: u16, payload: &[u8]) {
        if flags & NLM_F_DUMP_INTR != 0 {
            self.outcome = Some(Err(io::ErrorKind::Interrupted.into()));
        } else if kind == NLMSG_ERROR || kind == NLMSG_DONE {
            // Both begin with 0 or a negative errno.
            let code = payload.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
            self.outcome = Some(match code {
                0 => Ok(()),
                code => Err(io::Error::from_raw_os_error(code.saturating_neg())),
            });
        } else if kind == RTM_NEWLINK {
            self.links.extend(link(payload));
        }
    }
}

const ALIGN: usize = 4;
const HEADER: usize = 16;
/// `struct ifinfomsg`.
const IFINFOMSG: usize = 16;
/// What the kernel fills at once.
const DATAGRAM_MAX: usize = 32 * 1024;
/// A pod that makes devices by the thousand is not followed.
const MAX_DATAGRAMS: usize = 32;

const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
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
fn request() -> Vec<u8> {
    let attribute = [8, IFLA_EXT_MASK].map(u16::to_ne_bytes).concat();
    let payload = [&[0; IFINFOMSG][..], &attribute, &RTEXT_FILTER_SKIP_STATS.to_ne_bytes()].concat();
    message(RTM_GETLINK, NLM_F_REQUEST | NLM_F_DUMP, &payload)
}

fn message(kind: u16, flags: u16, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER + payload.len()).unwrap_or(u32::MAX);
    // The sequence number and the port: one question a socket, and the kernel knows.
    [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), &flags.to_ne_bytes(), &[0; 8], payload].concat()
}

fn link(payload: &[u8]) -> Option<Link> {
    let info = payload.first_chunk::<IFINFOMSG>()?;
    let mut link =
        Link { hardware: half(info, 2), index: word(info, 4), flags: word(info, 8), ..Link::default() };
    for (kind, value) in attributes(&payload[IFINFOMSG..]) {
        match kind {
            IFLA_LINK => link.lower = value.first_chunk().map(|index| u32::from_ne_bytes(*index)),
            IFLA_LINK_NETNSID => link.lower_is_elsewhere = true,
            IFLA_LINKINFO => {
                let name = attributes(value).find(|(kind, _)| *kind == IFLA_INFO_KIND);
                link.kind = name.map(|(_, name)| name.strip_suffix(b"\0").unwrap_or(name).into());
            }
            _ => {}
        }
    }
    Some(link)
}

/// Splits attributes, as far as they are well-formed. The flags in the upper bits of the kind are not part of it.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let header = bytes.first_chunk::<4>()?;
        let (length, kind) = (usize::from(half(header, 0)), half(header, 2) & 0x3fff);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(ALIGN)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn half<const N: usize>(bytes: &[u8; N], at: usize) -> u16 {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]])
}

fn word<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests;
