//! The seccomp profile that runtimes apply as `RuntimeDefault`, in the words of the OCI runtime
//! specification. Read from Debian's golang-github-containers-common, which Podman and CRI-O use;
//! containerd's differs in little. Called by `config`.

use std::{env, fs};

use anyhow::{Context as _, Result};
use serde_json::{Map, Value, json};

const PROFILE: &str = "/usr/share/containers/seccomp.json";

/// The rules that hold for a container with these capabilities on this machine.
pub(super) fn runtime_default(capabilities: &[String]) -> Result<Value> {
    let profile: Value =
        serde_json::from_slice(&fs::read(PROFILE).with_context(|| format!("cannot read {PROFILE}"))?)?;
    let (ours, known_as) = match env::consts::ARCH {
        "aarch64" => ("SCMP_ARCH_AARCH64", "arm64"),
        _ => ("SCMP_ARCH_X86_64", "amd64"),
    };
    let names = |of: &Value, kind: &str| -> Vec<String> {
        let list = of[kind].as_array().into_iter().flatten();
        list.filter_map(|name| Some(name.as_str()?.to_owned())).collect()
    };
    let holds = |rule: &&Value| {
        let (includes, excludes) = (&rule["includes"], &rule["excludes"]);
        let arches = names(includes, "arches");
        names(includes, "caps").iter().all(|name| capabilities.contains(name))
            && !names(excludes, "caps").iter().any(|name| capabilities.contains(name))
            && (arches.is_empty() || arches.iter().any(|arch| arch == known_as))
    };
    let rules = profile["syscalls"].as_array().into_iter().flatten().filter(holds).map(|rule| {
        let kept = ["names", "action", "args", "errnoRet"];
        let fields = rule.as_object().into_iter().flatten();
        let fields = fields.filter(|(name, value)| kept.contains(&name.as_str()) && !value.is_null());
        Value::Object(fields.map(|(name, value)| (name.clone(), value.clone())).collect::<Map<_, _>>())
    });
    let sub = profile["archMap"].as_array().into_iter().flatten().find(|arch| arch["architecture"] == ours);
    let mut architectures = sub.map(|arch| names(arch, "subArchitectures")).unwrap_or_default();
    architectures.push(ours.to_owned());
    Ok(json!({
        "defaultAction": profile["defaultAction"], "defaultErrnoRet": profile["defaultErrnoRet"],
        "architectures": architectures, "syscalls": rules.collect::<Vec<_>>(),
    }))
}
