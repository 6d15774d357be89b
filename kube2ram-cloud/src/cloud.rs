//! The clouds that there are. Data only; the agent's `args` chooses one, and its `app` composes its parts.

use crate::{alibaba, aws, dialect::Dialect};

/// A cloud.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cloud {
    /// Alibaba Cloud: ECS, RAM.
    Alibaba,
    /// AWS: EC2, IAM.
    Aws,
}

impl Cloud {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Alibaba, Self::Aws];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Alibaba => "alibaba",
            Self::Aws => "aws",
        }
    }

    /// How its metadata service speaks.
    pub fn dialect(self) -> &'static Dialect {
        match self {
            Self::Alibaba => &alibaba::DIALECT,
            Self::Aws => &aws::DIALECT,
        }
    }
}
