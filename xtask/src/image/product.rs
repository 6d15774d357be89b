//! The programs that have an image of their own, and what differs between them. Called by `image`, `proof`
//! and `build`.

use super::layout::Facts;

/// A program with an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Product {
    Agent,
    Authenticator,
}

impl Product {
    pub(crate) const ALL: [Self; 2] = [Self::Agent, Self::Authenticator];

    /// The program's name, which is also the repository's.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Agent => "kube2ram",
            Self::Authenticator => "kube2ram-authenticator",
        }
    }

    /// The package that has the program.
    pub(crate) fn package(self) -> &'static str {
        match self {
            Self::Agent => "kube2ram-agent",
            Self::Authenticator => "kube2ram-authenticator",
        }
    }

    /// Where the manifests expect it.
    pub(super) fn path(self) -> String {
        format!("usr/local/bin/{}", self.name())
    }

    /// Who runs it, unless the manifest says otherwise. The agent's needs root.
    pub(super) fn user(self) -> &'static str {
        match self {
            Self::Agent => "0:0",
            Self::Authenticator => "64532:64532",
        }
    }

    /// What the layer of the program brings.
    pub(super) fn brings(self) -> &'static str {
        match self {
            Self::Agent => "the agent, one static file",
            Self::Authenticator => "the authenticator, one static file",
        }
    }

    /// The directory of its layout, in `target/dist`.
    pub(super) fn layout(self) -> &'static str {
        match self {
            Self::Agent => "oci",
            Self::Authenticator => "oci-authenticator",
        }
    }

    /// Its layout in one file.
    pub(super) fn archive(self) -> String {
        format!("{}.oci.tar", self.name())
    }

    pub(super) fn facts(self, created: String, revision: Option<String>, source: Option<String>) -> Facts {
        Facts {
            title: self.name(),
            version: env!("CARGO_PKG_VERSION"),
            description: match self {
                Self::Agent => "Gives each Kubernetes pod on an Alibaba Cloud or AWS node its own cloud role",
                Self::Authenticator => "Lets RAM users and roles log in to a Kubernetes API server",
            },
            licenses: env!("CARGO_PKG_LICENSE"),
            created,
            revision,
            source,
        }
    }
}
