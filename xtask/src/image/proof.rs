//! `cargo xtask test --image`: others' tools read each image, and what it holds runs with nothing else around
//! it; with `--thorough` for both architectures, and each image is the same wherever it is built.
//! Unoptimised, because optimised builds take long; what makes a build depend on its place is the same in
//! both. Called by `main` and `ci`.

mod sources;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::{Product, product::KUBE2IAM};
use crate::{
    build::{self as builds, Profile},
    command::{cargo_home, root, run, say, target_dir},
    counts::Counts,
    ebpf,
    musl::{self, Arch},
    rungs, setup,
};

/// In a name that has what names of directories may have.
const ELSEWHERE: &str = "another-clone,elsewhere";
const TAG: &str = "proof";
/// Of no commit, and so found only where it was put.
const REVISION: &str = "the-revision-that-the-proof-gives";

/// Where the image is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Directories {
    /// Here, for this machine's architecture.
    One,
    /// Here and in another directory, for all architectures; the two are compared.
    Two,
}

/// Fails at the first thing that is not so; tells how many were. What cannot run here is said, and is an
/// error with `no_skip`.
pub(crate) fn prove(directories: Directories, no_skip: bool) -> Result<Counts> {
    let arches: &[Arch] = if directories == Directories::Two { &Arch::ALL } else { &[Arch::HERE] };
    setup::static_building(arches)?;
    setup::programs()?;
    setup::image(arches)?;
    let here = target_dir();
    let mut passed = 0;
    for product in Product::ALL {
        let image = build(product, root(), &here, arches)?.join(product.layout());
        if product == Product::Agent {
            for object in ebpf::objects() {
                leave_nothing_to_chance(&here.join("ebpf").join(object))?;
                passed += 1;
            }
        }
        if directories == Directories::Two {
            compare_with_elsewhere(product, &image, arches)?;
            passed += 1;
        }
    }

    let scratch = Scratch(target_dir().join("image-proof"));
    scratch.clear()?;
    for product in Product::ALL {
        passed += look_at(product, &scratch.0.join(product.name()), arches)?;
    }
    passed += find_shared_layers(&scratch.0, arches)?;
    Ok([Counts::passed(passed), run_here(&scratch.0, no_skip)?].into_iter().sum())
}

/// Has other tools read an image, and runs what it holds; tells how many things were so.
fn look_at(product: Product, scratch: &Path, arches: &[Arch]) -> Result<usize> {
    fs::create_dir_all(scratch)?;
    let image = Profile::Dev.dist().join(product.layout());
    copy_with_skopeo(&image, scratch, &sources::digest(&image)?)?;
    let mut passed = 1;
    for arch in arches {
        let root = scratch.join(arch.name());
        unpack(product, scratch, &image.with_file_name(product.archive()), *arch, &root)?;
        if product.is_of_agent() {
            let link = fs::read_link(root.join(KUBE2IAM))?;
            ensure!(link == Path::new(&product.path()), "/{KUBE2IAM} leads elsewhere");
            let program = fs::read(root.join(product.path()))?;
            ensure!(
                program.windows(REVISION.len()).any(|bytes| bytes == REVISION.as_bytes()),
                "the program for {} does not know its revision",
                arch.name()
            );
            passed += 2;
        }
        run_in_empty_root(product, &root, *arch)?;
        let debug = format!("{}.debug", product.program());
        find_lines(product, &Profile::Dev.dist().join(arch.name()).join(debug))?;
        passed += 2;
    }
    Ok(passed)
}

/// Builds the image of a copy of the sources, and compares objects and images.
fn compare_with_elsewhere(product: Product, image: &Path, arches: &[Arch]) -> Result<()> {
    let elsewhere = target_dir().join("elsewhere").join(ELSEWHERE);
    sources::copy(&elsewhere)?;
    let there = elsewhere.join("target");
    let other_image = build(product, &elsewhere, &there, arches)?.join(product.layout());
    for object in ebpf::objects().filter(|_| product == Product::Agent) {
        let [one, other] = [&target_dir(), &there].map(|target| target.join("ebpf").join(object));
        ensure!(sources::is_same(&one, &other), "{} and {} differ", one.display(), other.display());
    }
    sources::ensure_same(image, &other_image)?;
    say(format!("{}: the same in two directories: {}", product.name(), sources::digest(image)?));
    Ok(())
}

/// Has the image of those sources made; tells where.
fn build(product: Product, sources: &Path, target: &Path, arches: &[Arch]) -> Result<PathBuf> {
    say(format!("building the image of {} in {}", product.name(), sources.display()));
    // By what runs, not by its path: a build of the whole workspace may have put another xtask there.
    let mut image = Command::new("/proc/self/exe");
    image.args(["image", "--profile", "dev", "--revision", REVISION]);
    let choice = match product {
        Product::Agent => "agent",
        Product::Authenticator => "authenticator",
        Product::Kube2iam => "kube2iam",
    };
    image.args(["--product", choice, "--name", &format!("{}:{TAG}", product.name())]);
    if let [arch] = arches {
        image.args(["--arch", arch.name()]);
    }
    run(image
        .current_dir(sources)
        .env("CARGO_MANIFEST_DIR", sources.join("xtask"))
        .env("CARGO_TARGET_DIR", target)
        .env("CARGO_HOME", fs::canonicalize(cargo_home())?)
        .env("SOURCE_DATE_EPOCH", "86400"))?;
    Ok(target.join(Profile::Dev.dist().file_name().context("it has a name")?))
}

/// LLVM numbers forward declarations by its own addresses: with two of them, the same build is another one
/// now and then.
fn leave_nothing_to_chance(object: &Path) -> Result<()> {
    let types = finished(Command::new("bpftool").args(["btf", "dump", "file"]).arg(object))?;
    let types = String::from_utf8_lossy(&types.stdout).into_owned();
    ensure!(types.contains(" FUNC '"), "bpftool finds no functions in {}", object.display());
    let forward: Vec<&str> = types.lines().filter(|line| line.contains(" FWD ")).collect();
    ensure!(forward.len() <= 1, "{} has several forward declarations: {forward:?}", object.display());
    Ok(())
}

/// Copies the whole of it, and looks at what arrived.
fn copy_with_skopeo(image: &Path, scratch: &Path, digest: &str) -> Result<()> {
    let copied = scratch.join("copied");
    run(Command::new("skopeo")
        .args(["copy", "--quiet", "--insecure-policy", "--all"])
        .arg(format!("oci:{}:{TAG}", image.display()))
        .arg(format!("dir:{}", copied.display())))?;
    let mut sum = Command::new("sha256sum");
    let arrived = finished(sum.arg(copied.join("manifest.json")))?;
    let arrived = String::from_utf8_lossy(&arrived.stdout).split(' ').next().map(str::to_owned);
    ensure!(arrived.as_deref() == digest.strip_prefix("sha256:"), "skopeo copies {digest} as {arrived:?}");
    say("skopeo copies it with all architectures and under the same digest");
    Ok(())
}

/// Unpacks one architecture's image with skopeo and tar.
fn unpack(product: Product, scratch: &Path, archive: &Path, arch: Arch, root: &Path) -> Result<()> {
    let copied = scratch.join(format!("copied-{}", arch.name()));
    run(Command::new("skopeo")
        .args([
            "--override-os",
            "linux",
            "--override-arch",
            arch.name(),
            "--insecure-policy",
            "copy",
            "--quiet",
        ])
        .arg(format!("oci-archive:{}:{TAG}", archive.display()))
        .arg(format!("dir:{}", copied.display())))?;
    let manifest: Value = serde_json::from_slice(&fs::read(copied.join("manifest.json"))?)?;
    let blob = |descriptor: &Value| {
        let digest = descriptor["digest"].as_str().unwrap_or_default();
        copied.join(digest.trim_start_matches("sha256:"))
    };
    let config: Value = serde_json::from_slice(&fs::read(blob(&manifest["config"]))?)?;
    ensure!(config["architecture"] == arch.name(), "skopeo chose {}", config["architecture"]);
    let entrypoint = serde_json::json!([product.entrypoint()]);
    ensure!(config["config"]["Entrypoint"] == entrypoint, "{config}");
    ensure!(config["config"]["User"] == product.user(), "{config}");
    fs::create_dir_all(root)?;
    for layer in manifest["layers"].as_array().context("an image has layers")? {
        run(Command::new("tar").arg("-xzf").arg(blob(layer)).arg("-C").arg(root))?;
    }
    Ok(())
}

/// Runs the program where there is nothing but the image: no library, no /proc, no environment.
fn run_in_empty_root(product: Product, root: &Path, arch: Arch) -> Result<()> {
    if !setup::is_root() && !setup::in_path("sudo") {
        bail!("chroot(2) is for root");
    }
    let emulator = emulator(root, arch)?;
    let program = |args: &[&str]| {
        let mut command = setup::privileged("env");
        command
            .args(["-i", "PATH=/usr/sbin:/usr/bin", "chroot"])
            .arg(root)
            .args(&emulator)
            .arg(product.entrypoint())
            .args(args);
        command.output().context("cannot run chroot")
    };
    let version = format!("{} {}", product.program(), env!("CARGO_PKG_VERSION"));
    let (help, verdict): (_, &[&str]) = match product {
        Product::Agent | Product::Kube2iam => ("--auto-discover-base-arn", &["preflight"]),
        Product::Authenticator => (
            "Lets RAM users and roles log in",
            &["init", "--state-dir=/state", "--generate-kubeconfig=/kubeconfig"],
        ),
    };
    for (args, says) in [("--version", &*version), ("--help", help)] {
        let output = program(&[args])?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success() && said.contains(says), "{args:?} says {said:?} ({})", output.status);
    }
    let output = program(verdict)?;
    let said =
        [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
    // It must look at everything and come to a verdict, which here is no.
    let is_verdict_for = |cloud: &str| {
        output.status.code() == Some(1)
            && said.contains("cannot read /proc/self/status")
            && said.lines().any(|line| line.split_whitespace().eq(["✓", "cloud", cloud]))
    };
    let is_right = match product {
        Product::Agent => is_verdict_for("alibaba"),
        // No argument and no variable names the cloud.
        Product::Kube2iam => is_verdict_for("aws"),
        // It needs random numbers and the time.
        Product::Authenticator => output.status.success() && said.contains("a new CA was made"),
    };
    ensure!(is_right, "{verdict:?} says {said:?} ({})", output.status);
    let emulated = if emulator.is_some() { ", emulated" } else { "" };
    let (name, arch) = (product.name(), arch.name());
    say(format!("{name} for {arch}: --version, --help and {} run in an empty root{emulated}", verdict[0]));
    Ok(())
}

/// What runs another architecture's programs, put into the root; it needs nothing else either.
fn emulator(root: &Path, arch: Arch) -> Result<Option<String>> {
    if arch == Arch::HERE {
        return Ok(None);
    }
    let name = match arch {
        Arch::Amd64 => "qemu-x86_64-static",
        Arch::Arm64 => "qemu-aarch64-static",
    };
    fs::copy(setup::find(name).with_context(|| format!("no {name}"))?, root.join(name))?;
    Ok(Some(format!("/{name}")))
}

/// Asks the debug file for the line of the program's main().
fn find_lines(product: Product, debug: &Path) -> Result<()> {
    // As the compiler writes `kube2ram::main`, with the length of each part.
    let main_symbol = match product {
        Product::Agent | Product::Kube2iam => "8kube2ram4main17h",
        Product::Authenticator => "22kube2ram_authenticator4main17h",
    };
    let symbols = finished(Command::new(musl::llvm("llvm-nm")).arg(debug))?;
    let symbols = String::from_utf8_lossy(&symbols.stdout).into_owned();
    let main = symbols
        .lines()
        .find(|line| line.contains(" t ") && line.contains(main_symbol))
        .context("no main() among the symbols")?;
    let address = format!("0x{}", main.split(' ').next().unwrap_or_default());
    let line = finished(Command::new(musl::llvm("llvm-symbolizer")).arg("--obj").arg(debug).arg(address))?;
    let line = String::from_utf8_lossy(&line.stdout).into_owned();
    ensure!(
        line.contains(&format!("/src/{}/src/main.rs:", product.package())),
        "{} knows main() as {line:?}",
        debug.display()
    );
    say(format!("{}: addresses have lines", debug.display()));
    Ok(())
}

/// A node that has one image of the agent downloads only the configuration of the other.
fn find_shared_layers(scratch: &Path, arches: &[Arch]) -> Result<usize> {
    for arch in arches {
        let layers = |product: Product| -> Result<Value> {
            let copied = scratch.join(product.name()).join(format!("copied-{}", arch.name()));
            let manifest: Value = serde_json::from_slice(&fs::read(copied.join("manifest.json"))?)?;
            Ok(manifest["layers"].clone())
        };
        let (usual, as_kube2iam) = (layers(Product::Agent)?, layers(Product::Kube2iam)?);
        ensure!(usual.is_array() && usual == as_kube2iam, "layers differ: {usual} and {as_kube2iam}");
    }
    say("both images of the agent have the same layers");
    Ok(arches.len())
}

/// The main job on both clouds and what depends on the C library, by the programs from the images of the
/// agent: on AWS by the entry point of the image that replaces kube2iam's.
fn run_here(scratch: &Path, no_skip: bool) -> Result<Counts> {
    if !setup::is_root() {
        say("SKIPPED: the program from the image in the sandbox needs root");
        ensure!(!no_skip, "the sandbox was skipped");
        return Ok(Counts::default());
    }
    let program = |product: Product, path: &str| {
        scratch.join(product.name()).join(Arch::HERE.name()).join(path.trim_start_matches('/'))
    };
    let agent = program(Product::Agent, &Product::Agent.entrypoint());
    let as_kube2iam = program(Product::Kube2iam, &Product::Kube2iam.entrypoint());
    setup::bpf_file_system()?;
    let sandbox = builds::programs()?.sandbox;
    for (cloud, entrypoint) in [("alibaba", &agent), ("aws", &as_kube2iam)] {
        say(format!("the main job on {cloud}, by the program from the image"));
        run(Command::new(&sandbox).args(["show", "--cloud", cloud, "--agent"]).arg(entrypoint))?;
    }
    say("names of STS, by the program from the image");
    Ok([Counts::passed(2), rungs::test_names(&agent)?].into_iter().sum())
}

/// Runs a command that must succeed.
fn finished(command: &mut Command) -> Result<Output> {
    let output =
        command.output().with_context(|| format!("cannot run {}", command.get_program().display()))?;
    ensure!(
        output.status.success(),
        "{} failed: {}",
        command.get_program().display(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(output)
}

/// A directory that is removed afterwards.
struct Scratch(PathBuf);

impl Scratch {
    fn clear(&self) -> Result<()> {
        if self.0.exists() {
            fs::remove_dir_all(&self.0)?;
        }
        Ok(fs::create_dir_all(&self.0)?)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}
