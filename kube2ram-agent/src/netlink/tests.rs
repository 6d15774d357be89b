//! Bytes as the kernel sends them, and as it never should.

use std::cell::Cell;

use proptest::prelude::*;

use super::*;

const KIND: u16 = 0x0a00;

fn tree() -> Vec<Attribute> {
    vec![
        Attribute::text(1, "abc"),
        Attribute::Nest(4, vec![Attribute::number(1, 2), Attribute::number(2, 7)]),
    ]
}

fn encoded(attributes: &[Attribute]) -> Vec<u8> {
    let mut bytes = Vec::new();
    attributes.iter().for_each(|attribute| attribute.encode(&mut bytes));
    bytes
}

/// As the kernel sends it: without the flag of a request.
fn told(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
    let message = Message { kind, flags, head: payload.into(), attributes: vec![] };
    let mut bytes = encode(&[message], sequence);
    bytes[6] &= !1;
    bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
    bytes
}

fn done(kind: u16, code: i32) -> Vec<u8> {
    told(kind, 0, 7, &code.to_ne_bytes())
}

/// The payloads that are read of a datagram in reply to request 7, and how it ends.
fn read(datagrams: &[Vec<u8>]) -> (Vec<Vec<u8>>, Option<io::Result<()>>) {
    let (mut reply, mut payloads) = (Reply::to(7), Vec::new());
    for datagram in datagrams {
        reply.read(datagram, &mut |_, payload| payloads.push(payload.to_owned()));
    }
    (payloads, reply.outcome())
}

fn failure(outcome: Option<io::Result<()>>) -> io::ErrorKind {
    outcome.expect("it ended").expect_err("it failed").kind()
}

#[test]
#[cfg(target_endian = "little")]
fn encodes_lengths_padding_and_nests() {
    let message = Message { kind: 0x0a03, flags: NLM_F_ACK, head: vec![2, 0, 0, 10], attributes: tree() };

    let bytes = encode(&[message], 7);

    #[rustfmt::skip]
    assert_eq!(bytes, [
        48, 0, 0, 0,  3, 10,  5, 0,  7, 0, 0, 0,  0, 0, 0, 0,
        2, 0, 0, 10,
        8, 0, 1, 0,  b'a', b'b', b'c', 0,
        20, 0, 4, 0,  8, 0, 1, 0, 0, 0, 0, 2,  8, 0, 2, 0, 0, 0, 0, 7,
    ]);
}

#[test]
fn finds_itself_among_more_but_nothing_else() {
    let more = [&tree()[..], &[Attribute::number(9, 9)]].concat();
    let twice = [tree(), tree()].concat();
    let other = [Attribute::text(1, "abc"), Attribute::Nest(4, vec![Attribute::number(1, 2)])];

    assert!(all_in(&tree(), &encoded(&more)));
    assert!(!all_in(&tree(), &encoded(&twice)));
    assert!(!all_in(&tree(), &encoded(&other)));
    assert!(!all_in(&tree(), &[]));
    assert_eq!(attribute(&encoded(&more), 9), Some(&[0, 0, 0, 9][..]));
    assert_eq!(attribute(&encoded(&more), 8), None);
}

#[test]
fn the_flags_of_a_kind_are_not_part_of_it() {
    let nested = encoded(&[Attribute::Nest(4 | 0x8000, vec![Attribute::number(1 | 0x4000, 2)])]);

    assert_eq!(attribute(&nested, 4).and_then(|inner| attribute(inner, 1)), Some(&[0, 0, 0, 2][..]));
}

#[test]
fn attributes_end_where_one_is_cut() {
    let whole = encoded(&tree());

    for length in 0..whole.len() {
        assert_eq!(attributes(&whole[..length]).count(), usize::from(length >= 8), "{length}");
    }
    for length in [0_u16, 1, 3, 9] {
        let lying = [&length.to_ne_bytes()[..], &[1, 0, 0, 0, 0, 0]].concat();
        assert_eq!(attributes(&lying).count(), 0, "an attribute of 8 bytes that says {length}");
    }
}

#[test]
fn a_reply_ends_with_its_own_acknowledgement() {
    let others = told(NLMSG_ERROR, 0, 6, &(-libc::EPERM).to_ne_bytes());
    let reply = [told(KIND, 2, 7, b"once"), done(NLMSG_ERROR, 0), told(KIND, 2, 7, b"late")].concat();

    assert!(read(std::slice::from_ref(&others)).1.is_none(), "of another request");
    let (payloads, outcome) = read(&[others, reply]);

    assert_eq!(payloads, [b"once"]);
    assert!(outcome.unwrap().is_ok());
}

#[test]
fn a_dump_goes_on_over_datagrams_until_it_is_done() {
    let first = [told(KIND, 2, 7, b"a"), told(KIND, 2, 7, b"bc")].concat();

    assert!(read(std::slice::from_ref(&first)).1.is_none());
    let (payloads, outcome) = read(&[first, told(KIND, 2, 7, b""), done(NLMSG_DONE, 0)]);

    assert_eq!(payloads, [&b"a"[..], b"bc", b""]);
    assert!(outcome.unwrap().is_ok());
}

#[test]
fn a_refusal_is_its_errno() {
    for kind in [NLMSG_ERROR, NLMSG_DONE] {
        let (_, outcome) = read(&[done(kind, -libc::ENOENT)]);
        assert_eq!(outcome.unwrap().unwrap_err().raw_os_error(), Some(libc::ENOENT));
    }
    // Whatever a kernel means by it, it is not a success.
    assert!(read(&[done(NLMSG_ERROR, i32::MIN)]).1.unwrap().is_err());
    assert!(read(&[done(NLMSG_ERROR, 5)]).1.unwrap().is_err());
}

#[test]
fn an_interrupted_dump_is_reported_whatever_carries_the_flag() {
    for kind in [KIND, NLMSG_DONE] {
        let interrupted = told(kind, NLM_F_DUMP_INTR, 7, &[0; 4]);

        let (payloads, outcome) = read(&[interrupted, done(NLMSG_DONE, 0)]);

        assert_eq!(failure(outcome), io::ErrorKind::Interrupted);
        assert!(payloads.is_empty());
    }
}

#[test]
fn an_interrupted_dump_is_read_to_its_end_before_the_next_may_begin() {
    let interrupted = told(KIND, NLM_F_DUMP_INTR, 7, b"a");

    assert!(read(&[interrupted.clone(), told(KIND, 2, 7, b"b")]).1.is_none(), "the kernel has more to tell");
    assert_eq!(
        failure(read(&[interrupted, done(NLMSG_ERROR, 1)]).1),
        failure(read(&[done(NLMSG_ERROR, 1)]).1)
    );
}

#[test]
fn a_message_that_is_not_whole_is_no_success() {
    let whole = [told(KIND, 2, 7, b"abcd"), done(NLMSG_DONE, 0)].concat();

    for length in 1..whole.len() {
        // Between the messages nothing is wrong: the rest may come.
        let (_, outcome) = read(&[whole[..length].to_vec()]);
        let is_cut = length != HEADER + 4;
        assert_eq!(outcome.is_some_and(|outcome| outcome.is_err()), is_cut, "{length}");
    }
    for length in [0_u32, 4, 15] {
        let mut lying = whole.clone();
        lying[..4].copy_from_slice(&length.to_ne_bytes());
        assert_eq!(failure(read(&[lying]).1), io::ErrorKind::InvalidData, "{length}");
    }
    for kind in [NLMSG_ERROR, NLMSG_DONE] {
        let (_, outcome) = read(&[told(kind, 0, 7, &[0; 3])]);
        assert_eq!(failure(outcome), io::ErrorKind::InvalidData, "without its code");
    }
}

#[test]
fn control_messages_carry_no_news() {
    let (payloads, outcome) = read(&[told(1, 0, 7, b"noop"), done(NLMSG_DONE, 0)]);

    assert!(payloads.is_empty() && outcome.unwrap().is_ok());
}

#[test]
fn asks_again_only_while_interrupted() {
    let asked = Cell::new(0);
    let ask = |interruptions: u32, then: io::ErrorKind| {
        asked.set(0);
        uninterrupted(|| {
            asked.set(asked.get() + 1);
            let kind = if asked.get() <= interruptions { io::ErrorKind::Interrupted } else { then };
            Err::<(), _>(kind.into())
        })
        .unwrap_err()
        .kind()
    };

    assert_eq!((ask(2, io::ErrorKind::NotFound), asked.get()), (io::ErrorKind::NotFound, 3));
    assert_eq!((ask(9, io::ErrorKind::NotFound), asked.get()), (io::ErrorKind::Interrupted, 5));
}

#[test]
fn a_dump_of_more_than_was_agreed_fails() {
    const RTM_GETLINK: u16 = 18;
    let links = Message::dump(RTM_GETLINK, vec![0; 16], Vec::new());
    let count = |max_datagrams| {
        let mut told = 0;
        let outcome = Socket::open(None, max_datagrams)
            .unwrap()
            .request(std::slice::from_ref(&links), |_, _| told += 1);
        outcome.map(|()| told)
    };

    assert!(count(64).unwrap() >= 1, "the loopback device");
    assert_eq!(count(0).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
}

proptest! {
    #[test]
    fn reads_any_bytes(bytes: Vec<u8>, sequence: u32) {
        Reply::to(sequence).read(&bytes, &mut |_, payload| assert!(attributes(payload).count() <= payload.len()));
        all_in(&tree(), &bytes);
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn what_another_process_sends_is_no_reply() {
    use rustix::net::{SendFlags, getsockname, netlink::SocketAddrNetlink, sendto};

    /// `RTM_GETLINK` and `RTM_NEWLINK`, include/uapi/linux/rtnetlink.h; the head is `struct ifinfomsg`.
    const GETLINK: u16 = 18;
    const NEWLINK: u16 = 16;
    let mut asking = Socket::open(None, 64).unwrap();
    // The kernel gives a socket its port at the first use.
    asking.request(&[Message::dump(GETLINK, vec![0; 16], vec![])], |_, _| {}).unwrap();
    let port = SocketAddrNetlink::try_from(getsockname(&asking.socket).unwrap()).unwrap().pid();
    let forger = Socket::open(None, 1).unwrap();
    // In reply to the next request: a device that is not there, and the end.
    let forged =
        [told(NEWLINK, 2, 2, b"forged device   "), told(NLMSG_DONE, 2, 2, &0_i32.to_ne_bytes())].concat();
    sendto(&forger.socket, &forged, SendFlags::empty(), &SocketAddrNetlink::new(port, 0)).unwrap();

    let mut devices = Vec::new();
    let dump = Message::dump(GETLINK, vec![0; 16], vec![]);
    asking.request(&[dump], |_, payload| devices.push(payload.to_owned())).unwrap();

    assert!(!devices.is_empty(), "the kernel's reply, which came after");
    assert!(devices.iter().all(|device| !device.starts_with(b"forged")), "{devices:?}");
}
