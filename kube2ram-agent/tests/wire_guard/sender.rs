//! A pod that sends packets to the metadata server by a packet socket without a pause.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::{SOON, WAYS};

/// Sends until it is dropped.
pub(crate) struct Sender {
    child: Child,
    is_over: Arc<AtomicBool>,
    sent: Arc<AtomicUsize>,
    sending: Option<JoinHandle<()>>,
}

impl Sender {
    /// Starts `python3` with a way that sends one packet for each line, and sends it these lines again and
    /// again.
    pub(crate) fn start(mut python: Command, way: &[&str], lines: Vec<String>) -> Self {
        let mut child =
            python.arg(WAYS).args(way).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (mut orders, outcomes) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (is_over, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let sending = thread::spawn({
            let (is_over, sent) = (Arc::clone(&is_over), Arc::clone(&sent));
            move || {
                let mut outcomes = BufReader::new(outcomes).lines();
                for line in lines.iter().cycle().take_while(|_| !is_over.load(Ordering::Relaxed)) {
                    writeln!(orders, "{line}").unwrap();
                    let outcome = outcomes.next().unwrap().unwrap();
                    // What a program on the device drops is reported as a full queue.
                    assert!(["ENOBUFS", "sent"].contains(&outcome.as_str()), "{outcome}");
                    sent.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Self { child, is_over, sent, sending: Some(sending) }
    }

    /// How many packets it has sent so far, dropped or not.
    pub(crate) fn sent(&self) -> usize {
        self.sent.load(Ordering::Relaxed)
    }

    /// Waits until it has sent more packets.
    pub(crate) fn await_more(&self, packets: usize) {
        let (begun, target) = (Instant::now(), self.sent() + packets);
        while self.sent() < target {
            let has_ended = self.sending.as_ref().is_none_or(JoinHandle::is_finished);
            assert!(!has_ended && begun.elapsed() < SOON, "{} of {target} packets", self.sent());
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        let ended = self.sending.take().map(JoinHandle::join);
        drop(self.child.kill());
        drop(self.child.wait());
        // It has named the reason itself.
        assert!(thread::panicking() || !matches!(ended, Some(Err(_))), "the sender failed");
    }
}
