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

    /// The one whose machines have this vendor in their firmware (DMI, `sys_vendor`). Older machines of AWS
    /// (Xen) have another.
    ///
    /// Source: EC2 user guide, "Detect whether a host is an EC2 instance"; `hostnamectl` on ECS instances.
    pub fn of_vendor(vendor: &str) -> Option<Self> {
        match vendor {
            "Alibaba Cloud" => Some(Self::Alibaba),
            "Amazon EC2" => Some(Self::Aws),
            _ => None,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cloud_has_a_name_and_a_dialect_of_its_own() {
        let [alibaba, aws] = Cloud::ALL.map(|cloud| (cloud.name(), cloud.dialect().annotations.role));

        assert_eq!(alibaba, ("alibaba", "ram.aliyuncs.com/role"));
        assert_eq!(aws, ("aws", "iam.amazonaws.com/role"));
    }

    #[test]
    fn a_vendor_tells_its_cloud_and_others_tell_none() {
        assert_eq!(Cloud::of_vendor("Alibaba Cloud"), Some(Cloud::Alibaba));
        assert_eq!(Cloud::of_vendor("Amazon EC2"), Some(Cloud::Aws));
        for other in ["", "QEMU", "Xen", "amazon ec2", "Amazon EC2\n"] {
            assert_eq!(Cloud::of_vendor(other), None, "{other:?}");
        }
    }
}
