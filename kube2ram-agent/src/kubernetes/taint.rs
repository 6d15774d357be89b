//! The start-up taint: keeps pods off a node until its agent is ready, which removes it whenever it is there.
//! Depends on kube; called by `app` through `cluster`, and by `args` for its type.

use std::{fmt, str::FromStr, time::Duration};

use k8s_openapi::api::core::v1::Node;
use kube::{
    Api, Client,
    api::{GetParams, Patch, PatchParams},
    core::{ApiResource, object::Object},
};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::{Instant, error::Elapsed, sleep, timeout};
use tracing::{info, warn};

use kube2ram_service::{clock::jitter, telemetry::chain};

/// Which taints of the node are the start-up taint: those with the key, and with the value and effect if they
/// are given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartupTaint {
    key: Box<str>,
    value: Option<Box<str>>,
    effect: Option<Box<str>>,
}

/// The text is no `key[=value][:effect]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("give <key>[=<value>][:<effect>], such as kube2ram/agent-not-ready:NoSchedule")]
pub struct TaintError;

impl FromStr for StartupTaint {
    type Err = TaintError;

    /// As `kubectl taint` writes it (kubernetes.io/docs/concepts/scheduling-eviction/taint-and-toleration).
    fn from_str(text: &str) -> Result<Self, TaintError> {
        const EFFECTS: [&str; 3] = ["NoExecute", "NoSchedule", "PreferNoSchedule"];
        let legal =
            |text: &str| text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_./".contains(&byte));
        let (rest, effect) =
            text.rsplit_once(':').map_or((text, None), |(rest, effect)| (rest, Some(effect)));
        let (key, value) = rest.split_once('=').map_or((rest, None), |(key, value)| (key, Some(value)));
        let is_right = !key.is_empty()
            && key.len() <= 253 + 1 + 63
            && legal(key)
            && value.is_none_or(|value| value.len() <= 63 && legal(value))
            && effect.is_none_or(|effect| EFFECTS.contains(&effect));
        if !is_right {
            return Err(TaintError);
        }
        Ok(Self { key: key.into(), value: value.map(Into::into), effect: effect.map(Into::into) })
    }
}

impl fmt::Display for StartupTaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.key)?;
        self.value.iter().try_for_each(|value| write!(f, "={value}"))?;
        self.effect.iter().try_for_each(|effect| write!(f, ":{effect}"))
    }
}

impl StartupTaint {
    fn is(&self, taint: &Value) -> bool {
        let field = |name| taint[name].as_str().unwrap_or_default();
        field("key") == &*self.key
            && self.value.as_deref().is_none_or(|value| field("value") == value)
            && self.effect.as_deref().is_none_or(|effect| field("effect") == effect)
    }
}

/// Why the taint is still there.
#[derive(Debug, thiserror::Error)]
enum RemoveError {
    #[error("the API server refuses")]
    Request(#[source] kube::Error),
    #[error("the API server does not answer")]
    Timeout(#[source] Elapsed),
}

/// A Node as the API server sends it, cut down to its taints, which are kept whatever is in them.
type ApiNode = Object<NodeSpec, Ignored>;

#[derive(Clone, Debug, Default, Deserialize)]
struct NodeSpec {
    #[serde(default)]
    taints: Vec<Value>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Ignored {}

const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_mins(1);

/// How often the node is checked.
///
/// Node-pool managers may set the taint after the agent's first check, and autoscalers set it again while
/// they register the node (kubernetes-sigs/karpenter#1772). Both end some minutes after the node was created.
/// A check is one GET from the API server's cache. The kubelet makes the same request every 10 s
/// (`tryUpdateNodeStatus`), so a watch, which requires further rights, would save nothing relevant.
pub(super) struct Pace {
    /// Between two checks at first.
    early: Duration,
    /// How long that is, from the agent's start.
    early_for: Duration,
    /// Between two later checks.
    late: Duration,
}

pub(super) const PACE: Pace =
    Pace { early: Duration::from_secs(5), early_for: Duration::from_mins(15), late: Duration::from_mins(1) };

impl Pace {
    /// `jitter` lies in 0 – 1: agents that start at once do not ask at once.
    fn pause(&self, age: Duration, jitter: f64) -> Duration {
        let every = if age < self.early_for { self.early } else { self.late };
        every.mul_f64(0.75 + 0.5 * jitter)
    }
}

/// Removes the taint whenever it is there, for ever. `ready` resolves when the agent is ready; nothing is
/// removed before.
///
/// # Cancel safety
/// Dropping the future leaves the node with the taint or without.
pub(super) async fn keep_off<F: Future<Output = ()>>(
    client: &Client,
    node: &str,
    taint: &StartupTaint,
    pace: &Pace,
    ready: impl Fn() -> F,
) {
    let nodes = Api::<ApiNode>::all_with(client.clone(), &ApiResource::erase::<Node>(&()));
    let start = Instant::now();
    let mut from = GetParams::any();
    let mut pause = FIRST_PAUSE;
    let mut has_looked = false;
    loop {
        ready().await;
        let look = try_remove(&nodes, node, taint, &from);
        let looked = timeout(REQUEST_TIMEOUT, look).await.map_err(RemoveError::Timeout).flatten();
        from = GetParams::any();
        match looked {
            Ok(was_there) => {
                match was_there {
                    true => info!(node, %taint, "start-up taint removed"),
                    false if !has_looked => info!(node, %taint, "the node has no such start-up taint"),
                    false => {}
                }
                (has_looked, pause) = (true, FIRST_PAUSE);
                sleep(pace.pause(start.elapsed(), jitter())).await;
            }
            // Another client changed the node meanwhile, or the cache was behind: the next check reads the
            // committed state.
            Err(RemoveError::Request(kube::Error::Api(status))) if status.code == 409 => {
                from = GetParams::default();
                sleep(FIRST_PAUSE).await;
            }
            Err(error) => {
                warn!(
                    node, %taint, error = chain(&error),
                    "cannot remove the start-up taint: check that the service account may get and patch nodes"
                );
                sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

/// Returns whether the taint was there.
async fn try_remove(
    nodes: &Api<ApiNode>,
    name: &str,
    taint: &StartupTaint,
    from: &GetParams,
) -> Result<bool, RemoveError> {
    let node = nodes.get_with(name, from).await.map_err(RemoveError::Request)?;
    let (mut taints, before) = (node.spec.taints, node.metadata.resource_version);
    let count = taints.len();
    taints.retain(|found| !taint.is(found));
    if taints.len() == count {
        return Ok(false);
    }
    // The list is written as a whole, so only on the version that was read: another controller's taint must
    // not get lost.
    let patch = json!({ "metadata": { "resourceVersion": before }, "spec": { "taints": taints } });
    nodes.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await.map_err(RemoveError::Request)?;
    Ok(true)
}

#[cfg(test)]
mod tests;
