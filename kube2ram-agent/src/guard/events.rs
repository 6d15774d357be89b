//! Reports changes of the guard's tables, by netfilter's notifications. Owns the thread that waits for them.
//! Called by `guard`.

use std::{
    io::{self, PipeReader, PipeWriter, pipe},
    os::fd::OwnedFd,
    thread,
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SocketFlags, SocketType, bind, netlink, netlink::SocketAddrNetlink,
        recvfrom, socket_with,
    },
};
use tokio::sync::mpsc;

use crate::netlink::is_kernel;

/// The changes of one network namespace: the one that it was made in. Dropping it ends the thread.
#[derive(Debug)]
pub(super) struct Changes {
    changed: mpsc::Receiver<()>,
    /// Its end wakes the thread.
    _open: PipeWriter,
}

impl Changes {
    /// Receives changes from now on, of every table whose name, or whose parts' names, contain `table`.
    pub(super) fn of(table: &'static str) -> io::Result<Self> {
        let protocol = Some(netlink::NETFILTER);
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?;
        bind(&socket, &SocketAddrNetlink::new(0, 1 << (NFNLGRP_NFTABLES - 1)))?;
        // One that waits stands for all that have happened.
        let (sender, changed) = mpsc::channel(1);
        let (closed, open) = pipe()?;
        thread::Builder::new()
            .name("nft-events".into())
            .spawn(move || forward(&socket, &closed, table.as_bytes(), &sender))?;
        Ok(Self { changed, _open: open })
    }

    /// Waits for a change; `false` when none will come any more.
    ///
    /// # Cancel safety
    /// No change is lost.
    pub(super) async fn next(&mut self) -> bool {
        self.changed.recv().await.is_some()
    }
}

/// include/uapi/linux/netfilter/nfnetlink.h.
const NFNLGRP_NFTABLES: u32 = 7;

/// Ends with the other end of `closed`, or when reading fails, which only permanent errors cause.
fn forward(socket: &OwnedFd, closed: &PipeReader, table: &[u8], changed: &mpsc::Sender<()>) {
    loop {
        let mut fds = [PollFd::new(socket, PollFlags::IN), PollFd::new(closed, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return tracing::error!(%error, "cannot wait for netfilter notifications"),
        }
        if !fds[1].revents().is_empty() {
            return;
        }
        match read(socket, table) {
            // A notification is already pending, or the receiver has ended, which the pipe reports.
            Ok(true) => drop(changed.try_send(())),
            Ok(false) => {}
            Err(error) => return tracing::error!(%error, "cannot read netfilter notifications"),
        }
    }
}

/// Reads the pending notifications, and returns whether one is about the table.
fn read(socket: &OwnedFd, table: &[u8]) -> io::Result<bool> {
    /// A longer datagram is cut, and the name stands at the beginning of each of its messages.
    const DATAGRAM_MAX: usize = 16 * 1024;
    let mut buffer = vec![0; DATAGRAM_MAX];
    let mut is_about = false;
    loop {
        match recvfrom(socket, buffer.as_mut_slice(), RecvFlags::empty()) {
            Ok((length, _, sender)) if is_kernel(sender.clone()) => {
                is_about |= buffer[..length].windows(table.len()).any(|part| part == table);
            }
            Ok(_) => {}
            Err(Errno::AGAIN) => return Ok(is_about),
            Err(Errno::INTR) => {}
            // Notifications were dropped: anything may have happened.
            Err(Errno::NOBUFS) => is_about = true,
            Err(error) => return Err(error.into()),
        }
    }
}
