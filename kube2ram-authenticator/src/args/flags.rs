//! The flags, with the names and defaults of ack-ram-authenticator. Doc comments are the help text: unit,
//! default, effect on security. Depends on clap; read by the parent only.

#![allow(
    rustdoc::broken_intra_doc_links,
    rustdoc::invalid_html_tags,
    reason = "doc comments are the help text"
)]

use std::{net::IpAddr, path::PathBuf, time::Duration};

use clap::{ArgAction, Args, Command, CommandFactory, Parser};
use kube2ram_cloud::alibaba::endpoint::Endpoint;
use kube2ram_service::telemetry::LogFormat;
use tracing::level_filters::LevelFilter;

use self::{
    add::AddWhat,
    client::{TokenFlags, VerifyFlags},
};
use super::{Output, Server, StsRates, value};
use crate::config::Given;

mod add;
mod client;

/// The command, whose switches take `=<boolean>`, as in Go.
pub(super) fn command() -> Command {
    Flags::command().mut_subcommands(|subcommand| {
        subcommand.mut_args(|arg| match arg.get_action() {
            ArgAction::SetTrue => value::switch(arg).default_value("false"),
            _ => arg,
        })
    })
}

/// Lets RAM users and roles log in to a Kubernetes cluster: a token authentication webhook for its API
/// server, and the plugin that makes kubectl's tokens.
#[derive(Parser)]
#[command(
    name = "kube2ram-authenticator",
    version,
    args_override_self = true,
    subcommand_value_name = "COMMAND",
    next_line_help = true
)]
pub(super) struct Flags {
    #[command(flatten)]
    pub(super) global: Global,
    #[command(subcommand)]
    pub(super) subcommand: Subcommand,
}

/// For every command.
#[derive(Args)]
pub(super) struct Global {
    /// Path of the configuration file
    #[arg(short, long, value_name = "PATH", global = true)]
    pub(super) config: Option<PathBuf>,
    /// Id of the cluster: what a token must be for. It is no secret, but another cluster must not have the
    /// same one: a token of one would then be valid in the other
    #[arg(short = 'i', long, value_name = "ID", global = true)]
    pub(super) cluster_id: Option<String>,
    /// Format of the log: text or json
    #[arg(
        short,
        long,
        value_name = "FORMAT",
        default_value = "text",
        value_parser = value::log_format,
        global = true
    )]
    pub(super) log_format: LogFormat,
    /// Lowest level that is logged: trace, debug, info, warn or error. Tokens are never logged
    #[arg(
        long,
        value_name = "LEVEL",
        default_value = "info",
        value_parser = value::log_level,
        global = true
    )]
    pub(super) log_level: LevelFilter,
    /// No effect: for manifests of ack-ram-authenticator
    #[arg(long, value_name = "GATES", hide = true, global = true)]
    pub(super) feature_gates: Option<String>,
}

/// The subcommands.
#[derive(clap::Subcommand)]
pub(super) enum Subcommand {
    /// Adds a mapping to the ConfigMap kube-system/alibabacloud-auth, for the backend ACKConfigMap. Needs the
    /// right to change it: whoever has that decides who logs in as whom
    Add {
        #[command(subcommand)]
        what: AddWhat,
    },
    /// Shows what an ARN is mapped to, by which mapping, and which other mappings name it. Reads the same
    /// configuration and backends as the server. Exit status: 0 if the ARN is mapped, 1 if it is not
    Check(CheckFlags),
    /// Makes what the webhook and the API server need of each other: a CA, a certificate and the API server's
    /// kubeconfig. What exists and is still good is left as it is
    Init(InitFlags),
    /// Liveness probe for the kubelet: checks that the server of this container answers within 5 s, ready or
    /// not. Nothing else is checked
    Live(ProbeFlags),
    /// Readiness probe for the kubelet: checks that the server of this container is ready. If it is not, the
    /// output names the missing conditions
    Ready(ProbeFlags),
    /// Runs the webhook
    Server(Box<ServerFlags>),
    /// Prints a token for kubectl (an exec credential plugin)
    Token(TokenFlags),
    /// Asks STS who a token is, and shows it
    Verify(VerifyFlags),
    /// Shows the version
    Version {
        /// Only the version itself
        #[arg(short, long)]
        short: bool,
        /// Output format: text, json or yaml
        #[arg(short, long, value_enum, default_value = "text", hide_possible_values = true)]
        output: Output,
    },
}

/// Which mappings there are, and what they may do.
#[derive(Args)]
pub(super) struct MappingFlags {
    /// Where mappings come from, in the order in which they are asked; the first that names an identity
    /// decides. Of MountedFile (the configuration file), ACKConfigMap (the ConfigMap
    /// kube-system/alibabacloud-auth), CRD (objects of the kind RAMIdentityMapping) and DynamicFile, with
    /// commas between [default: MountedFile]
    #[arg(long, value_name = "MODES", help_heading = "Mappings")]
    backend_mode: Vec<String>,
    /// Path of the file of the backend DynamicFile. Whoever can write it decides who logs in as whom
    #[arg(long, value_name = "PATH", visible_alias = "dynamicfilepath", help_heading = "Mappings")]
    dynamic_file: Option<PathBuf>,
    /// Path of a kubeconfig file for the backends ACKConfigMap and CRD, instead of the pod's service account
    #[arg(long, value_name = "PATH", help_heading = "Mappings")]
    kubeconfig: Option<PathBuf>,
    /// Allow {{SessionName}} in groups, and at the beginning of usernames. Whoever assumes a role chooses
    /// the name of the session, and so the group and the user
    #[arg(
        long,
        value_name = "BOOL",
        action = ArgAction::Set,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        value_parser = value::boolean,
        help_heading = "Mappings"
    )]
    trust_session_names: Option<bool>,
}

/// Flags of `check`.
#[derive(Args)]
pub(super) struct CheckFlags {
    /// The ARN of a user, a role or a role's session
    #[arg(value_name = "ARN")]
    pub(super) arn: String,
    /// Name of the role's session, if the ARN is the role's
    #[arg(long, value_name = "NAME")]
    pub(super) session_name: Option<String>,
    /// Id of the user or role, for mappings that name it
    #[arg(long, value_name = "ID")]
    pub(super) user_id: Option<String>,
    /// Output format: text, or json
    #[arg(short, long, value_enum, default_value = "text", hide_possible_values = true)]
    pub(super) output: Output,
    #[command(flatten)]
    pub(super) mappings: MappingFlags,
}

/// How the API server reaches the webhook.
#[derive(Args)]
pub(super) struct WebhookFlags {
    /// Address on which the webhook listens. It is in the certificate [default: 127.0.0.1]
    #[arg(long, value_name = "IP", help_heading = "Webhook")]
    address: Option<IpAddr>,
    /// Path of the certificate that the API server shows, on its machine. The kubeconfig then names it
    #[arg(long, value_name = "PATH", requires = "client_key", help_heading = "Webhook")]
    client_certificate: Option<PathBuf>,
    /// Path of the key of --client-certificate, on the API server's machine
    #[arg(long, value_name = "PATH", requires = "client_certificate", help_heading = "Webhook")]
    client_key: Option<PathBuf>,
    /// Path of the API server's kubeconfig [default:
    /// /etc/kubernetes/ack-ram-authenticator/kubeconfig.yaml; for init without --config
    /// ack-ram-authenticator.kubeconfig]
    #[arg(long, value_name = "PATH", help_heading = "Webhook")]
    generate_kubeconfig: Option<PathBuf>,
    /// Name by which the API server reaches the webhook. It is in the certificate and in the kubeconfig
    /// [default: localhost]
    #[arg(long, value_name = "NAME", help_heading = "Webhook")]
    hostname: Option<String>,
    /// Port on which the webhook listens [default: 21362]
    #[arg(
        long,
        value_name = "PORT",
        value_parser = clap::value_parser!(u16).range(1..),
        help_heading = "Webhook"
    )]
    port: Option<u16>,
    /// Directory of the CA and its key, kept from one server to the next. Whoever can read it can pose as the
    /// webhook [default: /var/ack-ram-authenticator; for init without --config the working directory]
    #[arg(long, value_name = "PATH", help_heading = "Webhook")]
    state_dir: Option<PathBuf>,
}

/// Where the server of this container answers probes.
#[derive(Args)]
pub(super) struct ProbeFlags {
    /// Directory of the socket that the commands live and ready ask: one of this pod alone. During an upgrade
    /// two servers share the ports of a node, so a probe of a port could reach the other one
    #[arg(
        long,
        value_name = "PATH",
        default_value = "/run/kube2ram-authenticator",
        help_heading = "Observability"
    )]
    pub(super) probe_dir: PathBuf,
}

/// Flags of `init`.
#[derive(Args)]
pub(super) struct InitFlags {
    /// Change nothing: only compare the files with each other, and with these flags. Exit status: 1 if the
    /// API server could not use them
    #[arg(long)]
    pub(super) check: bool,
    /// Id of the user and of the group that the server runs as. They become the owners of the CA and its key
    #[arg(long, value_name = "ID", conflicts_with = "check")]
    pub(super) owner: Option<u32>,
    #[command(flatten)]
    pub(super) webhook: WebhookFlags,
}

/// Flags of `server`.
#[derive(Args)]
pub(super) struct ServerFlags {
    #[command(flatten)]
    mappings: MappingFlags,

    #[command(flatten)]
    webhook: WebhookFlags,
    /// No effect: for manifests of ack-ram-authenticator
    #[arg(short, long, value_name = "IP", hide = true)]
    pub(super) bind: Option<String>,
    /// Path of the certificates of a CA. Only clients with a certificate of it are answered: give one to the
    /// API server in its kubeconfig. Without it, every process that reaches the port can ask who a token is
    #[arg(long, value_name = "PATH", help_heading = "Webhook")]
    client_ca: Option<PathBuf>,
    /// Tell the API server why somebody is denied, as ack-ram-authenticator does. The API server logs the
    /// reason, but does not remember such a denial: each attempt of the client comes here again
    #[arg(long, help_heading = "Webhook")]
    deny_with_error: bool,
    /// Give the API server's audit log the ids of the access key and of the principal, too
    #[arg(long, help_heading = "Webhook")]
    extended_extra: bool,
    /// Leave the API server's kubeconfig as init made it
    #[arg(
        long,
        value_name = "BOOL",
        action = ArgAction::Set,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        value_parser = value::boolean,
        help_heading = "Webhook"
    )]
    kubeconfig_pregenerated: Option<bool>,
    /// Path of the webhook's own certificate and chain, instead of one that its own CA issues. It is read
    /// again when it changes
    #[arg(long, value_name = "PATH", requires = "tls_key", help_heading = "Webhook")]
    tls_certificate: Option<PathBuf>,
    /// Path of the key of --tls-certificate
    #[arg(long, value_name = "PATH", requires = "tls_certificate", help_heading = "Webhook")]
    tls_key: Option<PathBuf>,

    /// Region whose STS is asked, inside of its VPC first [default: $STS_REGION, or else the endpoint of no
    /// region]
    #[arg(long, value_name = "REGION", help_heading = "STS")]
    region: Option<String>,
    /// How long the identity of a token is remembered, 1m at the most; 0 for not at all. A key that was
    /// disabled still counts for so long, in addition to the API server's own two minutes. Mappings always
    /// count at once
    #[arg(
        long,
        value_name = "DURATION",
        default_value = "1m",
        value_parser = value::duration,
        help_heading = "STS"
    )]
    sts_cache_ttl: Duration,
    /// The only STS endpoint to use: https, or http to a loopback address for tests. It decides who is who
    #[arg(long, value_name = "URL", value_parser = value::sts_endpoint, help_heading = "STS")]
    sts_endpoint: Option<Endpoint>,
    /// Calls per second to STS for access keys that have logged in before; bursts may be twice as large. 0
    /// means no limit
    #[arg(long, value_name = "NUMBER", default_value = "60", help_heading = "STS")]
    sts_rate: u32,
    /// The same for each of these access keys
    #[arg(long, value_name = "NUMBER", default_value = "2", help_heading = "STS")]
    sts_rate_per_key: u32,
    /// The same for all other access keys together. Anybody who reaches the API server can use this up; those
    /// who have logged in before are not concerned
    #[arg(long, value_name = "NUMBER", default_value = "30", help_heading = "STS")]
    sts_rate_unknown: u32,

    /// Address of health checks and metrics
    #[arg(long, value_name = "IP", default_value = "127.0.0.1", help_heading = "Observability")]
    metrics_address: IpAddr,
    /// Port of health checks and metrics
    #[arg(
        long,
        value_name = "PORT",
        default_value = "21363",
        value_parser = clap::value_parser!(u16).range(1..),
        help_heading = "Observability"
    )]
    metrics_port: u16,
    #[command(flatten)]
    probe: ProbeFlags,
}

impl MappingFlags {
    /// What these flags add.
    pub(super) fn add_to(self, given: Given) -> Given {
        Given {
            backend_modes: self.backend_mode,
            dynamic_file: self.dynamic_file,
            kubeconfig: self.kubeconfig,
            trust_session_names: self.trust_session_names,
            ..given
        }
    }
}

impl WebhookFlags {
    /// What these flags add.
    pub(super) fn add_to(self, given: Given) -> Given {
        Given {
            address: self.address,
            client_files: self.client_certificate.zip(self.client_key),
            generate_kubeconfig: self.generate_kubeconfig,
            hostname: self.hostname,
            port: self.port,
            state_dir: self.state_dir,
            ..given
        }
    }
}

impl ServerFlags {
    pub(super) fn with(self, given: Given) -> Server {
        let given = self.webhook.add_to(self.mappings.add_to(given));
        Server {
            given: Given {
                kubeconfig_pregenerated: self.kubeconfig_pregenerated,
                region: self.region.or(given.region),
                ..given
            },
            tls_files: self.tls_certificate.zip(self.tls_key),
            sts_endpoint: self.sts_endpoint,
            sts_cache_ttl: self.sts_cache_ttl,
            sts_rates: StsRates {
                key: self.sts_rate_per_key,
                known: self.sts_rate,
                unknown: self.sts_rate_unknown,
            },
            client_ca: self.client_ca,
            deny_with_error: self.deny_with_error,
            extended_extra: self.extended_extra,
            metrics_address: self.metrics_address,
            metrics_port: self.metrics_port,
            probe_dir: self.probe.probe_dir,
        }
    }
}
