//! The longer tasks: lint, docs, sandbox, bench.

use std::process::Command;

use anyhow::{Result, bail};

use crate::{
    build,
    command::{cargo, root, run, say, target_dir},
    counts::Counts,
    house,
    image::Product,
    manifests, setup,
};

/// rustfmt, the dependencies, clippy and rustdoc, with warnings as errors.
pub(crate) fn lint() -> Result<()> {
    say("rules of the house");
    house::check()?;
    say("formatting");
    run(cargo().args(["fmt", "--all", "--check"]))?;
    say("dependencies");
    let [deny, machete] = setup::dependency_checkers()?;
    run(Command::new(machete).current_dir(root()).args(["--skip-target-dir"]))?;
    let check = ["--locked", "--log-level", "error", "check", "--hide-inclusion-graph"];
    run(Command::new(&deny).current_dir(root()).args(check).args(["licenses", "bans", "sources"]))?;
    say("lints");
    run(cargo().args(["clippy", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    for feature in ["debug-log", "boot-guard"] {
        let ebpf_programs = ["clippy", "--locked", "--package", "kube2ram-ebpf", "--features", feature];
        run(cargo().args(ebpf_programs).args(["--", "-D", "warnings"]))?;
    }
    say("documentation");
    run(cargo()
        .args(["doc", "--locked", "--workspace", "--no-deps", "--document-private-items"])
        .env("RUSTDOCFLAGS", "-D warnings"))
}

/// Holds the dependencies against the database of known vulnerabilities; says so where that cannot be
/// reached.
pub(crate) fn advisories() -> Result<Counts> {
    let [deny, _] = setup::dependency_checkers()?;
    let deny = |arguments: &[&str]| {
        let mut command = Command::new(&deny);
        command.current_dir(root()).args(arguments);
        command
    };
    if run(&mut deny(&["fetch", "db"])).is_err() {
        say("SKIPPED: advisories (their database cannot be reached)");
        return Ok(Counts { skipped: 1, ..Counts::default() });
    }
    run(&mut deny(&["--locked", "check", "--disable-fetch", "advisories"])).map(|()| Counts::passed(1))
}

/// Has the tests that compare documents with the code write them instead.
pub(crate) fn docs() -> Result<()> {
    say("the documents' tables");
    // All that are called `…_current`.
    let tests = ["test", "--locked", "--workspace", "--lib", "_current"];
    run(cargo().args(tests).env("UPDATE_DOCS", "1"))
}

/// Builds everything and runs the show.
pub(crate) fn sandbox(cloud: &str, credentials_from: &str, keep: bool) -> Result<()> {
    if !setup::is_root() && !setup::in_path("sudo") {
        bail!("the sandbox makes cgroups, network namespaces and eBPF programs: run it as root");
    }
    setup::building()?;
    setup::programs()?;
    let programs = build::programs()?;
    let mut show = setup::privileged(programs.sandbox);
    show.arg("show").arg("--agent").arg(programs.agent).args(["--cloud", cloud]);
    show.args(["--credentials-from", credentials_from]);
    if keep {
        show.arg("--keep");
    }
    run(&mut show)
}

/// Builds everything and lets users log in to an API server.
pub(crate) fn logins() -> Result<()> {
    if !setup::in_path("go") {
        bail!("the API server and kubectl are built by Go: install that first");
    }
    setup::building()?;
    manifests::api_server()?;
    let programs = build::programs()?;
    let mut logins = Command::new(programs.sandbox);
    logins.arg("logins").arg("--authenticator").arg(programs.authenticator);
    logins.arg("--tools").arg(target_dir().join("tools"));
    logins.arg("--deploy").arg(root().join("deploy/authenticator"));
    run(logins.arg("--directory").arg(target_dir().join("tmp/logins")))
}

/// Measures optimised builds of those programs that the subjects need.
pub(crate) fn bench(cloud: &str, subjects: &[String]) -> Result<()> {
    const AUTHENTICATOR: &str = "authenticator";
    const ALL: [&str; 7] = ["connect", "kernel", "service", "scale", "saturated", "wire", AUTHENTICATOR];
    let subjects = match subjects {
        [] => ALL.to_vec(),
        named => named.iter().map(String::as_str).collect(),
    };
    let is_of_agent = subjects.iter().any(|subject| *subject != AUTHENTICATOR);
    if is_of_agent && !setup::is_root() && !setup::in_path("sudo") {
        bail!("a bench makes cgroups, network namespaces and eBPF programs: run it as root");
    }
    setup::building()?;
    let mut programs = Vec::new();
    if is_of_agent {
        setup::programs()?;
        setup::bench()?;
        programs.push(("--agent", build::release(Product::Agent)?));
    }
    if subjects.contains(&AUTHENTICATOR) {
        programs.push(("--authenticator", build::release(Product::Authenticator)?));
    }
    let sandbox = build::release_sandbox()?;
    let mut bench = if is_of_agent { setup::privileged(sandbox) } else { Command::new(sandbox) };
    bench.args(["bench", "--cloud", cloud]);
    for (flag, program) in programs {
        bench.arg(flag).arg(program);
    }
    run(bench.args(subjects))
}
