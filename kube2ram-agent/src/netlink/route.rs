//! How a packet to an address would leave this network namespace, as rtnetlink(7) reports it. Called by
//! `wire_guard` and `app`.
//!
//! Not by connect(2): the agent's own programs deny it towards the metadata server.

use std::{io, net::IpAddr};

use super::{Attribute, Message, NLM_F_ACK, Socket, attribute};

/// The route to an address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Route {
    /// The index of the device.
    pub(crate) device: Option<u32>,
    /// Whether the address is one of this namespace's own. (That it can be bound is no proof:
    /// `net.ipv4.ip_nonlocal_bind`.)
    pub(crate) is_local: bool,
    /// The source address that the kernel would choose.
    pub(crate) source: Option<IpAddr>,
}

impl Route {
    /// Asks the kernel; `None` without a route.
    ///
    /// # Errors
    /// Netlink's.
    pub(crate) fn towards(address: IpAddr) -> io::Result<Option<Self>> {
        let (family, bytes): (u8, Vec<u8>) = match address {
            IpAddr::V4(address) => (AF_INET, address.octets().into()),
            IpAddr::V6(address) => (AF_INET6, address.octets().into()),
        };
        let bits = u8::try_from(bytes.len() * 8).map_err(io::Error::other)?;
        let mut head = vec![0; RTMSG];
        head[..2].copy_from_slice(&[family, bits]);
        let attributes = vec![Attribute::Value(RTA_DST, bytes)];
        let asked = Message { kind: RTM_GETROUTE, flags: NLM_F_ACK, head, attributes };
        let mut route = None;
        let answered = Socket::open(None, MAX_DATAGRAMS)?.request(&[asked], |kind, payload| {
            if kind == RTM_NEWROUTE {
                route = payload.split_first_chunk().map(|(head, attributes)| Self::read(head, attributes));
            }
        });
        match answered {
            Err(error) if NO_ROUTE.contains(&error.raw_os_error().unwrap_or_default()) => Ok(None),
            answered => answered.map(|()| route),
        }
    }

    fn read(head: &[u8; RTMSG], attributes: &[u8]) -> Self {
        let device = attribute(attributes, RTA_OIF).and_then(|index| index.first_chunk());
        let source = attribute(attributes, RTA_PREFSRC).and_then(|source| match source.len() {
            4 => source.first_chunk::<4>().map(|octets| IpAddr::from(*octets)),
            _ => source.first_chunk::<16>().map(|octets| IpAddr::from(*octets)),
        });
        let device = device.map(|index| u32::from_ne_bytes(*index));
        Self { device, is_local: head[RTM_TYPE] == RTN_LOCAL, source }
    }
}

/// One answer, and its acknowledgement.
const MAX_DATAGRAMS: usize = 4;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// `struct rtmsg`.
const RTMSG: usize = 12;
/// Where `rtm_type` is in it.
const RTM_TYPE: usize = 7;
const RTN_LOCAL: u8 = 2;
const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_PREFSRC: u16 = 7;
/// The errors of a namespace without a route to the address, or without any route of that family.
const NO_ROUTE: [i32; 5] =
    [libc::ENETUNREACH, libc::EHOSTUNREACH, libc::EAFNOSUPPORT, libc::EOPNOTSUPP, libc::EACCES];

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn the_way_to_this_machine_is_the_loopback_device() {
        let here = IpAddr::from(Ipv4Addr::LOCALHOST);

        let route = Route::towards(here).unwrap().unwrap();

        assert_eq!(route, Route { device: Some(1), is_local: true, source: Some(here) });
    }
}
