//! The output of `kube2ram status` and `kube2ram explain`: the documents, which are the JSON, and their text.
//! Pure: no I/O, no clock, no logs. Created by `app`, shown by `main`. No document can hold a secret: a
//! `SecretString` cannot be serialised.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

mod access_key;
mod explanation;
mod paint;
mod problems;
mod service_accounts;
mod text;

pub use self::{
    access_key::{AccessKeyReport, Holder, IssuedSession, Source},
    explanation::{Explanation, Outcome, Stage, Step, Verdict},
    paint::Paint,
    problems::problems_of,
    service_accounts::{RoleFrom, ServiceAccounts},
};

/// The version of the documents. It changes when a field is removed or changes its meaning, not when one is
/// added.
pub const SCHEMA: u32 = 1;

/// All that the agent knows of itself. Times are UTC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// [`SCHEMA`].
    pub schema: u32,
    /// When the document was created.
    pub at: Timestamp,
    /// The process.
    pub agent: Agent,
    /// What is wrong, the worst first; none when all is well.
    pub problems: Vec<Problem>,
    /// The eBPF programs.
    pub datapath: Datapath,
    /// The netfilter rules.
    pub forward_guard: ForwardGuard,
    /// The programs on network devices.
    #[serde(default)]
    pub wire_guard: WireGuard,
    /// The state of the boot guard.
    pub boot_guard: BootGuard,
    /// The watches.
    pub api_server: ApiServer,
    /// The real one.
    #[serde(default)]
    pub metadata_server: MetadataServer,
    /// Roles by ServiceAccount.
    #[serde(default)]
    pub service_accounts: ServiceAccounts,
    /// What the agent signs with.
    pub base_credentials: BaseCredentials,
    /// Issuing.
    pub sts: Sts,
    /// The pods of this node, by namespace and name.
    pub pods: Vec<Pod>,
}

/// The process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agent {
    /// Of kube2ram.
    pub version: String,
    /// The Node object's name.
    pub node: String,
    /// As its own namespace has it.
    pub pid: u32,
    /// When it began.
    pub started_at: Timestamp,
    /// Whether it drains: it was told to stop, with or without another agent that has taken over.
    pub is_draining: bool,
    /// What readiness waits for; empty when it is ready.
    pub pending: Vec<String>,
    /// What is logged.
    pub log_level: String,
    /// When it is reset to the level of the flags.
    pub log_level_until: Option<Timestamp>,
    /// Ports of the agent's that another process has.
    #[serde(default)]
    pub taken_ports: Vec<TakenPort>,
    /// Settings that leave something open, as after an incomplete migration, and other software that may fail
    /// because of kube2ram. They are not problems: they may be intended.
    #[serde(default)]
    pub hints: Vec<String>,
}

/// A port that the agent should listen on, and cannot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakenPort {
    /// The flag that names the port.
    pub flag: String,
    /// Address and port.
    pub address: String,
    /// The process that listens there, and its pod if it has one.
    pub holder: String,
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The key of the part of this document that has more of it.
    pub part: String,
    /// What is wrong.
    pub what: String,
    /// What to do.
    pub remedy: String,
}

/// The eBPF programs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Datapath {
    /// Whether all of it is in the expected state.
    pub is_in_force: bool,
    /// `pods`, or `root` where sockets of pods fall to the root cgroup.
    pub mode: String,
    /// The cgroup of all pods.
    pub pods_cgroup: String,
    /// When it was last checked.
    pub checked_at: Option<Timestamp>,
    /// Differences that could not be repaired.
    pub failures: Vec<String>,
    /// The attached programs.
    pub programs: Vec<Program>,
    /// Repairs since the agent started, by kind.
    pub repairs: BTreeMap<String, u64>,
    /// The last of it.
    pub last_repair: Option<Repair>,
    /// Pods that run where the programs do not see them.
    #[serde(default)]
    pub outside_pods: Vec<OutsidePod>,
    /// What the kernel did since the maps were made, by outcome.
    pub outcomes: BTreeMap<String, u64>,
    /// The agent's own connection to the metadata address.
    pub interception: Interception,
}

/// A program that is attached by a pinned link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Its name, as in bpftool.
    pub name: String,
    /// The cgroup that it is attached to.
    pub cgroup: String,
}

/// A pod that runs, and has no process below the pods' cgroup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutsidePod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// Whether it uses the host's network, and so reaches the node's role.
    pub host_network: bool,
    /// Where its processes seem to be.
    pub cgroup: Option<String>,
}

impl OutsidePod {
    /// What is wrong, what the pod gets, and what to do.
    pub fn message(&self) -> String {
        let cgroup =
            self.cgroup.as_deref().map(|cgroup| format!(" (they are in {cgroup})")).unwrap_or_default();
        let gets = if self.host_network {
            "it reaches the node's role, because it uses the host's network"
        } else {
            "it gets no role, and the netfilter rules keep it from the node's role"
        };
        format!(
            "the pod's processes are not below the pods' cgroup{cgroup}, so kube2ram does not see them: {gets}. Its runtime uses another cgroup driver than the kubelet, or the pod was started before the kubelet's driver was changed: set SystemdCgroup of its runtime handler to match the kubelet, and delete the pod"
        )
    }
}

/// A repair.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Repair {
    /// When.
    pub at: Timestamp,
    /// What kind.
    pub kind: String,
    /// Of what: a program, a map.
    pub of: String,
}

/// The agent's own connection to the metadata address, which must arrive at the agent as its own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interception {
    /// When one last arrived.
    pub arrived_at: Option<Timestamp>,
    /// Why the last one did not.
    pub failure: Option<String>,
}

/// The netfilter rules.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardGuard {
    /// Whether there should be any.
    pub is_wanted: bool,
    /// Whether they are active for each of the metadata server's addresses.
    pub is_in_force: bool,
    /// Whether rules for its IPv6 address are among them.
    #[serde(default)]
    pub has_ipv6: bool,
    /// Whether rules against IPVS are among them.
    pub has_ipvs: bool,
    /// How often they were restored since the agent started.
    pub repairs: u64,
    /// Why they, or some of them, are not active.
    pub failure: Option<String>,
}

/// The programs on network devices.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireGuard {
    /// Whether there should be any.
    pub is_wanted: bool,
    /// Whether each device that leads out has one, before all others.
    pub is_in_force: bool,
    /// The node's devices that have one.
    pub node_devices: usize,
    /// Devices in pods' network namespaces that have one.
    pub pod_devices: usize,
    /// How often one was missing or behind another since the agent began.
    pub repairs: u64,
    /// Why not all have one.
    pub failure: Option<String>,
}

/// The state of the boot guard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootGuard {
    /// `absent`, `in_force`, `taken_over`, or `unknown`.
    pub state: String,
    /// Why it could not be installed for the next boot, if that was tried and failed.
    #[serde(default)]
    pub installation_failure: Option<String>,
}

/// The watches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiServer {
    /// Its URL.
    #[serde(default)]
    pub address: String,
    /// Whether all that is watched has been listed once.
    pub is_synced: bool,
    /// Pods known from before a restart only.
    pub restored_pods: usize,
    /// Of pods and, with restrictions, of namespaces.
    pub watches: Vec<Watch>,
}

/// A watch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watch {
    /// `pods` or `namespaces`.
    pub resource: String,
    /// When the API server last answered.
    pub heard_at: Option<Timestamp>,
    /// Since when it fails.
    pub failing_since: Option<Timestamp>,
    /// The age of the known state while the API server does not answer; otherwise 0.
    pub lag_seconds: u64,
    /// The last failure.
    pub failure: Option<String>,
}

/// The real metadata server: it answers passed-through requests, and provides account, region and the node's
/// role.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetadataServer {
    /// Address and port; with `--metadata-addr6` also those.
    pub address: String,
    /// When it last answered, with whatever status. It is asked when a pod or the agent needs something.
    pub answered_at: Option<Timestamp>,
    /// Since when it does not answer.
    pub failing_since: Option<Timestamp>,
    /// When it was last asked in vain.
    pub failed_at: Option<Timestamp>,
    /// Why there was no answer.
    pub failure: Option<String>,
}

/// What the agent signs with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseCredentials {
    /// `node_role`, `oidc` or `static_keys`; `unused` if the agent signs nothing, because roles are assumed
    /// by ServiceAccounts.
    pub source: String,
    /// The name of the node's role, or with OIDC of the agent's own.
    pub role: Option<String>,
    /// The account that bare role names belong to.
    pub account: Option<String>,
    /// When they expire; absent for keys that do not, and before they were needed.
    pub expires_at: Option<Timestamp>,
    /// When they could not be obtained.
    pub failed_at: Option<Timestamp>,
    /// Why not.
    pub failure: Option<String>,
}

/// Issuing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sts {
    /// Whether account and region are known, without which nothing can be issued.
    pub can_issue: bool,
    /// Whether STS throttled when it was last asked.
    pub is_throttled: bool,
    /// Fetches that wait in the STS scheduler.
    pub queued: usize,
    /// Role sessions in the cache.
    pub sessions: usize,
    /// The last success.
    pub succeeded_at: Option<Timestamp>,
    /// The last failure.
    pub last_failure: Option<StsFailure>,
}

/// A call that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StsFailure {
    /// When.
    pub at: Timestamp,
    /// Which kind: `base_credentials`, `cluster_configuration`, `denied`, `invalid`, `no_such_role`,
    /// `throttled`, `token`, `unavailable` or `unexpected`.
    pub kind: String,
    /// STS's code, or one of ours.
    pub code: String,
    /// STS's words.
    pub message: String,
    /// STS's request id.
    pub request_id: Option<String>,
    /// The role that was to be assumed.
    pub role: String,
    /// What to do.
    pub remedy: String,
}

/// A pod of this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// `known`, `terminating`, `departed` or `restored`.
    pub presence: String,
    /// Whether it uses the host's network.
    pub host_network: bool,
    /// Its cgroup below the pods' cgroup; absent while it has none.
    pub cgroup: Option<String>,
    /// After what its cgroup is named: `uid`, or `config_hash` for a static pod.
    pub identified_by: Option<String>,
    /// The address of its in-pod listener; absent if the host listener serves it.
    pub listener: Option<String>,
    /// The role's ARN.
    pub role: Option<String>,
    /// What gives it the role; absent where it has none.
    #[serde(default)]
    pub role_from: Option<RoleFrom>,
    /// The key of the annotation that does so, if one does.
    #[serde(default)]
    pub role_annotation: Option<String>,
    /// What it gets.
    pub verdict: Verdict,
    /// Why, in a line.
    pub summary: String,
    /// When its credentials were issued.
    pub issued_at: Option<Timestamp>,
    /// When they expire.
    pub expires_at: Option<Timestamp>,
}

impl Status {
    /// What the process exits with: 0, or 1 when something is wrong.
    pub fn exit_code(&self) -> u8 {
        u8::from(!self.problems.is_empty())
    }

    /// For people.
    pub fn to_text(&self, paint: Paint) -> String {
        text::status(self, paint)
    }
}

#[cfg(test)]
mod tests;
