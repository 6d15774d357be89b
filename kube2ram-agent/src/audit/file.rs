//! The file of `--audit-file`: appended to by the agents of a node, one write(2) for each record, and renamed
//! when it is full. Blocking. Called by the writer's thread and, to search it, by `app`.
//!
//! During an upgrade two agents append. O_APPEND keeps their records apart. The agent that renames the file
//! holds its lock (flock), and both look before each record whether the name still leads to their file.

use std::{
    borrow::Cow,
    fs::{self, File, Metadata, OpenOptions},
    io::{self, BufRead as _, BufReader, ErrorKind, Read as _, Write as _},
    os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, OFlags, flock},
    io::Errno,
    process::geteuid,
};

use super::Record;

/// Why a record is not in the file.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// Others could replace the file.
    #[error("the directory of {} belongs to another user, or others may write to it: give the file its own directory", .0.display())]
    Directory(PathBuf),
    /// It cannot be written as JSON.
    #[error("cannot encode the record")]
    Encode(#[source] serde_json::Error),
    /// A file operation failed.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It is full, and another process's lock keeps it from being renamed.
    #[error("{} is full, and another process holds its lock", .0.display())]
    Locked(PathBuf),
    /// Others could read or write it.
    #[error("{} is not a regular file of root's with mode 0600: remove it, or set --audit-file", .0.display())]
    Unsafe(PathBuf),
}

/// The file, and the one before it.
#[derive(Debug)]
pub(super) struct AuditFile {
    path: PathBuf,
    limit_bytes: u64,
    file: Option<File>,
}

impl AuditFile {
    pub(super) fn new(path: PathBuf, limit_bytes: u64) -> Self {
        Self { path, limit_bytes, file: None }
    }

    /// Opens the file, and creates it for root alone when it is missing.
    pub(super) fn open(&mut self) -> Result<(), FileError> {
        let file = self.opened()?;
        self.file = Some(file);
        Ok(())
    }

    /// Appends a line. After an error the file is opened again.
    pub(super) fn append(&mut self, line: &[u8]) -> Result<(), FileError> {
        let mut file = match self.file.take() {
            Some(file) if leads_to(&self.path, &file) => file,
            _ => self.opened()?,
        };
        let mut length = file.metadata().map_err(self.failed("examine"))?.len();
        if length.saturating_add(line.len() as u64) > self.limit_bytes && length > 0 {
            file = self.renamed(file, length)?;
            length = file.metadata().map_err(self.failed("examine"))?.len();
        }
        // Of either agent, a record may not have fitted on the disk. If the other one writes at this moment,
        // the kernel can show half of its record: then an empty line is between the two.
        let mut last = *b"\n";
        if let Some(at) = length.checked_sub(1) {
            let _read = file.read_at(&mut last, at).map_err(self.failed("read"))?;
        }
        let line =
            if last != *b"\n" { Cow::from([b"\n".as_slice(), line].concat()) } else { Cow::from(line) };
        let written = write_once(&mut file, &line).map_err(self.failed("write to"))?;
        if written < line.len() {
            return Err(self.failed("write to")(ErrorKind::StorageFull.into()));
        }
        self.file = Some(file);
        Ok(())
    }

    /// The file that follows a full one.
    fn renamed(&mut self, file: File, length: u64) -> Result<File, FileError> {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            // The node's other agent renames it at this moment.
            Err(Errno::WOULDBLOCK) if length < 2 * self.limit_bytes => return Ok(file),
            Err(Errno::WOULDBLOCK) => return Err(FileError::Locked(self.path.clone())),
            Err(error) => return Err(self.failed("lock")(error.into())),
        }
        // The other agent may have renamed it before this one had the lock.
        if leads_to(&self.path, &file) {
            fs::rename(&self.path, former(&self.path)).map_err(self.failed("rename"))?;
        }
        self.opened()
    }

    fn opened(&mut self) -> Result<File, FileError> {
        let directory = match self.path.parent() {
            Some(directory) if !directory.as_os_str().is_empty() => directory,
            _ => Path::new("."),
        };
        let of_directory = fs::metadata(directory).map_err(self.failed("examine the directory of"))?;
        if !is_ours(&of_directory, WRITABLE_BY_OTHERS) {
            return Err(FileError::Directory(self.path.clone()));
        }
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
        let mut options = OpenOptions::new();
        options.read(true).append(true).create(true).mode(0o600).custom_flags(flags);
        let file = options.open(&self.path).map_err(self.failed("open"))?;
        let metadata = file.metadata().map_err(self.failed("examine"))?;
        if !metadata.is_file() || !is_ours(&metadata, OPEN_TO_OTHERS) {
            return Err(FileError::Unsafe(self.path.clone()));
        }
        Ok(file)
    }

    fn failed(&self, what: &'static str) -> impl FnOnce(io::Error) -> FileError + use<> {
        let path = self.path.clone();
        move |source| FileError::Io { what, path, source }
    }
}

/// What [`find`] found.
#[derive(Debug)]
pub struct Found {
    /// The records, the oldest first: at most 1,024.
    pub records: Vec<Record>,
    /// Why one of the files could not be read: [`FileError::Io`], or [`FileError::Unsafe`] for what others
    /// could have written.
    pub failure: Option<FileError>,
}

/// Finds the records of a session in the file and in the one before it. Lines that are no records are left
/// out.
pub fn find(path: &Path, access_key_id: &str) -> Found {
    let mut found = Found { records: Vec::new(), failure: None };
    // Both are opened before one is read, and this one first: if it is renamed meanwhile, the other one is
    // the same file.
    let files = [path.to_owned(), former(path)].map(|path| (readable(&path), path));
    let mut seen = None;
    for (file, path) in files.into_iter().rev() {
        let searched = file.and_then(|file| {
            let Some((file, metadata)) = file else { return Ok(()) };
            let id = id(&metadata);
            if seen.replace(id) == Some(id) {
                return Ok(());
            }
            search(&mut BufReader::new(file.take(READ_LIMIT_BYTES)), access_key_id, &mut found.records)
                .map_err(|source| FileError::Io { what: "read", path, source })
        });
        if let Err(error) = searched {
            found.failure = Some(error);
        }
    }
    found
}

/// A file, if there is one of this name.
fn readable(path: &Path) -> Result<Option<(File, Metadata)>, FileError> {
    let failed = |what| {
        let path = path.to_owned();
        move |source| FileError::Io { what, path, source }
    };
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(failed("open"))?,
    };
    let metadata = file.metadata().map_err(failed("examine"))?;
    if !metadata.is_file() || !is_ours(&metadata, WRITABLE_BY_OTHERS) {
        return Err(FileError::Unsafe(path.to_owned()));
    }
    Ok(Some((file, metadata)))
}

fn search(reader: &mut impl io::BufRead, access_key_id: &str, found: &mut Vec<Record>) -> io::Result<()> {
    let mut line = Vec::new();
    while found.len() < FOUND_MAX {
        line.clear();
        // What is longer is no record, nor are its parts.
        if reader.by_ref().take(LINE_LIMIT_BYTES).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        // Most lines need not be parsed.
        let names_it = str::from_utf8(&line).is_ok_and(|line| line.contains(access_key_id));
        if names_it
            && let Ok(record) = serde_json::from_slice::<Record>(&line)
            && *record.access_key_id == *access_key_id
        {
            found.push(record);
        }
    }
    Ok(())
}

/// One system call, so that the records of two agents do not mix.
fn write_once(file: &mut File, bytes: &[u8]) -> io::Result<usize> {
    loop {
        match file.write(bytes) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            written => return written,
        }
    }
}

/// Whether a name leads to an open file.
fn leads_to(path: &Path, file: &File) -> bool {
    match (fs::symlink_metadata(path), file.metadata()) {
        (Ok(named), Ok(open)) => id(&named) == id(&open),
        _ => false,
    }
}

fn id(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// The name of the file before this one.
fn former(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

fn is_ours(metadata: &Metadata, forbidden: u32) -> bool {
    let is_ours = metadata.uid() == 0 || metadata.uid() == geteuid().as_raw();
    is_ours && metadata.mode() & forbidden == 0
}

/// The mode bits that the directory, and a file that is read, must not have.
const WRITABLE_BY_OTHERS: u32 = 0o022;
/// The mode bits that the file must not have.
const OPEN_TO_OTHERS: u32 = 0o077;
/// How many records of one session are found: as many as pods' deliveries are recorded, and its issue, with
/// room for a second agent's.
const FOUND_MAX: usize = 1024;
/// A record takes 500 bytes, 3 KiB with all names at their longest.
const LINE_LIMIT_BYTES: u64 = 16 * 1024;
/// Twice the limit at which a file is renamed.
const READ_LIMIT_BYTES: u64 = 16 * 1024 * 1024;

#[cfg(test)]
mod tests;
