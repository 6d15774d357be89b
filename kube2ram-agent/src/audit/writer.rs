//! From the records to the file: a bounded queue, and a thread that writes, so that a disk that hangs delays
//! neither a request nor the end of the agent. Called by the parent.

use std::{
    io,
    mem::replace,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use tokio::{
    sync::{
        mpsc::{self, error::TrySendError},
        oneshot,
    },
    time::timeout,
};
use tracing::{error, info};

use super::{FileError, Metrics, Record, file::AuditFile};
use kube2ram_service::telemetry::chain;

/// The side that records.
#[derive(Debug)]
pub(super) struct Writer {
    path: PathBuf,
    queue: mpsc::Sender<Message>,
    /// Records that the file lacks, since the last one that it has.
    lost: Arc<AtomicU64>,
    /// Whether records were dropped since the queue was last empty.
    is_full: Arc<AtomicBool>,
    metrics: Metrics,
}

#[derive(Debug)]
pub(super) enum Message {
    /// All before it is written.
    Flush(oneshot::Sender<()>),
    Record(Box<Record>),
}

impl Writer {
    /// Starts the thread, which opens the file at once, so that a mistake is logged at the start.
    pub(super) fn start(path: PathBuf, metrics: Metrics) -> io::Result<Self> {
        let (queue, messages) = mpsc::channel(QUEUE_RECORDS);
        let writer = Self {
            path: path.clone(),
            queue,
            lost: Arc::default(),
            is_full: Arc::default(),
            metrics: metrics.clone(),
        };
        let writing = Writing {
            file: AuditFile::new(path, FILE_LIMIT_BYTES),
            is_failing: false,
            lost: Arc::clone(&writer.lost),
            is_full: Arc::clone(&writer.is_full),
            metrics,
        };
        thread::Builder::new().name("audit-writer".into()).spawn(move || writing.run(messages))?;
        Ok(writer)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Never waits. The thread may hang in a system call, so this side logs that the queue is full: once,
    /// until it has been empty again.
    pub(super) fn write(&self, record: Record) {
        match self.queue.try_send(Message::Record(Box::new(record))) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Closed(_)) => {
                self.lost.fetch_add(1, Ordering::Relaxed);
                self.metrics.dropped.inc();
                if !self.is_full.swap(true, Ordering::Relaxed) {
                    error!(
                        file = %self.path.display(),
                        "audit records are dropped, because the disk of the file is slow or hangs: repair the disk; pods get credentials, and the log has the records"
                    );
                }
            }
        }
    }

    /// Whether all that was recorded before is in the file, or has failed to get there.
    pub(super) async fn flush(&self, limit: Duration) -> bool {
        let (done, written) = oneshot::channel();
        let flushed = async { self.queue.send(Message::Flush(done)).await.is_ok() && written.await.is_ok() };
        timeout(limit, flushed).await.unwrap_or(false)
    }
}

#[cfg(test)]
impl Writer {
    /// Whose queue nobody reads, as while the disk hangs.
    pub(super) fn without_thread(metrics: Metrics) -> (Self, mpsc::Receiver<Message>) {
        let (queue, messages) = mpsc::channel(QUEUE_RECORDS);
        (
            Self { path: PathBuf::new(), queue, lost: Arc::default(), is_full: Arc::default(), metrics },
            messages,
        )
    }

    pub(super) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

/// The thread.
struct Writing {
    file: AuditFile,
    is_failing: bool,
    lost: Arc<AtomicU64>,
    is_full: Arc<AtomicBool>,
    metrics: Metrics,
}

impl Writing {
    fn run(mut self, mut messages: mpsc::Receiver<Message>) {
        if let Err(error) = self.file.open() {
            self.failed(&error);
        }
        while let Some(message) = messages.blocking_recv() {
            match message {
                Message::Flush(done) => {
                    // Who waited may have given up.
                    let _is_awaited = done.send(()).is_ok();
                }
                Message::Record(record) => self.write(*record),
            }
            if messages.is_empty() {
                self.is_full.store(false, Ordering::Relaxed);
            }
        }
    }

    fn write(&mut self, mut record: Record) {
        record.lost = self.lost.swap(0, Ordering::Relaxed);
        let lost = record.lost;
        let written = record.line().map_err(FileError::Encode).and_then(|line| self.file.append(&line));
        match written {
            Ok(()) => {
                self.metrics.written.inc();
                if replace(&mut self.is_failing, false) {
                    info!(lost, "audit records are written to the file again");
                }
            }
            Err(error) => {
                self.lost.fetch_add(lost + 1, Ordering::Relaxed);
                self.metrics.error.inc();
                self.failed(&error);
            }
        }
    }

    /// One line for a failure that lasts: the metric counts the records.
    fn failed(&mut self, error: &FileError) {
        if !replace(&mut self.is_failing, true) {
            error!(
                error = chain(error),
                "cannot write audit records to the file: pods get credentials, and the log has the records"
            );
        }
    }
}

/// When the file is renamed, and a new one begins.
const FILE_LIMIT_BYTES: u64 = 8 * 1024 * 1024;
/// How many records may wait for the disk.
const QUEUE_RECORDS: usize = 256;
/// The memory that they take, with all names at their longest.
#[cfg(test)]
pub(super) const QUEUE_LIMIT_BYTES: usize = QUEUE_RECORDS * 2 * 1024;
