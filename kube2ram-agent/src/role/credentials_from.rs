//! By whose right roles are assumed. Pure; called by the parent, and by `args` and `app` for the type.

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

impl CredentialsFrom {
    /// As in the flag.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::ServiceAccount => "service-account",
        }
    }
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
