//! The agent's configuration: what the flags of a [`Command`](super::Command) come to, once they fit
//! together. Called by the parent.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use clap::ValueEnum;
use secrecy::SecretString;
use tracing::level_filters::LevelFilter;
use url::Url;

use super::{
    ArgsError, CredentialsFrom, TokenRequestsAs,
    flags::{self, Flags},
    value,
};
use crate::{
    kubernetes::StartupTaint,
    policy::PatternFormat,
    preflight::NodePaths,
    role::{AnnotationKeys, Attribution, SessionTags},
    server::{HostNetworkPods, MetadataPolicy},
};
use kube2ram_cloud::{
    Cloud, MetadataAddr, OidcProviderArn, StsEndpoint,
    role::{ArnStyle, BaseArn, MAX_DURATION, MIN_DURATION, RoleArn},
};
use kube2ram_service::telemetry::LogFormat;

/// The default of `--metrics-port`.
const METRICS_PORT: u16 = 9181;

/// The agent's configuration.
#[derive(Debug)]
pub struct Config {
    /// The cloud that this node is in.
    pub cloud: Cloud,
    /// How annotations are called.
    pub annotation_keys: AnnotationKeys,
    /// Where the API server is.
    pub api_server: ApiServer,
    /// What sessions carry of their pods.
    pub attribution: Attribution,
    /// Whether the host listener answers the node's health checks: kube2iam's manifests make them there.
    pub answers_health_checks: bool,
    /// The TCP port at which redirected connections arrive.
    pub app_port: u16,
    /// The file of the audit trail, by its absolute path; `None` where the log alone has it.
    pub audit_file: Option<PathBuf>,
    /// What completes bare role names.
    pub base_arn: Source<BaseArn>,
    /// The bpffs directory of the pins.
    pub bpf_dir: PathBuf,
    /// The cgroup2 mount; found by looking when `None`.
    pub cgroup_root: Option<PathBuf>,
    /// By whose right pods' roles are assumed.
    pub credentials_from: CredentialsFrom,
    /// Whether the eBPF programs log each verdict.
    pub debug: bool,
    /// The role of pods without annotation, as it was written: it may need a base ARN that is discovered
    /// later.
    pub default_role: Source<String>,
    /// Whether the netfilter rules against forwarding to the metadata server are kept active.
    pub forward_guard: ForwardGuardMode,
    /// The node's address, to which connections are redirected.
    pub host_ip: Option<IpAddr>,
    /// How unannotated hostNetwork pods are treated.
    pub host_network_pods: HostNetworkPods,
    /// How logs are written.
    pub log_format: LogFormat,
    /// What is logged.
    pub log_level: LevelFilter,
    /// The real metadata server.
    pub metadata: MetadataAddr,
    /// Whether a flag has set its IPv4 address, which then counts whatever the machine's vendor is.
    pub metadata_is_set: bool,
    /// Which sensitive items of the real metadata server pods may read.
    pub metadata_policy: MetadataPolicy,
    /// The TCP port of health and metrics.
    pub metrics_port: u16,
    /// The key of the namespaces' allow-list annotation.
    pub namespace_key: Box<str>,
    /// How allow-lists are read; `None` when namespaces are not restricted.
    pub namespace_restrictions: Option<PatternFormat>,
    /// The name of this node's Node object.
    pub node: String,
    /// Whether that is the machine's host name, because nothing else was given: the API server must confirm
    /// it.
    pub node_is_host_name: bool,
    /// One line for each flag that was set and does nothing, to be logged as a warning.
    pub notices: Vec<String>,
    /// The cluster's OIDC provider, by which STS knows who signed a ServiceAccount's token. Always present if
    /// `credentials_from` is [`CredentialsFrom::ServiceAccount`] and the cloud's exchange needs it.
    pub oidc_provider: Option<OidcProviderArn>,
    /// How connections to the metadata server are treated that pods opened before the programs were attached.
    pub open_connections: OpenConnections,
    /// How many requests a second each pod may make of the real metadata server; zero is no limit.
    pub pass_through_rate: u32,
    /// How many requests per second each pod may send in all; zero means no limit.
    pub request_rate: u32,
    /// The directory that this agent's pod has to itself.
    pub pod_dir: PathBuf,
    /// The cgroup of all pods; found by looking when `None`.
    pub pods_cgroup: Option<PathBuf>,
    /// Whether annotations of ServiceAccounts are read.
    pub reads_service_accounts: bool,
    /// Whether requests without a session token are refused.
    pub require_token: bool,
    /// `DurationSeconds` of pods that are not annotated with one: 15 min – 12 h.
    pub session_duration: Duration,
    /// The taint to remove once the agent is ready.
    pub startup_taint: Option<StartupTaint>,
    /// The directory that the agents of this node share.
    pub state_dir: PathBuf,
    /// As whom the API server is asked for tokens of ServiceAccounts.
    pub token_requests_as: TokenRequestsAs,
    /// Whether network devices are guarded.
    pub wire_guard: WireGuardMode,
    /// Where STS is.
    pub sts_endpoint: StsEndpoint,
}

/// Where the API server is.
#[derive(Debug)]
pub enum ApiServer {
    /// By the service account that is mounted into the agent's pod.
    InCluster,
    /// By the current context of a kubeconfig file.
    Kubeconfig(PathBuf),
    /// By its address; plain HTTP is refused together with a token or `insecure`.
    Url {
        /// `https://` or `http://`.
        url: Url,
        /// A bearer token.
        token: Option<SecretString>,
        /// Whether any certificate will do.
        insecure: bool,
    },
}

/// Whether the agent keeps a netfilter rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ForwardGuardMode {
    /// It does, where the kernel has nf_tables.
    Auto,
    /// It does not.
    Off,
}

/// Whether the agent guards network devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WireGuardMode {
    /// It does, and reports what it cannot guard.
    Auto,
    /// It does not.
    Off,
    /// It does, and is not ready while it cannot.
    On,
}

/// How connections to the metadata server are treated that are older than the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OpenConnections {
    /// Nothing more of them arrives anywhere.
    Cut,
    /// They stay open, to the agent or server that they lead to.
    Keep,
}

/// Where a setting comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source<T> {
    /// The metadata server.
    Discover,
    /// A flag.
    Given(T),
    /// There is none.
    Unset,
}

pub(super) fn metadata(flags: &flags::Address) -> MetadataAddr {
    let usual = flags.cloud.dialect().metadata;
    MetadataAddr {
        v4: flags.metadata_addr.unwrap_or(usual.v4),
        v6: flags.metadata_addr6.map_or(usual.v6, |address| address.0),
    }
}

impl Config {
    /// The settings that preflight checks.
    pub fn node_paths(&self) -> NodePaths {
        NodePaths {
            bpf_dir: self.bpf_dir.clone(),
            cgroup_root: self.cgroup_root.clone(),
            cloud: self.cloud,
            metadata: self.metadata,
            metadata_is_set: self.metadata_is_set,
            pods_cgroup: self.pods_cgroup.clone(),
            impersonates_node: matches!(self.api_server, ApiServer::InCluster)
                && self.credentials_from == CredentialsFrom::ServiceAccount
                && self.token_requests_as == TokenRequestsAs::Node,
        }
    }

    /// `is_kube2iam`: the program was started by that name, and its manifests must fit. `host_name`: the
    /// machine's.
    pub(super) fn try_new(
        flags: Flags,
        mut notices: Vec<String>,
        is_kube2iam: bool,
        host_name: &str,
    ) -> Result<Self, ArgsError> {
        let metrics_port = metrics_port(&flags, is_kube2iam, &mut notices)?;
        let node_is_host_name = flags.node.is_none();
        let fallback = || node_of(host_name).filter(|_| is_kube2iam);
        let Some(node) = flags.node.or_else(fallback) else {
            return Err(ArgsError::usage(
                "the node's name is not known: set --node, or the variable NODE_NAME from spec.nodeName",
            ));
        };
        if node_is_host_name {
            notices.push(format!(
                "--node is not set: the machine's host name, {node}, is taken for the node's name"
            ));
        }
        if flags.insecure && flags.api_server.is_none() {
            notices.push("--insecure has no effect without --api-server".to_owned());
        }
        let cloud = flags.address.cloud;
        let dialect = cloud.dialect();
        let base_arn = base_arn(&flags.base, dialect.arns)?;
        let default_role = default_role(&flags.base, &base_arn, dialect.arns)?;
        let usual = &dialect.annotations;
        let or_usual = |key: Option<Box<str>>, usual: &str| key.unwrap_or_else(|| usual.into());
        let format = flags.namespace_restriction_format;
        if flags.cluster_name.is_some() && flags.session_tags == SessionTags::None {
            notices.push("--cluster-name has no effect without --session-tags".to_owned());
        }
        let credentials = flags.credentials;
        notices.extend(credentials.check(cloud, flags.session_tags, flags.source_identity)?);
        let reads_service_accounts = credentials.reads_service_accounts();
        let attribution = Attribution::try_new(
            &dialect.sessions,
            flags.session_tags,
            flags.cluster_name.as_deref(),
            flags.source_identity,
        )
        .map_err(|error| ArgsError::usage(error.to_string()))?;

        Ok(Self {
            cloud,
            annotation_keys: AnnotationKeys {
                role: or_usual(flags.ram_role_key, usual.role),
                account_role: reads_service_accounts.then(|| usual.account_role.into()),
                external_id: or_usual(flags.ram_external_id, usual.external_id),
                policy: or_usual(flags.ram_policy_key, usual.policy),
                duration: or_usual(flags.ram_session_duration_key, usual.duration),
                session_name: or_usual(flags.ram_session_name_key, usual.session_name),
            },
            answers_health_checks: is_kube2iam,
            api_server: api_server(flags.api_server, flags.api_token, flags.insecure, flags.kubeconfig)?,
            app_port: flags.app_port,
            attribution,
            audit_file: credentials.audit_file,
            base_arn,
            bpf_dir: flags.bpf_dir,
            cgroup_root: flags.cgroup_root,
            credentials_from: credentials.credentials_from,
            debug: flags.debug,
            default_role,
            forward_guard: flags.forward_guard,
            host_ip: flags.host_ip.and_then(|address| address.0),
            host_network_pods: flags.host_network_pods,
            log_format: flags.log_format,
            log_level: flags.log_level.unwrap_or(if flags.verbose {
                LevelFilter::DEBUG
            } else {
                LevelFilter::INFO
            }),
            metadata: metadata(&flags.address),
            metadata_is_set: flags.address.metadata_addr.is_some(),
            metadata_policy: flags.metadata_policy,
            metrics_port,
            namespace_key: or_usual(flags.namespace_key, usual.allowed_roles),
            namespace_restrictions: flags.namespace_restrictions.then_some(format),
            node,
            node_is_host_name,
            notices,
            oidc_provider: credentials.oidc_provider_arn,
            open_connections: flags.open_connections,
            pass_through_rate: flags.pass_through_rate,
            request_rate: flags.request_rate,
            pods_cgroup: flags.pods_cgroup,
            reads_service_accounts,
            require_token: flags.require_token,
            session_duration: session_duration(flags.ram_role_session_ttl)?,
            startup_taint: flags.startup_taint,
            pod_dir: flags.pod_dir,
            state_dir: flags.state_dir,
            token_requests_as: credentials.token_requests_as,
            wire_guard: flags.wire_guard,
            sts_endpoint: match (flags.sts_endpoint, flags.use_regional_sts_endpoint) {
                (Some(endpoint), _) => StsEndpoint::Only(endpoint),
                (None, true) => StsEndpoint::Regional,
                (None, false) => StsEndpoint::Global,
            },
        })
    }
}

/// Pods can reach the app port, so health checks and metrics need another one. kube2iam has all on one port,
/// and its manifests may name that port twice.
fn metrics_port(flags: &Flags, is_kube2iam: bool, notices: &mut Vec<String>) -> Result<u16, ArgsError> {
    let (app, metrics) = (flags.app_port, flags.metrics_port);
    if app != metrics {
        return Ok(metrics);
    }
    if is_kube2iam && app != METRICS_PORT {
        notices.push(format!(
            "--metrics-port={metrics} has no effect: it is also --app-port, which pods can reach; health checks and metrics are at port {METRICS_PORT}"
        ));
        return Ok(METRICS_PORT);
    }
    Err(ArgsError::usage(format!(
        "--app-port and --metrics-port are both {app}: pods can reach the app port, so health checks and metrics need another port; change one of them"
    )))
}

/// A host name, as the kubelet writes it when it is given no other name for its node. `None` when no node can
/// have that name.
fn node_of(host_name: &str) -> Option<String> {
    value::node_name(&host_name.trim().to_ascii_lowercase()).ok()
}

fn base_arn(flags: &flags::Base, style: ArnStyle) -> Result<Source<BaseArn>, ArgsError> {
    match flags.base_role_arn.as_deref().filter(|text| !text.is_empty()) {
        Some(_) if flags.auto_discover_base_arn => Err(ArgsError::usage(
            "--base-role-arn and --auto-discover-base-arn exclude each other: drop one of them",
        )),
        Some(text) => BaseArn::parse_in(style, text).map(Source::Given).map_err(|reason| {
            ArgsError::usage(format!("--base-role-arn {text:?} {reason}{}", of_other_cloud(style, text)))
        }),
        None if flags.auto_discover_base_arn || flags.auto_discover_default_role => Ok(Source::Discover),
        None => Ok(Source::Unset),
    }
}

/// What to add to the error about an ARN of another cloud.
fn of_other_cloud(style: ArnStyle, text: &str) -> &'static str {
    let is_other = |cloud: &Cloud| cloud.dialect().arns != style && cloud.dialect().arns.is_arn(text);
    if Cloud::ALL.iter().any(is_other) { "; check --cloud" } else { "" }
}

/// Checks the default role as far as it can be without what is discovered.
fn default_role(
    flags: &flags::Base,
    base: &Source<BaseArn>,
    style: ArnStyle,
) -> Result<Source<String>, ArgsError> {
    let Some(text) = flags.default_role.clone().filter(|text| !text.is_empty()) else {
        return Ok(if flags.auto_discover_default_role { Source::Discover } else { Source::Unset });
    };
    if flags.auto_discover_default_role {
        return Err(ArgsError::usage(
            "--default-role and --auto-discover-default-role exclude each other: drop one of them",
        ));
    }
    let arn = match base {
        Source::Given(base) => base.arn_for(&text).map(drop),
        Source::Discover | Source::Unset if style.is_arn(&text) => RoleArn::parse(&text).map(drop),
        Source::Discover => Ok(()),
        Source::Unset => {
            return Err(ArgsError::usage(format!(
                "--default-role is a bare name: add --base-role-arn or --auto-discover-base-arn, or give the role's ARN{}",
                of_other_cloud(style, &text)
            )));
        }
    };
    arn.map_err(|reason| {
        ArgsError::usage(format!("--default-role {text:?} {reason}{}", of_other_cloud(style, &text)))
    })?;
    Ok(Source::Given(text))
}

fn api_server(
    url: Option<Url>,
    token: Option<SecretString>,
    insecure: bool,
    kubeconfig: Option<PathBuf>,
) -> Result<ApiServer, ArgsError> {
    match (url, kubeconfig) {
        (Some(_), Some(_)) => {
            Err(ArgsError::usage("--kubeconfig and --api-server exclude each other: drop one of them"))
        }
        (None, _) if token.is_some() => {
            Err(ArgsError::usage("--api-token is nothing without --api-server: add it, or drop the token"))
        }
        (Some(url), None) if url.scheme() == "http" && (insecure || token.is_some()) => {
            Err(ArgsError::usage("--api-token and --insecure need an --api-server with https://"))
        }
        (Some(url), None) => Ok(ApiServer::Url { url, token, insecure }),
        (None, Some(path)) => Ok(ApiServer::Kubeconfig(path)),
        (None, None) => Ok(ApiServer::InCluster),
    }
}

/// As in the predecessors, sessions last twice as long as their credentials are handed out: no pod gets
/// credentials that are about to expire (row 5.5 of docs/predecessors.md).
fn session_duration(ttl: Duration) -> Result<Duration, ArgsError> {
    let duration = ttl.saturating_mul(2);
    if (MIN_DURATION..=MAX_DURATION).contains(&duration) {
        return Ok(duration);
    }
    Err(ArgsError::usage(format!(
        "--ram-role-session-ttl {}: give 7m30s to 6h, half of what STS lets a session last",
        humantime::format_duration(ttl)
    )))
}
