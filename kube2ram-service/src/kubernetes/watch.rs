//! One watch that never ends: list, watch, and again, whatever the API server does.
//! Depends on kube and `list`; called by the programs' modules for Kubernetes.
//!
//! Not kube's `watcher`: it holds each page three times, and has no list that is not older than a version.

use std::{fmt::Debug, pin::pin, time::Duration};

use futures::StreamExt as _;
use kube::{
    Api, Resource, ResourceExt as _,
    api::{ListParams, VersionMatch, WatchEvent, WatchParams},
    runtime::watcher::Event,
};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, error::Elapsed, sleep, timeout};
use tracing::warn;

use super::list::{ListError, is_final, list_page};
use crate::{clock::jitter, telemetry::chain};

/// Bounds one page of a list, and the beginning of a watch.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// After a failure; doubled with each further one, up to the limit.
const FIRST_PAUSE: Duration = Duration::from_millis(800);
const PAUSE_LIMIT: Duration = Duration::from_secs(30);
/// How often a cache may answer that it does not have a version yet, before the committed state is listed.
const TOO_LARGE_LIMIT: u32 = 3;
/// After so many watches without anything, not even bookmarks, their version is not believed.
const SILENT_LIMIT: u32 = 2;
/// A watch that ends earlier without anything is a failure, as in client-go ("very short watch").
const SHORT_WATCH: Duration = Duration::from_secs(1);
/// After this time the API server ends a watch, and two seconds before it sends a bookmark
/// (`nextBookmarkTime` of its cache). So a working watch is never silent for longer.
pub(super) const WATCH_TIMEOUT: Duration = Duration::from_secs(50);

/// What to follow, and how to list it.
#[derive(Clone, Debug)]
pub struct FollowConfig {
    /// The field selector, if not all objects count.
    pub fields: Option<String>,
    /// The first list.
    pub first: FirstList,
    /// The most objects of a page, where the API server reads pages.
    pub page_size: u32,
    /// The most bytes of a page, as the client's layers pass it on.
    pub page_limit_bytes: usize,
}

/// How old the first list may be. No later one is older than what the watch has shown: another API server's
/// cache may be behind, and a list from it would bring back objects that were changed or deleted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FirstList {
    /// As old as the API server's cache, whose lists cost etcd nothing.
    Any,
    /// Not older than anything that was committed before.
    MostRecent,
    /// From the cache, but not older than this version. Where the cache does not have the version, as
    /// [`Self::MostRecent`].
    NotOlderThan(String),
}

impl Default for FollowConfig {
    /// Everything, by lists of the committed state.
    fn default() -> Self {
        Self {
            fields: None,
            first: FirstList::MostRecent,
            page_size: 500,
            page_limit_bytes: 32 * 1024 * 1024,
        }
    }
}

/// Why the objects could not be followed on.
#[derive(Debug, thiserror::Error)]
enum FollowError {
    #[error("the watch ended at once, or has nothing that can be read")]
    Fruitless,
    #[error(transparent)]
    List(ListError),
    #[error("an event of the watch could not be read: everything is listed again")]
    Missed,
    #[error("list timed out")]
    ListTimeout(#[source] Elapsed),
    /// The watch may start from a version of the future, as after a restore of etcd from a backup.
    #[error("watches bring nothing, not even bookmarks: everything is listed again")]
    Silent,
    /// Without the cause, which quotes the event.
    #[error("an event of the watch cannot be read: it is passed over")]
    Unreadable,
    #[error("the watch failed")]
    Watch(#[source] kube::Error),
    #[error("the API server does not begin the watch in time")]
    WatchTimeout(#[source] Elapsed),
}

impl FollowError {
    /// Whether the watch was refused, or ended, because it starts too far back.
    fn is_expired(&self) -> bool {
        matches!(self, Self::Watch(kube::Error::Api(status)) if status.code == 410)
    }

    /// Whether no watch can go on from the version.
    fn needs_list(&self) -> bool {
        match self {
            Self::Missed | Self::Silent => true,
            Self::Watch(kube::Error::Api(status)) => is_final(status.code),
            _ => false,
        }
    }

    /// Whether to list the committed state from now on. `too_large` counts the answers of the cache that it
    /// does not have the version. An overloaded API server is not a reason: etcd would have to pay.
    fn gives_up(&self, first: &FirstList, too_large: &mut u32) -> bool {
        let Self::List(error) = self else { return false };
        match first {
            FirstList::Any => matches!(error, ListError::TooLong { .. }),
            FirstList::MostRecent => false,
            FirstList::NotOlderThan(_) => {
                *too_large += u32::from(error.is_version_too_large());
                error.is_of_the_cache() && (!error.is_version_too_large() || *too_large >= TOO_LARGE_LIMIT)
            }
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::List(error) => error.retry_after(),
            _ => None,
        }
    }
}

/// What failed in a row.
#[derive(Debug, Default)]
struct Failures {
    requests: u32,
    /// Lists that were needed although no watch has brought anything since the last one.
    lists: u32,
    silent_watches: u32,
}

/// The pause after a failure. `random` lies in 0 – 1.
fn pause(failures: u32, random: f64) -> Duration {
    FIRST_PAUSE.saturating_mul(1 << failures.min(16)).min(PAUSE_LIMIT).mul_f64(0.5 + 0.5 * random)
}

/// Feeds `take` for ever. `reached` is given each version just before `take` has been given everything up to
/// it. Each error is only passed to `failed`: earlier data stays valid.
pub async fn follow<K>(
    api: Api<K>,
    config: FollowConfig,
    mut take: impl FnMut(Event<K>),
    reached: impl Fn(&str),
    failed: impl Fn(&str),
) where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let report = |error: &FollowError| {
        let text = chain(error);
        warn!(resource = api.resource_url(), error = text, "watch failed");
        failed(&text);
    };
    let mut failures = Failures::default();
    let mut next_list = config.first.clone();
    let mut too_large = 0;
    // The version to watch from; `None` while a list is needed.
    let mut version = None;
    loop {
        let result = if let Some(version) = &mut version {
            watch(&api, &config, version, &mut failures, &mut take, &reached, &report).await
        } else {
            let listed = list_all(&api, &config, &next_list, &mut take, &reached).await;
            listed.map(|listed| {
                failures.requests = 0;
                version = Some(listed);
            })
        };
        let Err(error) = result else { continue };
        report(&error);
        let in_a_row = if error.needs_list() {
            let last = version.take().filter(|_| error.is_expired() && config.first != FirstList::MostRecent);
            next_list = last.map_or(FirstList::MostRecent, FirstList::NotOlderThan);
            too_large = 0;
            &mut failures.lists
        } else {
            if error.gives_up(&next_list, &mut too_large) {
                next_list = FirstList::MostRecent;
            }
            &mut failures.requests
        };
        let pause = pause(*in_a_row, jitter());
        *in_a_row = in_a_row.saturating_add(1);
        sleep(pause.max(error.retry_after().unwrap_or_default())).await;
    }
}

/// Lists everything, page by page. Returns the version of the list.
async fn list_all<K>(
    api: &Api<K>,
    config: &FollowConfig,
    first: &FirstList,
    take: &mut impl FnMut(Event<K>),
    reached: &impl Fn(&str),
) -> Result<String, FollowError>
where
    K: Resource + Clone + DeserializeOwned,
{
    let params = ListParams { field_selector: config.fields.clone(), ..ListParams::default() };
    // An API server ignores the page size of "any", and reads pages of other versions from etcd.
    let mut params = match first {
        FirstList::Any => params.match_any(),
        FirstList::MostRecent => params.limit(config.page_size),
        FirstList::NotOlderThan(version) => params.matching(VersionMatch::NotOlderThan).at(version),
    };
    take(Event::Init);
    loop {
        let page = list_page(api, &params, config.page_limit_bytes, |object| take(Event::InitApply(object)));
        let page = timeout(ANSWER_TIMEOUT, page).await.map_err(FollowError::ListTimeout)?;
        let page = page.map_err(FollowError::List)?;
        params.continue_token = page.next;
        if params.continue_token.is_none() {
            reached(&page.version);
            take(Event::InitDone);
            return Ok(page.version);
        }
    }
}

/// One watch. Returns when the API server has ended it, or it was lost, with the version to go on from.
async fn watch<K>(
    api: &Api<K>,
    config: &FollowConfig,
    version: &mut String,
    failures: &mut Failures,
    take: &mut impl FnMut(Event<K>),
    reached: &impl Fn(&str),
    report: &impl Fn(&FollowError),
) -> Result<(), FollowError>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    // Not all watches of the cluster's agents at the same time.
    let seconds = WATCH_TIMEOUT.mul_f64(0.8 + 0.2 * jitter()).as_secs();
    let params = WatchParams {
        field_selector: config.fields.clone(),
        timeout: u32::try_from(seconds).ok(),
        ..WatchParams::default()
    };
    let start = Instant::now();
    let events = timeout(ANSWER_TIMEOUT, api.watch(&params, version)).await;
    let events = events.map_err(FollowError::WatchTimeout)?.map_err(FollowError::Watch)?;
    let mut events = pin!(events);
    let (mut has_brought, mut has_unreadable, mut lost) = (false, false, Ok(()));
    while let Some(event) = events.next().await {
        let (at, event) = match event {
            Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)) => {
                (object.resource_version(), Some(Event::Apply(object)))
            }
            Ok(WatchEvent::Deleted(object)) => (object.resource_version(), Some(Event::Delete(object))),
            Ok(WatchEvent::Bookmark(bookmark)) => (Some(bookmark.metadata.resource_version), None),
            Ok(WatchEvent::Error(status)) => {
                lost = Err(FollowError::Watch(kube::Error::Api(status)));
                break;
            }
            Err(error) if is_unreadable(&error) => {
                // The next ones can be read: a watch from here on would bring the same event again.
                has_unreadable = true;
                report(&FollowError::Unreadable);
                continue;
            }
            Err(error) => {
                lost = Err(FollowError::Watch(error));
                break;
            }
        };
        has_brought = true;
        *failures = Failures::default();
        if let Some(at) = at.filter(|at| !at.is_empty()) {
            *version = at;
            reached(version);
        }
        event.into_iter().for_each(&mut *take);
    }
    if has_brought && has_unreadable {
        // The version is past it: what it said is known from a list only.
        lost.err().iter().for_each(report);
        return Err(FollowError::Missed);
    }
    lost?;
    if has_brought {
        return Ok(());
    }
    if has_unreadable || start.elapsed() < SHORT_WATCH {
        return Err(FollowError::Fruitless);
    }
    // One that a load balancer has ended earlier proves nothing.
    let is_whole = start.elapsed() + SHORT_WATCH >= Duration::from_secs(seconds);
    failures.silent_watches += u32::from(is_whole);
    if failures.silent_watches < SILENT_LIMIT {
        return Ok(());
    }
    failures.silent_watches = 0;
    Err(FollowError::Silent)
}

/// Whether it is about one line of a watch. kube takes an event that it cannot read for a `Status`, all of
/// whose fields are optional: such a one has no code.
fn is_unreadable(error: &kube::Error) -> bool {
    match error {
        kube::Error::Api(status) => status.code == 0,
        error => matches!(error, kube::Error::SerdeError(_)),
    }
}

#[cfg(test)]
mod tests;
