//! The metadata server of ECS: its tree, and the documents in it.
//!
//! Sources: "Instance metadata" and its FAQ, help.aliyun.com/document_detail/{49122,108460}; cloud-init's
//! DataSourceAliYun. Depends on the parent; called by it.

use std::time::Duration;

use http::StatusCode;
use serde_json::json;

use super::{ItemAnswer, Service, State};
use crate::{
    Cloud,
    clock::iso8601,
    standin::{
        account::{AccessKey, Accounts},
        server::reply,
    },
};

pub(super) static SERVICE: Service = Service {
    server: "ECSws",
    versions: &["2016-01-01", "latest"],
    token_path: None,
    echoes_ttl: false,
    missing_token: StatusCode::FORBIDDEN,
    renew_before: Duration::from_secs(30 * 60),
    items: ITEMS,
    document,
    item,
};

const IMAGE_ID: &str = "aliyun_3_x64_20G_alibase_20260915.vhd";
const INSTANCE_ID: &str = Cloud::Alibaba.instance_id();
const INSTANCE_TYPE: &str = "ecs.g7.large";
const MAC: &str = "00:16:3e:0f:00:01";
const PRIVATE_IPV4: &str = "172.16.0.10";
const REGION: &str = Cloud::Alibaba.region();
const SERIAL_NUMBER: &str = "5a0e7b6c-0000-4000-8000-000000000001";
const ZONE: &str = "cn-hangzhou-h";

const ITEMS: &[(&str, &str)] = &[
    ("dynamic/instance-identity/document", ""),
    ("dynamic/instance-identity/pkcs7", "MIISignedIdentityOfTheSandboxNode"),
    ("meta-data/dns-conf/nameservers", "100.100.2.136\n100.100.2.138"),
    ("meta-data/hostname", "sandbox-node"),
    ("meta-data/image-id", IMAGE_ID),
    ("meta-data/instance-id", INSTANCE_ID),
    ("meta-data/instance/instance-name", "sandbox-node"),
    ("meta-data/instance/instance-type", INSTANCE_TYPE),
    ("meta-data/mac", MAC),
    ("meta-data/network-type", "vpc"),
    ("meta-data/network/interfaces/macs/00:16:3e:0f:00:01/primary-ip-address", PRIVATE_IPV4),
    ("meta-data/network/interfaces/macs/00:16:3e:0f:00:01/vpc-id", "vpc-bp1sandbox"),
    ("meta-data/ntp-conf/ntp-servers", "ntp.cloud.aliyuncs.com"),
    ("meta-data/owner-account-id", Accounts::UID),
    ("meta-data/private-ipv4", PRIVATE_IPV4),
    ("meta-data/ram/security-credentials/KubernetesWorkerRole-sandbox", ""),
    ("meta-data/region-id", REGION),
    ("meta-data/serial-number", SERIAL_NUMBER),
    ("meta-data/source-address", "http://mirrors.cloud.aliyuncs.com"),
    ("meta-data/vpc-cidr-block", "172.16.0.0/12"),
    ("meta-data/vpc-id", "vpc-bp1sandbox"),
    ("meta-data/vswitch-cidr-block", "172.16.0.0/24"),
    ("meta-data/vswitch-id", "vsw-bp1sandbox"),
    ("meta-data/zone-id", ZONE),
    // On an ACK node this is the script that joins the cluster, with its bootstrap token.
    ("user-data", "#!/bin/bash\necho join --token SaNdBoXsEcReT-bootstrap\n"),
];

fn item(state: &State, path: &[&str]) -> Option<ItemAnswer> {
    let json = |body: String| Some(Ok(reply(StatusCode::OK, "application/json", body)));
    match path {
        ["meta-data", ram, "security-credentials", role] if ram.eq_ignore_ascii_case("ram") => {
            if *role != Accounts::NODE_ROLE {
                return Some(Err(StatusCode::NOT_FOUND));
            }
            json(state.credentials())
        }
        // Whether the real one includes the credentials is not documented: this one does, so that a test
        // sees it leak.
        ["meta-data", "all"] => {
            json(format!("{{\"ram\": {{\"security-credentials\": {}}}}}", state.credentials()))
        }
        ["dynamic", "instance-identity", "document"] => {
            let document = json!({
                "account-id": "", "owner-account-id": Accounts::UID, "instance-id": INSTANCE_ID,
                "mac": MAC, "region-id": REGION, "serial-number": SERIAL_NUMBER,
                "zone-id": ZONE, "instance-type": INSTANCE_TYPE, "image-id": IMAGE_ID,
                "private-ipv4": PRIVATE_IPV4,
            });
            json(document.to_string())
        }
        _ => None,
    }
}

/// In the real server's order and spacing.
fn document(key: &AccessKey) -> String {
    format!(
        "{{\n  \"AccessKeyId\" : \"{}\",\n  \"AccessKeySecret\" : \"{}\",\n  \"Expiration\" : \"{}\",\n  \
         \"SecurityToken\" : \"{}\",\n  \"LastUpdated\" : \"{}\",\n  \"Code\" : \"Success\"\n}}",
        key.id,
        key.secret,
        key.expires.map(iso8601).unwrap_or_default(),
        key.security_token.as_deref().unwrap_or_default(),
        iso8601(key.issued),
    )
}
