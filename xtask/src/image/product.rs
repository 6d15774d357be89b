//! The images, and what differs between them. Two of them hold the same program, the agent. Called by
//! `image`, `proof` and `build`.

use super::layout::Facts;

/// Started by this name, the agent has kube2iam's defaults.
pub(super) const KUBE2IAM: &str = "kube2iam";

/// An image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Product {
    /// The agent
    Agent,
    /// The authenticator
    Authenticator,
    /// The agent, started as kube2iam: for kube2iam's manifests, which have no `command`
    #[value(name = "kube2iam")]
    Kube2iam,
}

impl Product {
    pub(crate) const ALL: [Self; 3] = [Self::Agent, Self::Authenticator, Self::Kube2iam];

    /// The name of the image's repository, and its title.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Agent | Self::Authenticator => self.program(),
            Self::Kube2iam => "kube2ram-as-kube2iam",
        }
    }

    /// The program's name.
    pub(crate) fn program(self) -> &'static str {
        match self {
            Self::Agent | Self::Kube2iam => "kube2ram",
            Self::Authenticator => "kube2ram-authenticator",
        }
    }

    /// Whether the program in it is the agent.
    pub(super) fn is_of_agent(self) -> bool {
        self.program() == Self::Agent.program()
    }

    /// The package that has the program.
    pub(crate) fn package(self) -> &'static str {
        match self {
            Self::Agent | Self::Kube2iam => "kube2ram-agent",
            Self::Authenticator => "kube2ram-authenticator",
        }
    }

    /// Where the manifests expect it.
    pub(super) fn path(self) -> String {
        format!("usr/local/bin/{}", self.program())
    }

    /// What a container runs whose manifest names no command.
    pub(super) fn entrypoint(self) -> String {
        match self {
            Self::Agent | Self::Authenticator => format!("/{}", self.path()),
            Self::Kube2iam => format!("/{KUBE2IAM}"),
        }
    }

    /// Who runs it, unless the manifest says otherwise. The agent's needs root.
    pub(super) fn user(self) -> &'static str {
        match self {
            Self::Agent | Self::Kube2iam => "0:0",
            Self::Authenticator => "64532:64532",
        }
    }

    /// What the layer of the program brings.
    pub(super) fn brings(self) -> &'static str {
        match self {
            Self::Agent | Self::Kube2iam => "the agent, one static file",
            Self::Authenticator => "the authenticator, one static file",
        }
    }

    /// The directory of its layout, in `target/dist`.
    pub(super) fn layout(self) -> &'static str {
        match self {
            Self::Agent => "oci",
            Self::Authenticator => "oci-authenticator",
            Self::Kube2iam => "oci-kube2iam",
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
                Self::Kube2iam => "The agent of kube2ram, started as kube2iam for kube2iam's manifests",
            },
            licenses: env!("CARGO_PKG_LICENSE"),
            created,
            revision,
            source,
        }
    }
}
