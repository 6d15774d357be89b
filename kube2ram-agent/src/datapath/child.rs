//! A child process that connects from another cgroup, and how long it is waited for. Blocks; called by
//! `probe`.

#![expect(unsafe_code, reason = "fork(2)")]

use std::{
    io,
    net::SocketAddrV4,
    os::fd::BorrowedFd,
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    net::{
        AddressFamily, SocketType,
        sockopt::{Timeout, set_socket_timeout},
    },
    process::{Pid, Signal, WaitOptions, WaitStatus, waitpid},
};

/// What a child makes of its socket.
#[derive(Clone, Copy, Debug)]
pub(super) enum Attempt {
    /// A datagram socket: connect(2) sends no packet.
    Datagram,
    /// Waits for the handshake, within whole seconds.
    Stream(Duration),
}

/// Connects a socket in a child process that has joined the cgroup of `procs`, and returns connect(2)'s
/// result.
///
/// # Errors
/// When there was no child, or it could not join or make a socket, or did not end within [`CHILD_DEADLINE`].
pub(super) fn connect_in_child(
    procs: Option<BorrowedFd<'_>>,
    to: SocketAddrV4,
    attempt: Attempt,
) -> io::Result<io::Result<()>> {
    reap_the_late()?;
    // SAFETY: the child of a process with threads may only do what is safe in a signal handler: system calls,
    // and nothing that allocates.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let status = join_and_connect(procs, to, attempt);
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(status) };
    }
    let Some(child) = Pid::from_raw(child).filter(|_| child > 0) else {
        return Err(io::Error::last_os_error());
    };
    let status = wait_in_time(child, CHILD_DEADLINE)?;
    match status.exit_status() {
        Some(0) => Ok(Ok(())),
        Some(errno) if errno != UNABLE => Ok(Err(io::Error::from_raw_os_error(errno))),
        _ => Err(io::Error::other("the child could not try")),
    }
}

/// How long a child may take. It waits for `cgroup_threadgroup_rwsem` when it joins a cgroup, in a sleep that
/// no signal ends, and a node that creates many processes may hold that for long.
const CHILD_DEADLINE: Duration = Duration::from_secs(2);
/// The longest time between two checks of a child.
const CHILD_POLL_MAX: Duration = Duration::from_millis(20);

/// A child that was killed for being late, and had not ended by then.
static LATE_CHILD: Mutex<Option<Pid>> = Mutex::new(None);

/// Waits for a child, but not for ever: one that is late is killed, and reaped by the next call.
fn wait_in_time(child: Pid, deadline: Duration) -> io::Result<WaitStatus> {
    let end = Instant::now() + deadline;
    let mut pause = Duration::from_micros(100);
    loop {
        if let Some((_, status)) = rustix::io::retry_on_intr(|| waitpid(Some(child), WaitOptions::NOHANG))? {
            return Ok(status);
        }
        if Instant::now() >= end {
            rustix::process::kill_process(child, Signal::KILL)?;
            *LATE_CHILD.lock().unwrap_or_else(PoisonError::into_inner) = Some(child);
            return Err(io::ErrorKind::TimedOut.into());
        }
        thread::sleep(pause);
        pause = (pause * 2).min(CHILD_POLL_MAX);
    }
}

/// Reaps the child that was late.
///
/// # Errors
/// [`io::ErrorKind::TimedOut`] while it has not ended: there is never more than one.
fn reap_the_late() -> io::Result<()> {
    let mut late = LATE_CHILD.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(child) = *late {
        match rustix::io::retry_on_intr(|| waitpid(Some(child), WaitOptions::NOHANG)) {
            Ok(None) => return Err(io::ErrorKind::TimedOut.into()),
            // ECHILD: other code has reaped it.
            Ok(Some(_)) | Err(_) => *late = None,
        }
    }
    Ok(())
}

/// An exit status that is not an error number. The child otherwise exits with an error number, or with 0.
const UNABLE: i32 = 255;

/// What the child does.
fn join_and_connect(procs: Option<BorrowedFd<'_>>, to: SocketAddrV4, attempt: Attempt) -> i32 {
    if procs.is_some_and(|procs| rustix::io::write(procs, b"0").is_err()) {
        return UNABLE;
    }
    let kind = match attempt {
        Attempt::Datagram => SocketType::DGRAM,
        Attempt::Stream(_) => SocketType::STREAM,
    };
    let Ok(socket) = rustix::net::socket(AddressFamily::INET, kind, None) else { return UNABLE };
    // Also bounds connect(2), socket(7).
    if let Attempt::Stream(patience) = attempt
        && set_socket_timeout(&socket, Timeout::Send, Some(patience)).is_err()
    {
        return UNABLE;
    }
    rustix::net::connect(&socket, &to).map_or_else(rustix::io::Errno::raw_os_error, |()| 0)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    #[expect(clippy::zombie_processes, reason = "that they are reaped is what is tested")]
    fn a_child_that_does_not_end_is_killed_and_reaped_later() {
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = Pid::from_child(&child);
        let started = Instant::now();

        let waited = wait_in_time(pid, Duration::from_millis(50));

        assert_eq!(waited.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(started.elapsed() < Duration::from_secs(30));
        while reap_the_late().is_err() {
            thread::sleep(Duration::from_millis(1));
        }
        assert!(waitpid(Some(pid), WaitOptions::NOHANG).is_err(), "it was reaped");
        let ended = Command::new("true").spawn().unwrap();
        let status = wait_in_time(Pid::from_child(&ended), Duration::from_secs(30)).unwrap();
        assert_eq!(status.exit_status(), Some(0), "the twin");
    }
}
