//! Fetches what the node's pods may have while another agent still serves them, so that the change of agents is no moment at which they all wait for STS.
//! Depends on `kubernetes`, `role`, `policy` and `credentials`; called by `app` of an agent that stands by.

use std::{sync::Arc, time::Duration};

use futures::{StreamExt as _, stream};
use tokio::{
    sync::SetOnce,
    time::{sleep, timeout},
};
use tracing::warn;

use crate::{
    credentials::CredentialError,
    kubernetes::{Cluster, Directory as _},
    pod::Pod,
    policy::Permit,
    server::Entitlements,
};
use kube2ram_service::admin::Pending;

/// How long an agent that stands by is kept from taking over by credentials that cannot be had: the other one may still hold them. After that it is as
/// good as it gets, and whoever updates the agents, maybe because of just this, goes on.
const DEADLINE: Duration = Duration::from_secs(120);
/// How many wait at once. How many are fetched at once is the cache's business.
const AT_ONCE: usize = 64;
const MAX_PAUSE: Duration = Duration::from_secs(1);

/// Returns when every pod's credentials are held, or are refused for good.
pub(super) async fn warm_up(
    cluster: Arc<Cluster>,
    entitlements: Arc<SetOnce<Entitlements>>,
    pending: Pending,
) {
    cluster.synced().await;
    let entitlements = entitlements.wait().await;
    let pods = cluster.pods();
    let fetching = stream::iter(&pods).for_each_concurrent(AT_ONCE, async |pod| {
        while let Some(permit) = permit(&cluster, entitlements, pod) {
            let pause = match entitlements.credentials.get(permit, &pod.uid).await {
                Err(CredentialError::NotReady { retry_after }) => retry_after,
                Err(CredentialError::Issue { source, retry_after }) if source.kind.is_transient() => {
                    retry_after
                }
                Ok(_) | Err(CredentialError::Full | CredentialError::Issue { .. }) => return,
            };
            sleep(pause.min(MAX_PAUSE)).await;
        }
    });
    if timeout(DEADLINE, fetching).await.is_err() {
        warn!("not all credentials could be fetched ahead; some pods will wait for theirs");
    }
    pending.ready();
}

/// `None` for a pod that gets none, for whatever reason: it is not this module's to say.
fn permit(cluster: &Cluster, entitlements: &Entitlements, pod: &Pod) -> Option<Permit> {
    // Most pods without annotation never ask for the default role.
    if !entitlements.roles.is_asked_for_by(pod) {
        return None;
    }
    let session = entitlements.roles.session_for(pod).ok()?;
    let allow_list = cluster.allow_list(&pod.namespace);
    entitlements.policy.permit(session, allow_list.as_ref().map(Option::as_deref), None).ok()
}
