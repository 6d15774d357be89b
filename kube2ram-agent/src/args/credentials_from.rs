//! The flags by which pods' roles come from ServiceAccounts, and the audit file: their help texts, and what
//! goes together. Doc comments are the help text, as in `flags`. Depends on clap; read by the parent and
//! `config`.

#![allow(
    rustdoc::broken_intra_doc_links,
    rustdoc::invalid_html_tags,
    reason = "doc comments are the help text"
)]

use std::{path::PathBuf, str::FromStr};

use super::{ArgsError, value};
pub use crate::role::CredentialsFrom;
use crate::role::SessionTags;
use kube2ram_cloud::{Cloud, OidcProviderArn};

/// By whose right the API server is asked for tokens of ServiceAccounts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TokenRequestsAs {
    /// As the agent's own ServiceAccount: RBAC grants `create serviceaccounts/token`, and admission policies
    /// confine it.
    Agent,
    /// As the agent's node, which the agent may impersonate for this alone (constrained impersonation,
    /// KEP-5284, Kubernetes 1.36): the Node authorizer and NodeRestriction confine it to the node's pods.
    #[default]
    Node,
}

impl FromStr for TokenRequestsAs {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "agent" => Ok(Self::Agent),
            "node" => Ok(Self::Node),
            _ => Err("give node or agent"),
        }
    }
}

/// The flags about ServiceAccounts.
#[derive(clap::Args)]
pub(super) struct CredentialFlags {
    /// By whose right pods' roles are assumed. node: the agent's own, so roles trust the node's role.
    /// service-account: the pod's ServiceAccount's, so roles trust ServiceAccounts, and the node's role needs
    /// no right. The agent then asks the API server for a token of the ServiceAccount and exchanges it at
    /// STS. It never falls back from one to the other
    #[arg(long, value_name = "SOURCE", default_value = "node", help_heading = "Roles", global = true)]
    pub(super) credentials_from: CredentialsFrom,
    /// Read roles from pods' ServiceAccounts, too: from an annotation of the pods' key, else from that of the
    /// cloud's own webhook (pod-identity.alibabacloud.com/role-name, on AWS eks.amazonaws.com/role-arn). A
    /// session policy, duration and name are read there, too. The pod's own annotations take precedence.
    /// Requires the right to get ServiceAccounts. --credentials-from=service-account includes this
    #[arg(long, help_heading = "Roles")]
    pub(super) service_account_roles: bool,
    /// As whom the agent asks for tokens of ServiceAccounts. node: it impersonates its own node, and gets
    /// tokens for pods of this node only (from Kubernetes 1.36). agent: as itself. Without the admission
    /// policies that belong to it, that right is one to every ServiceAccount of the cluster
    #[arg(long, value_name = "REQUESTER", default_value = "node", help_heading = "Roles", global = true)]
    pub(super) token_requests_as: TokenRequestsAs,
    /// The cluster's OIDC provider in RAM: acs:ram::<account>:oidc-provider/<name>. Required on Alibaba Cloud
    /// with --credentials-from=service-account, and unused otherwise. Bare role names are then roles of its
    /// account, if --auto-discover-base-arn is set
    #[arg(long, value_name = "ARN", value_parser = value::oidc_provider, help_heading = "Cloud")]
    pub(super) oidc_provider_arn: Option<OidcProviderArn>,
    /// File to which the agent writes a line of JSON for each session that STS issues: who got which role,
    /// with STS's request id and the access key's id. It holds no secrets. The log has the same lines
    #[arg(long, value_name = "PATH", value_parser = value::file, help_heading = "Observability")]
    pub(super) audit_file: Option<PathBuf>,
}

impl CredentialFlags {
    /// Whether annotations of ServiceAccounts are read.
    pub(super) fn reads_service_accounts(&self) -> bool {
        self.service_account_roles || self.is_by_service_account()
    }

    /// Checks what goes together. Returns a line for each flag that has no effect.
    ///
    /// # Errors
    /// [`ArgsError::Usage`]. What the exchange of a token cannot carry is never left out in silence.
    pub(super) fn check(
        &self,
        cloud: Cloud,
        tags: SessionTags,
        has_source_identity: bool,
    ) -> Result<Option<String>, ArgsError> {
        if !self.is_by_service_account() {
            let is_unused = self.token_requests_as != TokenRequestsAs::default();
            return Ok(is_unused.then(|| {
                "--token-requests-as has no effect without --credentials-from=service-account".to_owned()
            }));
        }
        if cloud == Cloud::Alibaba && self.oidc_provider_arn.is_none() {
            return Err(ArgsError::usage(
                "--credentials-from=service-account needs the cluster's OIDC provider: add --oidc-provider-arn, or the variable ALIBABA_CLOUD_OIDC_PROVIDER_ARN",
            ));
        }
        let excluded = [
            (tags != SessionTags::None, "--session-tags", "session tags"),
            (has_source_identity, "--source-identity", "a source identity"),
        ];
        match excluded.iter().find(|(is_set, ..)| *is_set) {
            Some((_, flag, what)) => Err(ArgsError::usage(format!(
                "{flag} and --credentials-from=service-account exclude each other, because {what} cannot be sent with a ServiceAccount's token: drop one of them"
            ))),
            None => Ok(None),
        }
    }

    /// Whether the agent asks for tokens as its node.
    pub(super) fn impersonates_node(&self) -> bool {
        self.is_by_service_account() && self.token_requests_as == TokenRequestsAs::Node
    }

    pub(super) fn is_by_service_account(&self) -> bool {
        self.credentials_from == CredentialsFrom::ServiceAccount
    }
}
