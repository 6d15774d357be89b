//! The wire guard's programs as filters of the clsact queueing discipline, by rtnetlink (rtnetlink(7),
//! include/uapi/linux/pkt_cls.h): what there is below Linux 6.6. Depends on `netlink`; called by `wire`.
//!
//! Filters run in the order of their priority; among those of one priority, which must be of one kind and
//! protocol, the youngest runs first. Other plugins use the first priority, too.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use kube2ram_common::names::program;
use rustix::io::Errno;

use super::Covering;
use crate::netlink::{
    Attribute, Message, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_ECHO, NLM_F_EXCL, Socket, attribute,
    uninterrupted, word,
};

/// A program to attach.
#[derive(Clone, Copy, Debug)]
pub(super) struct Program<'a> {
    pub(super) name: &'static str,
    pub(super) fd: BorrowedFd<'a>,
    pub(super) id: u32,
}

/// A filter, as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Filter {
    priority: u16,
    handle: u32,
    program_id: Option<u32>,
    is_ours: bool,
}

/// Makes sure that the first filter on a device's egress is the program.
pub(super) fn cover(device: u32, program: &Program<'_>) -> io::Result<Covering> {
    let mut socket = Socket::open(None, MAX_DATAGRAMS)?;
    ensure_discipline(&mut socket, device)?;
    let filters = filters(&mut socket, device, EGRESS)?;
    let ours: Vec<_> = filters.iter().filter(|filter| filter.is_ours).collect();
    let first = filters.first().filter(|filter| filter.is_ours);
    if ours.len() == 1 && first.is_some_and(|first| first.program_id == Some(program.id)) {
        return Ok(Covering::Unchanged);
    }
    match first {
        // Replaces it, without a moment between the programs.
        Some(first) => add(&mut socket, device, program, first.handle, 0)?,
        None => {
            let is_free = |handle: &u32| ours.iter().all(|filter| filter.handle != *handle);
            let handle = HANDLES.into_iter().find(is_free).unwrap_or(HANDLES[0]);
            add(&mut socket, device, program, handle, NLM_F_EXCL)?;
        }
    }
    for filter in &ours {
        if first.is_none_or(|first| first.handle != filter.handle) {
            delete(&mut socket, device, filter)?;
        }
    }
    Ok(if ours.is_empty() { Covering::Attached } else { Covering::Moved })
}

/// Removes the programs, and the discipline if nothing is left in it. Returns whether there was one.
pub(super) fn uncover(device: u32) -> io::Result<bool> {
    let mut socket = Socket::open(None, MAX_DATAGRAMS)?;
    let (ours, others): (Vec<_>, Vec<_>) =
        filters(&mut socket, device, EGRESS)?.into_iter().partition(|filter| filter.is_ours);
    if ours.is_empty() {
        return Ok(false);
    }
    ours.iter().try_for_each(|filter| delete(&mut socket, device, filter))?;
    if others.is_empty() && filters(&mut socket, device, INGRESS)?.is_empty() {
        remove_discipline(&mut socket, device)?;
    }
    Ok(true)
}

/// Some hundred bytes each, of 32 KiB a datagram.
const MAX_DATAGRAMS: usize = 64;
/// The lowest number: filters run from there on up. 0 asks for any.
const PRIORITY: u16 = 1;
/// "k2", so that no other program uses the number by chance. There are two, because a filter is moved to the
/// front by creating another one.
const HANDLES: [u32; 2] = [0x6b32, 0x6b33];

/// `struct tcmsg`.
const TCMSG: usize = 20;
const TC_H_CLSACT: u32 = 0xffff_fff1;
const DISCIPLINE: u32 = 0xffff_0000;
const INGRESS: u32 = 0xffff_fff2;
const EGRESS: u32 = 0xffff_fff3;
const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_GETQDISC: u16 = 38;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;
const RTM_GETTFILTER: u16 = 46;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_CHAIN: u16 = 11;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_FLAGS_GEN: u16 = 9;
const TCA_BPF_ID: u16 = 11;
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;
const TCA_CLS_FLAGS_SKIP_HW: u32 = 1;
const ETH_P_ALL: u16 = 3;

fn head(device: u32, handle: u32, parent: u32, info: u32) -> Vec<u8> {
    let words = [0, device, handle, parent, info];
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Priority and protocol, in the layout of `tcm_info`.
fn info(priority: u16) -> u32 {
    u32::from(priority) << 16 | u32::from(ETH_P_ALL.to_be())
}

/// The filters on one side of a device, in the order in which they run; none without the discipline.
fn filters(socket: &mut Socket, device: u32, side: u32) -> io::Result<Vec<Filter>> {
    uninterrupted(|| {
        let mut found = Vec::new();
        let all = Message {
            kind: RTM_GETTFILTER,
            flags: NLM_F_DUMP,
            head: head(device, 0, side, 0),
            attributes: vec![],
        };
        socket.request(&[all], |kind, payload| found.extend(filter(kind, payload)))?;
        Ok(found)
    })
}

/// Reads a filter. The kernel also lists each priority by itself, with handle 0.
fn filter(kind: u16, payload: &[u8]) -> Option<Filter> {
    let head = payload.first_chunk::<TCMSG>().filter(|_| kind == RTM_NEWTFILTER)?;
    let attributes = &payload[TCMSG..];
    let number = |attributes: &[u8], kind| {
        attribute(attributes, kind)?.first_chunk().map(|id| u32::from_ne_bytes(*id))
    };
    let handle = word(head, 8);
    // Other chains are run where a filter leads there.
    if handle == 0 || number(attributes, TCA_CHAIN).is_some_and(|chain| chain != 0) {
        return None;
    }
    let is_bpf = attribute(attributes, TCA_KIND) == Some(b"bpf\0");
    let options = attribute(attributes, TCA_OPTIONS).filter(|_| is_bpf).unwrap_or_default();
    let name = attribute(options, TCA_BPF_NAME).unwrap_or_default();
    let is_named = program::WIRES.iter().any(|ours| name.strip_suffix(b"\0") == Some(ours.as_bytes()));
    let priority = u16::try_from(word(head, 16) >> 16).unwrap_or_default();
    let is_ours = is_named && priority == PRIORITY && HANDLES.contains(&handle);
    Some(Filter { priority, handle, program_id: number(options, TCA_BPF_ID), is_ours })
}

/// Creates the discipline unless it exists. The kind `ingress` would accept a filter for egress, and list it
/// there, but run it only on ingress.
fn ensure_discipline(socket: &mut Socket, device: u32) -> io::Result<()> {
    let mut kind = None;
    let head = head(device, 0, TC_H_CLSACT, 0);
    // Older kernels answer with a notification, which only requests with an echo flag receive.
    let flags = NLM_F_ACK | NLM_F_ECHO;
    let asked = Message { kind: RTM_GETQDISC, flags, head, attributes: vec![] };
    let answered = socket.request(&[asked], |message, payload| {
        if message == RTM_NEWQDISC {
            kind = attribute(payload.get(TCMSG..).unwrap_or_default(), TCA_KIND).map(<[u8]>::to_vec);
        }
    });
    match (answered, kind.as_deref()) {
        (Ok(()), Some(b"clsact\0")) => Ok(()),
        (Ok(()), Some(_)) => Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            "another queueing discipline is in clsact's place",
        )),
        (Ok(()), None) => add_discipline(socket, device),
        (Err(error), _) if error.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => {
            add_discipline(socket, device)
        }
        (Err(error), _) => Err(error),
    }
}

fn add_discipline(socket: &mut Socket, device: u32) -> io::Result<()> {
    let message = Message {
        kind: RTM_NEWQDISC,
        flags: NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL,
        head: head(device, DISCIPLINE, TC_H_CLSACT, 0),
        attributes: vec![Attribute::text(TCA_KIND, "clsact")],
    };
    socket.request(&[message], |_, _| {})
}

fn remove_discipline(socket: &mut Socket, device: u32) -> io::Result<()> {
    let head = head(device, DISCIPLINE, TC_H_CLSACT, 0);
    socket.request(&[Message { kind: RTM_DELQDISC, flags: NLM_F_ACK, head, attributes: vec![] }], |_, _| {})
}

/// `flags`: `NLM_F_EXCL` to add one, 0 to replace the one of that handle.
fn add(socket: &mut Socket, device: u32, program: &Program<'_>, handle: u32, flags: u16) -> io::Result<()> {
    let fd = program.fd.as_raw_fd().cast_unsigned();
    let number = |kind, value: u32| Attribute::Value(kind, value.to_ne_bytes().into());
    let options = vec![
        number(TCA_BPF_FD, fd),
        Attribute::text(TCA_BPF_NAME, program.name),
        number(TCA_BPF_FLAGS, TCA_BPF_FLAG_ACT_DIRECT),
        // A card that would run it has not our maps.
        number(TCA_BPF_FLAGS_GEN, TCA_CLS_FLAGS_SKIP_HW),
    ];
    let message = Message {
        kind: RTM_NEWTFILTER,
        flags: NLM_F_ACK | NLM_F_CREATE | flags,
        head: head(device, handle, EGRESS, info(PRIORITY)),
        attributes: vec![Attribute::text(TCA_KIND, "bpf"), Attribute::Nest(TCA_OPTIONS, options)],
    };
    socket.request(&[message], |_, _| {})
}

fn delete(socket: &mut Socket, device: u32, filter: &Filter) -> io::Result<()> {
    let message = Message {
        kind: RTM_DELTFILTER,
        flags: NLM_F_ACK,
        head: head(device, filter.handle, EGRESS, info(filter.priority)),
        attributes: vec![Attribute::text(TCA_KIND, "bpf")],
    };
    match socket.request(&[message], |_, _| {}) {
        Err(error) if error.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => Ok(()),
        deleted => deleted,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::{HEADER, encode};

    fn listed(handle: u32, priority: u16, attributes: Vec<Attribute>) -> Vec<u8> {
        let head = head(7, handle, EGRESS, info(priority));
        let message = Message { kind: RTM_NEWTFILTER, flags: 0, head, attributes };
        encode(&[message], 0)[HEADER..].to_vec()
    }

    fn bpf(name: &str) -> Vec<Attribute> {
        let id = Attribute::Value(TCA_BPF_ID, 42_u32.to_ne_bytes().into());
        let options = vec![Attribute::text(TCA_BPF_NAME, name), id];
        vec![Attribute::text(TCA_KIND, "bpf"), Attribute::Nest(TCA_OPTIONS, options)]
    }

    #[test]
    fn distinguishes_our_filter_from_others() {
        let read = |payload: &[u8]| filter(RTM_NEWTFILTER, payload);
        let ours = listed(HANDLES[1], PRIORITY, bpf(program::WIRE));
        let expected = Filter { priority: 1, handle: HANDLES[1], program_id: Some(42), is_ours: true };
        let is_ours = |payload: Vec<u8>| read(&payload).unwrap().is_ours;
        let flower = vec![Attribute::text(TCA_KIND, "flower"), bpf(program::WIRE).remove(1)];
        let mut chained = bpf(program::WIRE);
        chained.push(Attribute::Value(TCA_CHAIN, 5_u32.to_ne_bytes().into()));

        assert_eq!(read(&ours), Some(expected));
        assert!(!is_ours(listed(1, PRIORITY, bpf(program::WIRE))));
        assert!(!is_ours(listed(HANDLES[0], 2, bpf(program::WIRE))));
        assert!(!is_ours(listed(HANDLES[0], PRIORITY, bpf("cil_to_netdev"))));
        assert!(!is_ours(listed(HANDLES[0], PRIORITY, flower)));
        assert_eq!(read(&listed(0, PRIORITY, vec![Attribute::text(TCA_KIND, "bpf")])), None);
        assert_eq!(read(&listed(HANDLES[0], PRIORITY, chained)), None);
        assert_eq!(filter(RTM_DELTFILTER, &ours), None);
        for length in 0..TCMSG {
            assert_eq!(read(&ours[..length]), None, "{length}");
        }
    }
}
