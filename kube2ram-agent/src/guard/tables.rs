//! The tables in the kernel: reads, writes and removes them by netlink. Owns the socket. Called by `guard`.

use std::io;

use rustix::net::netlink;

use super::{
    GuardError,
    ruleset::{self, Family, Target},
};
use crate::netlink::{Message, Socket, uninterrupted};

/// The tables of the network namespace that it was opened in.
#[derive(Debug)]
pub(super) struct Tables(Socket);

impl Tables {
    pub(super) fn open() -> Result<Self, GuardError> {
        /// Far more than the tables are.
        const MAX_DATAGRAMS: usize = 64;
        Socket::open(Some(netlink::NETFILTER), MAX_DATAGRAMS).map(Self).map_err(GuardError::Socket)
    }

    /// Whether a family has a table of the name.
    pub(super) fn exists(&mut self, family: Family) -> Result<bool, GuardError> {
        is_there(self.ask(&ruleset::table_query(family))).map(|reply| reply.is_some())
    }

    /// Whether the target's tables are there as they should be.
    pub(super) fn are_installed(&mut self, target: Target) -> Result<bool, GuardError> {
        let mut replies = Vec::new();
        for query in ruleset::queries(target) {
            match is_there(self.ask(&query))? {
                Some(messages) => replies.push(messages),
                None => return Ok(false),
            }
        }
        Ok(ruleset::is_installed(target, &replies))
    }

    /// Writes a transaction.
    pub(super) fn write(&mut self, messages: &[Message]) -> io::Result<()> {
        self.0.request(messages, |_, _| {})
    }

    /// Removes a family's table, and returns whether there was one.
    pub(super) fn remove(&mut self, family: Family) -> Result<bool, GuardError> {
        match self.write(&ruleset::remove(family)) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(GuardError::Request("remove", error)),
        }
    }

    /// The attributes of each message of the reply.
    fn ask(&mut self, query: &Message) -> io::Result<Vec<Vec<u8>>> {
        // A change of any table by another process interrupts a dump.
        uninterrupted(|| {
            let mut messages = Vec::new();
            self.0.request(std::slice::from_ref(query), |_, payload| {
                messages.push(payload.get(ruleset::NFGENMSG..).unwrap_or_default().to_owned());
            })?;
            Ok(messages)
        })
    }
}

fn is_there<T>(reply: io::Result<T>) -> Result<Option<T>, GuardError> {
    match reply {
        Ok(messages) => Ok(Some(messages)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(GuardError::Request("read", error)),
    }
}
