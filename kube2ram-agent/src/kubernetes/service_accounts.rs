//! Reads the annotations of the ServiceAccounts of this node's pods. There is no watch: on each node it would
//! need the right to read all ServiceAccounts of the cluster, and would receive them. Depends on kube; called
//! by `kubernetes::cluster`. `kubernetes::accounts` decides what is read when.

use std::{collections::BTreeMap, time::Duration};

use futures::{StreamExt as _, stream::FuturesUnordered};
use http::{Request, header::ACCEPT};
use kube::client::Body;
use serde::Deserialize;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use super::{
    Cluster, Metrics, TokenRequester,
    account_api::{AccountApi, CallError, account_path, call},
    accounts::Annotations,
    object::kept_annotations,
};
use kube2ram_cloud::role::ServiceAccount;
use kube2ram_service::{
    clock::jitter,
    rate_limiter::{Rate, TokenBucket},
    telemetry::chain,
};

/// What is asked about ServiceAccounts.
#[derive(Clone, Debug)]
pub struct ServiceAccountConfig {
    /// The keys of their annotations to keep, and how many bytes of each.
    pub annotations: Vec<(Box<str>, usize)>,
    /// By whose right their tokens are asked for; annotations are read by the same right. `None` if none are
    /// asked for: annotations are then read as the agent itself.
    pub tokens: Option<TokenRequester>,
}

/// An answer, as far as it is used.
#[derive(Deserialize)]
struct ApiAccount {
    metadata: AccountMetadata,
}

#[derive(Deserialize)]
struct AccountMetadata {
    annotations: Option<BTreeMap<String, String>>,
}

/// How many accounts are read at once. Each answer may take a mebibyte while it is read, which counts towards
/// the container's limit.
pub(super) const READS_AT_ONCE: usize = 3;
/// A node's pods use some dozens of accounts, all of which are read when the agent starts.
const RATE: Rate = Rate { burst: 64, interval: Duration::from_millis(50) };
const DEADLINE: Duration = Duration::from_secs(5);
/// The API server takes 256 KiB of annotations, of which the projection keeps a few; JSON may write a byte as
/// six.
const ANSWER_LIMIT_BYTES: usize = 2 * 1024 * 1024;
/// Without `secrets` and `imagePullSecrets`.
const METADATA: &str = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1";
/// How long to wait when nothing is due; a change of the pods ends it.
const IDLE: Duration = Duration::from_hours(1);

impl Cluster {
    /// Reads what is due, for ever. Returns at once where nothing is asked about ServiceAccounts.
    pub(super) async fn read_accounts(&self) {
        let (Some(config), Some(api)) = (&self.config.service_accounts, &self.account_api) else { return };
        let mut changed = self.changed.subscribe();
        let mut bucket = TokenBucket::full(RATE, Instant::now());
        let mut reads = FuturesUnordered::new();
        loop {
            let now = Instant::now();
            let wake_at = {
                let mut lookups = self.lookups();
                let Some(accounts) = lookups.pods.follow_accounts(now) else { return };
                while reads.len() < READS_AT_ONCE && bucket.ready_at(RATE, 0, now) <= now {
                    let Some(account) = accounts.start(now) else { break };
                    bucket.take();
                    reads.push(async move {
                        let result = read(api, &config.annotations, &account, &self.metrics).await;
                        (account, result)
                    });
                }
                match accounts.next_due() {
                    Some(due) if reads.len() < READS_AT_ONCE => due.max(bucket.ready_at(RATE, 0, now)),
                    _ => now + IDLE,
                }
            };
            tokio::select! {
                Some((account, result)) = reads.next() => self.finish_read(&account, result),
                result = changed.changed() => if result.is_err() { return },
                () = sleep_until(wake_at) => {}
            }
        }
    }

    fn finish_read(&self, account: &ServiceAccount, result: Result<Annotations, CallError>) {
        let (now, at) = (Instant::now(), self.clock.now());
        let mut lookups = self.lookups();
        let Some(accounts) = lookups.pods.follow_accounts(now) else { return };
        let was_failing = accounts.failure().is_some();
        accounts.finish(account, result, (now, at), jitter());
        let failure = accounts.failure();
        lookups.pods.fill();
        drop(lookups);
        self.changed.send_replace(());
        match failure {
            Some(failure) if !was_failing => warn!(
                namespace = &*account.namespace,
                service_account = &*account.name,
                error = chain(&*failure.error),
                "cannot read a ServiceAccount: its pods keep the annotations that are known, and new ones wait"
            ),
            None if was_failing => info!("all ServiceAccounts of the node's pods can be read again"),
            _ => {}
        }
    }
}

/// From the committed state, not from the API server's cache: an annotation that was changed must not change
/// back, and an account that was just made must not be taken for one that does not exist.
async fn read(
    api: &AccountApi,
    keep: &[(Box<str>, usize)],
    account: &ServiceAccount,
    metrics: &Metrics,
) -> Result<Annotations, CallError> {
    let request = Request::get(account_path(account)?).header(ACCEPT, METADATA);
    let request = request.body(Body::empty()).map_err(CallError::Build)?;
    let answer = call(&api.client, request, ANSWER_LIMIT_BYTES, Instant::now() + DEADLINE).await;
    let (result, annotations) = match answer {
        Ok(answer) => match serde_json::from_slice::<ApiAccount>(&answer) {
            Ok(object) => ("ok", Ok(kept_annotations(object.metadata.annotations.unwrap_or_default(), keep))),
            Err(_unreadable) => ("error", Err(CallError::Unreadable)),
        },
        // Pods outlive their account. What it was annotated with may have given them less than the agent's
        // defaults do, so a deleted account is not one without annotations.
        Err(error) if error.is_not_found() => ("absent", Err(error)),
        Err(CallError::Refused(refusal)) if refusal.code == 403 => {
            ("forbidden", Err(CallError::Refused(refusal)))
        }
        Err(error) => ("error", Err(error)),
    };
    metrics.service_account_read(result);
    annotations
}
