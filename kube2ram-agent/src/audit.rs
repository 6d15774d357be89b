//! The audit trail: which session was issued for which pod, and which pods were given its credentials. Each
//! record is a line of the log and, with `--audit-file`, a line of a file; the last sessions are also kept in
//! memory, for `kube2ram explain --access-key-id`. No record can hold a secret.
//!
//! Depends on `identity` and `pod`; called by the credential cache, composed by `app`. A record never delays
//! a request, and a record that cannot be written is no reason to refuse credentials.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tracing::info;

mod file;
mod memory;
mod metrics;
mod record;
mod writer;

pub use self::{
    file::{FileError, Found, find},
    metrics::Metrics,
    record::{Event, GrantKind, PodNames, Record},
};
use self::{memory::Memory, writer::Writer};
use crate::{identity::PodUid, pod::Pod};
use kube2ram_cloud::{credentials::Credentials, role::RoleSession};
use kube2ram_service::clock::Clock;

/// The target of the log lines, by which they can be selected.
pub const TARGET: &str = "kube2ram::audit";

/// Looks a pod up.
type Pods = dyn Fn(&PodUid) -> Option<Arc<Pod>> + Send + Sync;

/// Writes the records, and remembers the last sessions.
pub struct Trail {
    node: Box<str>,
    clock: Arc<dyn Clock>,
    pods: Box<Pods>,
    memory: Mutex<Memory>,
    writer: Option<Writer>,
    metrics: Metrics,
}

impl Trail {
    /// Starts the trail of the agent of `node`. `pods` looks a pod up by its UID, for its names. With `file`,
    /// a thread appends the records to that file.
    ///
    /// # Errors
    /// When the thread cannot be started. A file that cannot be written is logged and counted instead.
    pub fn start(
        node: &str,
        clock: Arc<dyn Clock>,
        pods: impl Fn(&PodUid) -> Option<Arc<Pod>> + Send + Sync + 'static,
        file: Option<PathBuf>,
        metrics: Metrics,
    ) -> io::Result<Self> {
        let writer = file.map(|path| Writer::start(path, metrics.clone())).transpose()?;
        Ok(Self {
            node: node.into(),
            clock,
            pods: Box::new(pods),
            memory: Mutex::new(Memory::new(REMEMBERED_SESSIONS, REMEMBERED_BYTES)),
            writer,
            metrics,
        })
    }

    /// STS has issued a session, on behalf of `pod`.
    pub fn issued(&self, session: &RoleSession, credentials: &Credentials, pod: &PodUid) {
        let record = self.record(Event::Issued, session, credentials, pod);
        self.memory().issued(record.clone());
        self.write(record);
    }

    /// `pod` is given the credentials of a session for the first time.
    pub fn delivered(&self, session: &RoleSession, credentials: &Credentials, pod: &PodUid) {
        let record = self.record(Event::Delivered, session, credentials, pod);
        self.memory().delivered(&record);
        self.write(record);
    }

    /// `pod` is given credentials, and whether it had them before is not known: more pods have them than are
    /// remembered. Of a session, the first of these pods is recorded, and all answers are counted.
    pub fn not_recorded(
        &self,
        session: &RoleSession,
        credentials: &Credentials,
        pod: &PodUid,
        is_first: bool,
    ) {
        self.metrics.not_recorded.inc();
        if is_first {
            let record = self.record(Event::NotRecorded, session, credentials, pod);
            self.memory().delivered(&record);
            self.write(record);
        }
    }

    /// The records of the session with this AccessKeyId that are in memory, the oldest first.
    pub fn remembered(&self, access_key_id: &str) -> Vec<Record> {
        self.memory().find(access_key_id)
    }

    /// The file that the records are appended to.
    pub fn file(&self) -> Option<&Path> {
        self.writer.as_ref().map(Writer::path)
    }

    /// Waits until the file has what was recorded before, two seconds at most: the disk may hang.
    ///
    /// # Cancel safety
    /// Dropping the future loses no record.
    pub async fn flush(&self) {
        if let Some(writer) = &self.writer {
            writer.flush(FLUSH_LIMIT).await;
        }
    }

    fn record(&self, event: Event, session: &RoleSession, credentials: &Credentials, pod: &PodUid) -> Record {
        let known = (self.pods)(pod);
        Record::new(event, self.clock.now(), &self.node, session, credentials, (pod, known.as_deref()))
    }

    fn write(&self, record: Record) {
        log(&record);
        if let Some(writer) = &self.writer {
            writer.write(record);
        }
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Trail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trail")
            .field("node", &self.node)
            .field("writer", &self.writer)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
impl Trail {
    /// Without a file, on a node whose pods are not known.
    pub(crate) fn for_tests() -> Arc<Self> {
        let metrics = Metrics::new(&mut prometheus_client::registry::Registry::default());
        let clock = Arc::new(kube2ram_service::clock::SystemClock);
        Arc::new(Self::start("node-1", clock, |_| None, None, metrics).unwrap())
    }
}

/// The names of the fields are those of the file.
fn log(record: &Record) {
    let Record { event, pod, .. } = record;
    info!(
        target: TARGET,
        event = event.as_str(),
        node = &*record.node,
        access_key_id = &*record.access_key_id,
        request_id = record.request_id.as_deref(),
        role = &*record.role,
        session = &*record.session,
        grant = record.grant.as_str(),
        service_account = pod.service_account.as_deref(),
        pod.namespace = pod.namespace.as_deref(),
        pod.name = pod.name.as_deref(),
        pod.uid = pod.uid.as_str(),
        expires_at = %record.expires_at,
        "credentials {}",
        match event {
            Event::Delivered => "delivered",
            Event::Issued => "issued",
            Event::NotRecorded => "delivered to more pods than are recorded",
        }
    );
}

/// How many sessions are kept in memory.
const REMEMBERED_SESSIONS: usize = 1024;
/// How much memory they take: a session with ten pods takes 2 KiB.
const REMEMBERED_BYTES: usize = 512 * 1024;
/// How long the end of the agent waits for the disk.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);
/// The memory that sessions and records take together.
#[cfg(test)]
pub(crate) const LIMIT_BYTES: usize = REMEMBERED_BYTES + writer::QUEUE_LIMIT_BYTES;

#[cfg(test)]
mod tests;
