//! Fetches the credentials of the node's pods while another agent still serves them, so that not all pods
//! wait for STS after the handover. Depends on `kubernetes`, `role`, `policy` and `credentials`; called by
//! `app` of a standby agent.

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

/// How long missing credentials delay the takeover: the running agent may still hold them. Afterwards the
/// standby agent reports ready anyway, so that a roll-out, possibly the one that fixes the cause, is not
/// blocked.
const DEADLINE: Duration = Duration::from_secs(120);
/// How many sessions are requested at once. The cache limits how many are fetched at once.
const AT_ONCE: usize = 64;
const MAX_PAUSE: Duration = Duration::from_secs(1);

/// Returns when every pod's credentials are held, or are finally refused.
pub(super) async fn warm_up(
    cluster: Arc<Cluster>,
    entitlements: Arc<SetOnce<Entitlements>>,
    pending: Pending,
) {
    cluster.synced().await;
    cluster.known().await;
    let entitlements = entitlements.wait().await;
    let pods = cluster.pods();
    let fetching = stream::iter(&pods).for_each_concurrent(AT_ONCE, async |pod| {
        while let Some(permit) = permit(&cluster, entitlements, pod) {
            let pause = match entitlements.credentials.hold(permit, &pod.uid).await {
                Err(CredentialError::NotReady { retry_after }) => retry_after,
                Err(CredentialError::Issue { source, retry_after }) if source.kind.is_transient() => {
                    retry_after
                }
                Ok(()) | Err(CredentialError::Full | CredentialError::Issue { .. }) => return,
            };
            sleep(pause.min(MAX_PAUSE)).await;
        }
    });
    if timeout(DEADLINE, fetching).await.is_err() {
        warn!("not all credentials could be fetched ahead; some pods will wait for theirs");
    }
    pending.ready();
}

/// `None` for a pod that gets no credentials; other modules report the reason.
fn permit(cluster: &Cluster, entitlements: &Entitlements, pod: &Pod) -> Option<Permit> {
    // Most pods without annotation never ask for the default role.
    if !entitlements.roles.is_asked_for_by(pod) {
        return None;
    }
    let session = entitlements.roles.session_for(pod).ok()?;
    let allow_list = cluster.allow_list(&pod.namespace);
    entitlements.policy.permit(session, allow_list.as_ref().map(Option::as_deref), None).ok()
}
