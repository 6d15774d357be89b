//! The flags of the commands for users: `token` and `verify`. Doc comments are the help text. Depends on
//! clap; read by the parent's parent.

use std::path::PathBuf;

use clap::Args;
use kube2ram_cloud::{
    alibaba::endpoint::{Endpoint, Region},
    role::{ExternalId, RoleArn, SessionName},
};

use super::super::{ApiVersion, ArgsError, AssumedRole, CredentialType, Credentials, Output, Token, value};

/// Flags of `token`.
#[derive(Args)]
pub(crate) struct TokenFlags {
    /// Version of client.authentication.k8s.io, if kubectl does not name it: v1 or v1beta1
    #[arg(long, value_enum, value_name = "VERSION", default_value = "v1beta1", hide_possible_values = true)]
    api_version: ApiVersion,
    /// Print the token alone
    #[arg(long)]
    token_only: bool,

    /// ARN of a role to assume first. The token is then the role's
    #[arg(
        short,
        long,
        value_name = "ARN",
        visible_alias = "role",
        value_parser = value::role,
        help_heading = "Role"
    )]
    role_arn: Option<RoleArn>,
    /// Name of the role's session, which the audit log shows [default: $ALIBABA_CLOUD_ROLE_SESSION_NAME, or
    /// else kube2ram-authenticator]
    #[arg(
        short,
        long,
        value_name = "NAME",
        requires = "role_arn",
        value_parser = value::session_name,
        help_heading = "Role"
    )]
    session_name: Option<SessionName>,
    /// External id that the role's trust policy asks for
    #[arg(
        short,
        long,
        value_name = "ID",
        requires = "role_arn",
        value_parser = value::external_id,
        help_heading = "Role"
    )]
    external_id: Option<ExternalId>,
    /// Keep the credentials of assumed roles in files that only you can read, until they expire. Keys that do
    /// not expire are never kept
    #[arg(long, help_heading = "Role")]
    cache: bool,

    /// Where credentials come from: auto for all places in their order, or ecs-role for the role attached to
    /// this machine
    #[arg(
        long,
        value_enum,
        value_name = "TYPE",
        default_value = "auto",
        hide_possible_values = true,
        help_heading = "Credentials"
    )]
    credential_type: CredentialType,
    /// Do not look for credentials in the environment
    #[arg(long, help_heading = "Credentials")]
    ignore_env_credentials: bool,
    /// Do not look for credentials in the file of the Alibaba Cloud CLI
    #[arg(long, help_heading = "Credentials")]
    ignore_aliyun_cli_credentials: bool,
    /// Name of a profile
    #[arg(short, long, value_name = "NAME", visible_alias = "profile-name", help_heading = "Credentials")]
    profile: Option<String>,
    /// Path of the file of profiles [default: ~/.aliyun/config.json]
    #[arg(long, value_name = "PATH", help_heading = "Credentials")]
    profile_file: Option<PathBuf>,

    /// Region whose STS is asked for the role [default: $STS_REGION, or else the endpoint of no region]
    #[arg(
        long,
        value_name = "REGION",
        visible_alias = "region-id",
        value_parser = value::region,
        help_heading = "STS"
    )]
    region: Option<Region>,
    /// The only STS endpoint to use for the role
    #[arg(long, value_name = "URL", value_parser = value::sts_endpoint, help_heading = "STS")]
    sts_endpoint: Option<Endpoint>,
}

/// Flags of `verify`.
#[derive(Args)]
pub(crate) struct VerifyFlags {
    /// The token. Every process of this machine can read a command line
    #[arg(short, long, value_name = "TOKEN")]
    pub(crate) token: String,
    /// Output format: text, or json
    #[arg(short, long, value_enum, default_value = "text", hide_possible_values = true)]
    pub(crate) output: Output,
    /// Region whose STS is asked [default: $STS_REGION, or else the endpoint of no region]
    #[arg(long, value_name = "REGION")]
    pub(crate) region: Option<String>,
    /// The only STS endpoint to use
    #[arg(long, value_name = "URL", value_parser = value::sts_endpoint)]
    pub(crate) sts_endpoint: Option<Endpoint>,
}

impl TokenFlags {
    /// `session` is the environment's name of a role's session.
    pub(crate) fn with(
        self,
        cluster_id: Option<String>,
        region: Option<Region>,
        session: Option<String>,
    ) -> Result<Token, ArgsError> {
        let cluster_id = cluster_id
            .filter(|id| !id.is_empty())
            .ok_or_else(|| ArgsError::Usage("give --cluster-id: what the token is for".to_owned()))?;
        let session = match self.session_name {
            Some(session) => session,
            None => SessionName::fit(session.as_deref().unwrap_or(SESSION_NAME)),
        };
        let external_id = self.external_id;
        Ok(Token {
            cluster_id,
            api_version: self.api_version,
            role: self.role_arn.map(|arn| AssumedRole { arn, session, external_id }),
            credentials: Credentials {
                node_role: self.credential_type == CredentialType::EcsRole,
                ignore_environment: self.ignore_env_credentials,
                ignore_profiles: self.ignore_aliyun_cli_credentials,
                profile: self.profile,
                profile_file: self.profile_file,
            },
            is_bare: self.token_only,
            is_cached: self.cache,
            region: self.region.or(region),
            sts_endpoint: self.sts_endpoint,
        })
    }
}

const SESSION_NAME: &str = "kube2ram-authenticator";
