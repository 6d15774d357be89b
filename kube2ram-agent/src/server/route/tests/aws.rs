//! The paths of EC2's metadata service: the spellings of the parent's tables, and what is there only. That
//! server merges double slashes.

use super::*;
use kube2ram_cloud::aws;

const POLICIES: [MetadataPolicy; 3] =
    [MetadataPolicy::Open, MetadataPolicy::Standard, MetadataPolicy::Strict];
const CLOSED: [MetadataPolicy; 2] = [MetadataPolicy::Standard, MetadataPolicy::Strict];

fn routed(raw: &[u8], policy: MetadataPolicy) -> Option<Route> {
    let target = Target::parse(raw, aws::DIALECT.metadata, &aws::DIALECT).ok()?;
    Some(route(&Method::GET, &target, policy, &aws::DIALECT))
}

/// A target of Alibaba Cloud's as it would be here.
fn translated(raw: &str) -> String {
    [
        ("100.100.100.200", "169.254.169.254"),
        ("RAM", "IAM"),
        ("Ram", "Iam"),
        ("ram", "iam"),
        ("72am", "69am"),
        ("%72%61", "%69%61"),
    ]
    .into_iter()
    .fold(raw.to_owned(), |raw, (from, to)| raw.replace(from, to))
}

/// The node's role, and the identity of the instance. No pod gets the latter.
fn is_credentials(path: &[&str]) -> bool {
    path.windows(2).any(|pair| pair == ["meta-data", "iam"]) || is_for_nobody(path)
}

fn is_for_nobody(path: &[&str]) -> bool {
    let begins =
        |name: &&str| ["security-credentials", "identity-credentials"].iter().any(|s| name.starts_with(s));
    path.iter().any(begins)
}

fn is_secret(path: &[&str]) -> bool {
    path.iter().any(|name| ["user-data", "managed-ssh-keys"].contains(name))
}

fn is_sensitive(path: &[&str]) -> bool {
    let is_signed = |names: &[&str]| {
        names[..2] == ["dynamic", "instance-identity"]
            && ["pkcs7", "rsa2048", "signature"].contains(&names[2])
    };
    is_secret(path) || path.windows(3).any(is_signed)
}

#[test]
fn never_passes_a_confusing_spelling_of_a_credential_path() {
    for (raw, expected) in confusing_spellings() {
        let raw = translated(raw);
        for policy in POLICIES {
            assert_eq!(routed(raw.as_bytes(), policy), expected, "{raw:?} {policy:?}");
        }
        assert!(could_mean(raw.as_bytes(), is_credentials), "the model must see through {raw:?}");
    }
}

#[test]
fn passes_nothing_that_is_closed_but_for_a_suffix_a_parameter_or_a_query() {
    for (raw, expected) in spellings_of_other_servers() {
        let raw = translated(raw);
        assert_eq!(routed(raw.as_bytes(), MetadataPolicy::Standard), expected, "{raw:?}");
    }
}

#[test]
fn every_tree_of_credentials_is_answered_by_the_agent_or_does_not_exist() {
    for (raw, expected) in [
        ("/latest/meta-data//iam/security-credentials/", Some(Route::RoleList)),
        ("//latest//meta-data///iam//security-credentials//r", credentials("r")),
        ("/1.0/meta-data/iam/security-credentials", Some(Route::RoleList)),
        ("/2021-07-15/meta-data/iam/security-credentials/a+b=c,d.e@f-g_h", credentials("a+b=c,d.e@f-g_h")),
        (
            "/latest/meta-data//IAM/security-credentials/arn:aws:iam::123456789012:role%2Fa%2fb",
            credentials("arn:aws:iam::123456789012:role/a/b"),
        ),
        ("http://169.254.169.254/latest/meta-data//iam/security-credentials/", Some(Route::RoleList)),
        ("http://[fd00:ec2::254]/latest/meta-data/iam/security-credentials/r", credentials("r")),
        ("http://[fd00:ec2::254]:80/latest/meta-data/iam/security-credentials/r", credentials("r")),
        ("http://[fd00:ec2::253]/latest/meta-data/", None),
        ("/latest/meta-data/iam/security-credentials-extended", refuses(Refusal::NotFound)),
        ("/latest/meta-data/iam/security-credentials-extended/", refuses(Refusal::NotFound)),
        ("/latest/meta-data//iam//Security-Credentials-Extended//r", refuses(Refusal::NotFound)),
        ("/latest/meta-data/iam/%73ecurity-credentials%2dextended/r", refuses(Refusal::NotFound)),
        ("/latest/meta-data/iam/security-credentials-extended%2fr", None),
        ("/latest/meta-data/iam/security-credentials-extended;x/r", None),
        ("/latest/meta-data/security-credentials-extended/r", refuses(Refusal::NotFound)),
        ("/latest/meta-data/security-credentials-node", refuses(Refusal::NotFound)),
        ("/latest/dynamic/security-credentials.json", refuses(Refusal::NotFound)),
        ("/latest/meta-data/?x=security-credentials-node", refuses(Refusal::NotFound)),
        ("/latest/meta-data/identity-credentials", refuses(Refusal::NotFound)),
        ("/latest/meta-data/identity-credentials/ec2/info", refuses(Refusal::NotFound)),
        (
            "/latest/meta-data/identity-credentials/ec2/security-credentials/ec2-instance",
            refuses(Refusal::NotFound),
        ),
        (
            "/latest//meta-data//identity-credentials//ec2//security-credentials//ec2-instance",
            refuses(Refusal::NotFound),
        ),
        ("/2018-09-24/Meta-Data/Identity-Credentials/ec2/", refuses(Refusal::NotFound)),
        ("/identity-credentials/ec2", refuses(Refusal::NotFound)),
        ("/latest/./meta-data/./identity-credentials/.", refuses(Refusal::NotFound)),
        ("/latest/meta-data/x/../identity-credentials/ec2", None),
        ("/latest/meta-data/%69dentity-credentials/ec2", refuses(Refusal::NotFound)),
        ("/latest/meta-data/%2569dentity-credentials/ec2", None),
        ("/latest/meta-data/identity-credentials%2fec2", None),
        ("/latest/meta-data/identity-credentials;x/ec2", None),
        ("/latest/meta-data/identity-credentials.json", refuses(Refusal::NotFound)),
        ("/latest/meta-data/identity-credentials-x", refuses(Refusal::NotFound)),
        ("/latest/meta-data\\identity-credentials", None),
        ("/latest/meta-data?/identity-credentials/ec2", refuses(Refusal::NotFound)),
        ("http://[fd00:ec2::254]/latest/meta-data/identity-credentials/", refuses(Refusal::NotFound)),
    ] {
        for policy in POLICIES {
            assert_eq!(routed(raw.as_bytes(), policy), expected, "{raw} {policy:?}");
        }
    }
}

#[test]
fn secrets_of_the_node_are_closed_at_any_depth_and_in_any_case() {
    for raw in [
        "/latest/user-data",
        "/latest//user-data//",
        "/2009-04-04/User-Data",
        "/user-data",
        "/latest/user-data/part-001",
        "/latest/meta-data/user-data.txt",
        "/latest/meta-data/managed-ssh-keys/",
        "/latest/meta-data//managed-ssh-keys//signer-key",
        "/latest/Managed-SSH-Keys.json",
        "/latest/dynamic/instance-identity/user-data",
    ] {
        for policy in CLOSED {
            assert_eq!(routed(raw.as_bytes(), policy), refuses(Refusal::Sensitive), "{raw} {policy:?}");
        }
    }
    for raw in ["/latest/user-data", "/latest/meta-data/managed-ssh-keys/signer-key"] {
        assert_eq!(routed(raw.as_bytes(), MetadataPolicy::Open), passes(raw), "the twin");
    }
}

#[test]
fn of_the_identity_the_unsigned_document_alone_is_open() {
    const DOCUMENT: &str = "/latest/dynamic/instance-identity/document";
    for policy in CLOSED {
        let routed = |raw: &str| routed(raw.as_bytes(), policy);
        for raw in [DOCUMENT, "/latest//dynamic//%69nstance-identity//document"] {
            assert_eq!(routed(raw), passes(DOCUMENT), "{raw} {policy:?}");
        }
        for (raw, target) in [
            ("/latest/dynamic/instance-identity/pkcs7", "/latest/dynamic/instance-identity/pkcs7"),
            ("//latest/dynamic//instance-identity//rsa2048", "/latest/dynamic/instance-identity/rsa2048"),
            ("/1.0/dynamic/instance-identity/signature?x", "/1.0/dynamic/instance-identity/signature?x"),
            ("/latest/dynamic/instance-identity/Document", "/latest/dynamic/instance-identity/Document"),
            ("/latest/dynamic/instance-identity/document/x", "/latest/dynamic/instance-identity/document/x"),
            ("/latest/dynamic/instance-identity/document.", "/latest/dynamic/instance-identity/document."),
            ("/latest/dynamic/instance-identity/", "/latest/dynamic/instance-identity/"),
        ] {
            assert_eq!(routed(raw), node_item(target, Refusal::Sensitive), "{raw} {policy:?}");
        }
        for raw in [
            "/latest/Dynamic/instance-identity/pkcs7",
            "/dynamic/instance-identity/pkcs7",
            "/latest/x/dynamic/instance-identity/document",
            "/latest/dynamic/instance-identity.json/pkcs7",
            "/latest/dynamic/instance-identity/?/pkcs7",
        ] {
            assert_eq!(routed(raw), refuses(Refusal::Sensitive), "{raw} {policy:?}");
        }
        for raw in [&format!("{DOCUMENT}?/pkcs7"), &format!("{DOCUMENT}?x=user-data")] {
            assert_eq!(routed(raw), refuses(Refusal::NotFound), "{raw} {policy:?}");
        }
    }
}

/// EC2 user guide, "Instance metadata categories". SDKs, the node termination handler and the CNI plugin ask
/// for these.
#[test]
fn strict_policy_opens_what_clients_need_to_know_where_they_run() {
    let strict = |raw: &str| routed(raw.as_bytes(), MetadataPolicy::Strict);

    for raw in [
        "/",
        "/latest/",
        "/latest/meta-data/",
        "/latest/meta-data/ami-id",
        "/latest/meta-data/autoscaling/target-lifecycle-state",
        "/latest/meta-data/events/maintenance/scheduled",
        "/latest/meta-data/events/recommendations/rebalance",
        "/latest/meta-data/hostname",
        "/latest/meta-data/instance-id",
        "/latest/meta-data/instance-life-cycle",
        "/latest/meta-data/instance-type",
        "/latest/meta-data/ipv6",
        "/latest/meta-data/local-hostname",
        "/latest/meta-data/local-ipv4",
        "/latest/meta-data/mac",
        "/latest/meta-data/network/interfaces/macs/0e:49:61:0f:c3:11/vpc-ipv4-cidr-blocks",
        "/latest/meta-data/placement/availability-zone/",
        "/2021-07-15/meta-data/placement/region",
        "/latest/meta-data/reservation-id",
        "/latest/meta-data/security-groups",
        "/latest/meta-data/services/partition",
        "/latest/meta-data/spot/instance-action",
    ] {
        assert_eq!(strict(raw), passes(raw), "{raw}");
    }
    for raw in [
        "/latest/dynamic/",
        "/latest/meta-data/Instance-Id",
        "/latest/meta-data/Placement/region",
        "/latest/meta-data/autoscaling/x",
        "/latest/meta-data/block-device-mapping/",
        "/latest/meta-data/instance-id/x",
        "/latest/meta-data/network/",
        "/latest/meta-data/public-keys/",
        "/latest/meta-data/tags/instance/Name",
        "/x/latest/meta-data/instance-id",
    ] {
        assert_eq!(strict(raw), node_item(raw, Refusal::NotListed), "{raw}");
    }
}

/// The parent's pieces, with a name that is only here somewhere in between.
fn confusing_here() -> impl Strategy<Value = Vec<u8>> {
    const NAMES: &[&str] = &[
        "",
        "-extended",
        "/identity-credentials/",
        "/%69dentity-credentials-x/",
        "/security-credentials-",
        "/managed-ssh-keys",
        "/dynamic/instance-identity/pkcs7",
        "/dynamic//instance-identity/document/",
        "..,1/",
        "/+",
    ];
    (confusing(), prop::sample::select(NAMES), any::<prop::sample::Index>()).prop_map(|(raw, name, at)| {
        let mut raw = translated(str::from_utf8(&raw).unwrap());
        raw.insert_str(at.index(raw.len() + 1), name);
        raw.into_bytes()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn never_passes_what_could_mean_credentials(raw in prop_oneof![confusing_here(), prop::collection::vec(any::<u8>(), 0..64)]) {
        for policy in POLICIES {
            let (target, is_closed): (String, fn(&[&str]) -> bool) = match routed(&raw, policy) {
                Some(Route::PassThrough(target)) if policy == MetadataPolicy::Open => {
                    (target.as_str().into(), is_credentials)
                }
                Some(Route::PassThrough(target)) => {
                    (target.as_str().into(), |path| is_credentials(path) || is_sensitive(path))
                }
                Some(Route::NodeItem { target, .. }) => {
                    (target.as_str().into(), |path| is_for_nobody(path) || is_secret(path))
                }
                _ => continue,
            };
            for passed in [&*raw, target.as_bytes()] {
                prop_assert!(!could_mean(passed, is_closed), "{policy:?} passed {:?} as {target}", raw.escape_ascii().to_string());
            }
        }
    }

    #[test]
    fn passes_a_target_that_reads_the_same_again(raw in confusing_here()) {
        for policy in POLICIES {
            if let Some(Route::PassThrough(target)) = routed(&raw, policy) {
                prop_assert!(target.as_str().parse::<http::Uri>().is_ok());
                prop_assert_eq!(routed(target.as_str().as_bytes(), policy), passes(target.as_str()));
            }
        }
    }
}
