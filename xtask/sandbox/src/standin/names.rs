//! A name server: A records and a wildcard, some of whose answers are lost. Depends on nothing. Called by
//! tests.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::Result;

use crate::locked;

/// Which datagrams it drops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// None.
    None,
    /// The first of each question: of each name and type.
    First,
    /// All: a server that is dead, at an address that is not.
    All,
}

/// Serves until it is dropped.
#[derive(Debug)]
pub struct NameServer {
    asked: Arc<Mutex<BTreeMap<String, usize>>>,
    ended: Arc<AtomicBool>,
}

impl NameServer {
    /// Listens at port 53 of `addr`. A name that begins with `*.` answers for all names below that have no
    /// record.
    ///
    /// # Errors
    /// When the port is taken.
    pub fn start(addr: Ipv4Addr, records: &[(&str, Ipv4Addr)], loss: Loss) -> Result<Self> {
        let socket = UdpSocket::bind((addr, 53))?;
        socket.set_read_timeout(Some(TICK))?;
        let records = records.iter().map(|&(name, addr)| (name.to_owned(), addr)).collect();
        let asked = Arc::<Mutex<BTreeMap<String, usize>>>::default();
        let ended = Arc::new(AtomicBool::new(false));
        let serving = Serving { asked: Arc::clone(&asked), ended: Arc::clone(&ended), records, loss };
        thread::Builder::new().name("names".into()).spawn(move || serving.run(&socket))?;
        Ok(Self { asked, ended })
    }

    /// How often each name was asked for, in lower case, lost questions too.
    pub fn asked(&self) -> BTreeMap<String, usize> {
        locked(&self.asked).clone()
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

struct Serving {
    asked: Arc<Mutex<BTreeMap<String, usize>>>,
    ended: Arc<AtomicBool>,
    records: BTreeMap<String, Ipv4Addr>,
    loss: Loss,
}

impl Serving {
    fn run(&self, socket: &UdpSocket) {
        let mut seen = BTreeSet::new();
        let mut buffer = [0; 512];
        while !self.ended.load(Ordering::Relaxed) {
            let (length, peer): (usize, SocketAddr) = match socket.recv_from(&mut buffer) {
                Ok(received) => received,
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock) => continue,
                Err(_) => return,
            };
            let Some(question) = buffer.get(..length).and_then(Question::parse) else { continue };
            *locked(&self.asked).entry(question.name.clone()).or_default() += 1;
            let is_lost = match self.loss {
                Loss::None => false,
                Loss::First => seen.insert(question.section.to_vec()),
                Loss::All => true,
            };
            if !is_lost {
                // A client that has ended needs no answer; another one asks again.
                let _gone = socket.send_to(&question.answer(self.find(&question.name)), peer);
            }
        }
    }

    fn find(&self, name: &str) -> Option<Ipv4Addr> {
        let is_below = |suffix: &str| name.strip_suffix(suffix).is_some_and(|rest| rest.ends_with('.'));
        let wildcard = || {
            let mut wildcards =
                self.records.iter().filter(|(key, _)| key.strip_prefix("*.").is_some_and(is_below));
            wildcards.next().map(|(_, addr)| *addr)
        };
        self.records.get(name).copied().or_else(wildcard)
    }
}

/// The one question of a query (RFC 1035, 4.1).
struct Question<'a> {
    id: &'a [u8],
    name: String,
    /// As it stands in the query.
    section: &'a [u8],
}

impl<'a> Question<'a> {
    fn parse(query: &'a [u8]) -> Option<Self> {
        let (mut labels, mut at) = (Vec::new(), HEADER);
        loop {
            let length = usize::from(*query.get(at)?);
            if length == 0 {
                break;
            }
            labels.push(String::from_utf8_lossy(query.get(at + 1..=at + length)?).to_lowercase());
            at += 1 + length;
        }
        // The root's empty label, type and class.
        let section = query.get(HEADER..at + 5)?;
        Some(Self { id: query.get(..2)?, name: labels.join("."), section })
    }

    /// A response without an error: with the address, if there is one and one of IPv4 was asked for.
    fn answer(&self, addr: Option<Ipv4Addr>) -> Vec<u8> {
        let addr = addr.filter(|_| self.section.ends_with(&[0, A, 0, IN]));
        let mut reply = self.id.to_vec();
        reply.extend([0x81, 0x80, 0, 1, 0, u8::from(addr.is_some()), 0, 0, 0, 0]);
        reply.extend(self.section);
        if let Some(addr) = addr {
            // The question's name, A, IN, a minute, four bytes.
            reply.extend([0xc0, 12, 0, A, 0, IN, 0, 0, 0, 60, 0, 4]);
            reply.extend(addr.octets());
        }
        reply
    }
}

const HEADER: usize = 12;
const A: u8 = 1;
const IN: u8 = 1;
/// How soon it notices that it was dropped.
const TICK: Duration = Duration::from_millis(200);
