//! Environment → arguments: every flag is also the variable `KUBE2RAM_<FLAG>`.
//! Depends on clap; called by the parent, which puts these before the command line's arguments.

use std::ffi::{OsStr, OsString};

use clap::Command;

const PREFIX: &str = "KUBE2RAM_";

/// Variables that the ancestors' manifests set from the downward API.
const OTHER_NAMES: [(&str, &str); 2] = [("host-ip", "HOST_IP"), ("node", "NODE_NAME")];

/// The arguments that the environment stands for. Empty variables count as unset.
pub(super) fn args(command: &Command, env: &dyn Fn(&str) -> Option<OsString>) -> Vec<OsString> {
    let value_of = |name: &str| env(name).filter(|value| !value.is_empty() && !is_service_link(value));
    let arg_of = |flag: &str| {
        let other = OTHER_NAMES.iter().find(|(name, _)| *name == flag);
        let value = value_of(&format!("{PREFIX}{}", flag.replace('-', "_").to_uppercase()))
            .or_else(|| value_of(other?.1))?;
        let mut arg = OsString::from(format!("--{flag}="));
        arg.push(value);
        Some(arg)
    };
    command.get_arguments().filter_map(|arg| arg_of(arg.get_long()?)).collect()
}

/// The kubelet tells each container of the Services in its namespace. One that is called `kube2ram-metrics` becomes
/// `KUBE2RAM_METRICS_PORT=tcp://…`, which nobody meant for us.
fn is_service_link(value: &OsStr) -> bool {
    let starts_with = |scheme: &str| value.as_encoded_bytes().starts_with(scheme.as_bytes());
    ["tcp://", "udp://", "sctp://"].into_iter().any(starts_with)
}
