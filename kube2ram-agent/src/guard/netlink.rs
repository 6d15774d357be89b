//! Netlink messages and their attributes, as bytes (netlink(7), include/uapi/linux/netlink.h), and the socket they go through.
//! The messages are pure. Called by `guard` and `ruleset`, which give them meaning.

use std::{io, os::fd::OwnedFd};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
};

/// An attribute: a number and a value, or attributes again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Attribute {
    Nest(u16, Vec<Attribute>),
    Value(u16, Vec<u8>),
}

impl Attribute {
    /// Numbers are big-endian in nf_tables.
    pub(super) fn number(kind: u16, value: u32) -> Self {
        Self::Value(kind, value.to_be_bytes().into())
    }

    pub(super) fn text(kind: u16, value: &str) -> Self {
        Self::Value(kind, [value.as_bytes(), b"\0"].concat())
    }

    fn kind(&self) -> u16 {
        let (Self::Nest(kind, _) | Self::Value(kind, _)) = self;
        *kind
    }

    fn encode(&self, bytes: &mut Vec<u8>) {
        let start = bytes.len();
        bytes.extend([0; 2]);
        bytes.extend(self.kind().to_ne_bytes());
        match self {
            Self::Nest(_, inner) => inner.iter().for_each(|attribute| attribute.encode(bytes)),
            Self::Value(_, value) => bytes.extend(value),
        }
        let length = u16::try_from(bytes.len() - start).unwrap_or(u16::MAX);
        bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
    }

    fn is_in(&self, found: &[u8]) -> bool {
        match self {
            Self::Nest(_, inner) => all_in(inner, found),
            Self::Value(_, value) => value == found,
        }
    }
}

/// Tells whether each attribute is found with its value, and no other one of its kind. What is of other kinds does not count: newer
/// kernels may tell more.
pub(super) fn all_in(wanted: &[Attribute], found: &[u8]) -> bool {
    wanted.iter().all(|one| {
        let wanted = wanted.iter().filter(|attribute| attribute.kind() == one.kind());
        let mut found = attributes(found).filter(|(kind, _)| *kind == one.kind());
        wanted.clone().all(|attribute| found.next().is_some_and(|(_, value)| attribute.is_in(value)))
            && found.next().is_none()
    })
}

/// A message of one of netfilter's subsystems, which begins with a `struct nfgenmsg`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) kind: u16,
    pub(super) flags: u16,
    pub(super) family: u8,
    pub(super) resource: u16,
    pub(super) attributes: Vec<Attribute>,
}

impl Message {
    fn encode(&self, sequence: u32, bytes: &mut Vec<u8>) {
        let start = bytes.len();
        bytes.extend([0; 4]);
        bytes.extend(self.kind.to_ne_bytes());
        bytes.extend((self.flags | NLM_F_REQUEST).to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]); // the port: the kernel knows
        bytes.extend([self.family, 0]);
        bytes.extend(self.resource.to_be_bytes());
        self.attributes.iter().for_each(|attribute| attribute.encode(bytes));
        let length = u32::try_from(bytes.len() - start).unwrap_or(u32::MAX);
        bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
    }
}

/// All of them, one after the other.
pub(super) fn encode(messages: &[Message], sequence: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    messages.iter().for_each(|message| message.encode(sequence, &mut bytes));
    bytes
}

const ALIGN: usize = 4;
const HEADER: usize = 16;
const NFGENMSG: usize = 4;

const NLM_F_REQUEST: u16 = 1;
pub(super) const NLM_F_ACK: u16 = 4;
pub(super) const NLM_F_CREATE: u16 = 0x400;
pub(super) const NLM_F_APPEND: u16 = 0x800;
pub(super) const NLM_F_DUMP: u16 = 0x300;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

/// Splits attributes, as far as they are well-formed. The flags in the upper bits of the kind are not part of it.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> + Clone {
    std::iter::from_fn(move || {
        let [a, b, c, d] = *bytes.first_chunk()?;
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(ALIGN)..).unwrap_or_default();
        Some((u16::from_ne_bytes([c, d]) & 0x3fff, value))
    })
}

/// What came of a request, as far as it was heard.
#[derive(Debug, Default)]
pub(super) struct Reply {
    /// The attributes of each message.
    pub(super) messages: Vec<Vec<u8>>,
    outcome: Option<io::Result<()>>,
}

impl Reply {
    /// Reads a datagram; what belongs to other requests is skipped.
    fn read(&mut self, mut bytes: &[u8], sequence: u32) {
        while let Some(header) = bytes.first_chunk::<HEADER>() {
            let word =
                |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
            let half = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
            let length = usize::try_from(word(0)).unwrap_or(usize::MAX);
            let Some(payload) = bytes.get(HEADER..length) else { return };
            if word(8) == sequence && self.outcome.is_none() {
                self.take(half(4), half(6), payload);
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
            self.outcome = Some(if code == 0 {
                Ok(())
            } else {
                Err(io::Error::from_raw_os_error(code.saturating_neg()))
            });
        } else {
            self.messages.push(payload.get(NFGENMSG..).unwrap_or_default().into());
        }
    }
}

/// A socket to netfilter. It speaks to the network namespace in which it was made.
#[derive(Debug)]
pub(super) struct Socket {
    socket: OwnedFd,
    sequence: u32,
}

impl Socket {
    pub(super) fn open() -> io::Result<Self> {
        let protocol = Some(netlink::NETFILTER);
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Sends a request, one message of which asks for an acknowledgement or a dump, and hears the reply.
    ///
    /// # Errors
    /// The kernel's; [`io::ErrorKind::Interrupted`] when the rules changed during a dump.
    pub(super) fn request(&mut self, messages: &[Message]) -> io::Result<Reply> {
        /// What the kernel fills at once (`NLMSG_GOODSIZE` is a page, dumps take up to 32 KiB).
        const DATAGRAM_MAX: usize = 32 * 1024;
        self.sequence = self.sequence.wrapping_add(1);
        send(&self.socket, &encode(messages, self.sequence), SendFlags::empty())?;
        let mut reply = Reply::default();
        let mut buffer = vec![0; DATAGRAM_MAX];
        // The kernel answers within send(2), and goes on with a dump within recv(2): nothing to read is a fault, not a reason to wait.
        loop {
            let (length, _) = recv(&self.socket, buffer.as_mut_slice(), RecvFlags::DONTWAIT)?;
            reply.read(&buffer[..length], self.sequence);
            if let Some(outcome) = reply.outcome.take() {
                return outcome.map(|()| reply);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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

    #[test]
    #[cfg(target_endian = "little")]
    fn encodes_lengths_padding_and_nests() {
        let message = Message { kind: 0x0a03, flags: NLM_F_ACK, family: 2, resource: 10, attributes: tree() };

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
    }

    #[test]
    fn a_reply_ends_with_its_own_acknowledgement() {
        let datagram = |kind: u16, sequence, code: i32| {
            let message = Message { kind, flags: 0, family: 0, resource: 0, attributes: vec![] };
            let mut bytes = encode(&[message], sequence);
            bytes[HEADER..].copy_from_slice(&code.to_ne_bytes());
            bytes
        };
        let mut reply = Reply::default();

        reply.read(&datagram(NLMSG_ERROR, 1, -libc::EPERM), 2);
        assert!(reply.outcome.is_none(), "of another request");
        reply.read(&[datagram(0x0a00, 2, 0), datagram(NLMSG_ERROR, 2, -libc::ENOENT)].concat(), 2);

        assert_eq!(reply.messages.len(), 1);
        assert_eq!(reply.outcome.unwrap().unwrap_err().raw_os_error(), Some(libc::ENOENT));
    }

    proptest! {
        #[test]
        fn reads_any_bytes(bytes: Vec<u8>, sequence: u32) {
            Reply::default().read(&bytes, sequence);
            all_in(&tree(), &bytes);
        }
    }
}
