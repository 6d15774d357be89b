//! The most memory that the agent can take, as the kernel counts it for the container's limit: the sum of all
//! bounds. Depends on the modules whose bounds they are. Only a test calls it: the manifests' limit must be
//! larger, and docs/costs.md must say the same.

use kube2ram_common::abi::{MAX_HANDSHAKES, MAX_LEASES, MAX_TARGETS};

use crate::{
    audit, control, credentials, kubernetes,
    server::{self, pass_through_limiter::EXCHANGES},
    snapshot,
};
use kube2ram_cloud::{
    role::{
        ARN_MAX_BYTES, DURATION_MAX_BYTES, EXTERNAL_ID_MAX_BYTES, POLICY_MAX_BYTES, SESSION_NAME_MAX,
        TAGS_MAX_BYTES,
    },
    upstream,
};
use kube2ram_service::{
    admin,
    listener::{BUFFER_BYTES, HEAD_LIMIT_BYTES},
};

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

/// A socket, its file and its inode.
const SOCKET: usize = 4 * KIB;
/// The kernel counts twice the requested size in each direction, whatever the buffers hold.
const BUFFERS: usize = 2 * 2 * BUFFER_BYTES;
/// hyper's two buffers, a head that was read, and the connection's own state.
const HTTP: usize = 3 * HEAD_LIMIT_BYTES + 8 * KIB;
/// `/metrics` of 1,000 pods, as a body; and what the kernel takes of it at once, which it does while less
/// than the bound is waiting.
const METRICS: usize = 2 * 64 * KIB;
/// The size of `status -o json` with 1,000 pods.
const DOCUMENT: usize = 640 * KIB;
/// An entry of a hash with values of 64 bytes, in the kernel's size classes, and its bucket.
const RECORD: usize = 192 + 16;
/// The same with values of 8 or 16 bytes.
const SMALL: usize = 96 + 16;

/// Pods as in the first part, and connections, each of which remembers its pod's session.
const SESSIONS: usize = 1000 + server::CONNECTIONS;

/// What is kept of a pod's annotations, if all are as long as they may be.
const ANNOTATIONS: usize =
    ARN_MAX_BYTES + EXTERNAL_ID_MAX_BYTES + POLICY_MAX_BYTES + DURATION_MAX_BYTES + SESSION_NAME_MAX;
/// Pods that a list brings before it replaces those that were known: more than twice as many as a kubelet
/// runs by default.
const LISTED_PODS: usize = 256;

/// Purpose and number of bytes. The first is not a limit, but a measured value with a margin.
const PARTS: [(&str, usize); 11] = [
    ("code, 1,000 pods and their credentials, 5,000 namespaces", 24 * MIB),
    ("session tags, with `--session-tags=pod`", SESSIONS * TAGS_MAX_BYTES),
    ("namespaces' allow-lists, while they are listed again", 2 * kubernetes::ALLOW_LISTS_BYTES),
    (
        "the snapshot for the next agent: its text, as it grows, its file and a draft",
        4 * snapshot::LIMIT_BYTES,
    ),
    ("pods' connections", (server::CONNECTIONS + server::CONNECTIONS_OF_NODE) * (SOCKET + BUFFERS + HTTP)),
    ("connections to the metadata server", EXCHANGES * (SOCKET + 4 * upstream::BUFFER_BYTES as usize + HTTP)),
    ("connections of the admin listener", admin::CONNECTIONS * (SOCKET + BUFFERS + HTTP + METRICS)),
    ("connections of the control socket", control::MAX_CONNECTIONS * (SOCKET + BUFFERS + DOCUMENT)),
    (
        "the audit trail: the last sessions, their pods, and records that wait for the disk",
        audit::LIMIT_BYTES + credentials::HOLDERS_LIMIT_BYTES,
    ),
    ("eBPF maps", 2 * MAX_HANDSHAKES * RECORD + (MAX_LEASES + 2 * MAX_TARGETS) * SMALL),
    (
        "the API server's answers as they are read, and 256 pods while they are listed again",
        kubernetes::ANSWERS_BYTES + LISTED_PODS * ANNOTATIONS,
    ),
];

mod tests {
    use super::*;

    const MANIFEST: &str = include_str!("../../../deploy/helm/kube2ram/values.yaml");
    const COSTS: &str = include_str!("../../../docs/costs.md");

    fn limit() -> usize {
        let line = MANIFEST.lines().find(|line| line.contains("limits: { memory:")).unwrap();
        let (_, value) = line.split_once("memory: ").unwrap();
        value.trim_end_matches([' ', '}']).strip_suffix("Mi").unwrap().parse::<usize>().unwrap() * MIB
    }

    /// A fifth is left for what the allocator loses between blocks, and for files' pages.
    #[test]
    fn the_sum_of_all_bounds_is_below_the_manifests_limit() {
        let sum: usize = PARTS.iter().map(|(_, bytes)| bytes).sum();

        assert!(sum * 5 <= limit() * 4, "{} MiB of {} MiB", sum / MIB, limit() / MIB);
    }

    #[test]
    fn the_document_has_the_same() {
        let rows = PARTS.iter().map(|(what, bytes)| format!("| {what} | {} MiB |", bytes.div_ceil(MIB)));
        let sum: usize = PARTS.iter().map(|(_, bytes)| bytes.div_ceil(MIB)).sum();
        let total = format!("| **all of that at once** | **{sum} MiB** |");

        for row in rows.chain([total]) {
            assert!(COSTS.contains(&row), "docs/costs.md should have the row\n{row}");
        }
        assert!(COSTS.contains(&format!("{} MiB", limit() / MIB)), "docs/costs.md should name the limit");
    }
}
