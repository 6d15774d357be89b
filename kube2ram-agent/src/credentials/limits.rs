//! What bounds the credential cache and its calls to STS. Pure; chosen by `app`, applied by `cache`.

use std::time::Duration;

use kube2ram_service::{clock::jitter, rate_limiter::Rate};

/// What bounds a [`Cache`](super::Cache).
///
/// STS allows 100 requests per second to all nodes of an account together. In steady state a node requests
/// each of its sessions every 26 minutes, so the rates matter only in bad moments. Over minutes a node uses
/// at most a tenth of the account's limit. When many pods start at once, a node may use 50 calls at once and
/// 50 per second, which is the whole limit in the first second and half of it afterwards, until it has used
/// 250. So 250 pods of different roles, as many as a large node runs, are served within five seconds. Fetches
/// that no pod waits for get a fifth of that. A pod's own rate is far above the needs of one annotation, and
/// keeps a pod that changes its annotation in a loop from delaying the others.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How many role sessions are kept.
    pub sessions: usize,
    /// How many of them are issued at once.
    pub concurrent_issues: usize,
    /// How many calls may be in flight when a fetch that no pod waits for begins.
    pub concurrent_ahead: usize,
    /// How fast the node asks STS, over minutes.
    pub node: Rate,
    /// How much of the burst is reserved for sessions that a pod waits for.
    pub reserve: u32,
    /// How fast the node asks STS, over seconds.
    pub pace: Rate,
    /// How fast it asks for one pod.
    pub pod: Rate,
    /// How long a pod waits for credentials that are being issued. Its SDK gives up a little later.
    pub answer: Duration,
    /// Spreads what would otherwise happen at the same moment everywhere: a random number in 0 – 1.
    pub jitter: fn() -> f64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            sessions: 4096,
            concurrent_issues: 32,
            concurrent_ahead: 8,
            node: Rate { burst: 250, interval: Duration::from_millis(100) },
            reserve: 200,
            pace: Rate { burst: 50, interval: Duration::from_millis(20) },
            pod: Rate { burst: 4, interval: Duration::from_secs(15) },
            answer: Duration::from_millis(800),
            jitter,
        }
    }
}
