//! Which items of the real metadata server a [`MetadataPolicy`] opens to pods. Pure; called by `route`, which
//! has dealt with the credential directory.

use super::{Refusal, contains};
use kube2ram_cloud::dialect::Items;

/// Which items of the real server pods may read. Credentials and a dump of the whole tree stay closed in any
/// case.
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
    /// Pods that may have the node's role; the others get the refusal. Node agents need these items: the CSI
    /// plugin and the log agent of ACK by the identity document
    /// (kubernetes-sigs/alibaba-cloud-csi-driver#1124, alibaba/loongcollector#710).
    NodeRole(Refusal),
}

/// Who may read the item at this path. `bare` are its segments as some servers take them.
pub(super) fn readers(segments: &[&str], bare: &[&str], policy: MetadataPolicy, items: &Items) -> Readers {
    if items.dump.iter().any(|names| contains(bare, names)) {
        return Readers::Nobody(Refusal::Sensitive);
    }
    if policy == MetadataPolicy::Open {
        return Readers::All;
    }
    if items.secrets.iter().any(|names| contains(bare, names)) {
        return Readers::Nobody(Refusal::Sensitive);
    }
    if contains(bare, items.identity) {
        let is_spelt_so = segments.get(1..).is_some_and(|below| below.starts_with(items.identity));
        return match is_spelt_so {
            true => Readers::NodeRole(Refusal::Sensitive),
            false => Readers::Nobody(Refusal::Sensitive),
        };
    }
    match policy {
        MetadataPolicy::Strict if !is_listed(segments, items) => Readers::NodeRole(Refusal::NotListed),
        _ => Readers::All,
    }
}

/// Exactly as written: it is not known how the real server reads other spellings.
fn is_listed(segments: &[&str], items: &Items) -> bool {
    match segments {
        // The lists of versions, of directories and of items contain only names.
        [] | [_] | [_, "meta-data"] => true,
        [_, "meta-data", item @ ..] => items.listed.contains(&item) || item.starts_with(items.interfaces),
        _ => false,
    }
}
