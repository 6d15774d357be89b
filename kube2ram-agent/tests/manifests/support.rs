//! Manifests as JSON: rendered by kustomize and Helm, or read as they stand. Used by all tests here.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

pub(crate) const AGENT: &str = env!("CARGO_BIN_EXE_kube2ram");

pub(crate) const NAMESPACE: &str = "kube-system";

/// Each is a kustomize overlay, and a file of Helm values.
pub(crate) const VARIANTS: [&str; 15] = [
    "audit-file",
    "aws",
    "boot-guard",
    "bottlerocket",
    "debug",
    "irsa",
    "migration",
    "namespace-restrictions",
    "oidc",
    "service-account-roles",
    "service-accounts",
    "service-accounts-aws",
    "service-accounts-by-namespace",
    "service-accounts-by-policy",
    "startup-taint",
];

/// What can be had together. Migration's flags are instead of the base's.
pub(crate) const TOGETHER: [&str; 6] =
    ["audit-file", "boot-guard", "debug", "namespace-restrictions", "oidc", "startup-taint"];

/// The same on AWS.
pub(crate) const TOGETHER_ON_AWS: [&str; 5] =
    ["boot-guard", "debug", "irsa", "namespace-restrictions", "startup-taint"];

/// What containers run: cargo's, or the program of an image, which is another build with another C library.
pub(crate) fn agent() -> PathBuf {
    env::var_os("KUBE2RAM_TEST_PROGRAM").unwrap_or_else(|| AGENT.into()).into()
}

/// Objects by kind, namespace and name.
pub(crate) type Objects = BTreeMap<String, Value>;

pub(crate) fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("deploy")
}

/// Where `cargo xtask setup` links to what it builds: next to the directory of the profile.
pub(crate) fn tools() -> PathBuf {
    Path::new(AGENT).ancestors().nth(2).unwrap().join("tools")
}

fn run(command: &mut Command) -> Result<String, String> {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = |bytes| String::from_utf8(bytes).unwrap();
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

/// The documents of a YAML text.
pub(crate) fn parse(yaml: &str) -> Vec<Value> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(yaml).unwrap();
    documents.into_iter().filter(|document| !document.is_null()).collect()
}

pub(crate) fn objects(yaml: &str) -> Objects {
    let name = |object: &Value| {
        let metadata = &object["metadata"];
        let namespace = metadata["namespace"].as_str().unwrap_or_default();
        format!("{} {namespace}/{}", object["kind"].as_str().unwrap(), metadata["name"].as_str().unwrap())
    };
    let documents = parse(yaml);
    let count = documents.len();
    let objects: Objects = documents.into_iter().map(|object| (name(&object), object)).collect();
    assert_eq!(objects.len(), count, "two objects of one name");
    objects
}

/// The file that is applied as it stands.
pub(crate) fn single_file() -> String {
    fs::read_to_string(deploy().join("kube2ram.yaml")).unwrap()
}

pub(crate) fn kustomize(directory: &Path) -> Result<String, String> {
    run(Command::new(tools().join("kustomize/bin/kustomize")).arg("build").arg(directory))
}

/// The base or an overlay.
pub(crate) fn kustomized(variant: Option<&str>) -> String {
    let directory = variant.map_or("base".to_owned(), |variant| format!("overlays/{variant}"));
    kustomize(&deploy().join("kustomize").join(directory)).unwrap()
}

pub(crate) fn values(variant: &str) -> PathBuf {
    deploy().join(format!("helm/values/{variant}.yaml"))
}

/// What Helm makes of the chart with these arguments.
pub(crate) fn helm(args: &[&str]) -> Result<String, String> {
    let mut helm = Command::new(tools().join("helm/bin/helm"));
    helm.args(["template", "kube2ram"]).arg(deploy().join("helm/kube2ram"));
    run(helm.args(["--namespace", NAMESPACE, "--kube-version=1.36"]).args(args))
}

/// With the values of these variants.
pub(crate) fn charted(variants: &[&str]) -> String {
    let files = variants.iter().map(|variant| format!("--values={}", values(variant).display()));
    let files: Vec<_> = files.collect();
    helm(&files.iter().map(String::as_str).collect::<Vec<_>>()).unwrap()
}

/// The notes at the end of `helm install`. Helm renders them only for clusters that it reaches, so the test
/// gives it a copy of the chart with an object of this text.
pub(crate) fn notes(args: &[&str]) -> String {
    let directory = tempfile::tempdir().unwrap();
    let chart = directory.path().join("kube2ram");
    run(Command::new("cp").arg("-r").arg(deploy().join("helm/kube2ram")).arg(&chart)).unwrap();
    fs::rename(chart.join("templates/NOTES.txt"), chart.join("notes.txt")).unwrap();
    fs::write(chart.join("templates/notes.yaml"), r#"notes: {{ tpl (.Files.Get "notes.txt") . | quote }}"#)
        .unwrap();
    let mut helm = Command::new(tools().join("helm/bin/helm"));
    helm.args(["template", "kube2ram", "--namespace", NAMESPACE, "--kube-version=1.36"]);
    helm.arg("--show-only=templates/notes.yaml");
    let text = run(helm.arg(&chart).args(args)).unwrap();
    parse(&text)[0]["notes"].as_str().unwrap().to_owned()
}

pub(crate) fn helm_lint(variant: &str) -> Result<String, String> {
    let mut helm = Command::new(tools().join("helm/bin/helm"));
    helm.args(["lint", "--strict", "--kube-version=1.36", "--values"]).arg(values(variant));
    run(helm.arg(deploy().join("helm/kube2ram")))
}

/// The pod template's `spec` of the agent's DaemonSet.
pub(crate) fn template(objects: &Objects) -> &Value {
    &objects["DaemonSet kube-system/kube2ram"]["spec"]["template"]["spec"]
}

/// Every container of a pod template's `spec`.
pub(crate) fn containers(template: &Value) -> impl Iterator<Item = &Value> {
    let of = |kind| template[kind].as_array().into_iter().flatten();
    of("initContainers").chain(of("containers"))
}

/// A list of strings.
pub(crate) fn strings(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().map(|word| word.as_str().unwrap().to_owned()).collect()
}
