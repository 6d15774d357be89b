//! The most memory that the server can take, as the kernel counts it for the container's limit: the sum of
//! all bounds. Depends on the modules whose bounds they are. Only a test calls it: the manifests' limit must
//! be larger, and docs/internals/bounds.md must say the same.

use kube2ram_cloud::alibaba::wire;
use kube2ram_service::{
    admin,
    listener::{BUFFER_BYTES, HEAD_LIMIT_BYTES},
    rate_limiter::CALLERS,
};

use super::CONNECTIONS;
use crate::{
    identity::{ARN_MAX_BYTES, PRINCIPAL_ID_MAX_BYTES},
    token::{self, KEY_LIMIT_BYTES},
    verify::{FLIGHTS, IDENTITIES, KEYS, REFUSALS},
    webhook,
};

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

/// A socket, its file and its inode.
const SOCKET: usize = 4 * KIB;
/// The kernel counts twice the requested size in each direction, whatever the buffers hold.
const BUFFERS: usize = 2 * 2 * BUFFER_BYTES;
/// hyper's two buffers, a head that was read, and the connection's own state.
const HTTP: usize = 3 * HEAD_LIMIT_BYTES + 8 * KIB;
/// rustls: a record that is not complete, the text of one, and the connection's own state.
const TLS: usize = 2 * 18 * KIB + 4 * KIB;
/// `/metrics`, as a body; and what the kernel takes of it at once.
const METRICS: usize = 2 * 32 * KIB;
/// What an answer that is remembered takes besides its text: its places in two maps, and its allocations.
const ENTRY: usize = 640;
/// An identity's text has the resource of its ARN twice.
const IDENTITY: usize = ENTRY + 2 * ARN_MAX_BYTES + PRINCIPAL_ID_MAX_BYTES + KEY_LIMIT_BYTES;
/// A refusal's message has up to 256 characters, its code and the id of the request up to 64 each.
const REFUSAL: usize = ENTRY + 4 * 256 + 2 * 64;
/// An access key with its place in a map, and a limiter.
const KEY: usize = KEY_LIMIT_BYTES + 256;
/// The signed call as it was read, and as it is sent; the answer, of which the kernel has a part.
const CALL: usize =
    SOCKET + TLS + 16 * KIB + 2 * token::LIMIT_BYTES + 6 * KIB + wire::BODY_LIMIT_BYTES + 16 * KIB;

/// Purpose and number of bytes. The first is no limit: whoever writes mappings can be anybody anyway.
const PARTS: [(&str, usize); 7] = [
    ("code, 10,000 mappings of 500 bytes", 24 * MIB),
    ("identities that are remembered", IDENTITIES * IDENTITY),
    ("refusals that are remembered", REFUSALS * REFUSAL),
    ("access keys that have logged in, and their limits", (KEYS + CALLERS) * KEY),
    ("calls of STS", FLIGHTS * CALL),
    (
        "connections of API servers, each with a request",
        CONNECTIONS * (SOCKET + BUFFERS + HTTP + TLS + webhook::BODY_LIMIT_BYTES),
    ),
    ("connections of the admin listener", admin::CONNECTIONS * (SOCKET + BUFFERS + HTTP + METRICS)),
];

mod tests {
    use super::*;

    const MANIFESTS: [(&str, &str); 3] = [
        ("values.yaml", include_str!("../../../deploy/authenticator/helm/values.yaml")),
        ("authenticator.yaml", include_str!("../../../deploy/authenticator/kustomize/authenticator.yaml")),
        ("static-pod.yaml", include_str!("../../../deploy/authenticator/static-pod.yaml")),
    ];
    const BOUNDS: &str = include_str!("../../../docs/internals/bounds.md");

    /// The limit that all manifests have.
    fn limit() -> usize {
        let mut found = Vec::new();
        for (name, manifest) in MANIFESTS {
            let (_, limits) = manifest.split_once("limits:").unwrap_or_else(|| panic!("{name} has no limit"));
            let (_, value) = limits.split_once("memory: ").unwrap_or_else(|| panic!("{name}: {limits}"));
            let digits = value.split_once("Mi").unwrap().0;
            found.push(digits.parse::<usize>().unwrap_or_else(|error| panic!("{name}: {digits}: {error}")));
        }
        assert!(found.iter().all(|limit| *limit == found[0]), "{found:?}");
        found[0] * MIB
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
            assert!(BOUNDS.contains(&row), "docs/internals/bounds.md should have the row\n{row}");
        }
        let limit = format!("limit the container to {} MiB", limit() / MIB);
        assert!(BOUNDS.contains(&limit), "docs/internals/bounds.md should have: {limit}");
    }
}
