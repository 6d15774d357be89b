//! Modules of a kernel, as its package brought them, with those that they need. Called by `initramfs`.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

/// Where the modules of a kernel are: as its package puts them, two levels above the kernel.
pub(super) fn directory(kernel: &Path) -> Result<PathBuf> {
    let name = kernel.file_name().unwrap_or_default().to_string_lossy();
    let version = name.strip_prefix("vmlinuz-").context("a kernel is called vmlinuz-")?;
    let package = kernel.ancestors().nth(2).context("a kernel is in boot")?;
    Ok(package.join("lib/modules").join(version))
}

/// Names and contents, in an order in which they can be loaded.
pub(super) fn read(kernel: &Path, names: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
    let mut found = BTreeMap::new();
    find(&directory(kernel)?, &mut found)?;
    let mut ordered = Vec::new();
    for name in names {
        add(name, &found, &mut ordered)?;
    }
    Ok(ordered)
}

/// Everything below a directory, by the names that modules call each other.
fn find(directory: &Path, found: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("no modules in {}", directory.display()))?;
    for entry in entries {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name());
        if entry.file_type()?.is_dir() {
            find(&path, found)?;
        } else if let Some((name, "" | ".xz")) = name.to_string_lossy().split_once(".ko") {
            found.insert(name.replace('-', "_"), path);
        }
    }
    Ok(())
}

/// A module after those that it needs.
fn add(name: &str, found: &BTreeMap<String, PathBuf>, ordered: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
    if ordered.iter().any(|(done, _)| done == name) {
        return Ok(());
    }
    let path = found.get(name).with_context(|| format!("this kernel has no module {name}"))?;
    let content = content(path)?;
    let needed =
        depends(&content).with_context(|| format!("{} does not say what it needs", path.display()))?;
    for other in needed.split(',').filter(|other| !other.is_empty()) {
        add(&other.replace('-', "_"), found, ordered)?;
    }
    ordered.push((name.to_owned(), content));
    Ok(())
}

/// Unpacked: Debian compresses them from 6.12 on.
fn content(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_none_or(|end| end != "xz") {
        return fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    }
    let output = Command::new("xz").arg("-dc").arg(path).output().context("cannot run xz")?;
    ensure!(output.status.success(), "xz: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(output.stdout)
}

/// `depends=` of the section .modinfo, which holds "name=value" strings that end with zeros
/// (scripts/mod/modpost.c).
fn depends(module: &[u8]) -> Option<String> {
    const KEY: &[u8] = b"\0depends=";
    let start = module.windows(KEY.len()).position(|window| window == KEY)? + KEY.len();
    let length = module[start..].iter().position(|byte| *byte == 0)?;
    String::from_utf8(module[start..start + length].to_owned()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_names_its_dependencies() {
        assert_eq!(depends(b"ELF\0license=GPL\0depends=ip_vs,x-y\0"), Some("ip_vs,x-y".into()));
        assert_eq!(depends(b"ELF\0license=GPL\0depends=\0name=veth\0"), Some(String::new()));
        assert_eq!(depends(b"ELF\0license=GPL\0softdepends=pre: x\0"), None);
    }
}
