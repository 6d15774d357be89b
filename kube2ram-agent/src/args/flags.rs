//! The flags, with the ancestors' names and defaults. Doc comments are the help text: unit, default, effect on security.
//! Depends on clap; read by the parent only.

#![allow(
    rustdoc::broken_intra_doc_links,
    rustdoc::invalid_html_tags,
    reason = "doc comments are the help text"
)]

use std::{net::SocketAddrV4, path::PathBuf, time::Duration};

use clap::{ArgAction, Args, Command, CommandFactory, Parser};
use secrecy::SecretString;
use tracing::level_filters::LevelFilter;
use url::Url;

use super::{ForwardGuardMode, OpenConnections, Output, WireGuardMode, value};
use crate::{
    kubernetes::StartupTaint,
    policy::PatternFormat,
    server::{HostNetworkPods, MetadataPolicy},
};
use kube2ram_cloud::alibaba::{DIALECT, endpoint::Endpoint};
use kube2ram_service::telemetry::LogFormat;

/// The command, whose switches take `=<boolean>` and whose last flag of a name wins, both as in Go.
pub(super) fn command() -> Command {
    Flags::command().mut_args(|arg| match arg.get_action() {
        ArgAction::SetTrue if arg.get_default_values().is_empty() => {
            value::switch(arg).default_value("false")
        }
        ArgAction::SetTrue => value::switch(arg),
        _ => arg,
    })
}

/// Gives each Kubernetes pod on an Alibaba Cloud node its own RAM role.
#[derive(Parser)]
#[command(
    name = "kube2ram",
    version,
    args_override_self = true,
    disable_help_subcommand = true,
    subcommand_value_name = "COMMAND",
    next_line_help = true,
    after_help = "Every flag is also a variable: --app-port is KUBE2RAM_APP_PORT. --node is NODE_NAME and --host-ip is HOST_IP, too. \
                  What the command line says wins. Durations are written like 90s, 15m or 1h30m."
)]
pub(super) struct Flags {
    #[command(subcommand)]
    pub(super) subcommand: Option<Subcommand>,
    #[command(flatten)]
    pub(super) base: Base,

    /// Annotation key of the role's external id, which the pod's author can choose freely
    #[arg(
        long,
        value_name = "KEY",
        default_value = DIALECT.annotations.external_id,
        alias = "iam-external-id",
        value_parser = value::annotation_key,
        help_heading = "Roles"
    )]
    pub(super) ram_external_id: Box<str>,
    /// Annotation key of a session policy, JSON that can only narrow what the role may do
    #[arg(
        long,
        value_name = "KEY",
        default_value = DIALECT.annotations.policy,
        value_parser = value::annotation_key,
        help_heading = "Roles"
    )]
    pub(super) ram_policy_key: Box<str>,
    /// Annotation key of the pod's role: a name, a path and name, or an ARN. Without --namespace-restrictions, whoever may create
    /// a pod can have every role that trusts the node
    #[arg(
        long,
        value_name = "KEY",
        default_value = DIALECT.annotations.role,
        alias = "iam-role-key",
        value_parser = value::annotation_key,
        help_heading = "Roles"
    )]
    pub(super) ram_role_key: Box<str>,
    /// How long credentials are given out before new ones are fetched, 7m30s to 6h. They are valid for twice as long, also in the
    /// hands of whoever steals them
    #[arg(
        long,
        value_name = "DURATION",
        default_value = "30m",
        alias = "iam-role-session-ttl",
        value_parser = value::duration,
        help_heading = "Roles"
    )]
    pub(super) ram_role_session_ttl: Duration,
    /// Annotation key of the session's duration, 15m to 12h
    #[arg(
        long,
        value_name = "KEY",
        default_value = DIALECT.annotations.duration,
        value_parser = value::annotation_key,
        help_heading = "Roles"
    )]
    pub(super) ram_session_duration_key: Box<str>,
    /// Annotation key of the session's name, <namespace>.<service account> otherwise. A pod's author can choose any, so
    /// ActionTrail proves the role but not the pod
    #[arg(
        long,
        value_name = "KEY",
        default_value = DIALECT.annotations.session_name,
        value_parser = value::annotation_key,
        help_heading = "Roles"
    )]
    pub(super) ram_session_name_key: Box<str>,

    /// What unannotated hostNetwork pods get: pass gives them the node's own role, also when there is a default role; deny treats them
    /// as other pods
    #[arg(long, value_enum, default_value = "pass", hide_possible_values = true, help_heading = "Policy")]
    pub(super) host_network_pods: HostNetworkPods,
    /// What pods may read of the real metadata server, besides credentials and the dump meta-data/all, which they never may: open, everything else; standard, not the
    /// node's user data (which carries its join secrets), vendor data and the identity document with its signature; strict, only instance-id,
    /// instance/instance-type, instance/spot/termination-time, hostname, region-id, zone-id, owner-account-id, private-ipv4, mac,
    /// network-type, network/interfaces/macs/, vpc-id, vpc-cidr-block, vswitch-id, vswitch-cidr-block, dns-conf/nameservers and
    /// ntp-conf/ntp-servers of meta-data. Pods that have the node's role may read all but user data, vendor data and meta-data/all
    #[arg(
        long,
        value_enum,
        default_value = "standard",
        hide_possible_values = true,
        help_heading = "Policy"
    )]
    pub(super) metadata_policy: MetadataPolicy,
    /// Annotation key of a namespace's allow-list, a JSON array of patterns
    #[arg(
        long,
        value_name = "KEY",
        default_value = DIALECT.annotations.allowed_roles,
        value_parser = value::annotation_key,
        help_heading = "Policy"
    )]
    pub(super) namespace_key: Box<str>,
    /// How allow-lists are read: glob, where only * is special and matches / as well, or regexp, which must match as a whole
    #[arg(
        long,
        value_name = "FORMAT",
        default_value = "glob",
        value_parser = value::pattern_format,
        help_heading = "Policy"
    )]
    pub(super) namespace_restriction_format: PatternFormat,
    /// Give pods only the roles that their namespace's allow-list allows, and the default role. Without it, every namespace may
    /// have every role
    #[arg(long, help_heading = "Policy")]
    pub(super) namespace_restrictions: bool,

    /// Requests a second that each pod may make of the real metadata server, and twice as many at once; others get 429. It limits the
    /// node as a whole, so that without a limit (0) one pod can take it away from all
    #[arg(long, value_name = "NUMBER", default_value = "100", help_heading = "Policy")]
    pub(super) pass_through_rate: u32,
    /// Requests a second that each pod may make in all, and twice as many at once; others get 429, and their connection is closed. 0 is
    /// no limit
    #[arg(long, value_name = "NUMBER", default_value = "200", help_heading = "Policy")]
    pub(super) request_rate: u32,
    /// Refuse every request without a session token (hardened mode, PUT /latest/api/token), which an attacker who can make a pod fetch
    /// URLs does not have. Clients that know no tokens then get nothing, hostNetwork pods among them
    #[arg(long, help_heading = "Policy")]
    pub(super) require_token: bool,

    /// The API server's address, instead of the pod's service account. Who answers there decides which pod has which role
    #[arg(long, value_name = "URL", value_parser = value::api_server, help_heading = "Kubernetes")]
    pub(super) api_server: Option<Url>,
    /// Bearer token for --api-server. Everybody on the node can read it from the command line: use KUBE2RAM_API_TOKEN
    #[arg(long, value_name = "TOKEN", value_parser = value::secret, help_heading = "Kubernetes")]
    pub(super) api_token: Option<SecretString>,
    /// Take any certificate at --api-server. Whoever sits in between can then give every pod every role
    #[arg(long, help_heading = "Kubernetes")]
    pub(super) insecure: bool,
    /// Path of a kubeconfig file, instead of the pod's service account
    #[arg(long, value_name = "PATH", help_heading = "Kubernetes")]
    pub(super) kubeconfig: Option<PathBuf>,
    /// Name of this node's Node object; required
    #[arg(long, value_name = "NAME", value_parser = value::node_name, help_heading = "Kubernetes")]
    pub(super) node: Option<String>,

    /// Taint of this node to be removed whenever it is there and the agent is ready, so that no pod comes before: <key>[=<value>][:<effect>]. It takes the
    /// right to get and patch nodes, which is a right over every node of the cluster
    #[arg(long, value_name = "TAINT", help_heading = "Kubernetes")]
    pub(super) startup_taint: Option<StartupTaint>,

    /// The metadata server, at port 80 unless one is given. Pods' connections to it are redirected to the agent
    #[arg(
        long,
        value_name = "IP[:PORT]",
        default_value = "100.100.100.200",
        value_parser = value::metadata_addr,
        help_heading = "Cloud",
        global = true
    )]
    pub(super) metadata_addr: SocketAddrV4,
    /// The metadata server's IPv6 address, at the same port. Pods' connections to it are redirected, too; an empty value says that the platform has none
    #[arg(
        long,
        value_name = "IP",
        default_value = "fd00:100::100:200",
        value_parser = value::metadata_addr6,
        help_heading = "Cloud",
        global = true
    )]
    pub(super) metadata_addr6: value::Address6,
    /// The only STS endpoint to use. It sees the node's signed requests: https, or http to a loopback address for tests
    #[arg(long, value_name = "URL", value_parser = value::sts_endpoint, help_heading = "Cloud")]
    pub(super) sts_endpoint: Option<Endpoint>,
    /// Try STS in the node's region, in the VPC and then in public, before sts.aliyuncs.com. With false, only sts.aliyuncs.com is used
    #[arg(long, default_value = "true", help_heading = "Cloud")]
    pub(super) use_regional_sts_endpoint: bool,

    /// TCP port of the host's listener: for hostNetwork pods, pods without a listener of their own, and those that use the agent as their
    /// http_proxy. It answers nobody whom the kernel does not vouch for
    #[arg(
        long,
        value_name = "PORT",
        default_value = "8181",
        value_parser = clap::value_parser!(u16).range(1..),
        help_heading = "Node"
    )]
    pub(super) app_port: u16,
    /// bpffs directory of the pins. Whoever can write there can undo the redirection
    #[arg(
        long,
        value_name = "PATH",
        default_value = "/sys/fs/bpf/kube2ram",
        help_heading = "Node",
        global = true
    )]
    pub(super) bpf_dir: PathBuf,
    /// Where the cgroup2 hierarchy is mounted, instead of looking for it
    #[arg(long, value_name = "PATH", help_heading = "Node", global = true)]
    pub(super) cgroup_root: Option<PathBuf>,
    /// Whether netfilter rules (tables ip kube2ram and ip6 kube2ram) drop what the node would forward to the metadata server: auto, or off.
    /// They also stop containers outside of Kubernetes that have a network of their own. Without them packet sockets, TUN devices, Kata and
    /// gVisor pods, and Services that point at the metadata server get through
    #[arg(
        long,
        value_enum,
        default_value = "auto",
        hide_possible_values = true,
        help_heading = "Node",
        global = true
    )]
    pub(super) forward_guard: ForwardGuardMode,
    /// The node's IPv4 address, to which pods without a listener of their own are sent. When it is missing, empty, an IPv6 address or no address of this
    /// node, now or later, the agent uses the one from which the node would send to the outside
    #[arg(long, value_name = "IP", value_parser = value::host_ip, help_heading = "Node")]
    pub(super) host_ip: Option<value::Address>,
    /// What becomes of connections to the metadata server that pods opened before kube2ram was in force: cut, or keep, for the time of a migration
    /// alone. Kept ones go on to an ancestor's agent; those of hostNetwork pods, and without the forward guard all, to the real server with the node's
    /// role too
    #[arg(long, value_enum, default_value = "cut", hide_possible_values = true, help_heading = "Node")]
    pub(super) open_connections: OpenConnections,
    /// Directory that the containers of one agent's pod share, an emptyDir: for the socket of kube2ram ready and live, and what the boot guard's
    /// installation reports. If it is missing, that socket is in --state-dir
    #[arg(
        long,
        value_name = "PATH",
        default_value = "/run/kube2ram-pod",
        help_heading = "Node",
        global = true
    )]
    pub(super) pod_dir: PathBuf,
    /// The cgroup that holds all pods, instead of looking for it. Pods outside of it reach the node's role
    #[arg(long, value_name = "PATH", help_heading = "Node", global = true)]
    pub(super) pods_cgroup: Option<PathBuf>,
    /// Directory that agents of this node share, on a tmpfs, for root alone: whoever can write there can pose as the agent
    #[arg(long, value_name = "PATH", default_value = "/run/kube2ram", help_heading = "Node", global = true)]
    pub(super) state_dir: PathBuf,
    /// Whether a tc program on each network device that leads out of the node, or out of a pod's own network, drops pods' packets for the metadata
    /// server that pass no other guard: auto (failures are reported), on (the agent is not ready while a device is without it), or off. Without it packet
    /// sockets of hostNetwork pods, and of pods on ipvlan, with a card of their own or routed in eBPF, get through
    #[arg(long, value_enum, default_value = "auto", hide_possible_values = true, help_heading = "Node")]
    pub(super) wire_guard: WireGuardMode,

    /// Log every verdict of the kernel half
    #[arg(long, help_heading = "Observability")]
    pub(super) debug: bool,
    /// How logs are written: text or json
    #[arg(
        long,
        value_name = "FORMAT",
        default_value = "text",
        value_parser = value::log_format,
        help_heading = "Observability"
    )]
    pub(super) log_format: LogFormat,
    /// What is logged: trace, debug, info, warn or error. Secrets never are [default: info]
    #[arg(long, value_name = "LEVEL", value_parser = value::log_level, help_heading = "Observability")]
    pub(super) log_level: Option<LevelFilter>,
    /// TCP port of health and metrics, which must not be the app port: pods reach that one
    #[arg(
        long,
        value_name = "PORT",
        default_value = "9181",
        value_parser = clap::value_parser!(u16).range(1..),
        help_heading = "Observability"
    )]
    pub(super) metrics_port: u16,
    /// The same as --log-level=debug, unless that is given
    #[arg(long, help_heading = "Observability")]
    pub(super) verbose: bool,
}

/// What else it can do than be the agent.
#[derive(clap::Subcommand)]
pub(super) enum Subcommand {
    /// Denies containers the metadata server from boot on, before the kubelet starts, until an agent takes over
    #[command(subcommand)]
    BootGuard(BootGuard),
    /// Tells why a pod of this node gets what it gets: its annotation, the role that it names, the rule that permits or denies it, what STS said, and what
    /// the pod is answered now. Ends in 0 when that is credentials, 1 when it is not, 66 when there is no such pod on this node, 69 when no agent runs,
    /// 77 when not root
    Explain {
        /// The pod
        #[arg(value_name = "NAMESPACE/POD", value_parser = value::pod)]
        pod: (String, String),
        /// How it is told: text, or json
        #[arg(short, long, value_enum, default_value = "text", hide_possible_values = true)]
        output: Output,
    },
    /// Tells, for the kubelet, whether the agent of this very container answers, ready or not: within 5 s, and without a look at anybody else
    Live,
    /// Tells what the running agent logs, or changes it for a while. It falls back by itself, and with the agent's end. Ends in 69 when no agent runs, 77
    /// when not root
    LogLevel {
        /// trace, debug, info, warn or error; or reset, to fall back now
        #[arg(value_name = "LEVEL", value_parser = value::changed_log_level)]
        level: Option<value::LevelChange>,
        /// For how long, a day at the most
        #[arg(long = "for", value_name = "DURATION", default_value = "10m", value_parser = value::duration)]
        span: Duration,
    },
    /// Tells whether this node has what the agent needs, and what to do where it has not
    Preflight,
    /// Tells, for the kubelet, whether the agent of this very container could serve: it does, or stands by for another one's end
    Ready,
    /// Tells how the running agent is: readiness, the kernel half, the API server, credentials, STS, and each pod of this node. Ends in 0 when all is well,
    /// 1 when something is wrong, 69 when no agent runs, 75 when it does not answer, 77 when not root
    Status {
        /// How it is told: text, or json
        #[arg(short, long, value_enum, default_value = "text", hide_possible_values = true)]
        output: Output,
    },
    /// Shows what the agent knows of this node's pods and of namespaces' allow-lists, as JSON, annotations as they are written
    Store,
    /// Removes programs, maps and the netfilter rule from this node, on which no agent may run. Pods then reach the node's role
    Uninstall,
}

/// What can be done with the boot guard.
#[derive(clap::Subcommand)]
pub(super) enum BootGuard {
    /// Puts the guard in force now: what the unit runs at boot
    Apply(Guard),
    /// Puts this binary (/opt/kube2ram/bin/kube2ram) and a systemd unit (kube2ram-boot-guard.service, enabled) on the host, for the next boot
    Install {
        #[command(flatten)]
        guard: Guard,
        #[command(flatten)]
        host: HostRoot,
        /// End with status 0 even if it fails, so that an init container does not keep the agent from its node, and leave the reason in
        /// --pod-dir: the agent reports it in its log, status and metrics
        #[arg(long)]
        optional: bool,
        /// Have the kubelet not start at all when the guard fails. Otherwise it starts, and pods reach the node's role until an agent is in
        /// force
        #[arg(long)]
        required_by_kubelet: bool,
    },
    /// Removes from the host what install put there. What is in force stays so: see uninstall
    Remove(HostRoot),
}

/// What the boot guard does.
#[derive(Args)]
pub(super) struct Guard {
    /// Cgroup of the host's own services, relative to the root; repeat for each. Tasks outside of all of them, or in a network namespace of
    /// their own, are denied
    #[arg(
        long,
        value_name = "NAME",
        default_values = ["init.scope", "system.slice", "user.slice"],
        value_parser = value::host_cgroup
    )]
    pub(super) host_cgroup: Vec<PathBuf>,
}

/// Where the host is.
#[derive(Args)]
pub(super) struct HostRoot {
    /// The host's root directory, as it is mounted here
    #[arg(long, value_name = "PATH", default_value = "/")]
    pub(super) host_root: PathBuf,
}

/// The flags that together tell the base ARN and the default role.
#[derive(Args)]
#[command(next_help_heading = "Roles")]
pub(super) struct Base {
    /// Discover the node's account, from the agent's own role (OIDC) or else the metadata server: bare names are then roles of that account
    #[arg(long)]
    pub(super) auto_discover_base_arn: bool,
    /// Make the node's own role the default role, and discover the base ARN unless it is given. Every pod without annotation then
    /// has what the node may do
    #[arg(long)]
    pub(super) auto_discover_default_role: bool,
    /// What completes bare role names: acs:ram::<account>:role/, with or without a path
    #[arg(long, value_name = "ARN")]
    pub(super) base_role_arn: Option<String>,
    /// Role of pods without annotation, a name or an ARN; they have none otherwise. It is exempt from --namespace-restrictions, and not
    /// for hostNetwork pods unless --host-network-pods=deny
    #[arg(long, value_name = "ROLE")]
    pub(super) default_role: Option<String>,
}
