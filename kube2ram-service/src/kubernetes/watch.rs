//! One watch that never ends: list, watch, and again, whatever the API server does.
//! Depends on kube alone; called by `kubernetes::cluster`.

use std::{fmt::Debug, pin::pin, time::Duration};

use futures::StreamExt;
use kube::{
    Api, Resource,
    runtime::watcher::{self, DefaultBackoff, Event, ListSemantic, watcher},
};
use serde::de::DeserializeOwned;
use tokio::time::{sleep, timeout};
use tracing::warn;

use crate::telemetry::chain;

/// Bounds one page of a list. A watch itself is bounded by kube's idle timeout.
const LIST_PAGE_TIMEOUT: Duration = Duration::from_secs(30);

/// Feeds `take` for ever. Each error is only passed to `failed`: earlier data stays valid.
///
/// Only the first list may come from a cache (`config`). Later lists are of the committed state: another API
/// server's cache may be behind, and a list from it would bring back objects that the watch has already shown
/// as changed or deleted.
pub async fn follow<K>(
    api: Api<K>,
    mut config: watcher::Config,
    mut take: impl FnMut(Event<K>),
    failed: impl Fn(&str),
) where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let resource = api.resource_url();
    let mut backoff = DefaultBackoff::default();
    let mut is_listed = false;
    loop {
        let mut events = pin!(watcher(api.clone(), config.clone()));
        let mut listing = true;
        loop {
            let next = if listing {
                timeout(LIST_PAGE_TIMEOUT, events.next()).await
            } else {
                Ok(events.next().await)
            };
            let (restart, error) = match next {
                // The stream reports this before it sends the request.
                Ok(Some(Ok(Event::Init)))
                    if is_listed && config.list_semantic != ListSemantic::MostRecent =>
                {
                    config.list_semantic = ListSemantic::MostRecent;
                    break;
                }
                Ok(Some(Ok(event))) => {
                    listing = matches!(event, Event::Init | Event::InitApply(_));
                    is_listed |= matches!(event, Event::InitDone);
                    take(event);
                    continue;
                }
                Ok(Some(Err(error))) => {
                    let text = chain(&error);
                    warn!(resource, error = text, "watch failed");
                    (is_expired(&error), text)
                }
                Ok(None) => (true, "the watch ended".to_owned()),
                Err(error) => {
                    let text = chain(&error);
                    warn!(resource, error = text, "list timed out");
                    (true, format!("list timed out: {text}"))
                }
            };
            failed(&error);
            sleep(backoff.next().unwrap_or(LIST_PAGE_TIMEOUT)).await;
            if restart {
                break;
            }
        }
    }
}

/// Whether a watch was refused because it starts too far back. kube lists again when an event of the stream
/// reports this, but not when the response's status does; then it would repeat the request for ever.
fn is_expired(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::WatchStartFailed(kube::Error::Api(status)) if status.code == 410)
}
