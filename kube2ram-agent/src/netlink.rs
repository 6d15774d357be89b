//! Netlink (netlink(7), include/uapi/linux/netlink.h): messages and their attributes as bytes, and sockets
//! that send the kernel one request at a time. Of all families' messages only the route query is known;
//! everything but the socket is pure. Depends on no other module; called by `guard`, `listeners`,
//! `predecessors`, `wire_guard` and `app`.

mod route;

use std::{io, os::fd::OwnedFd};

use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketAddrAny, SocketFlags, SocketType,
    netlink::SocketAddrNetlink, recvfrom, send, socket_with,
};

pub(crate) use self::route::Route;

/// An attribute: a number and a value, or attributes again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Attribute {
    Nest(u16, Vec<Attribute>),
    Value(u16, Vec<u8>),
}

impl Attribute {
    /// Numbers are big-endian in nf_tables.
    pub(crate) fn number(kind: u16, value: u32) -> Self {
        Self::Value(kind, value.to_be_bytes().into())
    }

    pub(crate) fn text(kind: u16, value: &str) -> Self {
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

/// Returns whether each attribute is present with its value, and no other one of its kind. Attributes of
/// other kinds do not count: newer kernels may report more.
pub(crate) fn all_in(wanted: &[Attribute], found: &[u8]) -> bool {
    wanted.iter().all(|one| {
        let wanted = wanted.iter().filter(|attribute| attribute.kind() == one.kind());
        let mut found = attributes(found).filter(|(kind, _)| *kind == one.kind());
        wanted.clone().all(|attribute| found.next().is_some_and(|(_, value)| attribute.is_in(value)))
            && found.next().is_none()
    })
}

/// Splits attributes, as far as they are well-formed. The flags in the upper bits of the kind are not part of
/// it.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> + Clone {
    std::iter::from_fn(move || {
        let header = bytes.first_chunk::<4>()?;
        let (length, kind) = (usize::from(half(header, 0)), half(header, 2) & 0x3fff);
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(ALIGN)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The value of the first attribute of a kind.
pub(crate) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

/// A request: what the family puts first, then attributes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) head: Vec<u8>,
    pub(crate) attributes: Vec<Attribute>,
}

impl Message {
    /// A request for all that there is of a kind.
    pub(crate) fn dump(kind: u16, head: Vec<u8>, attributes: Vec<Attribute>) -> Self {
        Self { kind, flags: NLM_F_DUMP, head, attributes }
    }

    fn encode(&self, sequence: u32, bytes: &mut Vec<u8>) {
        let start = bytes.len();
        bytes.extend([0; 4]);
        bytes.extend(self.kind.to_ne_bytes());
        bytes.extend((self.flags | NLM_F_REQUEST).to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]); // the port: the kernel knows
        bytes.extend(&self.head);
        self.attributes.iter().for_each(|attribute| attribute.encode(bytes));
        let length = u32::try_from(bytes.len() - start).unwrap_or(u32::MAX);
        bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
    }
}

/// All of them, one after the other.
pub(crate) fn encode(messages: &[Message], sequence: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    messages.iter().for_each(|message| message.encode(sequence, &mut bytes));
    bytes
}

pub(crate) const HEADER: usize = 16;
const ALIGN: usize = 4;

const NLM_F_REQUEST: u16 = 1;
pub(crate) const NLM_F_ACK: u16 = 4;
pub(crate) const NLM_F_ECHO: u16 = 8;
pub(crate) const NLM_F_EXCL: u16 = 0x200;
pub(crate) const NLM_F_CREATE: u16 = 0x400;
pub(crate) const NLM_F_APPEND: u16 = 0x800;
pub(crate) const NLM_F_DUMP: u16 = 0x300;
pub(crate) const NLM_F_DUMP_INTR: u16 = 0x10;
pub(crate) const NLMSG_ERROR: u16 = 2;
pub(crate) const NLMSG_DONE: u16 = 3;
/// Below it are the control messages.
const NLMSG_MIN_TYPE: u16 = 0x10;

/// The result of one request, as far as it was received.
#[derive(Debug)]
pub(crate) struct Reply {
    sequence: u32,
    is_interrupted: bool,
    outcome: Option<io::Result<()>>,
}

impl Reply {
    pub(crate) fn to(sequence: u32) -> Self {
        Self { sequence, is_interrupted: false, outcome: None }
    }

    /// Reads a datagram, and gives kind and payload of each message to `each`; messages of other requests are
    /// skipped. Ends with the reply, or with the first incomplete message: it is not known what was lost with
    /// it.
    pub(crate) fn read(&mut self, mut bytes: &[u8], each: &mut impl FnMut(u16, &[u8])) {
        while self.outcome.is_none() && !bytes.is_empty() {
            let message = bytes.first_chunk::<HEADER>().and_then(|header| {
                let length = usize::try_from(word(header, 0)).ok()?;
                Some((header, length, bytes.get(HEADER..length)?))
            });
            let Some((header, length, payload)) = message else {
                self.outcome = Some(Err(io::ErrorKind::InvalidData.into()));
                return;
            };
            if word(header, 8) == self.sequence {
                self.take(half(header, 4), half(header, 6), payload, each);
            }
            bytes = bytes.get(length.next_multiple_of(ALIGN)..).unwrap_or_default();
        }
    }

    fn take(&mut self, kind: u16, flags: u16, payload: &[u8], each: &mut impl FnMut(u16, &[u8])) {
        // An interrupted dump is read to its end: until then the kernel answers the socket's next dump with
        // EBUSY.
        self.is_interrupted |= flags & NLM_F_DUMP_INTR != 0;
        if kind == NLMSG_ERROR || kind == NLMSG_DONE {
            // Both begin with 0 or a negative errno.
            self.outcome = Some(match payload.first_chunk().map(|code| i32::from_ne_bytes(*code)) {
                Some(0) if self.is_interrupted => Err(io::ErrorKind::Interrupted.into()),
                Some(0) => Ok(()),
                Some(code) => Err(io::Error::from_raw_os_error(code.saturating_neg())),
                None => Err(io::ErrorKind::InvalidData.into()),
            });
        } else if kind >= NLMSG_MIN_TYPE && !self.is_interrupted {
            each(kind, payload);
        }
    }

    /// How it ended, once it has.
    pub(crate) fn outcome(&mut self) -> Option<io::Result<()>> {
        self.outcome.take()
    }
}

/// A socket to the kernel. It belongs to the network namespace in which it was created.
#[derive(Debug)]
pub(crate) struct Socket {
    socket: OwnedFd,
    sequence: u32,
    max_datagrams: usize,
}

impl Socket {
    /// Opens a socket of a protocol (`None` is `NETLINK_ROUTE`), which reads at most this many datagrams of
    /// 32 KiB in reply to one request.
    ///
    /// # Errors
    /// The kernel's: it may know no such protocol.
    pub(crate) fn open(protocol: Option<Protocol>, max_datagrams: usize) -> io::Result<Self> {
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
        Ok(Self { socket, sequence: 0, max_datagrams })
    }

    /// Sends a request, one message of which asks for an acknowledgement or a dump, and gives kind and
    /// payload of each message of the reply to `each`.
    ///
    /// # Errors
    /// The kernel's; [`io::ErrorKind::Interrupted`] when what it tells of changed during a dump;
    /// [`io::ErrorKind::FileTooLarge`] when that is too much; [`io::ErrorKind::InvalidData`] when it is not
    /// whole. What `each` was given until then is not all there is.
    pub(crate) fn request(
        &mut self,
        messages: &[Message],
        mut each: impl FnMut(u16, &[u8]),
    ) -> io::Result<()> {
        /// What the kernel fills at once (`NLMSG_GOODSIZE` is a page, dumps take up to 32 KiB).
        const DATAGRAM_MAX: usize = 32 * 1024;
        self.sequence = self.sequence.wrapping_add(1);
        send(&self.socket, &encode(messages, self.sequence), SendFlags::empty())?;
        let mut reply = Reply::to(self.sequence);
        let mut buffer = vec![0; DATAGRAM_MAX];
        // The kernel answers within send(2), and continues a dump within recv(2): if there is nothing to
        // read, that is an error and not a reason to wait.
        for _ in 0..self.max_datagrams {
            let (read, length, sender) =
                recvfrom(&self.socket, buffer.as_mut_slice(), RecvFlags::DONTWAIT | RecvFlags::TRUNC)?;
            if !is_kernel(sender) {
                continue;
            }
            if length > read {
                return Err(io::ErrorKind::InvalidData.into());
            }
            reply.read(&buffer[..length], &mut each);
            if let Some(outcome) = reply.outcome() {
                return outcome;
            }
        }
        Err(io::ErrorKind::FileTooLarge.into())
    }
}

/// Whether a datagram is the kernel's. Other processes of the network namespace may send to the socket's
/// port, too: a container with CAP_NET_ADMIN in its own.
pub(crate) fn is_kernel(sender: Option<SocketAddrAny>) -> bool {
    sender.and_then(|sender| SocketAddrNetlink::try_from(sender).ok()).is_some_and(|sender| sender.pid() == 0)
}

/// Repeats the request a few times if the answer was interrupted by a change of what it lists.
///
/// # Errors
/// The last attempt's.
pub(crate) fn uninterrupted<T>(mut ask: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    const ATTEMPTS: u8 = 5;
    for _ in 1..ATTEMPTS {
        match ask() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            settled => return settled,
        }
    }
    ask()
}

/// A 16-bit number of a header that is long enough.
pub(crate) fn half<const N: usize>(bytes: &[u8; N], at: usize) -> u16 {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]])
}

/// A 32-bit number of a header that is long enough.
pub(crate) fn word<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests;
