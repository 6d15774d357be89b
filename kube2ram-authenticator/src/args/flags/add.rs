//! The flags of `add user` and `add role`, with the names of ack-ram-authenticator's. Doc comments are the
//! help text. Depends on clap; read by the parent's parent.

use std::{env, path::PathBuf};

use clap::{ArgAction, Args, Subcommand};
use http::Uri;

use super::super::{Add, value};
use crate::backend::add::Addition;

/// What is added.
#[derive(Subcommand)]
pub(crate) enum AddWhat {
    /// Adds a mapping of a role to the list mapRoles
    Role {
        /// ARN of the role
        #[arg(long, value_name = "ARN")]
        rolearn: String,
        #[command(flatten)]
        more: AddFlags,
    },
    /// Adds a mapping of a RAM user to the list mapUsers
    User {
        /// ARN of the RAM user
        #[arg(long, value_name = "ARN")]
        userarn: String,
        #[command(flatten)]
        more: AddFlags,
    },
}

/// What both have.
#[derive(Args)]
pub(crate) struct AddFlags {
    /// Name of the user in the cluster, with or without placeholders
    #[arg(long, value_name = "NAME")]
    username: String,
    /// Groups of the user in the cluster, with commas between
    #[arg(long, value_name = "GROUPS", required = true, value_delimiter = ',')]
    groups: Vec<String>,
    /// Id of the only user or role that is mapped: of those that are created again under this name, none is
    #[arg(long, value_name = "ID")]
    userid: Option<String>,
    /// Path of the kubeconfig file [default: those of $KUBECONFIG, or else ~/.kube/config]
    #[arg(long, value_name = "PATH")]
    kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig file [default: its current one]
    #[arg(long, value_name = "NAME")]
    kubeconfig_context: Option<String>,
    /// URL of the API server, https only [default: the context's]
    #[arg(long, value_name = "URL", value_parser = value::api_server)]
    master_url: Option<Uri>,
    /// Ask before anything is written
    #[arg(
        long,
        value_name = "BOOL",
        action = ArgAction::Set,
        num_args = 0..=1,
        require_equals = true,
        default_value = "true",
        default_missing_value = "true",
        value_parser = value::boolean
    )]
    prompt: bool,
}

impl AddWhat {
    /// `kubeconfigs` are the paths in the environment.
    pub(crate) fn with(self, kubeconfigs: Option<String>) -> Add {
        let (is_role, arn, more) = match self {
            Self::Role { rolearn, more } => (true, rolearn, more),
            Self::User { userarn, more } => (false, userarn, more),
        };
        let AddFlags { username, groups, userid, kubeconfig, kubeconfig_context, master_url, prompt } = more;
        let listed = || {
            let paths = kubeconfigs.iter().flat_map(env::split_paths);
            paths.filter(|path| !path.as_os_str().is_empty()).collect()
        };
        Add {
            addition: Addition { is_role, arn, username, groups, user_id: userid },
            kubeconfigs: kubeconfig.map_or_else(listed, |path| vec![path]),
            context: kubeconfig_context,
            server: master_url,
            asks: prompt,
        }
    }
}
