//! `--credentials-from` and `--token-requests-as`: by whose right roles are assumed, and by whose tokens of
//! ServiceAccounts are asked for. Read by `app`.

use std::str::FromStr;

/// By whose right pods' roles are assumed. There is no falling back from one to the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CredentialsFrom {
    /// By the agent's own: the node's role, or a role of the agent's own. The roles trust it.
    #[default]
    Node,
    /// By the pod's ServiceAccount, whose token the agent asks the API server for. The roles trust it, and
    /// the node's role needs no right.
    ServiceAccount,
}

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

impl FromStr for CredentialsFrom {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "node" => Ok(Self::Node),
            "service-account" => Ok(Self::ServiceAccount),
            _ => Err("give node or service-account"),
        }
    }
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
