//! What of the real metadata server pods read, and what no spelling leads to. The stand-in forgives every
//! spelling and records what it is asked: what an agent lets through by mistake is seen.

use kube2ram_sandbox::{
    Cloud,
    standin::{AccessKey, Accounts},
};

use crate::support::{INSTANCE_ID, LIST, Lab, pod};

/// Sends bytes on a redirected connection; empty when it was cut off.
fn raw(lab: &Lab, bytes: &str) -> String {
    let mut client = lab.pod("orders").unwrap().client("app").unwrap();
    let metadata = format!("{}:80", Cloud::Aws.metadata_ip());
    let output = client.args(["raw", "--connect", &metadata, "--hex", &hex::encode(bytes)]).output().unwrap();
    let answer = hex::decode(str::from_utf8(&output.stdout).unwrap().trim()).unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

fn status(answer: &str) -> &str {
    answer.split(' ').nth(1).unwrap_or_default()
}

/// Spellings of paths to the node's credentials, of each of their trees: closed under every policy.
fn credential_targets() -> Vec<String> {
    let node = Accounts::NODE_ROLE;
    let role = format!("/latest/meta-data/iam/security-credentials/{node}");
    let extended = format!("/latest/meta-data/iam/security-credentials-extended/{node}");
    let instance = "/latest/meta-data/identity-credentials/ec2/security-credentials/ec2-instance".to_owned();
    let mut targets = vec![
        "/latest/meta-data/iam/info".to_owned(),
        "/latest/meta-data/identity-credentials/ec2/info".to_owned(),
        "/latest/meta-data/identity-credentials/".to_owned(),
        "/latest/meta-data/identity-credentials.json".to_owned(),
        "/latest/meta-data/iam%5csecurity-credentials".to_owned(),
        "/latest/meta-data/iam/security-credentials%00".to_owned(),
        "/latest/iam/security-credentials/".to_owned(),
        "/latest/meta-data/x/security-credentials-extended/".to_owned(),
    ];
    for path in [&role, &extended, &instance] {
        let with = |from: &str, to: &str| path.replace(from, to);
        targets.extend([
            path.clone(),
            format!("{path}/"),
            with("/", "//"),
            with("meta-data/", "meta-data//"),
            with("latest", "2018-09-24"),
            with("latest", "LATEST"),
            with("meta-data", "Meta-Data"),
            with("/iam/", "/IAM/").replace("identity", "Identity"),
            with("security-credentials", "Security-Credentials"),
            with("security-credentials", "%73ecurity-credentials"),
            with("security-credentials", "%2573ecurity-credentials"),
            with("security-credentials", "security-credentials;x"),
            with("/iam/", "/%69am/").replace("identity", "%69dentity"),
            with("meta-data/", "meta-data;x=y/"),
            with("/latest/", "/latest/./"),
            with("meta-data/", "x/../meta-data/"),
            with("meta-data/", "%2e%2e/meta-data/"),
            with("/latest/", "/../latest/"),
            with("meta-data/", "meta-data\\"),
            with("/security", "\\security"),
            with("/security", "%2fsecurity"),
            with("/", "%2f"),
            format!("{path}?x"),
            format!("{path}#x"),
            with("/security", "?/security"),
            with("/security", "#/security"),
            format!("http://169.254.169.254{path}"),
            format!("http://169.254.169.254:80{path}"),
            format!("http://[fd00:ec2::254]{path}"),
            format!("http://x@169.254.169.254{path}"),
            format!("https://169.254.169.254{path}"),
            format!("\t{path}"),
            path.trim_start_matches('/').to_owned(),
        ]);
    }
    targets
}

/// Secrets and signatures of the node: closed unless the policy is `open`.
const SECRETS: [&str; 9] = [
    "/latest/user-data",
    "//latest//user-data/",
    "/2018-09-24/User-Data",
    "/latest/meta-data/managed-ssh-keys/signer-cert",
    "/latest/meta-data//managed-ssh-keys/",
    "/latest/dynamic/instance-identity/pkcs7",
    "/latest/dynamic/instance-identity/rsa2048",
    "/latest/dynamic//instance-identity/signature",
    "/latest/dynamic/instance-identity/",
];

/// Asserts that a target, alone and behind an ordinary request, leads to no key. Returns the status.
fn assert_closed(lab: &Lab, target: &str) -> String {
    let request = format!("GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    let bare = raw(lab, &request);
    let behind = raw(lab, &format!("GET {INSTANCE_ID} HTTP/1.1\r\nHost: x\r\n\r\n{request}"));
    for answer in [&bare, &behind] {
        let is_key = ["AccessKeyId", AccessKey::SECRET_MARKER, ":instance-profile/", "SignedIdentity"];
        assert!(!is_key.iter().any(|text| answer.contains(text)), "{target:?}: {answer}");
    }
    // hyper cuts a fragment off, as RFC 9112 has none: what is left may be the agent's own directory.
    let is_own = bare.ends_with("\r\n\r\nsecurity-credentials/") || bare.ends_with("\r\n\r\norders-role");
    assert!(status(&bare).starts_with('4') || is_own, "{target:?}: {bare}");
    status(&bare).to_owned()
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn no_spelling_of_any_credential_tree_reaches_the_real_server() {
    for policy in ["standard", "strict", "open"] {
        let lab =
            Lab::with_agent("aws-spellings", &[pod("orders")], &[&format!("--metadata-policy={policy}")]);
        // The agent itself fetches a token and the node's credentials when it first needs them.
        assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
        assert_eq!(lab.ask("orders", INSTANCE_ID).status, 200);
        let asked_by_agent = lab.metadata().seen().len();
        let targets = credential_targets();

        for target in &targets {
            assert_closed(&lab, target);
        }
        let secrets: &[&str] = if policy == "open" { &[] } else { &SECRETS };
        for target in secrets {
            assert_eq!(assert_closed(&lab, target), "403", "{policy}: {target}");
        }

        let seen = lab.metadata().seen().split_off(asked_by_agent);
        assert!(seen.len() >= targets.len(), "the ordinary requests were passed on");
        for request in seen {
            assert_eq!(request.target, INSTANCE_ID, "{policy}: {request:?}");
        }
        assert_eq!(lab.leaks(), []);
        // The control: the stand-in forgives spellings.
        let doubled = format!("/latest//meta-data//IAM//security-credentials/{}", Accounts::NODE_ROLE);
        assert!(lab.host_curl(&doubled).unwrap().body.contains("AccessKeyId"));
    }
}

/// Another status than 404, and SDKs that ask one of these first do not go on to the usual tree.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_other_trees_do_not_exist() {
    let lab = Lab::with_agent("aws-trees", &[pod("orders")], &[]);

    for target in [
        "/latest/meta-data/iam/security-credentials-extended/",
        "/latest/meta-data/iam/security-credentials-extended/orders-role",
        "/latest/meta-data/iam/security-credentials-node",
        "/latest/meta-data/identity-credentials/ec2/security-credentials/ec2-instance",
        "/latest/meta-data/identity-credentials/ec2/info",
        "/latest/meta-data/identity-credentials",
        "/latest/meta-data/iam/info",
        "/latest/meta-data/iam/other",
    ] {
        assert_eq!(lab.ask("orders", target).status, 404, "{target}");
    }
    assert_eq!(lab.ask("orders", LIST).status, 200);
    assert_eq!(lab.leaks(), []);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn sdks_and_tools_find_region_and_placement_and_a_404_stays_one() {
    let (region, zone) = (Cloud::Aws.region(), "eu-west-1b");
    for policy in ["standard", "strict"] {
        let lab = Lab::with_agent("aws-region", &[pod("orders")], &[&format!("--metadata-policy={policy}")]);

        // Go, Java and .NET ask for the first, Rust for the second, Python for the third, with a slash.
        let document = lab.ask("orders", "/latest/dynamic/instance-identity/document");
        let document: serde_json::Value = serde_json::from_str(&document.body).unwrap();
        assert_eq!(document["region"], region, "{policy}");
        for (target, body) in [
            ("placement/region", region),
            ("placement/availability-zone/", zone),
            ("services/domain", "amazonaws.com"),
            ("events/maintenance/scheduled", "[]"),
            ("instance-id", Cloud::Aws.instance_id()),
        ] {
            let reply = lab.ask("orders", &format!("/latest/meta-data/{target}"));
            assert_eq!((reply.status, &*reply.body), (200, body), "{policy}: {target}");
        }
        // Nothing is planned.
        for target in ["spot/instance-action", "spot/termination-time", "events/recommendations/rebalance"] {
            let reply = lab.ask("orders", &format!("/latest/meta-data/{target}"));
            assert_eq!(reply.status, 404, "{policy}: {target}");
        }
        assert_eq!(lab.leaks(), []);
    }
}
