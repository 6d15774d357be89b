//! The longer tasks: lint, sandbox, test.

use std::path::PathBuf;

use anyhow::{Result, bail};

use crate::{
    build,
    command::{capture, cargo, run, say, target_dir},
    ebpf, manifests, setup,
};

/// rustfmt, clippy and rustdoc, with warnings as errors.
pub(crate) fn lint() -> Result<()> {
    say("formatting");
    run(cargo().args(["fmt", "--all", "--check"]))?;
    say("lints");
    run(cargo().args(["clippy", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    for feature in ["debug-log", "boot-guard"] {
        let kernel_half = ["clippy", "--locked", "--package", "kube2ram-ebpf", "--features", feature];
        run(cargo().args(kernel_half).args(["--", "-D", "warnings"]))?;
    }
    say("documentation");
    run(cargo()
        .args(["doc", "--locked", "--workspace", "--no-deps", "--document-private-items"])
        .env("RUSTDOCFLAGS", "-D warnings"))
}

/// Has the tests that compare documents with the code write them instead.
pub(crate) fn docs() -> Result<()> {
    say("the documents' tables");
    // All that are called `…_current`.
    let tests = ["test", "--locked", "--package", "kube2ram-agent", "--lib", "_current"];
    run(cargo().args(tests).env("UPDATE_DOCS", "1"))
}

/// Builds everything and runs the show.
pub(crate) fn sandbox(keep: bool) -> Result<()> {
    if !setup::is_root() && !setup::in_path("sudo") {
        bail!("the sandbox makes cgroups, network namespaces and eBPF programs: run it as root");
    }
    setup::building()?;
    setup::programs()?;
    let agent = build::agent(false)?;
    let sandbox = sandbox_binary(false)?;
    let mut show = setup::privileged(sandbox);
    show.arg("show").arg("--agent").arg(agent);
    if keep {
        show.arg("--keep");
    }
    run(&mut show)
}

/// Measures optimised builds.
pub(crate) fn bench(subjects: &[String]) -> Result<()> {
    const ALL: [&str; 4] = ["connect", "kernel", "service", "scale"];
    if !setup::is_root() && !setup::in_path("sudo") {
        bail!("a bench makes cgroups, network namespaces and eBPF programs: run it as root");
    }
    setup::building()?;
    setup::programs()?;
    setup::bench()?;
    let agent = build::agent(true)?;
    let mut bench = setup::privileged(sandbox_binary(true)?);
    bench.args(["bench", "--agent"]).arg(agent);
    match subjects {
        [] => bench.args(ALL),
        named => bench.args(named),
    };
    run(&mut bench)
}

pub(crate) fn sandbox_binary(release: bool) -> Result<PathBuf> {
    say("building the sandbox");
    let mut build = cargo();
    build.args(["build", "--locked", "--package", "kube2ram-sandbox"]);
    if release {
        build.arg("--release");
    }
    run(&mut build)?;
    Ok(target_dir().join(if release { "release" } else { "debug" }).join("kube2ram-sandbox"))
}

/// Every rung that this machine's own kernel can run.
pub(crate) fn test(no_skip: bool) -> Result<()> {
    setup::building()?;
    setup::programs()?;
    let has_tools = manifests::tools()?;
    if no_skip && !has_tools {
        bail!("tests of the manifests were skipped");
    }
    setup::prometheus()?;
    let objects = ebpf::build()?;
    say("rungs 0 and 1: pure functions, and components against stand-ins");
    // One that fails does not hide the others.
    let workspace = ["test", "--locked", "--workspace", "--no-fail-fast"];
    run(ebpf::embed(cargo().args(workspace), &objects))?;

    say("rung 2: the real agent on the real kernel");
    if !setup::is_root() {
        say("skipped: needs root (cgroups, network namespaces, eBPF)");
        if no_skip {
            bail!("rung 2 was skipped");
        }
        return Ok(());
    }
    say(format!("kernel {}", capture(std::process::Command::new("uname").arg("-r")).unwrap_or_default()));
    setup::bpf_file_system()?;
    // One at a time: they share the machine's routes and count packets.
    run(ebpf::embed(cargo().args(workspace), &objects)
        .args(["--", "--ignored", "--test-threads=1"])
        .args(manifests::left_out(has_tools)))?;
    say("more, each by itself: cargo xtask test --api-server, --kernels, --reboot, --sdks");
    Ok(())
}
