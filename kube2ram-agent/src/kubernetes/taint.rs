//! The start-up taint: keeps pods off a node until its agent is ready, which then removes it, once. Depends on kube; called by `app` through
//! `cluster`, and by `args` for its type.

use std::{fmt, str::FromStr, time::Duration};

use k8s_openapi::api::core::v1::Node;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
    core::{ApiResource, object::Object},
};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::{error::Elapsed, sleep, timeout};
use tracing::{info, warn};

use crate::telemetry::chain;

/// Which taints of the node are the start-up taint: those of the key, and of the value and effect where they are given.
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

/// Removes the taint, however long that takes. One that is put there later stays: it is not from this start.
///
/// # Cancel safety
/// Dropping the future leaves the node with the taint or without.
pub(super) async fn remove(client: &Client, node: &str, taint: &StartupTaint) {
    let nodes = Api::<ApiNode>::all_with(client.clone(), &ApiResource::erase::<Node>(&()));
    let mut pause = FIRST_PAUSE;
    loop {
        match timeout(REQUEST_TIMEOUT, try_remove(&nodes, node, taint)).await.map_err(RemoveError::Timeout) {
            Ok(Ok(true)) => return info!(node, %taint, "start-up taint removed"),
            Ok(Ok(false)) => return info!(node, %taint, "the node has no such start-up taint"),
            // Somebody else changed the node in between: it is read again soon.
            Ok(Err(RemoveError::Request(kube::Error::Api(status)))) if status.code == 409 => {
                sleep(FIRST_PAUSE).await;
            }
            Ok(Err(error)) | Err(error) => {
                warn!(
                    node, %taint, error = chain(&error),
                    "cannot remove the start-up taint: may the service account get and patch nodes?"
                );
                sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

/// Tells whether the taint was there.
async fn try_remove(nodes: &Api<ApiNode>, name: &str, taint: &StartupTaint) -> Result<bool, RemoveError> {
    let node = nodes.get(name).await.map_err(RemoveError::Request)?;
    let (mut taints, before) = (node.spec.taints, node.metadata.resource_version);
    let count = taints.len();
    taints.retain(|found| !taint.is(found));
    if taints.len() == count {
        return Ok(false);
    }
    // The list is written as a whole, so only on the version that was read: another controller's taint must not get lost.
    let patch = json!({ "metadata": { "resourceVersion": before }, "spec": { "taints": taints } });
    nodes.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await.map_err(RemoveError::Request)?;
    Ok(true)
}

#[cfg(test)]
mod tests;
