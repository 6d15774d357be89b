//! The metadata service of EC2, as a table. Sources: EC2 user guide, "Instance metadata", "Instance metadata
//! categories" and "Use IMDSv2"; the defaults of amazon-ec2-metadata-mock; the SDKs' sources for how long
//! they wait.

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

/// AWS's.
pub static DIALECT: Dialect = Dialect {
    metadata: MetadataAddr {
        v4: SocketAddrV4::new(Ipv4Addr::new(169, 254, 169, 254), 80),
        v6: Some(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    },
    credentials: &["meta-data", "iam"],
    items: Items {
        dump: &[],
        // Keys of the instance's own identity, which are there on every instance, with a profile or without;
        // and `security-credentials-extended`, which some SDKs' branches ask for.
        closed_prefixes: &["identity-credentials", SECURITY_CREDENTIALS],
        secrets: &[&["user-data"], &["managed-ssh-keys"]],
        // The signatures of the document: `pkcs7`, `rsa2048`, `signature`.
        identity: &["dynamic", "instance-identity"],
        // Unsigned. Go v2, Java v2 and .NET find their region there.
        open: &[&["dynamic", "instance-identity", "document"]],
        // The instance profile, with the account: where node agents find it.
        node_role: &[&["meta-data", "iam", "info"]],
        listed: &[
            &["ami-id"],
            &["autoscaling"],
            &["autoscaling", "target-lifecycle-state"],
            &["hostname"],
            &["instance-id"],
            &["instance-life-cycle"],
            &["instance-type"],
            &["ipv6"],
            &["local-hostname"],
            &["local-ipv4"],
            &["mac"],
            &["reservation-id"],
            &["security-groups"],
        ],
        interfaces: &["network", "interfaces", "macs"],
        trees: &[&["events"], &["placement"], &["services"], &["spot"]],
        last_names: &[
            "iam",
            "identity-credentials",
            "instance-identity",
            "managed-ssh-keys",
            "pkcs7",
            "rsa2048",
            SECURITY_CREDENTIALS,
            "security-credentials-extended",
            "signature",
            "user-data",
        ],
    },
    server: "EC2ws",
    tokens: TokenHeaders {
        token: HeaderName::from_static("x-aws-ec2-metadata-token"),
        ttl: HeaderName::from_static("x-aws-ec2-metadata-token-ttl-seconds"),
        longest_ttl: 21_600,
        echoes_ttl: true,
        missing: StatusCode::UNAUTHORIZED,
    },
    document: document::write,
    advice: refusal::advice,
    exchange_advice: refusal::exchange_advice,
    // Go v2 gives up after 500 ms without a response's head, and most others after 1 s.
    patience: Patience {
        lookup: Duration::from_millis(350),
        start: Duration::from_millis(350),
        answer: Duration::from_millis(440),
        request: Duration::from_millis(450),
    },
    // The first, the second and the last are kube2iam's.
    annotations: Annotations {
        role: "iam.amazonaws.com/role",
        // IRSA's, of amazon-eks-pod-identity-webhook: an ARN.
        account_role: "eks.amazonaws.com/role-arn",
        external_id: "iam.amazonaws.com/external-id",
        policy: "iam.amazonaws.com/policy",
        duration: "iam.amazonaws.com/session-duration",
        session_name: "iam.amazonaws.com/session-name",
        allowed_roles: "iam.amazonaws.com/allowed-roles",
    },
    arns: ArnStyle::Aws,
    audience: "sts.amazonaws.com",
    subject_key: "<provider>:sub",
    sessions: SessionRules::AWS,
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_addresses_are_the_documented_ones() {
        assert_eq!(DIALECT.metadata.to_string(), "169.254.169.254:80 and [fd00:ec2::254]:80");
    }

    #[test]
    fn every_credential_tree_is_closed_whatever_the_policy() {
        let items = &DIALECT.items;

        assert_eq!(DIALECT.credentials, ["meta-data", "iam"]);
        assert_eq!(items.closed_prefixes, ["identity-credentials", SECURITY_CREDENTIALS]);
        assert!(items.dump.is_empty(), "nothing has all of it");
        // What is closed must not be listed, nor opened by an exception.
        let is_closed = |name: &&str| items.closed_prefixes.iter().any(|prefix| name.starts_with(prefix));
        for listed in items.listed.iter().chain(items.trees).chain([&items.interfaces]) {
            assert!(!listed.iter().any(is_closed), "{listed:?}");
            assert!(!listed.is_empty() && !listed.contains(&"iam"), "{listed:?}");
            assert!(!listed.iter().any(|name| items.last_names.contains(name)), "{listed:?}");
        }
        for open in items.open {
            assert!(open.starts_with(items.identity) && open.len() > items.identity.len(), "{open:?}");
            assert!(!items.last_names.contains(open.last().unwrap()), "{open:?}");
        }
        for item in items.node_role {
            assert!(item.starts_with(DIALECT.credentials), "{item:?}");
            let below = &item[DIALECT.credentials.len()..];
            assert!(!below.is_empty() && !below.iter().any(is_closed), "{item:?}");
        }
    }

    #[test]
    fn each_closed_name_is_one_that_a_query_must_not_hold() {
        let items = &DIALECT.items;
        let closed = [DIALECT.credentials, items.identity].into_iter().chain(items.secrets.iter().copied());

        for name in closed.map(|names| names.last().unwrap()).chain(items.closed_prefixes) {
            assert!(items.last_names.contains(name), "{name}");
        }
    }

    #[test]
    fn every_wait_ends_before_the_most_impatient_sdk_does() {
        let Patience { lookup, start, answer, request } = DIALECT.patience;

        assert!(lookup < answer && start < answer && answer < request);
        assert!(request + Duration::from_millis(50) <= Duration::from_millis(500));
    }
}
