//! Command line and environment → [`Command`]: parsed, checked and typed; no file is opened. The only home of
//! clap. Depends on `config` and `backend` for what goes on to them; called by `main`.

use std::{ffi::OsString, net::IpAddr, path::PathBuf, time::Duration};

use clap::{FromArgMatches as _, ValueEnum};
use http::Uri;
use kube2ram_cloud::{
    alibaba::endpoint::{Endpoint, Region},
    role::{ExternalId, RoleArn, SessionName},
};
pub use kube2ram_service::command_line::ArgsError;
use kube2ram_service::telemetry::LogFormat;
use tracing::level_filters::LevelFilter;

use self::flags::{Flags, InitFlags, ProbeFlags, Subcommand};
use crate::{backend::add::Addition, config::Given};

mod flags;
mod value;

/// What the process is for, and how it logs.
#[derive(Debug)]
pub struct Args {
    /// What it is for.
    pub command: Command,
    /// How logs are written.
    pub log_format: LogFormat,
    /// What is logged.
    pub log_level: LevelFilter,
    /// One line for each flag that was given and does nothing.
    pub notices: Vec<String>,
}

/// What the process is for.
#[derive(Debug)]
pub enum Command {
    /// Add a mapping to the ConfigMap, and exit.
    Add(Add),
    /// Show what an ARN is mapped to, and why, and exit.
    Check(Check),
    /// Make or check the files of the webhook, and exit.
    Init(Init),
    /// Show whether the server of this container answers, and exit.
    Live {
        /// The directory of the server's socket.
        probe_dir: PathBuf,
    },
    /// Show whether the server of this container is ready, and exit.
    Ready {
        /// The directory of the server's socket.
        probe_dir: PathBuf,
    },
    /// Be the webhook.
    Server(Box<Server>),
    /// Print a token for kubectl, and exit.
    Token(Token),
    /// Show who a token is, and exit.
    Verify(Verify),
    /// Print the version, and exit.
    Version {
        /// Whether it is the version alone.
        is_short: bool,
        /// The output format.
        output: Output,
    },
}

/// How a document is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For programs.
    Json,
    /// For people.
    Text,
    /// For programs that read YAML.
    Yaml,
}

/// For `add`.
#[derive(Debug)]
pub struct Add {
    /// The mapping.
    pub addition: Addition,
    /// The kubeconfig files, if any are named.
    pub kubeconfigs: Vec<PathBuf>,
    /// Their context, if not the current one.
    pub context: Option<String>,
    /// The API server, if not the context's.
    pub server: Option<Uri>,
    /// Whether the user is asked first.
    pub asks: bool,
}

/// For `check`.
#[derive(Debug)]
pub struct Check {
    /// What goes on to the configuration.
    pub given: Given,
    /// The ARN, as `aliyun sts GetCallerIdentity` shows it or as mappings name it.
    pub arn: String,
    /// The name of the role's session.
    pub session_name: Option<Box<str>>,
    /// The id of the user or role.
    pub user_id: Option<Box<str>>,
    /// The output format.
    pub output: Output,
}

/// For `init`.
#[derive(Debug)]
pub struct Init {
    /// What goes on to the configuration.
    pub given: Given,
    /// Whether the files are only compared with what they should be.
    pub is_check: bool,
    /// The user and the group that the CA and its key are given to.
    pub owner: Option<u32>,
}

/// For `server`.
#[derive(Debug)]
pub struct Server {
    /// What goes on to the configuration.
    pub given: Given,
    /// STS, if the region's is not asked.
    pub sts_endpoint: Option<Endpoint>,
    /// How long a token's identity is remembered; not at all if zero.
    pub sts_cache_ttl: Duration,
    /// How often STS is asked in a second.
    pub sts_rates: StsRates,
    /// Whose certificate the API server must show, if it must.
    pub client_ca: Option<PathBuf>,
    /// Whether the API server is told why somebody is denied.
    pub deny_with_error: bool,
    /// Whether the audit log gets the access key's and the principal's id.
    pub extended_extra: bool,
    /// The address of health checks and metrics.
    pub metrics_address: IpAddr,
    /// The port of health checks and metrics.
    pub metrics_port: u16,
    /// The directory of the socket that the commands `live` and `ready` ask.
    pub probe_dir: PathBuf,
    /// The webhook's own certificate and its key, if its own CA does not issue it.
    pub tls_files: Option<(PathBuf, PathBuf)>,
}

/// How often STS is asked in a second. Zero is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StsRates {
    /// For one access key that has logged in before.
    pub key: u32,
    /// For all of these together.
    pub known: u32,
    /// For all others together.
    pub unknown: u32,
}

/// For `token`.
#[derive(Debug)]
pub struct Token {
    /// What the token is for.
    pub cluster_id: String,
    /// The version that the kubeconfig names, for a kubectl that does not name it itself.
    pub api_version: ApiVersion,
    /// The role to assume first.
    pub role: Option<AssumedRole>,
    /// Where credentials are looked for.
    pub credentials: Credentials,
    /// Whether only the token is printed.
    pub is_bare: bool,
    /// Whether credentials of an assumed role are kept in a file.
    pub is_cached: bool,
    /// The region whose STS is asked.
    pub region: Option<Region>,
    /// STS, if the region's is not asked.
    pub sts_endpoint: Option<Endpoint>,
}

/// A role to assume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AssumedRole {
    /// Its ARN.
    pub arn: RoleArn,
    /// The name of its session.
    pub session: SessionName,
    /// The external id that its trust policy may ask for.
    pub external_id: Option<ExternalId>,
}

/// Where credentials are looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// Only the role attached to the machine.
    pub node_role: bool,
    /// Not in the environment.
    pub ignore_environment: bool,
    /// Not in the file of the Alibaba Cloud CLI.
    pub ignore_profiles: bool,
    /// A profile by its name.
    pub profile: Option<String>,
    /// The file of profiles.
    pub profile_file: Option<PathBuf>,
}

/// Where credentials are looked for, by ack-ram-tool's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CredentialType {
    /// Wherever they can be.
    Auto,
    /// The role attached to the machine.
    #[value(alias = "imds")]
    EcsRole,
}

/// The version of client.authentication.k8s.io.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ApiVersion {
    /// `v1`.
    V1,
    /// `v1beta1`.
    V1beta1,
}

/// For `verify`.
#[derive(Debug)]
pub struct Verify {
    /// What goes on to the configuration.
    pub given: Given,
    /// The token.
    pub token: String,
    /// STS, if the region's is not asked.
    pub sts_endpoint: Option<Endpoint>,
    /// The output format.
    pub output: Output,
}

/// clap's message, as an error of this program.
fn of_clap(error: clap::Error) -> ArgsError {
    ArgsError::of_parser("kube2ram-authenticator", error.exit_code(), error.to_string())
}

impl Args {
    /// Parses the command line (`args` begins with the program's name) and the variables that
    /// ack-ram-authenticator reads (`env` looks one up). Flags go before variables.
    ///
    /// # Errors
    /// [`ArgsError::Usage`] about the first thing that is wrong; [`ArgsError::Help`] when that was asked for.
    pub fn parse(
        args: impl IntoIterator<Item = OsString>,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, ArgsError> {
        let matches = flags::command().try_get_matches_from(args).map_err(of_clap)?;
        let Flags { global, subcommand } = Flags::from_arg_matches(&matches).map_err(of_clap)?;
        let variable = |name: &str| env(name).filter(|value| !value.is_empty());
        let mut notices = Vec::new();
        if global.feature_gates.is_some() {
            notices.push("--feature-gates has no effect".to_owned());
        }
        let given = Given {
            cluster_id: global.cluster_id,
            config: global.config,
            region: variable("STS_REGION"),
            ..Given::default()
        };
        let command = match subcommand {
            Subcommand::Add { what } => Command::Add(what.with(variable("KUBECONFIG"))),
            Subcommand::Check(check) => Command::Check(Check {
                given: check.mappings.add_to(given),
                arn: check.arn,
                session_name: check.session_name.map(Into::into),
                user_id: check.user_id.map(Into::into),
                output: check.output,
            }),
            Subcommand::Init(init) => {
                let InitFlags { check, owner, webhook } = init;
                Command::Init(Init { given: webhook.add_to(given), is_check: check, owner })
            }
            Subcommand::Live(ProbeFlags { probe_dir }) => Command::Live { probe_dir },
            Subcommand::Ready(ProbeFlags { probe_dir }) => Command::Ready { probe_dir },
            Subcommand::Server(server) => {
                if server.bind.is_some() {
                    notices.push("--bind has no effect: set --address, or server.address".to_owned());
                }
                if variable("STS_MAX_IDLE_CONNS_PER_HOST").is_some() {
                    notices.push("STS_MAX_IDLE_CONNS_PER_HOST has no effect".to_owned());
                }
                Command::Server((*server).with(given).into())
            }
            Subcommand::Token(token) => {
                let region = given.region.as_deref().map(value::region).transpose();
                let region = region.map_err(|problem| ArgsError::Usage(format!("STS_REGION: {problem}")))?;
                let session = variable("ALIBABA_CLOUD_ROLE_SESSION_NAME");
                Command::Token(token.with(given.cluster_id, region, session)?)
            }
            Subcommand::Verify(verify) => Command::Verify(Verify {
                given: Given { region: verify.region.or(given.region.clone()), ..given },
                token: verify.token,
                sts_endpoint: verify.sts_endpoint,
                output: verify.output,
            }),
            Subcommand::Version { short, output } => Command::Version { is_short: short, output },
        };
        Ok(Self { command, log_format: global.log_format, log_level: global.log_level, notices })
    }
}

#[cfg(test)]
mod tests;
