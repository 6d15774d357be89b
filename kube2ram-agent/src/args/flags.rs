//! The flags, with the names and defaults of kube2iam and the Go kube2ram. Doc comments are the help text:
//! unit, default, effect on security. Depends on clap; read by the parent only.

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

use super::{
    ForwardGuardMode, OpenConnections, Output, WireGuardMode, credentials_from::CredentialFlags, value,
};
use crate::{
    kubernetes::StartupTaint,
    policy::PatternFormat,
    role::SessionTags,
    server::{HostNetworkPods, MetadataPolicy},
};
use kube2ram_cloud::{Cloud, Endpoint};
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

/// Gives each Kubernetes pod its own cloud role, RAM's on Alibaba Cloud and IAM's on AWS.
#[derive(Parser)]
#[command(
    name = "kube2ram",
    version,
    args_override_self = true,
    disable_help_subcommand = true,
    subcommand_value_name = "COMMAND",
    next_line_help = true,
    after_help = "Every flag is also a variable: --app-port is KUBE2RAM_APP_PORT. --node is NODE_NAME, --host-ip is HOST_IP, and --oidc-provider-arn is ALIBABA_CLOUD_OIDC_PROVIDER_ARN, too. \
                  The command line takes precedence. Durations are written like 90s, 15m or 1h30m."
)]
pub(super) struct Flags {
    #[command(subcommand)]
    pub(super) subcommand: Option<Subcommand>,
    #[command(flatten)]
    pub(super) base: Base,

    /// Annotation key of the role's external id. The pod's author can choose any value [default:
    /// ram.aliyuncs.com/external-id; on AWS iam.amazonaws.com/external-id]
    #[arg(
        long,
        value_name = "KEY",
        visible_alias = "iam-external-id",
        value_parser = value::annotation_key,
        help_heading = "Roles"
    )]
    pub(super) ram_external_id: Option<Box<str>>,
    /// Annotation key of a session policy. It is JSON, and can only narrow what the role may do [default:
    /// ram.aliyuncs.com/policy; on AWS iam.amazonaws.com/policy]
    #[arg(
        long,
        value_name = "KEY",
        visible_alias = "iam-policy-key",
        value_parser = value::annotation_key,
        help_heading = "Roles"
    )]
    pub(super) ram_policy_key: Option<Box<str>>,
    /// Annotation key of the pod's role: a name, a path and name, or an ARN. Without
    /// --namespace-restrictions, every user who may create pods can use every role that trusts the node
    /// [default: ram.aliyuncs.com/role; on AWS iam.amazonaws.com/role]
    #[arg(
        long,
        value_name = "KEY",
        visible_alias = "iam-role-key",
        value_parser = value::annotation_key,
        help_heading = "Roles"
    )]
    pub(super) ram_role_key: Option<Box<str>>,
    /// How long credentials are served before new ones are fetched, 7m30s to 6h. They are valid for twice as
    /// long, for a thief too. On AWS, more than 30m has no effect unless the agent signs with the keys of a
    /// user
    #[arg(
        long,
        value_name = "DURATION",
        default_value = "30m",
        visible_alias = "iam-role-session-ttl",
        value_parser = value::duration,
        help_heading = "Roles"
    )]
    pub(super) ram_role_session_ttl: Duration,
    /// Annotation key of the session's duration, 15m to 12h. On AWS no role that is assumed with another
    /// role's credentials, such as the node's, can have a session longer than 1h [default:
    /// ram.aliyuncs.com/session-duration; on AWS iam.amazonaws.com/session-duration]
    #[arg(
        long,
        value_name = "KEY",
        visible_alias = "iam-session-duration-key",
        value_parser = value::annotation_key,
        help_heading = "Roles"
    )]
    pub(super) ram_session_duration_key: Option<Box<str>>,
    /// Annotation key of the session's name. Without the annotation the name is <namespace>.<service
    /// account>. The pod's author can choose any name, so the cloud's audit trail proves the role but not
    /// the pod [default: ram.aliyuncs.com/session-name; on AWS iam.amazonaws.com/session-name]
    #[arg(
        long,
        value_name = "KEY",
        visible_alias = "iam-session-name-key",
        value_parser = value::annotation_key,
        help_heading = "Roles"
    )]
    pub(super) ram_session_name_key: Option<Box<str>>,
    /// Session tags by which the cloud's policies can tell pods apart: none, workload (namespace, service
    /// account, and --cluster-name if it is given) or pod (also the pod's name and UID; then each pod has
    /// its own session). Roles must allow sts:TagSession. AWS only
    #[arg(long, value_name = "TAGS", default_value = "none", help_heading = "Roles")]
    pub(super) session_tags: SessionTags,
    /// The cluster's name, for session tags
    #[arg(long, value_name = "NAME", help_heading = "Roles")]
    pub(super) cluster_name: Option<Box<str>>,
    /// Give each session the source identity <namespace>.<service account>, which no annotation changes.
    /// Roles must allow sts:SetSourceIdentity. AWS only
    #[arg(long, help_heading = "Roles")]
    pub(super) source_identity: bool,

    /// What unannotated hostNetwork pods get. pass: the node's own role, even if there is a default role.
    /// deny: the same as other pods
    #[arg(long, value_enum, default_value = "pass", hide_possible_values = true, help_heading = "Policy")]
    pub(super) host_network_pods: HostNetworkPods,
    /// What pods may read from the real metadata server. Credentials, and a dump of all of it, are always
    /// refused. open: everything else. standard: not the node's user data (which holds its join secrets),
    /// vendor data, SSH keys and what proves the node's identity by a signature. strict: only what a
    /// program needs to know where it runs (docs/metadata-service.md has the list). Pods with the node's role
    /// may also read what proves its identity
    #[arg(
        long,
        value_enum,
        default_value = "standard",
        hide_possible_values = true,
        help_heading = "Policy"
    )]
    pub(super) metadata_policy: MetadataPolicy,
    /// Annotation key of a namespace's allow-list, a JSON array of patterns [default:
    /// ram.aliyuncs.com/allowed-roles; on AWS iam.amazonaws.com/allowed-roles]
    #[arg(
        long,
        value_name = "KEY",
        value_parser = value::annotation_key,
        help_heading = "Policy"
    )]
    pub(super) namespace_key: Option<Box<str>>,
    /// How allow-lists are read. glob: only * is special, and it also matches /. regexp: the expression must
    /// match as a whole
    #[arg(
        long,
        value_name = "FORMAT",
        default_value = "glob",
        value_parser = value::pattern_format,
        help_heading = "Policy"
    )]
    pub(super) namespace_restriction_format: PatternFormat,
    /// Give pods only the default role and the roles that their namespace's allow-list allows. Without this
    /// flag, every namespace may use every role
    #[arg(long, help_heading = "Policy")]
    pub(super) namespace_restrictions: bool,

    /// Requests per second that each pod may send to the real metadata server; bursts may be twice as large.
    /// Further requests get 429. The metadata server limits the node as a whole: without a limit per pod (0),
    /// one pod can use it up for all
    #[arg(long, value_name = "NUMBER", default_value = "100", help_heading = "Policy")]
    pub(super) pass_through_rate: u32,
    /// Requests per second that each pod may send in all; bursts may be twice as large. Further requests get
    /// 429, and the connection is closed. 0 means no limit
    #[arg(long, value_name = "NUMBER", default_value = "200", help_heading = "Policy")]
    pub(super) request_rate: u32,
    /// Refuse every request without a session token (hardened mode, or IMDSv2: PUT /latest/api/token). An
    /// attacker who can only make a pod fetch URLs cannot get a token. Clients without token support get
    /// nothing, in hostNetwork pods too
    #[arg(long, help_heading = "Policy")]
    pub(super) require_token: bool,

    /// The API server's address, used instead of the pod's service account. The server at this address
    /// decides which pod has which role
    #[arg(long, value_name = "URL", value_parser = value::api_server, help_heading = "Kubernetes")]
    pub(super) api_server: Option<Url>,
    /// Bearer token for --api-server. Every process on the node can read a command line, so set
    /// KUBE2RAM_API_TOKEN instead
    #[arg(long, value_name = "TOKEN", value_parser = value::secret, help_heading = "Kubernetes")]
    pub(super) api_token: Option<SecretString>,
    /// Accept any certificate of --api-server. An attacker on the path can then give every pod every role
    #[arg(long, help_heading = "Kubernetes")]
    pub(super) insecure: bool,
    /// Path of a kubeconfig file, instead of the pod's service account
    #[arg(long, value_name = "PATH", help_heading = "Kubernetes")]
    pub(super) kubeconfig: Option<PathBuf>,
    /// Name of this node's Node object; required
    #[arg(long, value_name = "NAME", value_parser = value::node_name, help_heading = "Kubernetes")]
    pub(super) node: Option<String>,

    /// Taint of this node that the agent removes whenever it is ready, so that no pod starts before:
    /// <key>[=<value>][:<effect>]. Requires the right to get and patch nodes, which applies to every node of
    /// the cluster
    #[arg(long, value_name = "TAINT", help_heading = "Kubernetes")]
    pub(super) startup_taint: Option<StartupTaint>,

    #[command(flatten)]
    pub(super) address: Address,
    /// The only STS endpoint to use: https, or http to a loopback address for tests. The endpoint sees the
    /// node's signed requests
    #[arg(long, value_name = "URL", value_parser = value::sts_endpoint, help_heading = "Cloud")]
    pub(super) sts_endpoint: Option<Endpoint>,
    /// Try the STS endpoints of the node's region before the global one. With false, Alibaba Cloud's is the
    /// only one that is used (sts.aliyuncs.com), and AWS's the first (sts.amazonaws.com), where it is valid
    #[arg(long, default_value = "true", help_heading = "Cloud")]
    pub(super) use_regional_sts_endpoint: bool,

    /// TCP port of the host listener. It serves hostNetwork pods, pods without an in-pod listener, and pods
    /// whose http_proxy is the agent. It refuses connections that no connect hook has recorded
    #[arg(
        long,
        value_name = "PORT",
        default_value = "8181",
        value_parser = clap::value_parser!(u16).range(1..),
        help_heading = "Node"
    )]
    pub(super) app_port: u16,
    /// Directory of the pins, on a bpf file system. A process that can write there can undo the redirection
    #[arg(
        long,
        value_name = "PATH",
        default_value = "/sys/fs/bpf/kube2ram",
        help_heading = "Node",
        global = true
    )]
    pub(super) bpf_dir: PathBuf,
    /// Mount point of the cgroup2 hierarchy; detected if not set
    #[arg(long, value_name = "PATH", help_heading = "Node", global = true)]
    pub(super) cgroup_root: Option<PathBuf>,
    /// Whether netfilter rules (tables ip kube2ram and ip6 kube2ram) drop packets that the node would forward
    /// to the metadata server: auto, or off. The rules also stop containers outside of Kubernetes that have
    /// their own network. Without them, packet sockets, TUN devices, Kata and gVisor pods, and Services that
    /// point at the metadata server reach it
    #[arg(
        long,
        value_enum,
        default_value = "auto",
        hide_possible_values = true,
        help_heading = "Node",
        global = true
    )]
    pub(super) forward_guard: ForwardGuardMode,
    /// IPv4 address of the node, to which pods without an in-pod listener are redirected. If it is missing,
    /// empty, an IPv6 address or not an address of this node, the agent uses the address from which the node
    /// sends to the outside. The agent checks this again while it runs
    #[arg(long, value_name = "IP", value_parser = value::host_ip, help_heading = "Node")]
    pub(super) host_ip: Option<value::Address>,
    /// What happens to connections to the metadata server that pods opened before the programs were attached:
    /// cut, or keep. Use keep only during a migration. Kept connections stay with the agent of kube2iam or
    /// the Go kube2ram. Those of hostNetwork pods, and without the netfilter rules those of all pods, also
    /// reach the real server with the node's role
    #[arg(long, value_enum, default_value = "cut", hide_possible_values = true, help_heading = "Node")]
    pub(super) open_connections: OpenConnections,
    /// Directory that the containers of the agent's pod share (an emptyDir). It holds the socket of kube2ram
    /// ready and live, and the report of the boot guard's installation. If it is missing, the socket is in
    /// --state-dir
    #[arg(
        long,
        value_name = "PATH",
        default_value = "/run/kube2ram-pod",
        help_heading = "Node",
        global = true
    )]
    pub(super) pod_dir: PathBuf,
    /// The cgroup that holds all pods; detected if not set. Pods outside of it reach the node's role
    #[arg(long, value_name = "PATH", help_heading = "Node", global = true)]
    pub(super) pods_cgroup: Option<PathBuf>,
    /// Directory that the agents of this node share, on a tmpfs. Only root may have access: a process that
    /// can write there can pose as the agent
    #[arg(long, value_name = "PATH", default_value = "/run/kube2ram", help_heading = "Node", global = true)]
    pub(super) state_dir: PathBuf,
    /// Whether a tc program drops pods' packets for the metadata server that pass no other guard. It is
    /// attached to each network device that leads out of the node or out of a pod's own network. auto:
    /// failures are reported. on: the agent is not ready while a device is without the program. off: packet
    /// sockets of hostNetwork pods, and of pods on ipvlan, with their own network card or routed in eBPF,
    /// reach the metadata server
    #[arg(long, value_enum, default_value = "auto", hide_possible_values = true, help_heading = "Node")]
    pub(super) wire_guard: WireGuardMode,

    /// Log every verdict of the eBPF programs
    #[arg(long, help_heading = "Observability")]
    pub(super) debug: bool,
    /// Format of the log: text or json
    #[arg(
        long,
        value_name = "FORMAT",
        default_value = "text",
        value_parser = value::log_format,
        help_heading = "Observability"
    )]
    pub(super) log_format: LogFormat,
    /// Lowest level that is logged: trace, debug, info, warn or error. Secrets are never logged [default:
    /// info]
    #[arg(long, value_name = "LEVEL", value_parser = value::log_level, help_heading = "Observability")]
    pub(super) log_level: Option<LevelFilter>,
    /// TCP port of health checks and metrics. It must differ from --app-port, which pods can reach
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

    #[command(flatten)]
    pub(super) credentials: CredentialFlags,
}

/// The subcommands.
#[derive(clap::Subcommand)]
pub(super) enum Subcommand {
    /// Denies containers access to the metadata server from boot on, before the kubelet starts, until an
    /// agent takes over
    #[command(subcommand)]
    BootGuard(BootGuard),
    /// Shows why a pod of this node gets what it gets: its annotation, the role, the rule that permits or
    /// denies it, the last answer of STS, and what the agent answers the pod now. Exit status: 0 if the pod
    /// gets credentials, 1 if not, 66 if there is no such pod on this node, 69 if no agent runs, 77 if not
    /// run as root. With --access-key-id it shows the pods of a session instead: 0 if the session is found,
    /// 66 if not
    Explain {
        /// The pod
        #[arg(
            value_name = "NAMESPACE/POD",
            value_parser = value::pod,
            required_unless_present = "access_key_id",
            conflicts_with = "access_key_id"
        )]
        pod: Option<(String, String)>,
        /// Show which pods of this node were given the credentials with this AccessKeyId, and their session.
        /// The AccessKeyId is in each line of ActionTrail and CloudTrail
        #[arg(long, value_name = "ID", value_parser = value::access_key_id)]
        access_key_id: Option<String>,
        /// Output format: text, or json
        #[arg(short, long, value_enum, default_value = "text", hide_possible_values = true)]
        output: Output,
    },
    /// Liveness probe for the kubelet: checks that the agent of this container answers within 5 s, ready or
    /// not. Nothing else is checked
    Live,
    /// Shows the running agent's log level, or changes it for a while. The level is reset after that time,
    /// and when the agent ends. Exit status: 69 if no agent runs, 77 if not run as root
    LogLevel {
        /// trace, debug, info, warn or error; reset goes back to the flags' level now
        #[arg(value_name = "LEVEL", value_parser = value::changed_log_level)]
        level: Option<value::LevelChange>,
        /// For how long, a day at the most
        #[arg(long = "for", value_name = "DURATION", default_value = "10m", value_parser = value::duration)]
        span: Duration,
    },
    /// Checks whether this node has what the agent needs, and prints a remedy for everything that is missing
    Preflight,
    /// Readiness probe for the kubelet: checks that the agent of this container serves, or is a prepared
    /// standby agent
    Ready,
    /// Shows the state of the running agent: readiness, the eBPF programs, the API server, credentials, STS,
    /// and each pod of this node. Exit status: 0 if all is well, 1 if something is wrong, 69 if no agent
    /// runs, 75 if it does not answer, 77 if not run as root
    Status {
        /// Output format: text, or json
        #[arg(short, long, value_enum, default_value = "text", hide_possible_values = true)]
        output: Output,
    },
    /// Prints what the agent knows of this node's pods and of namespaces' allow-lists as JSON, with the
    /// annotations unparsed
    Store,
    /// Removes the programs, maps and netfilter rules from this node. No agent may run here. Afterwards pods
    /// reach the node's role
    Uninstall,
}

/// What can be done with the boot guard.
#[derive(clap::Subcommand)]
pub(super) enum BootGuard {
    /// Activates the guard now. The systemd unit runs this command at boot
    Apply(Guard),
    /// Installs this binary (/opt/kube2ram/bin/kube2ram) and an enabled systemd unit
    /// (kube2ram-boot-guard.service) on the host, for the next boot
    Install {
        #[command(flatten)]
        guard: Guard,
        #[command(flatten)]
        host: HostRoot,
        /// Exit with status 0 even on failure, so that a failing init container does not keep the agent from
        /// starting. The reason is left in --pod-dir: the agent reports it in its log, status and metrics
        #[arg(long)]
        optional: bool,
        /// Keep the kubelet from starting if the guard fails. Without this flag the kubelet starts, and pods
        /// reach the node's role until an agent is active
        #[arg(long)]
        required_by_kubelet: bool,
    },
    /// Removes what install put on the host. Programs that are attached stay attached: see uninstall
    Remove(HostRoot),
}

/// What the boot guard does.
#[derive(Args)]
pub(super) struct Guard {
    /// Cgroup of the host's own services, relative to the root; repeat the flag for each. Tasks outside of
    /// all these cgroups, or in their own network namespace, are denied
    #[arg(
        long,
        value_name = "NAME",
        default_values = ["init.scope", "runtime.slice", "system.slice", "user.slice"],
        value_parser = value::host_cgroup
    )]
    pub(super) host_cgroup: Vec<PathBuf>,
}

/// Where the host is.
#[derive(Args)]
pub(super) struct HostRoot {
    /// Mount point of the host's root directory
    #[arg(long, value_name = "PATH", default_value = "/")]
    pub(super) host_root: PathBuf,
}

/// The flags that together determine the address of the metadata server.
#[derive(Args)]
#[command(next_help_heading = "Cloud")]
pub(super) struct Address {
    /// The cloud that the node is in: alibaba, or aws. A program that is started as kube2iam takes aws. It is
    /// not detected: a wrong guess would leave the metadata server open
    #[arg(
        long,
        value_name = "CLOUD",
        default_value = "alibaba",
        value_parser = value::cloud,
        global = true
    )]
    pub(super) cloud: Cloud,
    /// Address of the metadata server; the default port is 80. Pods' connections to it are redirected to the
    /// agent [default: 100.100.100.200; on AWS 169.254.169.254]
    #[arg(long, value_name = "IP[:PORT]", value_parser = value::metadata_addr, global = true)]
    pub(super) metadata_addr: Option<SocketAddrV4>,
    /// IPv6 address of the metadata server, with the same port. Pods' connections to it are redirected, too.
    /// An empty value means that the platform has none [default: fd00:100::100:200; on AWS fd00:ec2::254]
    #[arg(long, value_name = "IP", value_parser = value::metadata_addr6, global = true)]
    pub(super) metadata_addr6: Option<value::Address6>,
}

/// The flags that together determine the base ARN and the default role.
#[derive(Args)]
#[command(next_help_heading = "Roles")]
pub(super) struct Base {
    /// Discover the node's account, from the agent's own role (OIDC) or else from the metadata server. Bare
    /// role names are then roles of that account
    #[arg(long)]
    pub(super) auto_discover_base_arn: bool,
    /// Make the node's own role the default role, and discover the base ARN unless it is given. Every pod
    /// without annotation then has the node's permissions
    #[arg(long)]
    pub(super) auto_discover_default_role: bool,
    /// Prefix for bare role names: acs:ram::<account>:role/, or on AWS arn:<partition>:iam::<account>:role/;
    /// with or without a path
    #[arg(long, value_name = "ARN")]
    pub(super) base_role_arn: Option<String>,
    /// Role of pods without annotation, a name or an ARN. Without this flag they have no role.
    /// --namespace-restrictions does not apply to this role. Unannotated hostNetwork pods get it only with
    /// --host-network-pods=deny
    #[arg(long, value_name = "ROLE")]
    pub(super) default_role: Option<String>,
}
