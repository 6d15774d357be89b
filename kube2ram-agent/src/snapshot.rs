//! What an agent leaves to the next one in case the API server is away then: one JSON document in the state
//! directory, on a tmpfs, for root alone. It holds identities, annotations and allow-lists, never
//! credentials. Depends on `kubernetes` and `state_dir`; called by `app`.
//!
//! The document has no checksum. Only root can write it: directory and file must belong to root or to the
//! agent's own user, and no other user may have the right to write. A false snapshot could give a pod another
//! role, or another namespace's allow-list, until the first complete list of the API server. But root on the
//! node can use the node's role without the agent, and could compute a checksum. Damage without intent needs
//! no checksum either: the file is in memory, is replaced by rename, and is not valid JSON if it is cut.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::PathBuf,
    time::Duration,
};

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use crate::kubernetes::Checkpoint;
use kube2ram_cloud::Cloud;
use kube2ram_service::state_dir::StateDir;

/// What an agent knew.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Snapshot {
    /// Of the API server.
    pub cluster: Checkpoint,
    /// Of the metadata server.
    pub discovered: Option<Discovered>,
}

/// What the metadata server told, as far as it was asked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Discovered {
    /// The base ARN of the node's account.
    pub account_arn: Option<Box<str>>,
    /// The name of the node's role.
    pub node_role: Option<Box<str>>,
    /// The region's id.
    pub region: Option<Box<str>>,
    /// The cloud's partition, where the region's id does not tell it.
    pub partition: Option<Box<str>>,
}

/// The node, its cloud, the boot and the annotations in which a snapshot is made: it is valid nowhere else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotScope {
    /// The kernel's random id of this boot.
    pub boot_id: Box<str>,
    /// The cloud that the agent was told of.
    pub cloud: Box<str>,
    /// The node's name.
    pub node: Box<str>,
    /// The keys of all annotations that the agent reads: an agent that reads others would take those that are
    /// not in the snapshot for absent.
    pub annotations: Vec<Box<str>>,
}

/// The file.
#[derive(Clone, Debug)]
pub struct SnapshotFile(PathBuf);

/// Why there is no snapshot, or none is written.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// It is damaged, or an agent wrote it that lays it out differently.
    #[error("the snapshot is damaged or of another version")]
    Content(#[source] serde_json::Error),
    /// It is of another boot, node or cloud, or of an agent that reads other annotations.
    #[error("the snapshot is of another boot, node or cloud, or of an agent with other annotation keys")]
    Foreign,
    /// It could not be read.
    #[error("cannot read the snapshot")]
    Read(#[source] io::Error),
    /// What is to be written, or was found, is longer than [`LIMIT_BYTES`].
    #[error("the snapshot is longer than {LIMIT_BYTES} bytes")]
    TooLong,
    /// No agent that the API server answered has written it for [`MAX_AGE`].
    #[error("the snapshot is too old")]
    TooOld,
    /// The file is not a plain one of ours.
    #[error("the snapshot belongs to another user, or other users may write to it")]
    Unsafe,
    /// The state directory is on a disk.
    #[error("the state directory is not on a tmpfs")]
    OnDisk,
    /// It could not be written.
    #[error("cannot write the snapshot")]
    Write(#[source] io::Error),
    /// It is of a version of the agent that writes it differently.
    #[error("the snapshot is of another version")]
    Version,
}

impl Snapshot {
    /// Writes the document; `written_at` is the time since boot. If it would be too long, the largest of what
    /// the API server has sent is left out.
    ///
    /// # Errors
    /// [`SnapshotError::TooLong`].
    pub fn encode(mut self, scope: &SnapshotScope, written_at: Duration) -> Result<Vec<u8>, SnapshotError> {
        match self.text(scope, written_at) {
            Err(SnapshotError::TooLong) => {
                self.cluster.shorten(CLUSTER_LIMIT_BYTES);
                self.text(scope, written_at)
            }
            result => result,
        }
    }

    fn text(&self, scope: &SnapshotScope, written_at: Duration) -> Result<Vec<u8>, SnapshotError> {
        let written_at_secs = written_at.as_secs();
        let document = Document { version: VERSION, scope, written_at_secs, snapshot: self };
        let mut text = Bounded(Vec::new());
        serde_json::to_writer(&mut text, &document).map_err(|error| match error.is_io() {
            true => SnapshotError::TooLong,
            false => SnapshotError::Content(error),
        })?;
        Ok(text.0)
    }

    /// Reads what [`Self::encode`] wrote; `now` is the time since boot.
    ///
    /// # Errors
    /// See [`SnapshotError`]: a snapshot is used as a whole or not at all.
    pub fn decode(text: &[u8], scope: &SnapshotScope, now: Duration) -> Result<Self, SnapshotError> {
        let found: Document<SnapshotScope, Self> =
            serde_json::from_slice(text).map_err(SnapshotError::Content)?;
        if found.version != VERSION {
            return Err(SnapshotError::Version);
        }
        if found.scope != *scope {
            return Err(SnapshotError::Foreign);
        }
        if now.saturating_sub(Duration::from_secs(found.written_at_secs)) > MAX_AGE {
            return Err(SnapshotError::TooOld);
        }
        Ok(found.snapshot)
    }
}

impl SnapshotScope {
    /// Of a node in this boot; `annotations` are all keys, in a fixed order.
    ///
    /// # Errors
    /// [`SnapshotError::Read`], when the kernel does not tell its boot id.
    pub fn of_node(node: &str, cloud: Cloud, annotations: Vec<Box<str>>) -> Result<Self, SnapshotError> {
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(SnapshotError::Read)?;
        Ok(Self {
            boot_id: boot_id.trim().into(),
            cloud: cloud.name().into(),
            node: node.into(),
            annotations,
        })
    }
}

impl SnapshotFile {
    /// The snapshot of a state directory.
    ///
    /// # Errors
    /// [`SnapshotError::OnDisk`]: external ids and policies of pods are nobody else's business, and must not
    /// outlive the machine.
    pub fn in_dir(dir: &StateDir) -> Result<Self, SnapshotError> {
        if dir.is_volatile() { Ok(Self(dir.path().join(FILE_NAME))) } else { Err(SnapshotError::OnDisk) }
    }

    /// Reads the file; `None` when there is none.
    ///
    /// # Errors
    /// See [`SnapshotError`].
    pub fn read(&self) -> Result<Option<Vec<u8>>, SnapshotError> {
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let opened = OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(&self.0);
        let file = match opened {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            file => file.map_err(SnapshotError::Read)?,
        };
        let found = file.metadata().map_err(SnapshotError::Read)?;
        let is_ours = found.uid() == 0 || found.uid() == rustix::process::geteuid().as_raw();
        if !found.is_file() || !is_ours || found.mode() & 0o022 != 0 {
            return Err(SnapshotError::Unsafe);
        }
        let mut text = Vec::new();
        let limit = u64::try_from(LIMIT_BYTES).unwrap_or(u64::MAX);
        file.take(limit.saturating_add(1)).read_to_end(&mut text).map_err(SnapshotError::Read)?;
        if text.len() > LIMIT_BYTES { Err(SnapshotError::TooLong) } else { Ok(Some(text)) }
    }

    /// Replaces the file at once: whoever reads it finds the old one or the new one.
    ///
    /// # Errors
    /// [`SnapshotError::Write`].
    pub fn write(&self, text: &[u8]) -> Result<(), SnapshotError> {
        let new = self.0.with_extension(DRAFT_EXTENSION);
        let write = || {
            drop(fs::remove_file(&new));
            let mut file: File = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
            file.write_all(text)?;
            fs::rename(&new, &self.0)
        };
        write().map_err(|error| {
            drop(fs::remove_file(&new));
            SnapshotError::Write(error)
        })
    }
}

/// A text that ends where it would be longer than [`LIMIT_BYTES`].
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > LIMIT_BYTES {
            return Err(ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The whole file.
#[derive(Serialize, Deserialize)]
struct Document<P, S> {
    version: u32,
    scope: P,
    written_at_secs: u64,
    snapshot: S,
}

/// How long a snapshot counts after the last agent wrote it that the API server had answered: such an agent
/// itself has no limit, but one that has been away for a day has nothing to continue.
pub const MAX_AGE: Duration = Duration::from_hours(24);
/// 250 pods with every annotation at its longest (half as many if each has a ServiceAccount with such
/// annotations, too), and 1 MiB of allow-lists; a thousand ordinary pods take 300 KiB.
pub const LIMIT_BYTES: usize = 4 * 1024 * 1024;
/// Of that what the API server has sent; the rest is for the scope, and for what the metadata server told.
const CLUSTER_LIMIT_BYTES: usize = LIMIT_BYTES - 64 * 1024;
/// The name of its file in the state directory.
pub const FILE_NAME: &str = "snapshot";
/// That of the file that replaces it, which a crash may leave. Only the agent that serves writes.
pub const DRAFT_NAME: &str = "snapshot.new";
const DRAFT_EXTENSION: &str = "new";
/// Counts up with every change of what a field means. Version 1 was no JSON document.
const VERSION: u32 = 4;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    const NOW: Duration = Duration::from_secs(1_000_000);

    fn scope() -> SnapshotScope {
        SnapshotScope {
            boot_id: "0b8c2a5e".into(),
            cloud: "alibaba".into(),
            node: "node-1".into(),
            annotations: vec!["ram.aliyuncs.com/role".into()],
        }
    }

    fn snapshot() -> Snapshot {
        let region = Some("cn-hangzhou".into());
        Snapshot {
            cluster: Checkpoint::default(),
            discovered: Some(Discovered { region, ..Discovered::default() }),
        }
    }

    fn text() -> Vec<u8> {
        snapshot().encode(&scope(), NOW).unwrap()
    }

    #[test]
    fn is_restored_in_the_same_scope_within_its_time() {
        assert_eq!(Snapshot::decode(&text(), &scope(), NOW + MAX_AGE).unwrap(), snapshot());
        assert!(matches!(
            Snapshot::decode(&text(), &scope(), NOW + MAX_AGE + Duration::from_secs(1)),
            Err(SnapshotError::TooOld)
        ));
    }

    #[test]
    fn counts_on_no_other_node_in_no_other_boot_and_for_no_other_annotations() {
        for other in [
            SnapshotScope { boot_id: "1".into(), ..scope() },
            SnapshotScope { cloud: "aws".into(), ..scope() },
            SnapshotScope { node: "node-2".into(), ..scope() },
            SnapshotScope { annotations: vec!["role".into()], ..scope() },
        ] {
            assert!(matches!(Snapshot::decode(&text(), &other, NOW), Err(SnapshotError::Foreign)));
        }
    }

    #[test]
    fn a_document_that_is_cut_or_no_document_is_refused() {
        let text = text();
        for n in 0..text.len() {
            let decoded = Snapshot::decode(&text[..n], &scope(), NOW);
            assert!(matches!(decoded, Err(SnapshotError::Content(_))), "cut at {n}");
        }
        for text in ["kube2ram-snapshot 1 00\n0b8c2a5e 1000000 node-1\n{}", "null", "[]", "\0"] {
            let decoded = Snapshot::decode(text.as_bytes(), &scope(), NOW);
            assert!(matches!(decoded, Err(SnapshotError::Content(_))), "{text}");
        }
    }

    #[test]
    fn a_document_of_another_version_is_refused() {
        for other in ["3", "5"] {
            let version = format!(r#"{{"version":{other},"#);
            let text = String::from_utf8(text()).unwrap().replacen(r#"{"version":4,"#, &version, 1);
            let decoded = Snapshot::decode(text.as_bytes(), &scope(), NOW);
            assert!(matches!(decoded, Err(SnapshotError::Version)), "{text}");
        }
    }

    #[test]
    fn a_file_or_a_document_over_the_limit_is_refused_before_it_is_parsed() {
        let dir = tempfile::tempdir().unwrap();
        let file = SnapshotFile(dir.path().join("snapshot"));
        file.write(&vec![b' '; LIMIT_BYTES]).unwrap();
        assert_eq!(file.read().unwrap().unwrap().len(), LIMIT_BYTES, "the allowed twin");

        file.write(&vec![b' '; LIMIT_BYTES + 1]).unwrap();
        let region = Some("x".repeat(LIMIT_BYTES).into());
        let long =
            Snapshot { discovered: Some(Discovered { region, ..Discovered::default() }), ..snapshot() };

        assert!(matches!(file.read(), Err(SnapshotError::TooLong)));
        assert!(matches!(long.encode(&scope(), NOW), Err(SnapshotError::TooLong)));
    }

    #[test]
    fn the_file_is_for_its_owner_alone_and_replaced_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let file = SnapshotFile(dir.path().join("snapshot"));
        assert!(file.read().unwrap().is_none());

        file.write(b"one").unwrap();
        file.write(b"two").unwrap();

        assert_eq!(file.read().unwrap().unwrap(), b"two");
        assert_eq!(fs::metadata(&file.0).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_that_others_may_have_written_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = SnapshotFile(dir.path().join("snapshot"));
        file.write(b"one").unwrap();
        fs::set_permissions(&file.0, fs::Permissions::from_mode(0o666)).unwrap();
        let link = SnapshotFile(dir.path().join("link"));
        symlink(&file.0, &link.0).unwrap();

        assert!(matches!(file.read(), Err(SnapshotError::Unsafe)));
        assert!(matches!(link.read(), Err(SnapshotError::Read(_))));
    }

    #[test]
    fn is_kept_in_memory_only() {
        let in_memory = tempfile::tempdir_in("/dev/shm").unwrap();
        let on_proc = StateDir::open(std::path::Path::new("/proc/sys")).unwrap();

        assert!(SnapshotFile::in_dir(&StateDir::open(in_memory.path()).unwrap()).is_ok());
        assert!(matches!(SnapshotFile::in_dir(&on_proc), Err(SnapshotError::OnDisk)));
    }
}
