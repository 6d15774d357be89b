//! The metadata service of ECS, as a table. Sources: ECS, "Instance metadata" and "Instance RAM roles".

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddrV4},
    time::Duration,
};

use http::{HeaderName, StatusCode};

use super::{document, refusal};
use crate::{
    MetadataAddr,
    dialect::{Annotations, Dialect, Items, Patience, SECURITY_CREDENTIALS, TokenHeaders},
    role::{ArnStyle, SessionRules},
};

/// Alibaba Cloud's.
pub static DIALECT: Dialect = Dialect {
    metadata: MetadataAddr {
        v4: SocketAddrV4::new(Ipv4Addr::new(100, 100, 100, 200), 80),
        v6: Some(Ipv6Addr::new(0xfd00, 0x100, 0, 0, 0, 0, 0x100, 0x200)),
    },
    credentials: &["meta-data", "ram"],
    items: Items {
        dump: &[&["meta-data", "all"]],
        closed_prefixes: &[],
        secrets: &[&["user-data"], &["vendor-data"]],
        // The document and its signature (`pkcs7`).
        identity: &["dynamic", "instance-identity"],
        open: &[],
        node_role: &[],
        listed: &[
            &["dns-conf", "nameservers"],
            &["hostname"],
            &["instance", "instance-type"],
            &["instance", "spot", "termination-time"],
            &["instance-id"],
            &["mac"],
            &["network-type"],
            &["ntp-conf", "ntp-servers"],
            &["owner-account-id"],
            &["private-ipv4"],
            &["region-id"],
            &["vpc-cidr-block"],
            &["vpc-id"],
            &["vswitch-cidr-block"],
            &["vswitch-id"],
            &["zone-id"],
        ],
        interfaces: &["network", "interfaces", "macs"],
        trees: &[],
        last_names: &["all", "instance-identity", "ram", SECURITY_CREDENTIALS, "user-data", "vendor-data"],
    },
    server: "ECSws",
    tokens: TokenHeaders {
        token: HeaderName::from_static("x-aliyun-ecs-metadata-token"),
        ttl: HeaderName::from_static("x-aliyun-ecs-metadata-token-ttl-seconds"),
        longest_ttl: 21_600,
        echoes_ttl: false,
        missing: StatusCode::FORBIDDEN,
    },
    document: document::write,
    advice: refusal::advice,
    exchange_advice: refusal::exchange_advice,
    // The SDKs give up after 1 s.
    patience: Patience {
        lookup: Duration::from_millis(700),
        start: Duration::from_millis(700),
        answer: Duration::from_millis(800),
        request: Duration::from_millis(900),
    },
    annotations: Annotations {
        role: "ram.aliyuncs.com/role",
        // RRSA's, of ack-pod-identity-webhook: a name, of the cluster's account.
        account_role: "pod-identity.alibabacloud.com/role-name",
        external_id: "ram.aliyuncs.com/external-id",
        policy: "ram.aliyuncs.com/policy",
        duration: "ram.aliyuncs.com/session-duration",
        session_name: "ram.aliyuncs.com/session-name",
        allowed_roles: "ram.aliyuncs.com/allowed-roles",
    },
    arns: ArnStyle::Acs,
    audience: "sts.aliyuncs.com",
    subject_key: "oidc:sub",
    sessions: SessionRules::ACS,
};
