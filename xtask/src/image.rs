//! `cargo xtask image`: an OCI image of the agent, of the agent as kube2iam, or of the authenticator, for
//! each architecture, without a container engine; the same sources give the same digest. Depends on `build`
//! and `musl`. Called by `main`.

mod certificates;
mod layer;
mod layout;
mod name;
mod product;
mod proof;

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    time::{Duration, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};

use self::{
    layer::Entry,
    layout::{Layer, Layout},
    name::Name,
    product::KUBE2IAM,
};
pub(crate) use self::{
    product::Product,
    proof::{Directories, prove},
};
use crate::{
    build::{self, Profile},
    checkout,
    command::say,
    ebpf,
    musl::Arch,
    setup,
};

/// What to make.
#[derive(clap::Args)]
pub(crate) struct Request {
    /// Which image
    #[arg(long, value_enum, default_value = "agent")]
    product: Product,
    /// What containerd, kind and podman call it once they have loaded the archive; no part of the digest
    /// [default: the image's own name and the version]
    #[arg(long)]
    name: Option<Name>,
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
        let Self { product, name, arch, revision, source, profile } = self;
        let name = name.map_or_else(|| product.name().parse(), Ok)?;
        let revision = revision.or_else(checkout::revision);
        let arches = arch.map_or(Arch::ALL.to_vec(), |arch| vec![arch]);
        setup::static_building(&arches)?;
        let objects = if product.is_of_agent() { Some(ebpf::build()?) } else { None };
        let certificates = certificates::pem();
        let mut images = Vec::new();
        for arch in arches {
            let built = build::program(product, objects.as_deref(), arch, profile, revision.as_deref())?;
            let program = fs::read(built.path)?;
            let path = product.path();
            let mut entries = vec![file(&path, 0o755, &program)];
            if product.is_of_agent() {
                entries.push((KUBE2IAM.to_owned(), Entry::Link { to: &path }));
            }
            let roots = vec![file(certificates::PATH, 0o644, certificates.as_bytes())];
            images.push(layout::Image {
                arch,
                entrypoint: product.entrypoint(),
                user: product.user(),
                layers: vec![layer(roots, "Mozilla's root certificates")?, layer(entries, product.brings())?],
            });
        }
        // For the Dockerfiles.
        fs::write(profile.dist().join("ca-certificates.crt"), &certificates)?;
        let facts = product.facts(created()?, revision, source);
        let layout = Layout::new(&facts, &name, &images)?;
        for (directory_or_archive, what) in write(&layout, product, &profile.dist())? {
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

fn layer(entries: Vec<(String, Entry<'_>)>, brings: &'static str) -> Result<Layer> {
    Ok(Layer { tar: layer::tar(&entries.into_iter().collect::<BTreeMap<_, _>>())?, brings })
}

/// The time of the sources.
fn created() -> Result<String> {
    // https://reproducible-builds.org/specs/source-date-epoch
    let seconds = match env::var("SOURCE_DATE_EPOCH") {
        Ok(given) => given.parse().context("SOURCE_DATE_EPOCH is no number of seconds")?,
        Err(_) => checkout::committed_at().unwrap_or(0),
    };
    Ok(humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(seconds)).to_string())
}

/// Writes the layout as a directory and as one archive.
fn write(layout: &Layout, product: Product, dist: &Path) -> Result<[(PathBuf, &'static str); 2]> {
    let directory = dist.join(product.layout());
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
    let archive = dist.join(product.archive());
    fs::write(&archive, layer::tar(&files)?)
        .with_context(|| format!("cannot write {}", archive.display()))?;
    Ok([(directory, "OCI image layout"), (archive, "the same in one file")])
}
