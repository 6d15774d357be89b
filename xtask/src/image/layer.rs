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

/// What is at a path. It belongs to root.
pub(crate) enum Entry<'a> {
    File {
        mode: u32,
        contents: &'a [u8],
    },
    /// A symbolic link.
    Link {
        to: &'a str,
    },
}

/// A tar archive of entries by their paths, which have no leading slash; the directories above them come with
/// them.
///
/// # Errors
/// When a path is longer than a plain (ustar) header holds.
pub(crate) fn tar(entries: &BTreeMap<String, Entry<'_>>) -> io::Result<Vec<u8>> {
    let directories = entries.keys().flat_map(|path| {
        Path::new(path).ancestors().skip(1).filter(|above| *above != Path::new("")).map(Path::to_owned)
    });
    let mut archive = tar::Builder::new(Vec::new());
    for directory in directories.collect::<BTreeSet<_>>() {
        let mut header = header(EntryType::Directory, 0o755, 0);
        header.set_path(format!("{}/", directory.display()))?;
        header.set_cksum();
        archive.append(&header, io::empty())?;
    }
    for (path, entry) in entries {
        let (mut header, contents) = match entry {
            Entry::File { mode, contents } => (header(EntryType::Regular, *mode, contents.len()), *contents),
            Entry::Link { to } => {
                let mut header = header(EntryType::Symlink, 0o777, 0);
                header.set_link_name(to)?;
                (header, &[][..])
            }
        };
        header.set_path(path)?;
        header.set_cksum();
        archive.append(&header, contents)?;
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

    fn entries() -> BTreeMap<String, Entry<'static>> {
        BTreeMap::from([
            ("usr/local/bin/agent".to_owned(), Entry::File { mode: 0o755, contents: b"program" }),
            ("etc/roots".to_owned(), Entry::File { mode: 0o644, contents: b"certificates" }),
            ("agent".to_owned(), Entry::Link { to: "usr/local/bin/agent" }),
        ])
    }

    #[test]
    fn directories_come_before_what_is_in_them_and_all_in_order() {
        let archive = tar(&entries()).unwrap();

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
                ("agent".to_owned(), 0o777),
                ("etc/roots".to_owned(), 0o644),
                ("usr/local/bin/agent".to_owned(), 0o755),
            ]
        );
    }

    #[test]
    fn a_link_has_a_target_and_no_contents() {
        let archive = tar(&entries()).unwrap();

        let mut archive = tar::Archive::new(&*archive);
        let links = archive.entries().unwrap().filter_map(|entry| {
            let entry = entry.unwrap();
            let target = entry.link_name().unwrap()?.display().to_string();
            Some((entry.path().unwrap().display().to_string(), target, entry.size()))
        });
        assert_eq!(links.collect::<Vec<_>>(), [("agent".to_owned(), "usr/local/bin/agent".to_owned(), 0)]);
    }

    #[test]
    fn entries_are_roots_and_hold_neither_a_time_nor_a_name() {
        let archive = tar(&entries()).unwrap();

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
        let fits = BTreeMap::from([("a".repeat(100), Entry::File { mode: 0o644, contents })]);
        let too_long = BTreeMap::from([("a".repeat(101), Entry::File { mode: 0o644, contents })]);

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
