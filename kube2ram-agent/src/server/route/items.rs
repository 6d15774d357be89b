//! Which items of the real metadata server a [`MetadataPolicy`] opens to pods. Pure; called by `route`, which has dealt with `ram/`.

use super::{Refusal, contains};

/// Which items of the real server pods may read. The credentials below `ram/` and the dump `meta-data/all` stay closed in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetadataPolicy {
    /// All others.
    Open,
    /// All but user data, vendor data and the identity document: a node's user data carries its join secrets.
    Standard,
    /// Those of a list: where the pod runs, and the network there.
    Strict,
}

/// Who may read an item.
pub(super) enum Readers {
    /// Every pod.
    All,
    /// Nobody.
    Nobody(Refusal),
    /// Who may have the node's role; the others get the refusal. Node agents go by these items: the CSI plugin and the log agent of ACK by the
    /// identity document (kubernetes-sigs/alibaba-cloud-csi-driver#1124, alibaba/loongcollector#710).
    NodeRole(Refusal),
}

/// Closed unless the policy is `open`, at any depth and in any case: a node's user data carries its join secrets.
const SECRETS: &[&[&str]] = &[&["user-data"], &["vendor-data"]];

/// The directory of the identity document and its signature (`pkcs7`), by which a pod proves to be the node. Closed likewise, but open to who may
/// have the node's role, which proves as much, in this very spelling.
const IDENTITY: &[&str] = &["dynamic", "instance-identity"];

/// Closed whatever the policy: a dump of the whole tree, perhaps with credentials.
const DUMP: &[&str] = &["meta-data", "all"];

/// What `strict` leaves open below `/<version>/meta-data/`: what SDKs, cloud controllers and schedulers need to know where they run.
const LISTED: &[&[&str]] = &[
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
];

/// The directory of the network cards, which `strict` leaves open as a whole: addresses and ids, by MAC.
const INTERFACES: &[&str] = &["network", "interfaces", "macs"];

/// Who may read the item at this path. `bare` are its segments as some servers take them.
pub(super) fn readers(segments: &[&str], bare: &[&str], policy: MetadataPolicy) -> Readers {
    if contains(bare, DUMP) {
        return Readers::Nobody(Refusal::Sensitive);
    }
    if policy == MetadataPolicy::Open {
        return Readers::All;
    }
    if SECRETS.iter().any(|names| contains(bare, names)) {
        return Readers::Nobody(Refusal::Sensitive);
    }
    if contains(bare, IDENTITY) {
        let is_spelt_so = segments.get(1..).is_some_and(|below| below.starts_with(IDENTITY));
        return match is_spelt_so {
            true => Readers::NodeRole(Refusal::Sensitive),
            false => Readers::Nobody(Refusal::Sensitive),
        };
    }
    match policy {
        MetadataPolicy::Strict if !is_listed(segments) => Readers::NodeRole(Refusal::NotListed),
        _ => Readers::All,
    }
}

/// Exactly as written, for the real server's reading of other spellings is not known.
fn is_listed(segments: &[&str]) -> bool {
    match segments {
        // The lists of versions, of directories and of items say nothing but names.
        [] | [_] | [_, "meta-data"] => true,
        [_, "meta-data", item @ ..] => LISTED.contains(&item) || item.starts_with(INTERFACES),
        _ => false,
    }
}
