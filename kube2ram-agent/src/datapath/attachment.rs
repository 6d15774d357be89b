//! The programs of all owners that are attached to a cgroup at the hooks that kube2ram uses. Called by
//! `preflight`.

use std::{fs::File, path::Path};

use super::{
    DatapathError, io_error,
    sys::{BPF_CGROUP_SETSOCKOPT, attach_flags, program_ids, program_name},
};

/// Programs at one hook of one cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// The hook, as `bpftool cgroup show` calls it.
    pub hook: &'static str,
    /// Whether other programs may be attached there and below without replacing one.
    pub shared: bool,
}

/// `enum bpf_attach_type` of include/uapi/linux/bpf.h.
pub(super) const HOOKS: [(u32, &str); 9] = [
    (1, "cgroup_inet_egress"),
    (3, "cgroup_sock_ops"),
    (10, "cgroup_inet4_connect"),
    (11, "cgroup_inet6_connect"),
    (14, "cgroup_udp4_sendmsg"),
    (15, "cgroup_udp6_sendmsg"),
    (BPF_CGROUP_SETSOCKOPT, "cgroup_setsockopt"),
    (29, "cgroup_inet4_getpeername"),
    (30, "cgroup_inet6_getpeername"),
];

/// The names of the programs that are attached to the cgroup itself at the hooks of connect(2). Those that
/// cannot be read are left out.
///
/// # Errors
/// As [`attachments`].
pub fn connect_programs(cgroup: &Path) -> Result<Vec<String>, DatapathError> {
    let directory = File::open(cgroup).map_err(io_error("open", cgroup))?;
    let mut names = Vec::new();
    for (hook, _) in HOOKS.into_iter().filter(|(_, name)| name.ends_with("_connect")) {
        let ids = program_ids(&directory, hook).map_err(io_error("ask for programs on", cgroup))?;
        names.extend(ids.into_iter().filter_map(|id| program_name(id).ok()));
    }
    Ok(names)
}

/// Returns the programs that are attached to the cgroup itself, not to those above it.
///
/// # Errors
/// [`DatapathError::Io`]; the query requires CAP_NET_ADMIN.
pub fn attachments(cgroup: &Path) -> Result<Vec<Attachment>, DatapathError> {
    /// Exclusive attachments have no flag, attachments that may be overridden have `BPF_F_ALLOW_OVERRIDE`.
    /// Links always have this flag.
    const BPF_F_ALLOW_MULTI: u32 = 2;
    let directory = File::open(cgroup).map_err(io_error("open", cgroup))?;
    let mut found = Vec::new();
    for (kind, hook) in HOOKS {
        let flags = attach_flags(&directory, kind).map_err(io_error("ask for programs on", cgroup))?;
        found.extend(flags.map(|flags| Attachment { hook, shared: flags & BPF_F_ALLOW_MULTI != 0 }));
    }
    Ok(found)
}
