//! Archives whose bytes depend on nothing but what is in them: no times, no owners, a fixed order, a fixed
//! compression. Pure; called by `image` and `layout`.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Write as _},
    path::Path,
};

use flate2::{Compression, GzBuilder};
use tar::{EntryType, Header};

/// The last change of every file and directory: then, layers do not change when their contents do not.
const MTIME: u64 = 0;
/// "Unknown" in a gzip header (RFC 1952, 2.3.1), which else names the system that wrote it.
const NO_SYSTEM: u8 = 255;

/// A file of root's.
pub(crate) struct File<'a> {
    pub(crate) mode: u32,
    pub(crate) contents: &'a [u8],
}

/// A tar archive of files by their paths, which have no leading slash; the directories above them come with
/// them.
///
/// # Errors
/// When a path is longer than a plain (ustar) header holds.
pub(crate) fn tar(files: &BTreeMap<String, File<'_>>) -> io::Result<Vec<u8>> {
    let directories = files.keys().flat_map(|path| {
        Path::new(path).ancestors().skip(1).filter(|above| *above != Path::new("")).map(Path::to_owned)
    });
    let mut archive = tar::Builder::new(Vec::new());
    for directory in directories.collect::<BTreeSet<_>>() {
        let mut header = header(EntryType::Directory, 0o755, 0);
        header.set_path(format!("{}/", directory.display()))?;
        header.set_cksum();
        archive.append(&header, io::empty())?;
    }
    for (path, file) in files {
        let mut header = header(EntryType::Regular, file.mode, file.contents.len());
        header.set_path(path)?;
        header.set_cksum();
        archive.append(&header, file.contents)?;
    }
    archive.into_inner()
}

/// As small as gzip makes it.
pub(crate) fn gzip(bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut encoder =
        GzBuilder::new().mtime(0).operating_system(NO_SYSTEM).write(Vec::new(), Compression::best());
    encoder.write_all(bytes)?;
    encoder.finish()
}

fn header(kind: EntryType, mode: u32, size: usize) -> Header {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size as u64);
    header.set_mtime(MTIME);
    header.set_uid(0);
    header.set_gid(0);
    header
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    fn two_files() -> BTreeMap<String, File<'static>> {
        BTreeMap::from([
            ("usr/local/bin/agent".to_owned(), File { mode: 0o755, contents: b"program" }),
            ("etc/roots".to_owned(), File { mode: 0o644, contents: b"certificates" }),
        ])
    }

    #[test]
    fn directories_come_before_what_is_in_them_and_all_in_order() {
        let archive = tar(&two_files()).unwrap();

        let mut archive = tar::Archive::new(&*archive);
        let entries = archive.entries().unwrap().map(|entry| {
            let entry = entry.unwrap();
            (entry.path().unwrap().display().to_string(), entry.header().mode().unwrap())
        });
        assert_eq!(
            entries.collect::<Vec<_>>(),
            [
                ("etc/".to_owned(), 0o755),
                ("usr/".to_owned(), 0o755),
                ("usr/local/".to_owned(), 0o755),
                ("usr/local/bin/".to_owned(), 0o755),
                ("etc/roots".to_owned(), 0o644),
                ("usr/local/bin/agent".to_owned(), 0o755),
            ]
        );
    }

    #[test]
    fn entries_are_roots_and_hold_neither_a_time_nor_a_name() {
        let archive = tar(&two_files()).unwrap();

        for entry in tar::Archive::new(&*archive).entries().unwrap() {
            let header = entry.unwrap().header().clone();
            assert_eq!((header.uid().unwrap(), header.gid().unwrap(), header.mtime().unwrap()), (0, 0, 0));
            assert_eq!(header.username().unwrap().unwrap_or_default(), "");
            assert_eq!(header.groupname().unwrap().unwrap_or_default(), "");
        }
    }

    #[test]
    fn a_path_that_a_plain_header_cannot_hold_is_an_error() {
        let contents: &[u8] = b"";
        let fits = BTreeMap::from([("a".repeat(100), File { mode: 0o644, contents })]);
        let too_long = BTreeMap::from([("a".repeat(101), File { mode: 0o644, contents })]);

        tar(&fits).unwrap();
        assert!(tar(&too_long).is_err());
    }

    #[test]
    fn what_is_compressed_holds_neither_time_nor_system_and_comes_back() {
        let bytes = b"the same over and over ".repeat(100);

        let compressed = gzip(&bytes).unwrap();

        // Magic, deflate, no flags, no time, best compression, no system (RFC 1952, 2.3).
        assert_eq!(compressed[..10], [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 2, 255]);
        let mut back = Vec::new();
        flate2::read::GzDecoder::new(&*compressed).read_to_end(&mut back).unwrap();
        assert_eq!(back, bytes);
    }
}
