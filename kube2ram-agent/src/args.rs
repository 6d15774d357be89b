//! Command line and environment → [`Command`]: parsed, checked and typed, nothing opened or bound. The only
//! home of clap. Depends on `role`, `policy` and `cloud` for their types; called by `main`, and read by
//! `app`.

use std::{
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
};

use clap::{FromArgMatches, ValueEnum};

pub use self::config::{ApiServer, Config, ForwardGuardMode, OpenConnections, Source, WireGuardMode};
pub use self::credentials_from::{CredentialsFrom, TokenRequestsAs};
pub use self::environment::is_of_own_credentials;
use self::{
    config::metadata,
    flags::{Flags, Subcommand},
};
use crate::{
    boot_guard::{Guard, Installation},
    control::ChangeLogLevel,
    preflight::NodePaths,
    probe::SocketPaths,
};
use kube2ram_cloud::Cloud;
pub use kube2ram_service::command_line::ArgsError;

mod config;
mod credentials_from;
mod environment;
mod flags;
mod retired;
mod value;

/// What the process is for.
#[derive(Debug)]
pub enum Command {
    /// To be the agent.
    Agent(Box<Config>),
    /// To change what guards the node before an agent does, and end.
    BootGuard(BootGuardCommand),
    /// Show why a pod gets what it gets, and exit.
    Explain {
        /// The pod's namespace.
        namespace: String,
        /// The pod's name.
        name: String,
        /// The output format.
        output: Output,
        /// The directory that the agents of this node share.
        state_dir: PathBuf,
    },
    /// Show which pods were given the credentials with an AccessKeyId, and exit.
    ExplainAccessKey {
        /// The AccessKeyId.
        access_key_id: String,
        /// The output format.
        output: Output,
        /// The directory that the agents of this node share.
        state_dir: PathBuf,
    },
    /// Check whether this container's agent answers, and exit.
    Live(SocketPaths),
    /// Show or change the running agent's log level, and exit.
    LogLevel {
        /// How it is to change.
        change: Option<ChangeLogLevel>,
        /// The directory that the agents of this node share.
        state_dir: PathBuf,
    },
    /// Check whether an agent could run here, and exit.
    Preflight(NodePaths),
    /// Check whether this container's agent is ready, and exit.
    Ready(SocketPaths),
    /// Show the state of the running agent, and exit.
    Status {
        /// The output format.
        output: Output,
        /// The directory that the agents of this node share.
        state_dir: PathBuf,
    },
    /// To show what the running agent knows of pods and namespaces, and end.
    Store {
        /// The directory that the agents of this node share.
        state_dir: PathBuf,
    },
    /// Remove all programs, maps and rules, and exit.
    Uninstall {
        /// The bpffs directory of the pins.
        bpf_dir: PathBuf,
        /// The directory that the agents of this node share.
        state_dir: PathBuf,
    },
}

/// How a document is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For programs: one object, whose fields keep their meaning while its `schema` is the same.
    Json,
    /// For people.
    Text,
}

/// The command for the boot guard.
#[derive(Debug)]
pub enum BootGuardCommand {
    /// Activate it.
    Apply(Guard),
    /// It is put on the host.
    Install(Installation),
    /// It is removed from the host.
    Remove {
        /// The host's file system, as it is mounted here.
        host_root: PathBuf,
    },
}

/// clap's message, as an error of this program.
fn of_clap(error: clap::Error) -> ArgsError {
    ArgsError::of_parser("kube2ram", error.exit_code(), error.to_string())
}

impl Command {
    /// Parses the command line (`args` begins with the program's name) and the environment (`env` looks up a
    /// variable). Flags on the command line take precedence.
    ///
    /// # Errors
    /// [`ArgsError::Usage`] about the first thing that is wrong; [`ArgsError::Help`] when that was asked for.
    pub fn from_args(
        args: impl IntoIterator<Item = OsString>,
        env: &dyn Fn(&str) -> Option<OsString>,
    ) -> Result<Self, ArgsError> {
        Self::on_machine(args, env, &rustix::system::uname().nodename().to_string_lossy())
    }

    /// The same on a machine with this host name.
    fn on_machine(
        args: impl IntoIterator<Item = OsString>,
        env: &dyn Fn(&str) -> Option<OsString>,
        host_name: &str,
    ) -> Result<Self, ArgsError> {
        let mut args = args.into_iter();
        let command = retired::add_to(flags::command());
        let program = args.next().unwrap_or_else(|| "kube2ram".into());
        let is_kube2iam = is_kube2iam(&program);
        let by_program = is_kube2iam.then(|| format!("--cloud={}", Cloud::Aws.name()).into());
        let from_environment = environment::args(&command, env);
        let matches = command
            .try_get_matches_from([program].into_iter().chain(by_program).chain(from_environment).chain(args))
            .map_err(of_clap)?;
        let flags = Flags::from_arg_matches(&matches).map_err(of_clap)?;
        match flags.subcommand {
            None => {
                let is_unsigned = flags.credentials.is_by_service_account();
                let unused = is_unsigned.then(|| environment::own_credentials_notice(env)).flatten();
                let notices = retired::notices(&matches).into_iter();
                let notices = notices.chain(environment::proxy_notice(env)).chain(unused);
                Ok(Self::Agent(Config::try_new(flags, notices.collect(), is_kube2iam, host_name)?.into()))
            }
            Some(Subcommand::BootGuard(command)) => {
                let guard = |of: flags::Guard| Guard {
                    bpf_dir: flags.bpf_dir,
                    cgroup_root: flags.cgroup_root,
                    forward_guard: flags.forward_guard == ForwardGuardMode::Auto,
                    host_cgroups: of.host_cgroup,
                    metadata: metadata(&flags.address),
                };
                Ok(Self::BootGuard(match command {
                    flags::BootGuard::Apply(of) => BootGuardCommand::Apply(guard(of)),
                    flags::BootGuard::Install { guard: of, host, optional, required_by_kubelet } => {
                        let host_root = host.host_root;
                        BootGuardCommand::Install(Installation {
                            guard: guard(of),
                            host_root,
                            report_to: optional.then(|| flags.pod_dir.clone()),
                            required_by_kubelet,
                        })
                    }
                    flags::BootGuard::Remove(host) => BootGuardCommand::Remove { host_root: host.host_root },
                }))
            }
            Some(Subcommand::Explain { pod, access_key_id, output }) => {
                let state_dir = flags.state_dir;
                match (access_key_id, pod) {
                    (Some(access_key_id), _) => {
                        Ok(Self::ExplainAccessKey { access_key_id, output, state_dir })
                    }
                    (None, Some((namespace, name))) => {
                        Ok(Self::Explain { namespace, name, output, state_dir })
                    }
                    (None, None) => {
                        Err(ArgsError::usage("explain needs <namespace>/<pod> or --access-key-id"))
                    }
                }
            }
            Some(Subcommand::Live) => Ok(Self::Live(SocketPaths::new(&flags.pod_dir, &flags.state_dir))),
            Some(Subcommand::LogLevel { level, span }) => Ok(Self::LogLevel {
                change: level.map(|change| match change {
                    value::LevelChange::Reset => ChangeLogLevel::Reset,
                    value::LevelChange::To(level) => {
                        ChangeLogLevel::To { level: level.to_string(), seconds: span.as_secs() }
                    }
                }),
                state_dir: flags.state_dir,
            }),
            Some(Subcommand::Status { output }) => Ok(Self::Status { output, state_dir: flags.state_dir }),
            Some(Subcommand::Store) => Ok(Self::Store { state_dir: flags.state_dir }),
            Some(Subcommand::Preflight) => Ok(Self::Preflight(NodePaths {
                bpf_dir: flags.bpf_dir,
                cgroup_root: flags.cgroup_root,
                cloud: flags.address.cloud,
                metadata: metadata(&flags.address),
                metadata_is_set: flags.address.metadata_addr.is_some(),
                pods_cgroup: flags.pods_cgroup,
                impersonates_node: flags.credentials.impersonates_node()
                    && flags.api_server.is_none()
                    && flags.kubeconfig.is_none(),
            })),
            Some(Subcommand::Ready) => Ok(Self::Ready(SocketPaths::new(&flags.pod_dir, &flags.state_dir))),
            Some(Subcommand::Uninstall) => {
                Ok(Self::Uninstall { bpf_dir: flags.bpf_dir, state_dir: flags.state_dir })
            }
        }
    }
}

/// Refuses `KUBE2RAM_…` variables that stand for no flag. For the agent only: subcommands in its container
/// inherit its environment.
///
/// # Errors
/// [`ArgsError::Usage`], which names the first one.
pub fn refuse_unknown(variables: impl IntoIterator<Item = (OsString, OsString)>) -> Result<(), ArgsError> {
    let command = retired::add_to(flags::command());
    let Some(name) = environment::unknown(&command, variables) else { return Ok(()) };
    let hint = match environment::similar(&command, &name) {
        Some(known) => format!(": it may be meant for {known}"),
        None => String::new(),
    };
    Err(ArgsError::Usage(format!("the variable {name} stands for no flag{hint}")))
}

/// Whether the program was started as kube2iam: its manifests have no flag of ours, and its name chooses the
/// cloud.
fn is_kube2iam(program: &OsStr) -> bool {
    Path::new(program).file_name() == Some(OsStr::new("kube2iam"))
}

#[cfg(test)]
mod tests;
