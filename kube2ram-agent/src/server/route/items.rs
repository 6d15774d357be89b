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
    /// All but what holds secrets of the node, such as its user data, and what proves to be the node.
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
    if bare.iter().any(|segment| begins_closed(segment, items)) {
        return Readers::Nobody(Refusal::NotFound);
    }
    if policy == MetadataPolicy::Open {
        return Readers::All;
    }
    if items.secrets.iter().any(|names| contains(bare, names)) {
        return Readers::Nobody(Refusal::Sensitive);
    }
    if contains(bare, items.identity) {
        // Exactly as written, as in `is_listed`.
        return match segments.get(1..) {
            Some(below) if items.open.contains(&below) => Readers::All,
            Some(below) if below.starts_with(items.identity) => Readers::NodeRole(Refusal::Sensitive),
            _ => Readers::Nobody(Refusal::Sensitive),
        };
    }
    match policy {
        MetadataPolicy::Strict if !is_listed(segments, items) => Readers::NodeRole(Refusal::NotListed),
        _ => Readers::All,
    }
}

/// Whether a segment begins like one that is closed, without regard to case.
pub(super) fn begins_closed(segment: &str, items: &Items) -> bool {
    let begins_with =
        |prefix: &str| segment.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix));
    items.closed_prefixes.iter().any(|prefix| begins_with(prefix))
}

/// Exactly as written: it is not known how the real server reads other spellings.
fn is_listed(segments: &[&str], items: &Items) -> bool {
    match segments {
        // The lists of versions, of directories and of items contain only names.
        [] | [_] | [_, "meta-data"] => true,
        [_, "meta-data", item @ ..] => {
            let trees = items.trees.iter().copied().chain([items.interfaces]);
            items.listed.contains(&item) || trees.into_iter().any(|tree| item.starts_with(tree))
        }
        _ => false,
    }
}
