//! The items that never change and the listings that follow from them.
//! Pure. Called by the metadata stand-in.

use percent_encoding::percent_decode_str;

use crate::standin::account::Accounts;

pub(super) const IMAGE_ID: &str = "aliyun_3_x64_20G_alibase_20260915.vhd";
pub(super) const INSTANCE_ID: &str = "i-bp1sandbox0000000001";
pub(super) const INSTANCE_TYPE: &str = "ecs.g7.large";
pub(super) const MAC: &str = "00:16:3e:0f:00:01";
pub(super) const PRIVATE_IPV4: &str = "172.16.0.10";
pub(super) const REGION: &str = "cn-hangzhou";
pub(super) const SERIAL_NUMBER: &str = "5a0e7b6c-0000-4000-8000-000000000001";
pub(super) const ZONE: &str = "cn-hangzhou-h";

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

/// An item's value, or the names in a directory, a line each, without a newline at the end.
pub(super) fn lookup(path: &[&str]) -> Option<String> {
    let path = path.iter().map(|part| if part.eq_ignore_ascii_case("ram") { "ram" } else { part });
    let path = path.collect::<Vec<_>>().join("/");
    if let Some((_, value)) = ITEMS.iter().find(|(name, _)| *name == path) {
        return Some((*value).to_owned());
    }

    let prefix = if path.is_empty() { path } else { path + "/" };
    let mut names = ITEMS
        .iter()
        .filter_map(|(name, _)| name.strip_prefix(prefix.as_str()))
        .map(|rest| rest.split_inclusive('/').next().unwrap_or_default())
        .collect::<Vec<_>>();
    names.dedup();
    (!names.is_empty()).then(|| names.join("\n"))
}

/// A path's segments, decoded, without empty ones, `.` and `..`: like the real server, this one forgives
/// everything, so that what an agent lets through by mistake is seen to leak.
pub(super) fn normalise(path: &str) -> Vec<String> {
    let mut segments = Vec::new();
    for segment in percent_decode_str(path).decode_utf8_lossy().split('/') {
        match segment {
            "" | "." => {}
            ".." => drop(segments.pop()),
            _ => segments.push(segment.to_owned()),
        }
    }
    segments
}
