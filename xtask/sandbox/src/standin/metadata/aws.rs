//! The metadata server of EC2 (IMDS): its tree, and the documents in it.
//!
//! Sources: EC2 user guide, "Instance metadata", "Instance metadata categories", "Use IMDSv2" and "Retrieve
//! security credentials from instance metadata"; the defaults of amazon-ec2-metadata-mock. Depends on the
//! parent; called by it.

use std::time::Duration;

use http::StatusCode;
use serde_json::json;

use super::{ItemAnswer, Service, State, text};
use crate::{
    Cloud,
    clock::iso8601,
    standin::account::{AccessKey, Accounts, Principal},
};

pub(super) static SERVICE: Service = Service {
    server: "EC2ws",
    versions: &["2009-04-04", "2016-09-02", "2018-09-24", "2019-10-01", "2021-03-23", "latest"],
    token_path: Some("/latest/api/token"),
    echoes_ttl: true,
    missing_token: StatusCode::UNAUTHORIZED,
    renew_before: Duration::from_secs(5 * 60),
    items: ITEMS,
    document,
    item,
};

const ACCOUNT: &str = Cloud::Aws.account();
const DOMAIN: &str = "amazonaws.com";
const HOSTNAME: &str = "ip-172-16-0-10.eu-west-1.compute.internal";
const IMAGE_ID: &str = "ami-0123456789abcdef0";
const INSTANCE_ID: &str = Cloud::Aws.instance_id();
const INSTANCE_TYPE: &str = "m5.large";
const LOCAL_IPV4: &str = "172.16.0.10";
const MAC: &str = "0a:16:3e:0f:00:01";
const PARTITION: &str = "aws";
const REGION: &str = Cloud::Aws.region();
const ZONE: &str = "eu-west-1b";

/// What is not here is 404, `spot/instance-action` and `events/recommendations/rebalance` among it: nothing
/// is planned.
const ITEMS: &[(&str, &str)] = &[
    ("dynamic/fws/instance-monitoring", "disabled"),
    ("dynamic/instance-identity/document", ""),
    ("dynamic/instance-identity/pkcs7", "MIISignedIdentityOfTheSandboxNode"),
    ("dynamic/instance-identity/rsa2048", "MIIRsaSignedIdentityOfTheSandboxNode"),
    ("dynamic/instance-identity/signature", "SignatureOfTheSandboxNode"),
    ("meta-data/ami-id", IMAGE_ID),
    ("meta-data/autoscaling/target-lifecycle-state", "InService"),
    ("meta-data/events/maintenance/history", "[]"),
    ("meta-data/events/maintenance/scheduled", "[]"),
    ("meta-data/hostname", HOSTNAME),
    ("meta-data/iam/info", ""),
    ("meta-data/iam/security-credentials-extended/KubernetesWorkerRole-sandbox", ""),
    ("meta-data/iam/security-credentials/KubernetesWorkerRole-sandbox", ""),
    ("meta-data/identity-credentials/ec2/info", ""),
    ("meta-data/identity-credentials/ec2/security-credentials/ec2-instance", ""),
    ("meta-data/instance-id", INSTANCE_ID),
    ("meta-data/instance-life-cycle", "on-demand"),
    ("meta-data/instance-type", INSTANCE_TYPE),
    ("meta-data/local-hostname", HOSTNAME),
    ("meta-data/local-ipv4", LOCAL_IPV4),
    ("meta-data/mac", MAC),
    // With what EC2 Instance Connect logs people in.
    ("meta-data/managed-ssh-keys/signer-cert", "SaNdBoXsEcReT-signer"),
    ("meta-data/network/interfaces/macs/0a:16:3e:0f:00:01/interface-id", "eni-0123456789abcdef0"),
    ("meta-data/network/interfaces/macs/0a:16:3e:0f:00:01/local-ipv4s", LOCAL_IPV4),
    ("meta-data/network/interfaces/macs/0a:16:3e:0f:00:01/vpc-id", "vpc-0123456789abcdef0"),
    ("meta-data/placement/availability-zone", ZONE),
    ("meta-data/placement/availability-zone-id", "euw1-az1"),
    ("meta-data/placement/region", REGION),
    ("meta-data/public-keys/0/openssh-key", "ssh-ed25519 AAAA sandbox"),
    ("meta-data/reservation-id", "r-0123456789abcdef0"),
    ("meta-data/security-groups", "sandbox-node"),
    ("meta-data/services/domain", DOMAIN),
    ("meta-data/services/partition", PARTITION),
    // Of a node of a cluster: the script that joins it, with its bootstrap token.
    ("user-data", "#!/bin/bash\necho join --token SaNdBoXsEcReT-bootstrap\n"),
];

/// What belongs to the instance profile: not there without one.
const PROFILE: [&str; 2] = ["meta-data", "iam"];

/// No spelling is known that the real server forgives besides slashes; this one forgives case as well.
fn item(state: &State, path: &[&str]) -> Option<ItemAnswer> {
    let folded = path.iter().map(|segment| segment.to_ascii_lowercase()).collect::<Vec<_>>();
    let folded = folded.iter().map(String::as_str).collect::<Vec<_>>();
    if folded.starts_with(&PROFILE) && !state.has_profile() {
        return Some(Err(StatusCode::NOT_FOUND));
    }
    let body = match folded[..] {
        ["meta-data", "iam", "info"] => info(state),
        ["meta-data", "iam", directory, role] if directory.starts_with("security-credentials") => {
            if !role.eq_ignore_ascii_case(Accounts::NODE_ROLE) {
                return Some(Err(StatusCode::NOT_FOUND));
            }
            let document = state.credentials();
            // As the branches of some SDKs expect it of that directory.
            let account = format!("\n  \"AccountId\" : \"{ACCOUNT}\",");
            if directory.ends_with("-extended") {
                document.replacen('{', &format!("{{{account}"), 1)
            } else {
                document
            }
        }
        ["meta-data", "identity-credentials", "ec2", "info"] => identity_info(state),
        ["meta-data", "identity-credentials", "ec2", "security-credentials", "ec2-instance"] => {
            document(&identity_key(state))
        }
        ["dynamic", "instance-identity", "document"] => identity_document(),
        _ => return None,
    };
    Some(Ok(text(body)))
}

/// The instance profile, which is called otherwise than its role.
fn info(state: &State) -> String {
    let info = json!({
        "Code": "Success",
        "LastUpdated": iso8601(state.accounts.clock().now()),
        "InstanceProfileArn": format!("arn:{PARTITION}:iam::{ACCOUNT}:instance-profile/nodes/sandbox-profile"),
        "InstanceProfileId": "AIPAQW12SANDBOX000001",
    });
    format!("{info:#}")
}

fn identity_info(state: &State) -> String {
    let info = json!({
        "Code": "Success", "LastUpdated": iso8601(state.accounts.clock().now()), "AccountId": ACCOUNT,
    });
    format!("{info:#}")
}

/// Keys of the instance itself, which are there with a profile or without, and may assume no role.
fn identity_key(state: &State) -> AccessKey {
    let principal =
        Principal::AssumedRole { role: "aws:ec2-instance".to_owned(), session: INSTANCE_ID.to_owned() };
    state.accounts.issue(principal, Some(super::LIFETIME))
}

fn identity_document() -> String {
    let document = json!({
        "accountId": ACCOUNT, "architecture": "x86_64", "availabilityZone": ZONE, "billingProducts": null,
        "devpayProductCodes": null, "marketplaceProductCodes": null, "imageId": IMAGE_ID,
        "instanceId": INSTANCE_ID, "instanceType": INSTANCE_TYPE, "kernelId": null,
        "pendingTime": "2026-11-28T10:00:00Z", "privateIp": LOCAL_IPV4, "ramdiskId": null, "region": REGION,
        "version": "2017-09-30",
    });
    format!("{document:#}")
}

/// In the real server's order and spacing.
fn document(key: &AccessKey) -> String {
    let pairs = [
        ("Code", "Success"),
        ("LastUpdated", &iso8601(key.issued)),
        ("Type", "AWS-HMAC"),
        ("AccessKeyId", &key.id),
        ("SecretAccessKey", &key.secret),
        ("Token", key.security_token.as_deref().unwrap_or_default()),
        ("Expiration", &key.expires.map(iso8601).unwrap_or_default()),
    ];
    let lines = pairs.map(|(name, value)| format!("  \"{name}\" : \"{value}\""));
    format!("{{\n{}\n}}", lines.join(",\n"))
}

#[cfg(test)]
mod tests;
