//! Passes the role sessions of the node's pods to the credential cache, so that credentials are fetched
//! before pods ask, and dropped with them. Depends on `kubernetes`, `role`, `policy` and `credentials`;
//! spawned by `app`.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::SetOnce,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    credentials::{Claim, WARM_UP},
    kubernetes::{Cluster, Directory as _},
    pod::Pod,
    policy::Policy,
    role::Roles,
    server::Entitlements,
};

/// The time between two passes over the pods: a cluster with many namespaces changes all the time.
const PAUSE: Duration = Duration::from_millis(250);
/// After this time there is a pass even if nothing changed.
const RECHECK: Duration = Duration::from_secs(30);

/// What prefetching works with.
pub(super) struct Prefetch {
    pub(super) cluster: Arc<Cluster>,
    pub(super) entitlements: Arc<SetOnce<Entitlements>>,
}

impl Prefetch {
    /// Runs until `shutdown`.
    pub(super) async fn run(self, shutdown: CancellationToken) {
        shutdown.run_until_cancelled(Box::pin(self.follow())).await;
        shutdown.cancelled().await;
    }

    async fn follow(self) {
        let mut changes = self.cluster.changes();
        let Entitlements { roles, policy, credentials } = self.entitlements.wait().await;
        let mut spread = WARM_UP;
        loop {
            changes.mark_unchanged();
            // Before that the pods are not known yet. There is no pause then: a pod that arrives once they
            // are known is a new one.
            if self.cluster.is_known() {
                let mut pods = self.cluster.pods();
                // Policy remembers a few allow-lists only: each is read once.
                pods.sort_unstable_by(|a, b| a.namespace.cmp(&b.namespace));
                let claims = pods.iter().filter_map(|pod| self.claim(pod, roles, policy));
                credentials.set_claims(claims, spread);
                spread = Duration::ZERO;
                sleep(PAUSE).await;
            }
            // The cluster outlives this task, so the changes do not end; a time-out is a recheck.
            let _recheck = timeout(RECHECK, changes.changed()).await;
        }
    }

    fn claim(&self, pod: &Pod, roles: &Roles, policy: &Policy) -> Option<Claim> {
        let session = roles.session_for(pod).ok()?;
        let allow_list = self.cluster.allow_list(&pod.namespace);
        let permit = policy.permit(session, allow_list.as_ref().map(Option::as_deref), None).ok()?;
        // Most pods without annotation never ask for the default role.
        Some(Claim { permit, pod: pod.uid.clone(), prefetch: roles.is_asked_for_by(pod) })
    }
}
