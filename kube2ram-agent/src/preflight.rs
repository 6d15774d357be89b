//! `kube2ram preflight`: what a node must have, each condition with its remedy. The agent makes the same
//! checks at its start, and refuses to run if one fails. Depends on `datapath`, `boot_guard`, `predecessors`
//! and `identity`, and on procfs; called by `main` and `app`.

mod own_token;

use std::{
    fmt, fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use kube2ram_common::abi::MAX_CGROUP_LEVEL;
use rustix::process::{Resource, getrlimit};

use crate::{
    boot_guard,
    datapath::{
        self, Attachment, BootGuard, WireHook, attachments, check_bpffs, connect_programs, kernel_version,
        other_installation,
    },
    identity::{find_cgroup_root, find_pods_cgroup, is_populated, own_cgroup},
    predecessors,
};
use kube2ram_cloud::{Cloud, MetadataAddr};
use kube2ram_service::telemetry::chain;

/// Where the agent's things are on this node.
#[derive(Clone, Debug)]
pub struct NodePaths {
    /// The bpffs directory of the pins.
    pub bpf_dir: PathBuf,
    /// The cgroup2 mount; found by looking when `None`.
    pub cgroup_root: Option<PathBuf>,
    /// The cloud that the node is said to be in.
    pub cloud: Cloud,
    /// The metadata server's addresses.
    pub metadata: MetadataAddr,
    /// Whether an operator has set them, so that the machine's vendor says nothing about them.
    pub metadata_is_set: bool,
    /// The cgroup of all pods; found by looking when `None`.
    pub pods_cgroup: Option<PathBuf>,
    /// Whether the agent impersonates its node, with the token that is mounted into its pod.
    pub impersonates_node: bool,
}

/// One condition: what is the case, or what is wrong and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    condition: &'static str,
    outcome: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    /// An agent can run, but something else is wrong.
    Amiss(String),
    Met(String),
    Unmet(String),
}

impl From<Result<String, String>> for Outcome {
    fn from(checked: Result<String, String>) -> Self {
        checked.map_or_else(Self::Unmet, Self::Met)
    }
}

/// All conditions, one a line.
#[derive(Clone, Debug)]
pub struct Preflight(Vec<Check>);

impl Preflight {
    /// Makes the checks for an operator. Nothing is changed.
    pub fn of_node(paths: &NodePaths) -> Self {
        Self::of(paths, Outcome::Amiss, Outcome::Amiss)
    }

    /// Makes the checks for an agent, which runs in a pod: if the pods' cgroup holds no process, it is not
    /// where pods are. If the machine is another cloud's, the agent would take protection from the address
    /// where its metadata server is.
    pub fn of_agent(paths: &NodePaths) -> Self {
        Self::of(paths, Outcome::Unmet, Outcome::Unmet)
    }

    /// `empty`: what it means that the pods' cgroup holds no process. `foreign`: that the machine is another
    /// cloud's.
    fn of(paths: &NodePaths, empty: fn(String) -> Outcome, foreign: fn(String) -> Outcome) -> Self {
        let version = kernel_version();
        let capabilities = read("/proc/self/status").map(|status| effective_capabilities(&status));
        let outcomes = [
            ("kernel", check_kernel(version)),
            ("capabilities", capabilities.clone().and_then(check_capabilities)),
            ("memory lock", capabilities.and_then(|held| check_memlock(version, held))),
            (
                "bpf file system",
                check_bpffs(&paths.bpf_dir)
                    .map(|()| paths.bpf_dir.display().to_string())
                    .map_err(|error| chain(&error)),
            ),
            ("cgroup v1", read("/proc/self/mounts").and_then(|mounts| check_v1(version, &mounts))),
        ];
        let check = |condition, outcome: Result<String, String>| Check { condition, outcome: outcome.into() };
        let mut checks: Vec<_> =
            outcomes.into_iter().map(|(condition, outcome)| check(condition, outcome)).collect();
        let root = find_cgroup_root(paths.cgroup_root.as_deref()).map_err(|error| chain(&error));
        let pods = root.clone().and_then(|root| {
            find_pods_cgroup(&root, paths.pods_cgroup.as_deref()).map_err(|error| chain(&error))
        });
        let others = root.clone().and_then(|root| check_attachments(&root, &pods.clone()?));
        let installations = pods.clone().and_then(|pods| check_installations(&paths.bpf_dir, &pods));
        let cilium = root.as_ref().ok().and_then(|root| tell_cilium(&paths.bpf_dir, root));
        let levels = root.clone();
        let shown = |path: PathBuf| path.display().to_string();
        checks.push(check("cgroup v2", root.map(shown)));
        let pods = pods.and_then(|pods| check_pods(&levels?, &pods, empty));
        checks.push(Check { condition: "pods' cgroup", outcome: pods.unwrap_or_else(Outcome::Unmet) });
        checks.push(check("other programs", others));
        // Some machines tell no vendor.
        let vendor = read(SYS_VENDOR).unwrap_or_default();
        checks.push(Check { condition: "cloud", outcome: check_cloud(paths, vendor.trim(), foreign) });
        checks.push(check("wire guard", Ok(tell_wire_guard().to_owned())));
        if paths.impersonates_node {
            checks.push(Check { condition: "own token", outcome: own_token::check() });
        }
        checks.push(check("installations", installations));
        checks.extend(cilium.map(|outcome| Check { condition: "Cilium", outcome }));
        checks.push(check("boot guard", Ok(tell_boot_guard(paths))));
        let predecessors = check_predecessors(*paths.metadata.v4.ip()).into_iter();
        checks.extend(predecessors.map(|outcome| Check { condition: "predecessors", outcome }));
        Self(checks)
    }

    /// What does not keep an agent from running.
    pub fn warnings(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|Check { outcome, .. }| match outcome {
            Outcome::Amiss(text) => Some(text.as_str()),
            Outcome::Met(_) | Outcome::Unmet(_) => None,
        })
    }

    /// The conditions that are not met, with their remedies.
    pub fn failures(&self) -> impl Iterator<Item = String> {
        self.0.iter().filter_map(|Check { condition, outcome }| match outcome {
            Outcome::Unmet(reason) => Some(format!("{condition}: {reason}")),
            Outcome::Amiss(_) | Outcome::Met(_) => None,
        })
    }
}

impl fmt::Display for Preflight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, Check { condition, outcome }) in self.0.iter().enumerate() {
            let (mark, text) = match outcome {
                Outcome::Amiss(text) => ('!', text),
                Outcome::Met(text) => ('✓', text),
                Outcome::Unmet(text) => ('✗', text),
            };
            let end = if index == 0 { "" } else { "\n" };
            write!(f, "{end}{mark} {condition:<16} {text}")?;
        }
        Ok(())
    }
}

/// A kernel's major and minor version.
type Version = (u32, u32);

fn read(path: &str) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("cannot read {path}: {error}"))
}

/// What the machine's firmware says who made it.
const SYS_VENDOR: &str = "/sys/class/dmi/id/sys_vendor";

fn check_cloud(paths: &NodePaths, vendor: &str, foreign: fn(String) -> Outcome) -> Outcome {
    match foreign_to(vendor, paths.metadata) {
        Some(text) if !paths.metadata_is_set => {
            foreign(format!("{text}, or --metadata-addr where that is another machine's"))
        }
        _ => Outcome::Met(paths.cloud.name().to_owned()),
    }
}

/// Why a guard of these addresses may guard nothing: this machine is of a cloud that has others.
pub fn foreign_address(guarded: MetadataAddr) -> Option<String> {
    foreign_to(read(SYS_VENDOR).ok()?.trim(), guarded)
}

fn foreign_to(vendor: &str, guarded: MetadataAddr) -> Option<String> {
    let found = Cloud::of_vendor(vendor)?;
    let usual = found.dialect().metadata;
    (usual.v4.ip() != guarded.v4.ip()).then(|| {
        format!(
            "this machine's vendor is {vendor}, whose metadata server is at {usual}, and what is guarded is {guarded}: set --cloud={}",
            found.name()
        )
    })
}

fn check_kernel(version: Version) -> Result<String, String> {
    let (major, minor) = version;
    if version < (5, 10) {
        return Err(format!("Linux {major}.{minor} is too old: 5.10 is needed"));
    }
    Ok(format!("Linux {major}.{minor}"))
}

/// Numbers of include/uapi/linux/capability.h.
mod capability {
    pub(super) const DAC_READ_SEARCH: u8 = 2;
    pub(super) const NET_ADMIN: u8 = 12;
    pub(super) const SYS_ADMIN: u8 = 21;
    pub(super) const SYS_RESOURCE: u8 = 24;
    pub(super) const BPF: u8 = 39;
}

/// The `CapEff` line of proc_pid_status(5); 0 when the line is missing.
fn effective_capabilities(status: &str) -> u64 {
    let hex = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    hex.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0)
}

fn has(held: u64, capability: u8) -> bool {
    held >> capability & 1 == 1
}

fn check_capabilities(held: u64) -> Result<String, String> {
    let needed = [
        (has(held, capability::BPF) || has(held, capability::SYS_ADMIN), "BPF (or SYS_ADMIN)"),
        (has(held, capability::NET_ADMIN), "NET_ADMIN"),
        (has(held, capability::DAC_READ_SEARCH), "DAC_READ_SEARCH"),
    ];
    let missing: Vec<_> = needed.iter().filter(|(there, _)| !there).map(|(_, name)| *name).collect();
    if missing.is_empty() {
        return Ok("enough".to_owned());
    }
    Err(format!("{} missing: add to the container's securityContext.capabilities", missing.join(", ")))
}

/// Below 5.11 maps count against `RLIMIT_MEMLOCK`; they take about 10 MB, and as much again when an upgrade
/// makes new ones.
fn check_memlock(version: Version, held: u64) -> Result<String, String> {
    const NEEDED: u64 = 32 << 20;
    let limit = getrlimit(Resource::Memlock).current;
    if version >= (5, 11) || has(held, capability::SYS_RESOURCE) || limit.is_none_or(|limit| limit >= NEEDED)
    {
        return Ok("enough".to_owned());
    }
    Err("the limit is too low for a kernel below 5.11: raise `ulimit -l` to 32 MiB, or add CAP_SYS_RESOURCE"
        .to_owned())
}

/// Below 5.15, a process that writes to net_cls or net_prio moves all new sockets to the root cgroup, past
/// programs on others (kernel commit 8520e224f547). The agent tests for this periodically, and follows the
/// sockets there, so this is no failure.
fn check_v1(version: Version, mounts: &str) -> Result<String, String> {
    let is_used = |line: &&str| {
        let fields: Vec<_> = line.split(' ').collect();
        let of = |name| fields.get(3).is_some_and(|options| options.split(',').any(|option| option == name));
        fields.get(2) == Some(&"cgroup") && (of("net_cls") || of("net_prio"))
    };
    Ok(match mounts.lines().find(is_used).filter(|_| version < (5, 15)) {
        None => "takes no sockets away".to_owned(),
        Some(line) => format!(
            "{} can take sockets away below 5.15; the agent follows them to the root cgroup. Better boot with cgroup_no_v1=net_cls,net_prio",
            line.split(' ').nth(1).unwrap_or_default()
        ),
    })
}

/// No condition: what is missing is a failure of the wire guard, which the agent reports for each device.
/// Whether a module can be loaded is not known before it is.
fn tell_wire_guard() -> &'static str {
    match WireHook::of_kernel() {
        WireHook::Tcx => "by tcx links, before all other programs",
        WireHook::Clsact => {
            "by filters of clsact: the kernel loads sch_ingress and cls_bpf, if they are not built in; pods with their own network card and NET_ADMIN can remove them until the next check (Linux 6.6 has tcx links)"
        }
    }
}

/// No condition: an agent runs without it.
fn tell_boot_guard(paths: &NodePaths) -> String {
    match datapath::boot_guard(&paths.bpf_dir) {
        Ok(BootGuard::Active { denied }) => {
            format!("active until an agent takes over; denied {denied} attempts")
        }
        Ok(BootGuard::TakenOver) => "was active until an agent took over".to_owned(),
        Ok(BootGuard::Absent) if boot_guard::is_installed() => {
            "installed; active from the next boot on".to_owned()
        }
        Ok(BootGuard::Absent) => format!(
            "was not active at this boot: pods that start before the agent of a boot reach the node's role \
             (kube2ram boot-guard install --cloud={})",
            paths.cloud.name()
        ),
        Err(error) => format!("unknown: {}", chain(&error)),
    }
}

/// What a predecessor left is no failure: an agent that refused to run next to it could not take its place
/// without an outage, and what is redirected by programs does not meet its rules.
fn check_predecessors(metadata: Ipv4Addr) -> Vec<Outcome> {
    match predecessors::leftovers(metadata) {
        Ok(leftovers) if leftovers.is_empty() => vec![Outcome::Met("left nothing".to_owned())],
        Ok(leftovers) => leftovers.into_iter().map(Outcome::Amiss).collect(),
        Err(error) => vec![Outcome::Amiss(chain(&error))],
    }
}

/// Two sets of programs on the pods' cgroup would redirect pods, and each other's agents, to listeners of
/// either.
fn check_installations(bpf_dir: &Path, pods: &Path) -> Result<String, String> {
    match other_installation(bpf_dir, pods) {
        Ok(None) => Ok("no other one on this node".to_owned()),
        Ok(Some(other)) => Err(format!("{}: {other}", pods.display())),
        Err(error) => Err(chain(&error)),
    }
}

/// Cilium whose socket load balancer is off detaches all programs of the cgroup root when it starts. Versions
/// without the fix of cilium/cilium#43877 give up at the first link: the kernel answers `ENOENT`. The version
/// is not visible to preflight.
fn tell_cilium(bpf_dir: &Path, root: &Path) -> Option<Outcome> {
    let pins = bpf_dir.parent()?.join("cilium");
    if !pins.is_dir() {
        return None;
    }
    let names = connect_programs(root).unwrap_or_default();
    // Before 1.14 without the prefix.
    let is_cilium = |name: &String| {
        name.starts_with("cil_sock") || name.starts_with("sock4_") || name.starts_with("sock6_")
    };
    if names.iter().any(is_cilium) {
        return Some(Outcome::Met("its socket load balancer is on".to_owned()));
    }
    Some(Outcome::Amiss(format!(
        "Cilium ({}) has no socket load balancer at the cgroup root. Up to 1.18 it then fails when it starts (\"can't detach program: no such file \
         or directory\"), because kube2ram has links there: use a Cilium with the fix of cilium/cilium#43877, or turn its socket load balancer on",
        pins.display()
    )))
}

/// The same for an operator who did not see the warning at the agent's start.
pub fn cilium_warning(bpf_dir: &Path, root: &Path) -> Option<String> {
    match tell_cilium(bpf_dir, root)? {
        Outcome::Amiss(warning) => Some(warning),
        Outcome::Met(_) | Outcome::Unmet(_) => None,
    }
}

/// The deepest level of the pods' cgroup at which the programs, which check ten levels, still find a pod two
/// levels below.
const MAX_PODS_LEVEL: u8 = 8;
const _: () = assert!(MAX_PODS_LEVEL as i32 + 2 == MAX_CGROUP_LEVEL);

/// In a nested node (kind) the root is not the kernel's, and the levels above it are not counted here.
fn check_pods(root: &Path, pods: &Path, empty: fn(String) -> Outcome) -> Result<Outcome, String> {
    let level = pods.strip_prefix(root).map_or(0, |below| below.components().count());
    if level > usize::from(MAX_PODS_LEVEL) {
        return Err(format!(
            "{} is {level} levels below the cgroup root, and the programs find pods down to {MAX_PODS_LEVEL}: move it up (the kubelet's --cgroup-root)",
            pods.display()
        ));
    }
    if is_populated(pods) {
        return Ok(Outcome::Met(pods.display().to_string()));
    }
    Ok(empty(format!(
        "{} holds no process. If pods run on this node, they are not in cgroup v2, or --pods-cgroup is wrong",
        pods.display()
    )))
}

/// A program that was attached exclusively or with `BPF_F_ALLOW_OVERRIDE` does not coexist with others: below
/// an exclusive one the kernel refuses kube2ram's program; one with the flag is replaced for its cgroup.
fn check_attachments(root: &Path, pods: &Path) -> Result<String, String> {
    let own = own_cgroup(root).map_err(|error| chain(&error))?;
    let mut cgroups: Vec<_> =
        [pods, &own].into_iter().flat_map(Path::ancestors).filter(|path| path.starts_with(root)).collect();
    cgroups.sort();
    cgroups.dedup();
    for cgroup in cgroups {
        for attachment in attachments(cgroup).map_err(|error| chain(&error))? {
            if let Attachment { hook, shared: false } = attachment {
                return Err(format!(
                    "a program of type {hook} on {} is attached exclusively: its owner must attach it with BPF_F_ALLOW_MULTI (bpftool cgroup show {0} lists the programs)",
                    cgroup.display()
                ));
            }
        }
    }
    Ok("share their places".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = u64::MAX;

    #[test]
    fn reads_the_effective_capabilities() {
        let status = "CapPrm:\t000001ffffffffff\nCapEff:\t0000008000001004\nCapBnd:\t0\n";

        let held = effective_capabilities(status);

        assert!(check_capabilities(held).is_ok(), "{held:#x}: BPF, NET_ADMIN, DAC_READ_SEARCH");
        for needed in [capability::BPF, capability::NET_ADMIN, capability::DAC_READ_SEARCH] {
            assert!(check_capabilities(held & !(1 << needed)).is_err(), "{needed}");
        }
        let admin = held & !(1 << capability::BPF) | 1 << capability::SYS_ADMIN;
        assert!(check_capabilities(admin).is_ok());
        assert!(check_capabilities(effective_capabilities("nothing")).is_err());
    }

    #[test]
    fn a_machine_of_another_cloud_than_was_told_is_a_warning() {
        let paths = |cloud: Cloud| NodePaths {
            bpf_dir: PathBuf::new(),
            cgroup_root: None,
            cloud,
            metadata: cloud.dialect().metadata,
            metadata_is_set: false,
            pods_cgroup: None,
            impersonates_node: false,
        };
        for (told, vendor, other) in
            [(Cloud::Alibaba, "Amazon EC2", Cloud::Aws), (Cloud::Aws, "Alibaba Cloud", Cloud::Alibaba)]
        {
            let remedy = format!("set --cloud={}, or --metadata-addr", other.name());
            for foreign in [Outcome::Amiss, Outcome::Unmet] {
                let outcome = check_cloud(&paths(told), vendor, foreign);
                let (Outcome::Amiss(text) | Outcome::Unmet(text)) = &outcome else { panic!("{outcome:?}") };
                assert!(text.contains(vendor) && text.contains(&remedy), "{text}");
                assert_eq!(outcome, foreign(text.clone()));
            }
            // An operator knows better than the firmware.
            let set = NodePaths { metadata_is_set: true, ..paths(told) };
            let met = Outcome::Met(told.name().to_owned());
            assert_eq!(check_cloud(&set, vendor, Outcome::Unmet), met);
        }
        for vendor in ["Amazon EC2", "QEMU", ""] {
            let met = Outcome::Met("aws".to_owned());
            assert_eq!(check_cloud(&paths(Cloud::Aws), vendor, Outcome::Unmet), met, "{vendor}");
        }
        let [alibaba, aws] = Cloud::ALL.map(|cloud| cloud.dialect().metadata);
        let foreign = foreign_to("Amazon EC2", alibaba).unwrap();
        assert!(foreign.contains(&aws.to_string()) && foreign.ends_with("set --cloud=aws"), "{foreign}");
        assert_eq!((foreign_to("Amazon EC2", aws), foreign_to("QEMU", alibaba)), (None, None));
    }

    #[test]
    fn old_kernels_are_refused_and_what_takes_sockets_away_is_reported() {
        let mounts = "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\ncgroup /sys/fs/cgroup/net_cls,net_prio cgroup rw,net_cls,net_prio 0 0";

        assert!(check_kernel((5, 9)).is_err() && check_kernel((4, 19)).is_err());
        assert!(check_kernel((5, 10)).is_ok() && check_kernel((6, 1)).is_ok());
        assert!(check_v1((5, 10), mounts).unwrap().starts_with("/sys/fs/cgroup/net_cls,net_prio can"));
        let harmless = [((5, 15), mounts), ((5, 10), "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0")];
        for (version, mounts) in harmless {
            assert_eq!(check_v1(version, mounts).unwrap(), "takes no sockets away");
        }
        assert!(check_memlock((5, 11), 0).is_ok() && check_memlock((5, 10), ALL).is_ok());
    }

    #[test]
    fn a_pods_cgroup_that_is_too_deep_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let at = |level: usize| {
            let pods = (0..level).fold(root.path().to_owned(), |path, _| path.join("a"));
            fs::create_dir_all(&pods).unwrap();
            fs::write(pods.join("cgroup.events"), "populated 1\n").unwrap();
            check_pods(root.path(), &pods, Outcome::Unmet)
        };

        assert!(at(1).is_ok() && at(8).is_ok());
        assert!(at(9).unwrap_err().contains("is 9 levels below the cgroup root"));
    }

    #[test]
    fn each_condition_has_a_line() {
        let check = |outcome| Check { condition: "kernel", outcome };
        let text = str::to_owned;
        let preflight = Preflight(vec![
            check(Ok(text("new")).into()),
            check(Outcome::Amiss(text("odd"))),
            check(Err(text("old: boot a new one")).into()),
        ]);

        assert_eq!(
            preflight.to_string(),
            "✓ kernel           new\n! kernel           odd\n✗ kernel           old: boot a new one"
        );
        assert_eq!(preflight.failures().collect::<Vec<_>>(), ["kernel: old: boot a new one"]);
        assert_eq!(preflight.warnings().collect::<Vec<_>>(), ["odd"]);
    }
}
