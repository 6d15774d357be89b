//! How one network namespace numbers another (rtnetlink(7), include/uapi/linux/net_namespace.h). Depends on
//! `netlink`; called by `wire_guard`.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use crate::netlink::{Attribute, Message, NLM_F_ACK, Socket, attribute};

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
/// `struct rtgenmsg`, padded.
const RTGENMSG: usize = 4;
const RTM_NEWNSID: u16 = 88;
const RTM_GETNSID: u16 = 90;
const NETNSA_NSID: u16 = 1;
const NETNSA_FD: u16 = 3;
