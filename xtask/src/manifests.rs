//! `cargo xtask manifests`, and what the tests of `deploy` need: kustomize, Helm, the API server's schemas,
//! and for `cargo xtask test --api-server` an API server and kubectl. All of it is built by Go, from modules
//! of pinned versions. Called by `main`, `setup` and `steps`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    command::{capture, root, run, say},
    setup,
    tools::Tool,
};

/// Program, package and version. The newest that the machine's Go builds.
const PROGRAMS: [(&str, &str, &str); 2] = [
    ("kustomize", "sigs.k8s.io/kustomize/kustomize/v5", "v5.8.1"),
    ("helm", "helm.sh/helm/v3/cmd/helm", "v3.21.4"),
];
/// Schemas of the groups that manifests and examples use.
const SCHEMAS: [&str; 5] = [
    "api__v1_openapi.json",
    "apis__admissionregistration.k8s.io__v1_openapi.json",
    "apis__apps__v1_openapi.json",
    "apis__batch__v1_openapi.json",
    "apis__rbac.authorization.k8s.io__v1_openapi.json",
];
/// Below `deploy/kustomize`, and what Helm makes them of.
const OF_THE_CHART: [(&str, &[&str]); 6] = [
    ("base/kube2ram.yaml", &[]),
    (
        "components/namespace-restrictions/admission.yaml",
        &["--show-only=templates/allow-lists.yaml", "--set=allowLists.admissionPolicy=true"],
    ),
    (
        "components/startup-taint/admission.yaml",
        &["--show-only=templates/startup-taint.yaml", "--set=startupTaint.enabled=true"],
    ),
    ("components/service-accounts/rights.yaml", &[OF_SERVICE_ACCOUNTS, BY_SERVICE_ACCOUNTS]),
    (
        "components/service-accounts-by-policy/admission.yaml",
        &[OF_SERVICE_ACCOUNTS, BY_SERVICE_ACCOUNTS, "--set=tokenRequests=agent"],
    ),
    (
        "components/service-accounts-by-namespace/admission.yaml",
        &[OF_SERVICE_ACCOUNTS, BY_SERVICE_ACCOUNTS, "--set=tokenRequests=namespaces"],
    ),
];
const OF_SERVICE_ACCOUNTS: &str = "--show-only=templates/service-accounts.yaml";
/// With an ARN that the chart requires, and that is not in these files.
const BY_SERVICE_ACCOUNTS: &str =
    "--set=credentialsFrom=service-account,oidcProviderArn=acs:ram::1:oidc-provider/any";
const HEAD_OF_THE_CHART: &str = "\
# Made of deploy/helm/kube2ram, whose templates and values tell what each line is for, by `cargo xtask manifests`.
";
const HEAD: &str = "\
# One agent per node: `kubectl apply -f deploy/kube2ram.yaml`, after setting the image. Made of deploy/helm/kube2ram, whose templates and values tell what
# each line is for, by `cargo xtask manifests`.
---
";

/// Writes what is made of the chart: the kustomize base, and of that `deploy/kube2ram.yaml`.
pub(crate) fn write() -> Result<()> {
    ensure!(setup::in_path("go"), "kustomize and Helm are built by Go: install that first");
    each_made(|file, text| {
        fs::write(file, text)?;
        say(format!("wrote {}", file.display()));
        Ok(())
    })
}

/// Fails unless these files are as [`write()`] writes them.
pub(crate) fn check() -> Result<()> {
    each_made(|file, text| {
        let is_current = fs::read_to_string(file).is_ok_and(|found| found == text);
        ensure!(is_current, "{} is not as the chart renders it: run `cargo xtask manifests`", file.display());
        Ok(())
    })
}

fn each_made(mut take: impl FnMut(&Path, String) -> Result<()>) -> Result<()> {
    let deploy = root().join("deploy");
    for (file, arguments) in OF_THE_CHART {
        let mut helm = Command::new(install("helm")?);
        helm.args(["template", "kube2ram", "--namespace=kube-system", "--kube-version=1.36"]);
        let rendered = capture(helm.args(arguments).arg(deploy.join("helm/kube2ram")));
        let rendered = rendered.with_context(|| format!("Helm cannot render {file}"))?;
        // What Helm says of itself.
        let is_helms = |line: &str| {
            ["# Source: ", "app.kubernetes.io/managed-by: ", "helm.sh/chart: "]
                .iter()
                .any(|start| line.trim_start().starts_with(start))
        };
        let lines = rendered.lines().filter(|line| !line.trim().is_empty() && !is_helms(line));
        let text: String = lines.flat_map(|line| [line, "\n"]).collect();
        take(&deploy.join("kustomize").join(file), format!("{HEAD_OF_THE_CHART}{text}"))?;
    }
    let base = deploy.join("kustomize/base");
    let rendered = capture(Command::new(install("kustomize")?).arg("build").arg(&base));
    let rendered = rendered.with_context(|| format!("cannot build {}", base.display()))?;
    take(&deploy.join("kube2ram.yaml"), format!("{HEAD}{rendered}\n"))
}

/// What the tests of manifests need; says so when it cannot be had here.
pub(crate) fn tools() -> Result<bool> {
    if !setup::in_path("go") {
        say("SKIPPED: tests of the manifests (no go)");
        return Ok(false);
    }
    for (program, ..) in PROGRAMS {
        install(program)?;
    }
    schemas()?;
    Ok(true)
}

fn install(program: &str) -> Result<PathBuf> {
    let Some((_, package, version)) = PROGRAMS.into_iter().find(|(name, ..)| *name == program) else {
        bail!("no version of {program} is pinned");
    };
    Tool { name: program, version }.program(program, |directory| {
        say(format!("building {program} {version} (once on this machine)"));
        let mut go = Command::new("go");
        go.args(["install", "-trimpath", "-ldflags=-s -w", &format!("{package}@{version}")]);
        run(go.env("GOBIN", directory.join("bin")).env("CGO_ENABLED", "0"))
    })
}

/// Where the pinned module of the API server is in this repository.
fn module() -> PathBuf {
    root().join("xtask/api-server")
}

/// Kubernetes' version, as our module pins it.
fn kubernetes() -> Result<String> {
    let module = fs::read_to_string(module().join("go.mod"))?;
    let line = module
        .lines()
        .find_map(|line| line.trim().trim_start_matches("require ").strip_prefix("k8s.io/kubernetes "));
    Ok(line.context("go.mod names no k8s.io/kubernetes")?.to_owned())
}

fn schemas() -> Result<()> {
    let version = kubernetes()?;
    let make = |directory: &Path| {
        say(format!("fetching the API schemas of Kubernetes {version}"));
        run(Command::new("go").current_dir(module()).args(["mod", "download", "k8s.io/kubernetes"]))?;
        let list = ["list", "-m", "-f", "{{.Dir}}", "k8s.io/kubernetes"];
        let sources = capture(Command::new("go").current_dir(module()).args(list));
        let sources = sources.context("cannot find the sources of Kubernetes")?;
        for name in SCHEMAS {
            let from = Path::new(&sources).join("api/openapi-spec/v3").join(name);
            let text = fs::read(&from).with_context(|| format!("cannot read {}", from.display()))?;
            fs::write(directory.join(name), text)?;
        }
        Ok(())
    };
    Tool { name: "openapi", version: &version }.directory(make).map(drop)
}

/// The API server with its store, and kubectl.
pub(crate) fn api_server() -> Result<()> {
    build(
        "kube-apiserver",
        &[("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"), ("etcd", "go.etcd.io/etcd/server/v3")],
    )?;
    build("kubectl", &[("kubectl", "k8s.io/kubernetes/cmd/kubectl")])
}

/// A tool of Kubernetes' version: programs and their packages.
fn build(tool: &str, programs: &[(&str, &str)]) -> Result<()> {
    let version = kubernetes()?;
    let make = |directory: &Path| {
        say(format!("building {tool} {version} (once on this machine)"));
        let bin = directory.join("bin");
        for (name, package) in programs {
            let mut go = Command::new("go");
            go.current_dir(module()).env("CGO_ENABLED", "0").args([
                "build",
                "-trimpath",
                "-ldflags=-s -w",
                "-o",
            ]);
            run(go.arg(bin.join(name)).arg(package))?;
        }
        Ok(())
    };
    Tool { name: tool, version: &version }.directory(make).map(drop)
}
