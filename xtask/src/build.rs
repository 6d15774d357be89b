//! The build of the agent around the eBPF programs. Depends on `ebpf`, `musl` and `checkout`; called by
//! `main`, `steps`, `sdks` and `image`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::{
    checkout,
    command::{cargo, run, say, target_dir},
    ebpf,
    image::Product,
    musl::{self, Arch},
    setup,
};

/// Programs that are not optimised, which all tests use.
pub(crate) struct Programs {
    pub(crate) agent: PathBuf,
    pub(crate) authenticator: PathBuf,
    pub(crate) sandbox: PathBuf,
}

/// Builds the eBPF programs, the agent around them, and the sandbox. All packages of the workspace at a time,
/// as the tests are built: with other packages selected, cargo would choose other features for what they
/// share, and build that once more.
pub(crate) fn programs() -> Result<Programs> {
    let objects = ebpf::build()?;
    say("building the agent and the sandbox");
    let mut build = cargo();
    build.args(["build", "--locked", "--workspace", "--bins"]);
    run(ebpf::embed(&mut build, &objects))?;
    let built = |name| target_dir().join("debug").join(name);
    Ok(Programs {
        agent: built("kube2ram"),
        authenticator: built("kube2ram-authenticator"),
        sandbox: built("kube2ram-sandbox"),
    })
}

/// Builds a program as it is released, one static file, the very one that the image holds; tells where it is.
pub(crate) fn release(product: Product) -> Result<PathBuf> {
    setup::static_building(&[Arch::HERE])?;
    let revision = checkout::revision();
    let objects = if product == Product::Agent { Some(ebpf::build()?) } else { None };
    let program = program(product, objects.as_deref(), Arch::HERE, Profile::Release, revision.as_deref())?;
    Ok(program.path)
}

/// Builds the optimised sandbox, for benches.
pub(crate) fn release_sandbox() -> Result<PathBuf> {
    say("building the sandbox");
    run(cargo().args(["build", "--locked", "--package", "kube2ram-sandbox", "--release"]))?;
    Ok(target_dir().join("release/kube2ram-sandbox"))
}

/// How a program for the node is optimised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Profile {
    /// Not at all, for tests
    Dev,
    Release,
}

impl Profile {
    /// What comes of it: target/dist, or next to it for tests.
    pub(crate) fn dist(self) -> PathBuf {
        target_dir().join(match self {
            Self::Dev => "dist-dev",
            Self::Release => "dist",
        })
    }
}

/// A static program, and what a debugger needs besides.
pub(crate) struct Program {
    pub(crate) path: PathBuf,
    pub(crate) debug: PathBuf,
}

/// Builds a program, the agent around the eBPF programs' objects; the revision is the source that the agent
/// reports (`kube2ram_build_info`).
pub(crate) fn program(
    product: Product,
    objects: Option<&Path>,
    arch: Arch,
    profile: Profile,
    revision: Option<&str>,
) -> Result<Program> {
    let (package, name) = (product.package(), product.program());
    say(format!("building {package} for {}", arch.name()));
    let mut build = cargo();
    build.args(["build", "--locked", "--package", package, "--bin", name, "--profile"]);
    let (profile_name, directory) = match profile {
        Profile::Dev => ("dev", "debug"),
        Profile::Release => ("release", "release"),
    };
    let build = musl::make_static(build.arg(profile_name), arch)?;
    if let Some(objects) = objects {
        ebpf::embed(build, objects);
    }
    run(build.envs(revision.map(|revision| ("KUBE2RAM_REVISION", revision))))?;
    let built = target_dir().join(arch.target()).join(directory).join(name);
    let dist = profile.dist().join(arch.name());
    fs::create_dir_all(&dist).with_context(|| format!("cannot make {}", dist.display()))?;
    let debug = format!("{name}.debug");
    let program = Program { path: dist.join(name), debug: dist.join(&debug) };
    musl::split(&built, &program.path, &program.debug)?;
    say(format!("built {} (a debugger also wants {debug})", program.path.display()));
    Ok(program)
}
