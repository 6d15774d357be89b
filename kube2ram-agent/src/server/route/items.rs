//! Which items of the real metadata server a [`MetadataPolicy`] opens to pods. Pure; called by `route`, which has dealt with `ram/`.

use super::{Refusal, contains};
use crate::args::MetadataPolicy;

/// Closed unless the policy is `open`, at any depth and in any case: a node's user data carries its join secrets, and the identity
/// document, signed, proves to be the node.
const SENSITIVE: &[&[&str]] = &[&["dynamic", "instance-identity"], &["user-data"], &["vendor-data"]];

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

/// Why the item at this path is not passed; `None` when it is.
pub(super) fn refusal(segments: &[&str], policy: MetadataPolicy) -> Option<Refusal> {
    if contains(segments, DUMP) {
        return Some(Refusal::Sensitive);
    }
    match policy {
        MetadataPolicy::Open => None,
        MetadataPolicy::Standard | MetadataPolicy::Strict
            if SENSITIVE.iter().any(|names| contains(segments, names)) =>
        {
            Some(Refusal::Sensitive)
        }
        MetadataPolicy::Standard => None,
        MetadataPolicy::Strict => (!is_listed(segments)).then_some(Refusal::NotListed),
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
