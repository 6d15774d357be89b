//! By whose right pods' roles are assumed, as a choice for `show` and trials of SDKs. Depends on the cloud's
//! data. Called by these and by the binary.

use crate::Cloud;

/// By whose right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum CredentialsFrom {
    /// The node's role may assume pods' roles.
    #[default]
    Node,
    /// Pods' roles trust their ServiceAccounts, and the node's role may assume nothing.
    ServiceAccount,
}

impl CredentialsFrom {
    /// Its name on command lines.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::ServiceAccount => "service-account",
        }
    }

    /// The agent's flags for it.
    pub fn flags(self, cloud: Cloud) -> Vec<String> {
        let mut flags = vec![format!("--credentials-from={}", self.name())];
        if self == Self::ServiceAccount && cloud == Cloud::Alibaba {
            flags.push(format!("--oidc-provider-arn={}", cloud.cluster_provider()));
        }
        flags
    }
}
