//! What each cloud's metadata server keeps where, and what its names are made of, by the cloud's own
//! documents (ECS and EC2: "Instance metadata", with its categories; RAM and IAM: identifiers; STS:
//! AssumeRole). Written by hand: a mistake in a `Dialect` must not be repeated here.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4};

use kube2ram_cloud::{Cloud, MetadataAddr};

/// One cloud's. Items are recognised by neighbouring segments, at any depth; a name that ends in `*` stands
/// for all that begin so.
pub struct Tree {
    /// Where the metadata server is.
    pub metadata: MetadataAddr,
    /// What completes a role's name; begins as all ARNs do.
    pub base: &'static str,
    /// The directory below `meta-data` that the agent answers itself.
    pub directory: &'static str,
    /// How clients write it.
    pub spellings: &'static [&'static str],
    /// What role names hold besides letters and digits.
    pub role_marks: &'static [u8],
    /// What session names hold besides letters and digits.
    pub session_marks: &'static [u8],
    /// The node's credentials: closed with every policy.
    pub credentials: &'static [&'static [&'static str]],
    /// What is closed besides, unless the policy is `open`.
    pub sensitive: &'static [&'static [&'static str]],
    /// What of both is also closed to pods that may have the node's role.
    pub secrets: &'static [&'static [&'static str]],
    /// What of [`directory`](Self::directory) those pods may ask of the real server by its own name.
    pub node_item: Option<&'static str>,
    /// What `strict` leaves open below the version. Directories end in a slash.
    pub listed: &'static [&'static str],
    /// What clients must be able to read with every policy, as they write it.
    pub needed: &'static [&'static str],
}

impl Tree {
    /// The cloud's.
    pub fn of(cloud: Cloud) -> &'static Self {
        match cloud {
            Cloud::Alibaba => &ALIBABA,
            Cloud::Aws => &AWS,
        }
    }

    /// Whether a role is written as an ARN of this cloud.
    pub fn is_arn(&self, role: &str) -> bool {
        role.get(..4).is_some_and(|start| start.eq_ignore_ascii_case(&self.base[..4]))
    }
}

static ALIBABA: Tree = Tree {
    metadata: MetadataAddr {
        v4: SocketAddrV4::new(Ipv4Addr::new(100, 100, 100, 200), 80),
        v6: Some(Ipv6Addr::new(0xfd00, 0x100, 0, 0, 0, 0, 0x100, 0x200)),
    },
    base: "acs:ram::123456789012:role/",
    directory: "ram",
    spellings: &["meta-data/ram", "meta-data/Ram"],
    role_marks: b"._-",
    session_marks: b".@_-",
    credentials: &[&["meta-data", "ram"], &["meta-data", "all"], &["security-credentials"]],
    sensitive: &[&["user-data"], &["vendor-data"], &["dynamic", "instance-identity"]],
    secrets: &[
        &["meta-data", "ram"],
        &["meta-data", "all"],
        &["security-credentials"],
        &["user-data"],
        &["vendor-data"],
    ],
    node_item: None,
    listed: &[
        "meta-data",
        "meta-data/dns-conf/nameservers",
        "meta-data/hostname",
        "meta-data/instance-id",
        "meta-data/instance/instance-type",
        "meta-data/instance/spot/termination-time",
        "meta-data/mac",
        "meta-data/network-type",
        "meta-data/network/interfaces/macs/",
        "meta-data/ntp-conf/ntp-servers",
        "meta-data/owner-account-id",
        "meta-data/private-ipv4",
        "meta-data/region-id",
        "meta-data/vpc-cidr-block",
        "meta-data/vpc-id",
        "meta-data/vswitch-cidr-block",
        "meta-data/vswitch-id",
        "meta-data/zone-id",
    ],
    needed: &["/latest/meta-data/instance-id", "/latest/meta-data/region-id", "/latest/meta-data/zone-id"],
};

/// The keys of the instance's own identity are a second tree, and some clients ask for a third,
/// `security-credentials-extended`. Of the identity, the document is not signed, and says where the region
/// is.
static AWS: Tree = Tree {
    metadata: MetadataAddr {
        v4: SocketAddrV4::new(Ipv4Addr::new(169, 254, 169, 254), 80),
        v6: Some(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    },
    base: "arn:aws:iam::123456789012:role/",
    directory: "iam",
    spellings: &["meta-data/iam", "meta-data//iam"],
    role_marks: b"+=,.@-_",
    session_marks: b"+=,.@-_",
    credentials: &[&["meta-data", "iam"], &["identity-credentials"], &["security-credentials*"]],
    sensitive: &[
        &["user-data"],
        &["managed-ssh-keys"],
        &["dynamic", "instance-identity", "pkcs7"],
        &["dynamic", "instance-identity", "rsa2048"],
        &["dynamic", "instance-identity", "signature"],
    ],
    secrets: &[&["identity-credentials"], &["security-credentials*"], &["user-data"], &["managed-ssh-keys"]],
    node_item: Some("info"),
    listed: &[
        "meta-data",
        "meta-data/ami-id",
        "meta-data/autoscaling",
        "meta-data/autoscaling/target-lifecycle-state",
        "meta-data/events/",
        "meta-data/hostname",
        "meta-data/instance-id",
        "meta-data/instance-life-cycle",
        "meta-data/instance-type",
        "meta-data/ipv6",
        "meta-data/local-hostname",
        "meta-data/local-ipv4",
        "meta-data/mac",
        "meta-data/network/interfaces/macs/",
        "meta-data/placement/",
        "meta-data/reservation-id",
        "meta-data/security-groups",
        "meta-data/services/",
        "meta-data/spot/",
        "dynamic/instance-identity/document",
    ],
    needed: &[
        "/latest/dynamic/instance-identity/document",
        "/latest/meta-data/events/recommendations/rebalance",
        "/latest/meta-data/instance-id",
        "/latest/meta-data/placement/availability-zone",
        "/latest/meta-data/placement/availability-zone/",
        "/latest/meta-data/placement/region",
        "/latest/meta-data/spot/instance-action",
    ],
};
