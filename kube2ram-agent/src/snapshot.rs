//! What an agent leaves to the next one in case the API server is away then: a file in the state directory, on a tmpfs, for root alone.
//! It holds identities, annotations and allow-lists, never credentials. Depends on `kubernetes` and `state_dir`; called by `app`.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::PathBuf,
    time::Duration,
};

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::kubernetes::Saved;
use kube2ram_service::state_dir::StateDir;

/// What an agent knew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Of the API server.
    pub cluster: Saved,
    /// Of the metadata server.
    pub discovered: Option<Discovered>,
}

/// What the metadata server told, as far as it was asked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Discovered {
    /// The base ARN of the node's account.
    pub account_arn: Option<Box<str>>,
    /// The name of the node's role.
    pub node_role: Option<Box<str>>,
    /// The region's id.
    pub region: Option<Box<str>>,
}

/// Where and in which life of the machine a snapshot is made: it counts nowhere else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The kernel's random id of this boot.
    pub boot_id: Box<str>,
    /// The node's name.
    pub node: Box<str>,
}

/// The file.
#[derive(Clone, Debug)]
pub struct SnapshotFile(PathBuf);

/// Why there is no snapshot, or none is written.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// Its checksum is wrong, or it is no snapshot at all.
    #[error("the snapshot is damaged")]
    Damaged,
    /// It is not JSON as it should be, although its checksum is right.
    #[error("cannot parse the snapshot")]
    Content(#[source] serde_json::Error),
    /// It is of another boot or another node.
    #[error("the snapshot is of another boot or another node")]
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
    /// Writes it down: a line with the checksum of the rest, a line with place and time (since boot), and JSON.
    ///
    /// # Errors
    /// [`SnapshotError::TooLong`].
    pub fn encode(&self, place: &Place, saved_at: Duration) -> Result<Vec<u8>, SnapshotError> {
        let Place { boot_id, node } = place;
        let head = |digest: &[u8]| format!("{MAGIC} {VERSION} {}\n", hex::encode(digest)).into_bytes();
        // The checksum is not known yet, but how long it is.
        let mut text = Bounded(head(&Sha256::digest(b"")));
        let rest = text.0.len();
        let too_long = |_full| SnapshotError::TooLong;
        text.write_all(format!("{boot_id} {} {node}\n", saved_at.as_secs()).as_bytes()).map_err(too_long)?;
        serde_json::to_writer(&mut text, self).map_err(|error| match error.is_io() {
            true => SnapshotError::TooLong,
            false => SnapshotError::Content(error),
        })?;
        let head = head(&Sha256::digest(&text.0[rest..]));
        text.0[..rest].copy_from_slice(&head);
        Ok(text.0)
    }

    /// Reads what [`Self::encode`] wrote, `now` being the time since boot.
    ///
    /// # Errors
    /// See [`SnapshotError`]; a snapshot that is not wholly right is none.
    pub fn decode(text: &[u8], place: &Place, now: Duration) -> Result<Self, SnapshotError> {
        let (head, rest) = line(text).ok_or(SnapshotError::Damaged)?;
        let mut words = head.split(' ');
        if words.next() != Some(MAGIC) {
            return Err(SnapshotError::Damaged);
        }
        if words.next() != Some(VERSION) {
            return Err(SnapshotError::Version);
        }
        if words.next() != Some(hex::encode(Sha256::digest(rest)).as_str()) {
            return Err(SnapshotError::Damaged);
        }
        let (head, rest) = line(rest).ok_or(SnapshotError::Damaged)?;
        let mut words = head.splitn(3, ' ');
        let boot_id = words.next();
        let saved_at = words.next().and_then(|word| word.parse().ok()).ok_or(SnapshotError::Damaged)?;
        if boot_id != Some(&*place.boot_id) || words.next() != Some(&*place.node) {
            return Err(SnapshotError::Foreign);
        }
        if now.saturating_sub(Duration::from_secs(saved_at)) > MAX_AGE {
            return Err(SnapshotError::TooOld);
        }
        serde_json::from_slice(rest).map_err(SnapshotError::Content)
    }
}

impl Place {
    /// Of a node in this boot.
    ///
    /// # Errors
    /// [`SnapshotError::Read`], when the kernel does not tell its boot id.
    pub fn of_node(node: &str) -> Result<Self, SnapshotError> {
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(SnapshotError::Read)?;
        Ok(Self { boot_id: boot_id.trim().into(), node: node.into() })
    }
}

impl SnapshotFile {
    /// The snapshot of a state directory.
    ///
    /// # Errors
    /// [`SnapshotError::OnDisk`]: external ids and policies of pods are nobody else's business, and must not outlive the machine.
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

fn line(text: &[u8]) -> Option<(&str, &[u8])> {
    let end = text.iter().take(LINE_LIMIT_BYTES).position(|&c| c == b'\n')?;
    Some((str::from_utf8(&text[..end]).ok()?, &text[end + 1..]))
}

/// How long a snapshot counts after the last agent wrote it that the API server had answered: such an agent itself has no limit, but one that
/// has been away for a day has nothing to continue.
pub const MAX_AGE: Duration = Duration::from_hours(24);
/// 250 pods with every annotation at its longest, and 1 MiB of allow-lists; a thousand ordinary pods take 300 KiB.
pub const LIMIT_BYTES: usize = 4 * 1024 * 1024;
const LINE_LIMIT_BYTES: usize = 512;
/// The name of its file in the state directory.
pub const FILE_NAME: &str = "snapshot";
/// That of the file that replaces it, which a crash may leave. Only the agent that serves writes.
pub const DRAFT_NAME: &str = "snapshot.new";
const DRAFT_EXTENSION: &str = "new";
const MAGIC: &str = "kube2ram-snapshot";
const VERSION: &str = "1";

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    const NOW: Duration = Duration::from_secs(1_000_000);

    fn place() -> Place {
        Place { boot_id: "0b8c2a5e".into(), node: "node-1".into() }
    }

    fn snapshot() -> Snapshot {
        let region = Some("cn-hangzhou".into());
        Snapshot {
            cluster: Saved::default(),
            discovered: Some(Discovered { region, ..Discovered::default() }),
        }
    }

    fn text() -> Vec<u8> {
        snapshot().encode(&place(), NOW).unwrap()
    }

    #[test]
    fn comes_back_at_the_same_place_within_its_time() {
        assert_eq!(Snapshot::decode(&text(), &place(), NOW + MAX_AGE).unwrap(), snapshot());
        assert!(matches!(
            Snapshot::decode(&text(), &place(), NOW + MAX_AGE + Duration::from_secs(1)),
            Err(SnapshotError::TooOld)
        ));
    }

    #[test]
    fn counts_on_no_other_node_and_in_no_other_boot() {
        for other in [Place { boot_id: "1".into(), ..place() }, Place { node: "node-2".into(), ..place() }] {
            assert!(matches!(Snapshot::decode(&text(), &other, NOW), Err(SnapshotError::Foreign)));
        }
    }

    #[test]
    fn any_changed_or_missing_byte_makes_it_none() {
        let text = text();
        for n in 0..text.len() {
            let mut changed = text.clone();
            changed[n] ^= 1;
            assert!(Snapshot::decode(&changed, &place(), NOW).is_err(), "byte {n}");
            assert!(Snapshot::decode(&text[..n], &place(), NOW).is_err(), "cut at {n}");
        }
    }

    #[test]
    fn another_version_is_told_apart() {
        let text = String::from_utf8(text()).unwrap().replacen(" 1 ", " 2 ", 1);

        assert!(matches!(Snapshot::decode(text.as_bytes(), &place(), NOW), Err(SnapshotError::Version)));
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
