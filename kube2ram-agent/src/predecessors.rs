//! What a predecessor (kube2iam, the Go kube2ram) left on this node: iptables rules that lead the metadata
//! server's address elsewhere, and an agent that still answers. Looks, and changes nothing. Depends on
//! `netlink` and procfs; called by `preflight`.
//!
//! A rule is known by the address that it compares with and by its target. The rest of it is not read: the
//! command that removes it finds it by its text.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream},
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd},
    time::{Duration, Instant},
};

use rustix::net::{AddressFamily, SocketFlags, SocketType, netlink, socket_with};

use crate::netlink::{Attribute, Message, Socket, attribute, attributes, half, uninterrupted, word};

/// Why it is not known what was left.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the nat table: is CAP_NET_ADMIN given?")]
pub struct PredecessorsError(#[source] io::Error);

/// A rule that leads the metadata server's address elsewhere.
#[derive(Debug, PartialEq, Eq)]
struct Rule {
    tool: &'static str,
    /// `None` when it is not known.
    to: Option<SocketAddrV4>,
    /// The shell command that removes it.
    removal: String,
}

/// The predecessors' own default.
const DEFAULT_PORT: u16 = 8181;
const MAX_RULES: usize = 16;
/// The targets of iptables that lead elsewhere.
const TARGETS: [&[u8]; 2] = [b"DNAT\0", b"REDIRECT\0"];

/// Looks for rules of the nat table that name `metadata` as their destination and send it elsewhere, and for
/// the agent that they lead to. Returns a warning for each. Blocks; asks nobody but the kernel and ports of
/// the loopback device, for three seconds at the most.
///
/// Rules of nf_tables are looked for in the chains PREROUTING and OUTPUT of `ip nat`, which are those of
/// `iptables-nft`.
///
/// # Errors
/// [`PredecessorsError`]: nothing is known.
pub fn leftovers(metadata: Ipv4Addr) -> Result<Vec<String>, PredecessorsError> {
    let mut rules = nft_rules(metadata).map_err(PredecessorsError)?;
    rules.extend(legacy_rules(metadata).map_err(PredecessorsError)?);
    rules.truncate(MAX_RULES);
    // Where a rule leads, whatever listens is the predecessor's agent, because its health check may fail;
    // only not kube2ram itself. On the predecessors' default port something else may listen, so that is
    // asked.
    let led_to: BTreeSet<_> =
        rules.iter().filter_map(|rule| Some(rule.to?.port())).filter(|port| *port != 0).collect();
    let led_to = led_to.into_iter().take(2).find(|port| is_someone_elses(*port));
    let agent = led_to.or_else(|| is_predecessors(DEFAULT_PORT).then_some(DEFAULT_PORT)).map(|port| {
        format!(
            "a predecessor's agent listens on port {port}: whoever reaches it is given roles by IP address. Delete its DaemonSet once kube2ram is ready"
        )
    });
    Ok(rules.iter().map(|rule| rule.warning(metadata)).chain(agent).collect())
}

impl Rule {
    fn of_iptables(tool: &'static str, info: &[u8], metadata: Ipv4Addr) -> Self {
        let removal = format!(
            r"{tool}-save -t nat | sed -nE 's,^-A (.*[^!] -d {metadata}/32 .*-j (DNAT|REDIRECT).*),-D \1,p' | xargs -rL1 {tool} -t nat"
        );
        Self { tool, to: destination(info), removal }
    }

    fn warning(&self, metadata: Ipv4Addr) -> String {
        let Self { tool, to, removal } = self;
        let to = match to {
            None => "another place".to_owned(),
            Some(to) if to.ip().is_unspecified() && to.port() == 0 => "another port of the node".to_owned(),
            Some(to) if to.ip().is_unspecified() => format!("port {} of the node", to.port()),
            Some(to) if to.port() == 0 => to.ip().to_string(),
            Some(to) => to.to_string(),
        };
        format!(
            "{tool}, table nat: {metadata} leads to {to}. Pods' connections do not come there while kube2ram is active, what else the node receives \
             or sends does. Once the predecessor is removed: {removal}"
        )
    }
}

/// Where a target leads: `struct nf_nat_range` has two addresses of 16 bytes and two ports behind its flags,
/// the older `nf_nat_ipv4_multi_range_compat` has a count first and addresses of 4 bytes
/// (include/uapi/linux/netfilter/nf_nat.h).
fn destination(info: &[u8]) -> Option<SocketAddrV4> {
    let (addr, port) = if info.len() < 40 { (8, 16) } else { (4, 36) };
    let addr: [u8; 4] = *info.get(addr..)?.first_chunk()?;
    let port = info.get(port..)?.first_chunk()?;
    Some(SocketAddrV4::new(addr.into(), u16::from_be_bytes(*port)))
}

/// The rules in nf_tables, which may be absent (include/uapi/linux/netfilter/nf_tables.h).
fn nft_rules(metadata: Ipv4Addr) -> io::Result<Vec<Rule>> {
    const NFNL_SUBSYS_NFTABLES: u16 = 10;
    const NFT_MSG_GETRULE: u16 = 7;
    const NFPROTO_IPV4: u8 = 2;
    const ABSENT: [i32; 4] = [libc::EINVAL, libc::ENOENT, libc::EOPNOTSUPP, libc::EPROTONOSUPPORT];
    /// Of 32 KiB each.
    const MAX_DATAGRAMS: usize = 4096;
    let ask = |chain: &'static str| {
        let location = vec![Attribute::text(1, "nat"), Attribute::text(2, chain)];
        let kind = NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETRULE;
        let query = [Message::dump(kind, vec![NFPROTO_IPV4, 0, 0, 0], location)];
        let mut socket = Socket::open(Some(netlink::NETFILTER), MAX_DATAGRAMS)?;
        uninterrupted(|| {
            let mut rules = Vec::new();
            socket.request(&query, |_, payload| rules.extend(nft_rule(payload, chain, metadata)))?;
            Ok(rules)
        })
    };
    let mut rules = Vec::new();
    for chain in ["PREROUTING", "OUTPUT"] {
        match ask(chain) {
            Err(error) if ABSENT.iter().any(|errno| error.raw_os_error() == Some(*errno)) => {}
            found => rules.extend(found?),
        }
    }
    Ok(rules)
}

/// Reads a rule behind its `struct nfgenmsg`. Numbers of each expression's own attributes follow their order:
/// `NFTA_CMP_{SREG,OP,DATA}`, `NFTA_TARGET_{NAME,REV,INFO}`, `NFTA_NAT_TYPE`.
fn nft_rule(payload: &[u8], chain: &str, metadata: Ipv4Addr) -> Option<Rule> {
    const EQUAL: &[u8] = &[0; 4];
    const DNAT: &[u8] = &[0, 0, 0, 1];
    let payload = payload.get(4..)?;
    let handle = u64::from_be_bytes(*attribute(payload, 3)?.first_chunk()?);
    let (mut names_metadata, mut rule) = (false, None);
    for (_, expression) in attributes(attribute(payload, 4)?) {
        let data = attribute(expression, 2).unwrap_or_default();
        let first = attribute(data, 1).unwrap_or_default();
        match attribute(expression, 1)? {
            // nft compares neighbouring fields of the header at once.
            b"cmp\0" if attribute(data, 2) == Some(EQUAL) => {
                let mut fields = attribute(attribute(data, 3)?, 1)?.windows(4);
                names_metadata |= fields.any(|field| field == metadata.octets());
            }
            b"target\0" if TARGETS.contains(&first) => {
                rule = Some(Rule::of_iptables("iptables-nft", attribute(data, 3)?, metadata));
            }
            name if name == b"redir\0" || name == b"nat\0" && first == DNAT => {
                let removal = format!("nft delete rule ip nat {chain} handle {handle}");
                rule = Some(Rule { tool: "nft", to: None, removal });
            }
            _ => {}
        }
    }
    rule.filter(|_| names_metadata)
}

/// The rules of `iptables-legacy`. A namespace that has no such table is not asked for one: asking would make
/// it, and with it NAT and connection tracking for the node.
fn legacy_rules(metadata: Ipv4Addr) -> io::Result<Vec<Rule>> {
    match fs::read_to_string("/proc/thread-self/net/ip_tables_names") {
        Ok(tables) if tables.lines().any(|table| table == "nat") => {}
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => return Ok(Vec::new()),
    }
    // Of any kind: the tables are asked for through whatever socket there is. (A raw one would take
    // CAP_NET_RAW.)
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    Ok(legacy_rules_in(&uninterrupted(|| legacy_table(socket.as_fd()))?, metadata))
}

/// The entries of the nat table, as the kernel copies them out
/// (include/uapi/linux/netfilter_ipv4/ip_tables.h).
fn legacy_table(socket: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    const IPT_SO_GET_INFO: libc::c_int = 64;
    const IPT_SO_GET_ENTRIES: libc::c_int = 65;
    /// A node with 100,000 rules has some 25 MiB of them.
    const MAX_SIZE: u32 = 32 * 1024 * 1024;
    // struct ipt_getinfo: the name in 32 bytes, twelve numbers, the size.
    let mut info = [0; 84];
    info[..3].copy_from_slice(b"nat");
    ask(socket, IPT_SO_GET_INFO, &mut info)?;
    let size = word(&info, 80);
    if size > MAX_SIZE {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    // struct ipt_get_entries: the name, the size, padding, the entries.
    let mut entries = vec![0; 40 + usize::try_from(size).unwrap_or_default()];
    entries[..3].copy_from_slice(b"nat");
    entries[32..36].copy_from_slice(&size.to_ne_bytes());
    ask(socket, IPT_SO_GET_ENTRIES, &mut entries).map_err(|error| match error.kind() {
        // The size has changed meanwhile.
        io::ErrorKind::WouldBlock => io::ErrorKind::Interrupted.into(),
        _ => error,
    })?;
    Ok(entries.split_off(40))
}

/// Has the kernel fill a buffer.
fn ask(socket: BorrowedFd<'_>, option: libc::c_int, buffer: &mut [u8]) -> io::Result<()> {
    let mut length = libc::socklen_t::try_from(buffer.len()).map_err(io::Error::other)?;
    let value = buffer.as_mut_ptr().cast();
    #[expect(unsafe_code, reason = "rustix knows no options of netfilter")]
    // SAFETY: the kernel writes `length` bytes at the most, which the buffer has.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_IP, option, value, &raw mut length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Each is a `struct ipt_entry` of 112 bytes, matches, and a `struct xt_entry_target` of 32 bytes with what
/// is the target's own behind it.
fn legacy_rules_in(mut entries: &[u8], metadata: Ipv4Addr) -> Vec<Rule> {
    const IPT_INV_DSTIP: u8 = 0x10;
    let mut rules = Vec::new();
    while let Some(entry) = entries.first_chunk::<112>() {
        let (target, next) = (usize::from(half(entry, 88)), usize::from(half(entry, 90)));
        let (addr, mask, inverted) = (&entry[4..8], &entry[12..16], entry[83] & IPT_INV_DSTIP != 0);
        let names_metadata = addr == metadata.octets() && mask == [255; 4] && !inverted;
        if let Some((head, info)) =
            entries.get(target..next).and_then(|target| target.split_first_chunk::<32>())
            && names_metadata
            && TARGETS.iter().any(|name| head[2..].starts_with(name))
        {
            rules.push(Rule::of_iptables("iptables-legacy", info, metadata));
        }
        entries = entries.get(next.max(entry.len())..).unwrap_or_default();
    }
    rules
}

/// Whether a predecessor's agent answers there. Both tell the instance's id and the host's address, or that
/// they do not know the former (server.go of both).
fn is_predecessors(port: u16) -> bool {
    let answer = health(port).unwrap_or_default();
    answer.contains(r#""instanceId""#) && answer.contains(r#""hostIP""#)
        || answer.contains("Healthcheck not yet performed")
}

/// The loopback device takes microseconds.
const TIMEOUT: Duration = Duration::from_millis(150);

/// Whether another program than kube2ram listens there.
fn is_someone_elses(port: u16) -> bool {
    health(port).is_ok_and(|answer| !answer.contains(OURS))
}

/// What kube2ram answers a process of the host.
const OURS: &str = "the kernel has no record of the caller";

fn health(port: u16) -> io::Result<String> {
    let begun = Instant::now();
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)), TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    stream.write_all(b"GET /healthz HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
    let (mut answer, mut part) = (Vec::new(), [0; 512]);
    // What came before an error or the end of the time counts; the predecessors' answers are shorter.
    while answer.len() < 2048 && begun.elapsed() < 3 * TIMEOUT {
        match stream.read(&mut part) {
            Ok(0) | Err(_) => break,
            Ok(length) => answer.extend_from_slice(&part[..length]),
        }
    }
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

#[cfg(test)]
mod tests;
