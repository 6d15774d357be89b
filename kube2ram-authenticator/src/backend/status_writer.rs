//! Writes what became of each RAMIdentityMapping to its status: one at a time, at a bounded rate. Nothing
//! depends on it: mappings are used whether their status can be written or not. Depends on kube; run by the
//! parent.

use std::{
    collections::BTreeSet,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use kube::{
    Api,
    api::{Patch, PatchParams},
};
use kube2ram_service::telemetry::chain;
use serde_json::Value;
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};
use tracing::{debug, warn};

use super::{api_object::ApiObject, metrics::Metrics};

/// The objects whose status is to be written.
#[derive(Debug, Default)]
pub(super) struct StatusWriter {
    /// No more names than there are objects.
    waiting: Mutex<BTreeSet<Box<str>>>,
    wanted: Notify,
}

/// How a write ended.
#[derive(Debug)]
enum Written {
    /// The service account may not.
    Forbidden(kube::Error),
    /// The API server may accept it later.
    Later,
    /// The object no longer exists, or its status is refused.
    Lost,
    Yes,
}

/// Ten thousand objects then take 17 minutes, and the API server does not notice.
const PAUSE: Duration = Duration::from_millis(100);
const TIMEOUT: Duration = Duration::from_secs(5);
/// After a failure; doubled up to the limit.
const BACK_OFF: Duration = Duration::from_secs(1);
const BACK_OFF_LIMIT: Duration = Duration::from_mins(1);
/// Without the right to write, one attempt is made this often.
const FORBIDDEN_FOR: Duration = Duration::from_mins(10);

impl StatusWriter {
    /// Writes the status of these objects, and of no others that still waited.
    pub(super) fn want(&self, names: Vec<Box<str>>) {
        *self.waiting() = names.into_iter().collect();
        self.wanted.notify_one();
    }

    /// Writes for ever. `patch` gives the patch of an object, if one is still needed.
    ///
    /// # Cancel safety
    /// Dropping the future loses the writes that are not done; a later [`Self::want`] names them again.
    pub(super) async fn run(
        &self,
        api: &Api<ApiObject>,
        metrics: &Metrics,
        patch: impl Fn(&str) -> Option<Value>,
    ) {
        let mut back_off = BACK_OFF;
        let mut is_forbidden = false;
        loop {
            let next = self.waiting().pop_first();
            let Some(name) = next else {
                self.wanted.notified().await;
                continue;
            };
            let Some(body) = patch(&name) else { continue };
            let written = write(api, &name, &body).await;
            metrics.status_write(written.result());
            match written {
                Written::Forbidden(error) => {
                    if !is_forbidden {
                        warn!(
                            error = chain(&error),
                            "no right to patch ramidentitymappings/status: the mappings are used, but do not show it"
                        );
                    }
                    is_forbidden = true;
                    self.waiting().insert(name);
                    sleep(FORBIDDEN_FOR).await;
                }
                Written::Later => {
                    self.waiting().insert(name);
                    sleep(back_off).await;
                    back_off = (back_off * 2).min(BACK_OFF_LIMIT);
                }
                Written::Lost | Written::Yes => {
                    (is_forbidden, back_off) = (false, BACK_OFF);
                    sleep(PAUSE).await;
                }
            }
        }
    }

    fn waiting(&self) -> MutexGuard<'_, BTreeSet<Box<str>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Written {
    fn result(&self) -> &'static str {
        match self {
            Self::Forbidden(_) => "forbidden",
            Self::Later => "failed",
            Self::Lost => "lost",
            Self::Yes => "written",
        }
    }
}

async fn write(api: &Api<ApiObject>, name: &str, body: &Value) -> Written {
    let params = PatchParams::default();
    let patch = Patch::Merge(body);
    let error = match timeout(TIMEOUT, api.patch_status(name, &params, &patch)).await {
        Ok(Ok(_)) => return Written::Yes,
        Ok(Err(error)) => error,
        Err(elapsed) => {
            debug!(name, error = chain(&elapsed), "cannot write a mapping's status");
            return Written::Later;
        }
    };
    let code = match &error {
        kube::Error::Api(status) => status.code,
        _ => 0,
    };
    debug!(name, error = chain(&error), "cannot write a mapping's status");
    match code {
        403 => Written::Forbidden(error),
        404 | 422 => Written::Lost,
        _ => Written::Later,
    }
}
