//! Forwards the log of the eBPF programs (only the debug object has one) to tracing. Called by `attach`.

use std::time::Duration;

use aya::Ebpf;
use aya_log::EbpfLogger;

use crate::datapath::VERDICTS;

/// Hands aya's log records on.
#[derive(Debug)]
struct Forward;

impl log::Log for Forward {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        tracing::debug!(target: VERDICTS, verdict = %record.args(), "connect");
    }

    fn flush(&self) {}
}

/// Reads the log for as long as the agent runs, if there is one. Cancel safe: what is unread stays in the
/// ring buffer, and a full one drops.
///
/// Asks on a timer rather than waits on the descriptor: tokio's registration of foreign descriptors is
/// unsafe, and this is for debugging.
pub(super) async fn forward(mut ebpf: Ebpf) {
    let mut logger = match EbpfLogger::init_with_logger(&mut ebpf, Forward) {
        Ok(logger) => logger,
        Err(error) => {
            tracing::warn!(%error, "no log from the eBPF programs");
            return std::future::pending().await;
        }
    };
    let mut ticks = tokio::time::interval(READ_INTERVAL);
    loop {
        ticks.tick().await;
        logger.flush();
    }
}

/// The buffer holds 128 KiB, some thousand verdicts.
const READ_INTERVAL: Duration = Duration::from_millis(100);
