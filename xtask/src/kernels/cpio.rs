//! Archives in the "newc" format of Linux (Documentation/driver-api/early-userspace/buffer-format.rst).
//! Called by `initramfs`.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

/// An archive being written.
pub(super) struct Cpio {
    directories: BTreeSet<PathBuf>,
    entries: u32,
    out: io::BufWriter<fs::File>,
}

impl Cpio {
    pub(super) fn create(path: &Path) -> Result<Self> {
        let file = fs::File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { directories: BTreeSet::new(), entries: 0, out: io::BufWriter::new(file) })
    }

    /// A directory, after those above it.
    pub(super) fn directory(&mut self, path: &Path) -> Result<()> {
        let path = path.strip_prefix("/").unwrap_or(path);
        if path.as_os_str().is_empty() || !self.directories.insert(path.to_owned()) {
            return Ok(());
        }
        self.directory(path.parent().unwrap_or(Path::new("")))?;
        self.entry(path, 0o040_755, &[])
    }

    /// An executable file, in directories that are made for it.
    pub(super) fn file(&mut self, path: &Path, content: &[u8]) -> Result<()> {
        let path = path.strip_prefix("/").unwrap_or(path);
        self.directory(path.parent().unwrap_or(Path::new("")))?;
        self.entry(path, 0o100_755, content)
    }

    pub(super) fn finish(mut self) -> Result<()> {
        self.entry(Path::new("TRAILER!!!"), 0, &[])?;
        Ok(self.out.flush()?)
    }

    fn entry(&mut self, path: &Path, mode: u32, content: &[u8]) -> Result<()> {
        self.entries += 1;
        let name = path.as_os_str().as_encoded_bytes();
        let (name_size, size) = (u32::try_from(name.len() + 1)?, u32::try_from(content.len())?);
        // inode, mode, uid, gid, links, mtime, size, device ×2, special device ×2, length of the name,
        // checksum
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        let header: String = fields.iter().map(|field| format!("{field:08X}")).collect();
        self.out.write_all(format!("070701{header}").as_bytes())?;
        self.out.write_all(name)?;
        // Name and content each end at a multiple of four, the name with at least one zero.
        self.out.write_all(&[0; 4][..4 - (110 + name.len()) % 4])?;
        self.out.write_all(content)?;
        self.out.write_all(&[0; 4][..content.len().next_multiple_of(4) - content.len()])?;
        Ok(())
    }
}
