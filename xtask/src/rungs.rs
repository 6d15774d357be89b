//! Rungs 0 to 2, `cargo xtask test`: all tests of the workspace, by cargo-nextest, which runs each in its own
//! process and several at a time (`.config/nextest.toml`). Called by `main` and `ci`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    command::{capture, cargo, cargo_like, run, say, target_dir},
    counts::Counts,
    ebpf, manifests, setup,
};

/// The tests that need a real API server, in nextest's words.
const ON_API_SERVER: &str = "binary(manifests) and test(/^api_server::/) or binary(api_server)";
/// Those that need kustomize, Helm and the API server's schemas.
const OF_MANIFESTS: &str = "binary(manifests) and test(/^(chart|kube2iam|overlays|rendered|schema)::/)";

/// Every rung that this machine's own kernel can run.
pub(crate) fn test(no_skip: bool) -> Result<Counts> {
    setup::building()?;
    setup::programs()?;
    let has_tools = manifests::tools()?;
    if has_tools {
        manifests::check()?;
    }
    ensure!(has_tools || !no_skip, "tests of the manifests were skipped");
    setup::prometheus()?;
    let objects = ebpf::build()?;

    let mut tests = nextest(&objects)?;
    let is_root = setup::is_root();
    if is_root {
        setup::bpf_file_system()?;
        let kernel = capture(Command::new("uname").arg("-r")).unwrap_or_default();
        say(format!("rungs 0 to 2: units, components, and the real agent on the real kernel, {kernel}"));
        let left_out = if has_tools { String::new() } else { format!(" and not ({OF_MANIFESTS})") };
        tests.args(["--run-ignored", "all", "-E", &format!("not ({ON_API_SERVER}){left_out}")]);
    } else {
        say("rungs 0 and 1: pure functions, and components against stand-ins");
    }
    let counts = counted(&mut tests)?;
    say("examples in the documentation");
    run(ebpf::embed(cargo().args(["test", "--locked", "--workspace", "--doc", "--quiet"]), &objects))?;
    if !is_root {
        say("skipped: rung 2 needs root (cgroups, network namespaces, eBPF)");
        if no_skip {
            bail!("rung 2 was skipped");
        }
        return Ok(counts);
    }
    say("more, each by itself: cargo xtask test --api-server, --image, --kernels, --reboot, --sdks");
    Ok(counts)
}

/// The tests of names, with the containers' program from an image: its C library resolves them.
pub(crate) fn test_names(program: &Path) -> Result<Counts> {
    let mut tests = nextest(&ebpf::build()?)?;
    tests.env("KUBE2RAM_TEST_PROGRAM", program);
    counted(tests.args(["--run-ignored", "all", "-E", "binary(manifests) and test(/^names::/)"]))
}

/// `cargo xtask test --api-server`.
pub(crate) fn test_on_api_server() -> Result<Counts> {
    ensure!(setup::is_root(), "pods, cgroups and eBPF programs: run it as root");
    setup::building()?;
    setup::programs()?;
    ensure!(manifests::tools()?, "the API server is built by Go: install that first");
    manifests::api_server()?;
    setup::bpf_file_system()?;
    counted(nextest(&ebpf::build()?)?.args(["--run-ignored", "all", "-E", ON_API_SERVER]))
}

/// Where cargo put the executables of these tests of the agent, in that order. All tests are built, as for
/// rungs 0 to 2.
pub(crate) fn executables(objects: &Path, tests: &[&str]) -> Result<Vec<PathBuf>> {
    let mut build = cargo();
    build.args(["test", "--locked", "--workspace", "--no-run", "--message-format=json"]);
    let messages = capture(ebpf::embed(&mut build, objects)).context("the tests cannot be built")?;
    let find = |test: &&str| {
        let artifacts = messages.lines().filter(|line| line.contains(r#""kind":["test"]"#));
        let mut executables =
            artifacts.filter_map(|line| line.split_once(r#""executable":""#)?.1.split('"').next());
        let executable = executables.find(|path| {
            let name = Path::new(path).file_name().unwrap_or_default().to_string_lossy();
            // Cargo adds a hash.
            name.rsplit_once('-').is_some_and(|(name, _)| name == *test)
        });
        executable.map(Into::into).with_context(|| format!("cargo built no test {test}"))
    };
    tests.iter().map(find).collect()
}

/// Runs nextest, and returns how many tests it ran.
fn counted(nextest: &mut Command) -> Result<Counts> {
    let report = target_dir().join("nextest/default/junit.xml");
    if report.exists() {
        fs::remove_file(&report)?;
    }
    run(nextest)?;
    let report = fs::read_to_string(&report).with_context(|| format!("cannot read {}", report.display()))?;
    Counts::of_junit(&report).context("cannot understand nextest's report")
}

/// `cargo nextest run` of the whole workspace.
fn nextest(objects: &Path) -> Result<Command> {
    let mut command = cargo_like(setup::nextest()?);
    command.args(["nextest", "run", "--locked", "--workspace"]);
    ebpf::embed(&mut command, objects);
    Ok(command)
}
