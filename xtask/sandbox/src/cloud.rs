//! The clouds that a sandbox can stand for, and what follows from the choice: addresses, paths, names. Data
//! only, and none of the agent's. Called by everything in this crate that differs by cloud.

use std::net::{Ipv4Addr, Ipv6Addr};

/// A cloud.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Cloud {
    /// Alibaba Cloud: ECS, RAM.
    #[default]
    Alibaba,
    /// AWS: EC2, IAM.
    Aws,
}

impl Cloud {
    /// Its name on command lines.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Alibaba => "alibaba",
            Self::Aws => "aws",
        }
    }

    /// The IPv4 address of its metadata server.
    pub const fn metadata_ip(self) -> Ipv4Addr {
        match self {
            Self::Alibaba => Ipv4Addr::new(100, 100, 100, 200),
            Self::Aws => Ipv4Addr::new(169, 254, 169, 254),
        }
    }

    /// The IPv6 address of its metadata server.
    pub const fn metadata_ip6(self) -> Ipv6Addr {
        match self {
            Self::Alibaba => Ipv6Addr::new(0xfd00, 0x100, 0, 0, 0, 0, 0x100, 0x200),
            Self::Aws => Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254),
        }
    }

    /// Where a client learns its role, and below it the credentials.
    pub const fn list(self) -> &'static str {
        match self {
            Self::Alibaba => "/latest/meta-data/ram/security-credentials/",
            Self::Aws => "/latest/meta-data/iam/security-credentials/",
        }
    }

    /// The header that carries a session token.
    pub const fn token_header(self) -> &'static str {
        match self {
            Self::Alibaba => "x-aliyun-ecs-metadata-token",
            Self::Aws => "x-aws-ec2-metadata-token",
        }
    }

    /// The header that asks for a session token that lasts so many seconds.
    pub const fn token_ttl_header(self) -> &'static str {
        match self {
            Self::Alibaba => "x-aliyun-ecs-metadata-token-ttl-seconds",
            Self::Aws => "x-aws-ec2-metadata-token-ttl-seconds",
        }
    }

    /// The key of an annotation: of `role`, `allowed-roles`, `external-id` and so on.
    pub fn annotation(self, name: &str) -> String {
        match self {
            Self::Alibaba => format!("ram.aliyuncs.com/{name}"),
            Self::Aws => format!("iam.amazonaws.com/{name}"),
        }
    }

    /// The account that a sandbox is in.
    pub const fn account(self) -> &'static str {
        match self {
            Self::Alibaba => "1234567890123456",
            Self::Aws => "123456789012",
        }
    }

    /// The node's region.
    pub const fn region(self) -> &'static str {
        match self {
            Self::Alibaba => "cn-hangzhou",
            Self::Aws => "eu-west-1",
        }
    }

    /// The node's instance id.
    pub const fn instance_id(self) -> &'static str {
        match self {
            Self::Alibaba => "i-bp1sandbox0000000001",
            Self::Aws => "i-0123456789abcdef0",
        }
    }

    /// The ARN of a role of the account; `name` may have a path.
    pub fn role_arn(self, name: &str) -> String {
        match self {
            Self::Alibaba => format!("acs:ram::{}:role/{name}", self.account()),
            Self::Aws => format!("arn:aws:iam::{}:role/{name}", self.account()),
        }
    }

    /// The ARN of an OIDC provider of the account.
    pub fn provider_arn(self, name: &str) -> String {
        match self {
            Self::Alibaba => format!("acs:ram::{}:oidc-provider/{name}", self.account()),
            Self::Aws => format!("arn:aws:iam::{}:oidc-provider/{name}", self.account()),
        }
    }

    /// The audience of the tokens that its STS takes.
    pub const fn audience(self) -> &'static str {
        match self {
            Self::Alibaba => "sts.aliyuncs.com",
            Self::Aws => "sts.amazonaws.com",
        }
    }

    /// The annotation of a ServiceAccount by which the cloud's own webhook finds its role: by its name, on
    /// AWS by its ARN.
    pub const fn account_annotation(self) -> &'static str {
        match self {
            Self::Alibaba => "pod-identity.alibabacloud.com/role-name",
            Self::Aws => "eks.amazonaws.com/role-arn",
        }
    }

    /// The issuer of the cluster's tokens.
    pub const fn issuer(self) -> &'static str {
        match self {
            Self::Alibaba => "https://oidc-ack-cn-hangzhou.oss-cn-hangzhou.aliyuncs.com/sandbox",
            Self::Aws => "https://oidc.eks.eu-west-1.amazonaws.com/id/SANDBOX",
        }
    }

    /// The ARN of the OIDC provider of that issuer.
    pub fn cluster_provider(self) -> String {
        self.provider_arn(match self {
            Self::Alibaba => "ack-rrsa-sandbox",
            Self::Aws => "oidc.eks.eu-west-1.amazonaws.com/id/SANDBOX",
        })
    }

    /// The action that trades a ServiceAccount's token for a role's session.
    pub const fn exchange(self) -> &'static str {
        match self {
            Self::Alibaba => "AssumeRoleWithOIDC",
            Self::Aws => "AssumeRoleWithWebIdentity",
        }
    }
}
