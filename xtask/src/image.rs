//! `cargo xtask image`: an OCI image of the agent for each architecture, without a container engine; the same
//! sources give the same digest. Depends on `build` and `musl`. Called by `main`.

mod certificates;
mod layer;
mod layout;
mod name;
mod proof;

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    time::{Duration, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};

pub(crate) use self::proof::{Directories, prove};
use self::{
    layer::Entry,
    layout::{Facts, Layer, Layout},
    name::Name,
};
use crate::{
    build::{self, Profile},
    checkout,
    command::say,
    ebpf,
    musl::Arch,
    setup,
};

/// Where the manifests and the boot guard's installation expect it.
const PROGRAM: &str = "usr/local/bin/kube2ram";
/// Started by this name, the agent has kube2iam's defaults.
const KUBE2IAM: &str = "kube2iam";

/// What to make.
#[derive(clap::Args)]
pub(crate) struct Request {
    /// What containerd, kind and podman call it once they have loaded the archive; no part of the digest
    #[arg(long, default_value = concat!("kube2ram:", env!("CARGO_PKG_VERSION")))]
    name: Name,
    /// Only this architecture
    #[arg(long)]
    arch: Option<Arch>,
    /// The commit that image and agent name; else that of a clean git checkout, or none
    #[arg(long)]
    revision: Option<String>,
    /// Where the sources are to be had, for the image to name
    #[arg(long)]
    source: Option<String>,
    #[arg(long, default_value = "release", hide = true)]
    profile: Profile,
}

impl Request {
    /// Builds, writes, and prints the result.
    pub(crate) fn run(self) -> Result<()> {
        let revision = self.revision.or_else(checkout::revision);
        let arches = self.arch.map_or(Arch::ALL.to_vec(), |arch| vec![arch]);
        setup::static_building(&arches)?;
        let objects = ebpf::build()?;
        let certificates = certificates::pem();
        let mut images = Vec::new();
        for arch in arches {
            let program = fs::read(build::program(&objects, arch, self.profile, revision.as_deref())?.path)?;
            images.push(layout::Image {
                arch,
                entrypoint: format!("/{PROGRAM}"),
                layers: vec![
                    layer(
                        [file(certificates::PATH, 0o644, certificates.as_bytes())],
                        "Mozilla's root certificates",
                    )?,
                    layer(
                        [file(PROGRAM, 0o755, &program), (KUBE2IAM.to_owned(), Entry::Link { to: PROGRAM })],
                        "the agent, one static file",
                    )?,
                ],
            });
        }
        // For deploy/Dockerfile.
        fs::write(self.profile.dist().join("ca-certificates.crt"), &certificates)?;
        let layout = Layout::new(&facts(revision, self.source)?, &self.name, &images)?;
        for (directory_or_archive, what) in write(&layout, &self.profile.dist())? {
            say(format!("{} ({what})", directory_or_archive.display()));
        }
        for (arch, size) in &layout.sizes {
            say(format!("linux/{}: {:.1} MiB to download", arch.name(), *size as f64 / f64::from(1 << 20)));
        }
        say(format!("digest {}", layout.digest));
        Ok(())
    }
}

fn file<'a>(path: &str, mode: u32, contents: &'a [u8]) -> (String, Entry<'a>) {
    (path.to_owned(), Entry::File { mode, contents })
}

fn layer<const N: usize>(entries: [(String, Entry<'_>); N], brings: &'static str) -> Result<Layer> {
    Ok(Layer { tar: layer::tar(&BTreeMap::from(entries))?, brings })
}

fn facts(revision: Option<String>, source: Option<String>) -> Result<Facts> {
    // https://reproducible-builds.org/specs/source-date-epoch
    let seconds = match env::var("SOURCE_DATE_EPOCH") {
        Ok(given) => given.parse().context("SOURCE_DATE_EPOCH is no number of seconds")?,
        Err(_) => checkout::committed_at().unwrap_or(0),
    };
    Ok(Facts {
        version: env!("CARGO_PKG_VERSION"),
        description: "Gives each Kubernetes pod on an Alibaba Cloud or AWS node its own cloud role",
        licenses: env!("CARGO_PKG_LICENSE"),
        created: humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(seconds)).to_string(),
        revision,
        source,
    })
}

/// Writes the layout as a directory and as one archive.
fn write(layout: &Layout, dist: &Path) -> Result<[(PathBuf, &'static str); 2]> {
    let directory = dist.join("oci");
    if directory.exists() {
        fs::remove_dir_all(&directory)?;
    }
    for (path, bytes) in &layout.files {
        let path = directory.join(path);
        fs::create_dir_all(path.parent().context("a file is in a directory")?)?;
        fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let files = layout.files.iter();
    let files = files.map(|(path, contents)| file(path, 0o644, contents)).collect();
    let archive = dist.join("kube2ram.oci.tar");
    fs::write(&archive, layer::tar(&files)?)
        .with_context(|| format!("cannot write {}", archive.display()))?;
    Ok([(directory, "OCI image layout"), (archive, "the same in one file")])
}
