//! The nat table of `iptables-legacy`, as the kernel copies it out (include/uapi/linux/netfilter_ipv4/ip_tables.h). Reading its bytes is pure.
//! Called by `ancestor`.

use std::{
    fs, io,
    net::Ipv4Addr,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd},
};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::{
    MAX_RULES,
    rule::{Place, Rule},
    xtables::{self, Nat, device},
};

/// The table's rules that lead `metadata` elsewhere. A namespace that has no such table is not asked for one: asking would make it, and with it NAT and
/// connection tracking for the node.
///
/// # Errors
/// The kernel's; [`io::ErrorKind::FileTooLarge`] when it has more rules than anybody reads.
pub(super) fn rules(metadata: Ipv4Addr) -> io::Result<Vec<Rule>> {
    let tables = match fs::read_to_string("/proc/thread-self/net/ip_tables_names") {
        Ok(tables) => tables,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    if !tables.lines().any(|table| table == "nat") {
        return Ok(Vec::new());
    }
    // Of any kind: the tables are asked for through whatever socket there is. (A raw one would take CAP_NET_RAW.)
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    let (info, entries) = read(socket.as_fd())?;
    Ok(rules_in(&info, &entries, metadata))
}

/// What the kernel tells of a table: `struct ipt_getinfo`, behind its name.
struct Info {
    valid_hooks: u32,
    hook_entry: [u32; HOOKS],
    underflow: [u32; HOOKS],
    size: u32,
}

const HOOKS: usize = 5;
const NAME: usize = 32;
/// `sizeof(struct ipt_get_entries)`: name, size, and padding in front of entries, which are aligned to eight bytes.
const GET_ENTRIES: usize = 40;
/// A node with 100,000 rules has some 25 MiB of them.
const MAX_SIZE: u32 = 32 * 1024 * 1024;

fn read(socket: BorrowedFd<'_>) -> io::Result<(Info, Vec<u8>)> {
    const IPT_SO_GET_INFO: libc::c_int = 64;
    const IPT_SO_GET_ENTRIES: libc::c_int = 65;
    const ATTEMPTS: u8 = 5;
    let mut attempt = 0;
    loop {
        attempt += 1;
        let mut info = [0; NAME + 4 + 4 * HOOKS + 4 * HOOKS + 4 + 4];
        info[..3].copy_from_slice(b"nat");
        ask(socket, IPT_SO_GET_INFO, &mut info)?;
        let word =
            |index: usize| u32::from_ne_bytes(std::array::from_fn(|byte| info[NAME + 4 * index + byte]));
        let info = Info {
            valid_hooks: word(0),
            hook_entry: std::array::from_fn(|hook| word(1 + hook)),
            underflow: std::array::from_fn(|hook| word(1 + HOOKS + hook)),
            size: word(2 + 2 * HOOKS),
        };
        if info.size > MAX_SIZE {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let mut entries = vec![0; GET_ENTRIES + usize::try_from(info.size).unwrap_or_default()];
        entries[..3].copy_from_slice(b"nat");
        entries[NAME..NAME + 4].copy_from_slice(&info.size.to_ne_bytes());
        match ask(socket, IPT_SO_GET_ENTRIES, &mut entries) {
            Ok(()) => return Ok((info, entries.split_off(GET_ENTRIES))),
            // Its size has changed meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) && attempt < ATTEMPTS => {}
            Err(error) => return Err(error),
        }
    }
}

/// Has the kernel fill a buffer.
fn ask(socket: BorrowedFd<'_>, option: libc::c_int, buffer: &mut [u8]) -> io::Result<()> {
    let mut length = libc::socklen_t::try_from(buffer.len()).map_err(io::Error::other)?;
    #[expect(unsafe_code, reason = "rustix knows no options of netfilter")]
    // SAFETY: the kernel writes `length` bytes at the most, which the buffer has.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_IP,
            option,
            buffer.as_mut_ptr().cast(),
            std::ptr::from_mut(&mut length),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The rules of PREROUTING and OUTPUT: from a hook's first entry to its last, which is the chain's policy.
fn rules_in(info: &Info, entries: &[u8], metadata: Ipv4Addr) -> Vec<Rule> {
    let mut found = Vec::new();
    for (hook, chain) in [(0, "PREROUTING"), (3, "OUTPUT")] {
        if info.valid_hooks & 1 << hook == 0 {
            continue;
        }
        let offset = |of: [u32; HOOKS]| usize::try_from(of[hook]).unwrap_or(usize::MAX);
        let (mut at, end) = (offset(info.hook_entry), offset(info.underflow));
        let mut number = 0;
        while at < end && found.len() < MAX_RULES {
            number += 1;
            let Some(entry) = entries.get(at..end.min(entries.len())).and_then(Entry::first_of) else {
                break;
            };
            if let Some((words, Nat { to, .. })) = entry.leading(metadata) {
                let (place, chain) = (Place::Legacy { number }, chain.to_owned());
                found.push(Rule { place, chain, metadata, words, to });
            }
            at += entry.length;
        }
    }
    found
}

/// `struct ipt_entry`.
struct Entry<'a> {
    /// `struct ipt_ip`.
    ip: &'a [u8; IP],
    matches: &'a [u8],
    target: &'a [u8],
    length: usize,
}

const IP: usize = 84;
const ENTRY: usize = 112;
/// `struct xt_entry_match` and `xt_entry_target` alike: size, name, revision.
const EXTENSION: usize = 32;

impl<'a> Entry<'a> {
    fn first_of(bytes: &'a [u8]) -> Option<Self> {
        let half = |at: usize| Some(usize::from(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?)));
        let (target, length) = (half(88)?, half(90)?);
        let ip = bytes.first_chunk()?;
        // An entry is as long as itself at the least, so that this ends.
        let (matches, target) = (bytes.get(ENTRY..target)?, bytes.get(target..length)?);
        Some(Self { ip, matches, target, length })
    }

    /// Where it leads what is for `metadata` alone, and its words.
    fn leading(&self, metadata: Ipv4Addr) -> Option<(Option<Vec<String>>, Nat)> {
        const IPT_INV_DSTIP: u8 = 0x10;
        let destination = address(self.ip, 4, 12)?;
        if destination != (metadata, 32) || self.ip[83] & IPT_INV_DSTIP != 0 {
            return None;
        }
        let (name, revision, info) = extension(self.target)?;
        let nat = xtables::nat(name, revision, info)?;
        let words = [self.ip_words(metadata), self.match_words(), nat.words.clone()];
        let words: Option<Vec<_>> = words.into_iter().collect();
        Some((words.map(|words| words.concat()), nat))
    }

    fn ip_words(&self, metadata: Ipv4Addr) -> Option<Vec<String>> {
        const IPT_INV_VIA_IN: u8 = 1;
        const IPT_INV_VIA_OUT: u8 = 2;
        const IPT_INV_SRCIP: u8 = 8;
        let (ip, flags, inverted) = (self.ip, self.ip[82], self.ip[83]);
        if flags != 0 || inverted & !(IPT_INV_VIA_IN | IPT_INV_VIA_OUT | IPT_INV_SRCIP) != 0 {
            return None;
        }
        let mut words = Vec::new();
        let mut add = |flag: &str, value: String, inversion: u8| {
            words.extend((inverted & inversion != 0).then(|| "!".to_owned()));
            words.extend([flag.to_owned(), value]);
        };
        match address(ip, 0, 8)? {
            (_, 0) => {}
            (addr, bits) => add("-s", format!("{addr}/{bits}"), IPT_INV_SRCIP),
        }
        add("-d", format!("{metadata}/32"), 0);
        for (flag, name, inversion) in [("-i", 16, IPT_INV_VIA_IN), ("-o", 32, IPT_INV_VIA_OUT)] {
            let mask = &ip[name + 32..name + 48];
            let told = mask.iter().take_while(|byte| **byte != 0).count();
            if mask[told..].iter().any(|byte| *byte != 0) {
                return None;
            }
            if told != 0 {
                add(flag, device(&ip[name..name + told])?, inversion);
            }
        }
        match u16::from_ne_bytes([ip[80], ip[81]]) {
            0 => {}
            6 => add("-p", "tcp".to_owned(), 0),
            17 => add("-p", "udp".to_owned(), 0),
            other => add("-p", other.to_string(), 0),
        }
        Some(words)
    }

    fn match_words(&self) -> Option<Vec<String>> {
        let (mut words, mut rest) = (Vec::new(), self.matches);
        while !rest.is_empty() {
            let (name, revision, info) = extension(rest)?;
            words.extend(xtables::match_words(name, revision, info)?);
            rest = rest.get(EXTENSION + info.len()..)?;
        }
        Some(words)
    }
}

/// An IPv4 address and how many bits of it count; `None` for a mask with a hole.
fn address(ip: &[u8; IP], addr: usize, mask: usize) -> Option<(Ipv4Addr, u32)> {
    let octets = |at: usize| [ip[at], ip[at + 1], ip[at + 2], ip[at + 3]];
    let mask = u32::from_be_bytes(octets(mask));
    (mask.count_ones() == mask.leading_ones()).then(|| (Ipv4Addr::from(octets(addr)), mask.count_ones()))
}

/// The first match or target: its name, its revision, and what is its own.
fn extension(bytes: &[u8]) -> Option<(&[u8], u8, &[u8])> {
    let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
    let info = bytes.get(EXTENSION..length)?;
    let name = bytes[2..EXTENSION - 1].split(|byte| *byte == 0).next()?;
    Some((name, bytes[EXTENSION - 1], info))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const METADATA: Ipv4Addr = Ipv4Addr::new(100, 100, 100, 200);

    proptest! {
        #[test]
        fn reads_any_bytes(mut bytes in prop::collection::vec(any::<u8>(), 0..600), lengths: (u16, u16), start: u32) {
            // Something that looks like an entry, so that more than its length is read.
            if bytes.len() > ENTRY {
                bytes[4..8].copy_from_slice(&METADATA.octets());
                bytes[12..16].fill(0xff);
                bytes[83] = 0;
                bytes[88..90].copy_from_slice(&(lengths.0 % 300).to_ne_bytes());
                bytes[90..92].copy_from_slice(&(lengths.1 % 600).to_ne_bytes());
            }
            let underflow = [u32::try_from(bytes.len()).unwrap(); HOOKS];
            for hook_entry in [[0; HOOKS], [start; HOOKS]] {
                let info = Info { valid_hooks: 9, hook_entry, underflow, size: 0 };
                prop_assert!(rules_in(&info, &bytes, METADATA).len() <= MAX_RULES);
            }
        }
    }
}
