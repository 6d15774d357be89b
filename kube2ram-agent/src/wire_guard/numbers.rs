//! What rtnetlink tells of ways: by which device a packet to the metadata server would leave, and how one namespace
//! numbers another (rtnetlink(7), include/uapi/linux/net_namespace.h). Depends on `netlink`; called by `wire_guard`.

use std::{
    io,
    net::IpAddr,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use crate::netlink::{Attribute, Message, NLM_F_ACK, Socket, attribute};

/// The device by which this namespace would send to an address; `None` without a route.
///
/// # Errors
/// Netlink's.
pub(super) fn device_towards(address: IpAddr) -> io::Result<Option<u32>> {
    let (family, bytes): (u8, Vec<u8>) = match address {
        IpAddr::V4(address) => (AF_INET, address.octets().into()),
        IpAddr::V6(address) => (AF_INET6, address.octets().into()),
    };
    let bits = u8::try_from(bytes.len() * 8).map_err(io::Error::other)?;
    let mut head = vec![0; RTMSG];
    head[..2].copy_from_slice(&[family, bits]);
    let attributes = vec![Attribute::Value(RTA_DST, bytes)];
    let asked = Message { kind: RTM_GETROUTE, flags: NLM_F_ACK, head, attributes };
    let mut device = None;
    let answered = Socket::open(None, MAX_DATAGRAMS)?.request(&[asked], |kind, payload| {
        if kind == RTM_NEWROUTE {
            let index = attribute(payload.get(RTMSG..).unwrap_or_default(), RTA_OIF);
            device = index.and_then(|index| index.first_chunk()).map(|index| u32::from_ne_bytes(*index));
        }
    });
    match answered {
        Err(error) if NO_ROUTE.contains(&error.raw_os_error().unwrap_or_default()) => Ok(None),
        answered => answered.map(|()| device),
    }
}

/// How the calling thread's namespace numbers another one; `None` when it does not.
///
/// # Errors
/// Netlink's.
pub(super) fn number_of(netns: BorrowedFd<'_>) -> io::Result<Option<i32>> {
    let fd = netns.as_raw_fd().to_ne_bytes().into();
    let attributes = vec![Attribute::Value(NETNSA_FD, fd)];
    let asked = Message { kind: RTM_GETNSID, flags: NLM_F_ACK, head: vec![0; RTGENMSG], attributes };
    let mut number = None;
    Socket::open(None, MAX_DATAGRAMS)?.request(&[asked], |kind, payload| {
        if kind == RTM_NEWNSID {
            let id = attribute(payload.get(RTGENMSG..).unwrap_or_default(), NETNSA_NSID);
            number = id.and_then(|id| id.first_chunk()).map(|id| i32::from_ne_bytes(*id));
        }
    })?;
    Ok(number.filter(|number| *number >= 0))
}

/// One answer, and its acknowledgement.
const MAX_DATAGRAMS: usize = 4;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// `struct rtmsg`.
const RTMSG: usize = 12;
/// `struct rtgenmsg`, padded.
const RTGENMSG: usize = 4;
const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const RTM_NEWNSID: u16 = 88;
const RTM_GETNSID: u16 = 90;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const NETNSA_NSID: u16 = 1;
const NETNSA_FD: u16 = 3;
/// What a namespace says that has no route there, or none at all of that family.
const NO_ROUTE: [i32; 5] =
    [libc::ENETUNREACH, libc::EHOSTUNREACH, libc::EAFNOSUPPORT, libc::EOPNOTSUPP, libc::EACCES];
