//! One watch that never ends: list, watch, and again, whatever the API server does.
//! Depends on kube and `list`; called by the programs' modules for Kubernetes.
//!
//! Not kube's `watcher`: it holds each page three times, and has no list that is not older than a version.

use std::{fmt::Debug, pin::pin, time::Duration};

use futures::StreamExt as _;
use kube::{
    Api, Resource, ResourceExt as _,
    api::{ListParams, VersionMatch, WatchEvent, WatchParams},
    runtime::watcher::{DefaultBackoff, Event},
};
use serde::de::DeserializeOwned;
use tokio::time::{error::Elapsed, sleep, timeout};
use tracing::warn;

use super::list::{ListError, list_page};
use crate::{clock::jitter, telemetry::chain};

/// Bounds one page of a list.
const LIST_PAGE_TIMEOUT: Duration = Duration::from_secs(30);
/// Bounds the first list where it must not be older than a version: an API server whose cache is behind waits
/// three seconds for it and then answers 504, which the client repeats.
const NOT_OLDER_TIMEOUT: Duration = Duration::from_secs(10);
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

/// How old the first list may be. All later ones are of the committed state: another API server's cache may
/// be behind, and a list from it would bring back objects that the watch has already shown as changed or
/// deleted.
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
    #[error(transparent)]
    List(ListError),
    #[error("list timed out")]
    ListTimeout(#[source] Elapsed),
    #[error("the watch failed")]
    Watch(#[source] kube::Error),
}

impl FollowError {
    /// Whether the watch was refused, or ended, because it starts too far back.
    fn is_expired(&self) -> bool {
        matches!(self, Self::Watch(kube::Error::Api(status)) if status.code == 410)
    }

    /// Whether a list of the committed state may succeed where this one has not: the cache does not have the
    /// version (504, or no answer in time), the version is of another cluster (400, 410), or the list of the
    /// cache, which has no pages, is too long.
    fn is_of_the_cache(&self, first: &FirstList) -> bool {
        let is_too_long = matches!(self, Self::List(ListError::TooLong { .. }));
        match (first, self) {
            (FirstList::MostRecent, _) => false,
            (FirstList::Any, _) => is_too_long,
            (FirstList::NotOlderThan(_), Self::List(error)) => {
                is_too_long || matches!(error.status(), Some(400 | 410 | 504))
            }
            (FirstList::NotOlderThan(_), error) => matches!(error, Self::ListTimeout(_)),
        }
    }
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
    let mut backoff = DefaultBackoff::default();
    let mut next_list = config.first.clone();
    // The version to watch from; `None` while a list is needed.
    let mut version = None;
    loop {
        let result = if let Some(version) = &mut version {
            watch(&api, &config, version, &mut take, &reached, &report).await
        } else {
            let listed = list_all(&api, &config, &next_list, &mut take, &reached).await;
            listed.map(|listed| {
                next_list = FirstList::MostRecent;
                version = Some(listed);
            })
        };
        let Err(error) = result else { continue };
        if error.is_of_the_cache(&next_list) {
            next_list = FirstList::MostRecent;
        }
        if error.is_expired() {
            version = None;
        }
        report(&error);
        sleep(backoff.next().unwrap_or(LIST_PAGE_TIMEOUT)).await;
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
    let (mut params, deadline) = match first {
        FirstList::Any => (params.match_any(), LIST_PAGE_TIMEOUT),
        FirstList::MostRecent => (params.limit(config.page_size), LIST_PAGE_TIMEOUT),
        FirstList::NotOlderThan(version) => {
            (params.matching(VersionMatch::NotOlderThan).at(version), NOT_OLDER_TIMEOUT)
        }
    };
    take(Event::Init);
    loop {
        let page = list_page(api, &params, config.page_limit_bytes, |object| take(Event::InitApply(object)));
        let page = timeout(deadline, page).await.map_err(FollowError::ListTimeout)?;
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
    let events = api.watch(&params, version).await.map_err(FollowError::Watch)?;
    let mut events = pin!(events);
    while let Some(event) = events.next().await {
        let (at, event) = match event {
            Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)) => {
                (object.resource_version(), Some(Event::Apply(object)))
            }
            Ok(WatchEvent::Deleted(object)) => (object.resource_version(), Some(Event::Delete(object))),
            Ok(WatchEvent::Bookmark(bookmark)) => (Some(bookmark.metadata.resource_version), None),
            Ok(WatchEvent::Error(status)) => {
                return Err(FollowError::Watch(kube::Error::Api(status)));
            }
            // The next ones can be read: a watch from here on would bring the same event again.
            Err(error @ kube::Error::SerdeError(_)) => {
                report(&FollowError::Watch(error));
                continue;
            }
            Err(error) => return Err(FollowError::Watch(error)),
        };
        if let Some(at) = at.filter(|at| !at.is_empty()) {
            *version = at;
            reached(version);
        }
        event.into_iter().for_each(&mut *take);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    fn refused(code: u16) -> kube::Error {
        kube::Error::Api(Status::failure("", "").with_code(code).boxed())
    }

    #[test]
    fn a_cache_that_does_not_have_a_version_is_not_asked_for_it_again() {
        let (any, recent) = (FirstList::Any, FirstList::MostRecent);
        let since = FirstList::NotOlderThan("7".into());
        let list = |code| FollowError::List(ListError::Request(refused(code)));
        let is = |error: &FollowError| [&any, &recent, &since].map(|first| error.is_of_the_cache(first));

        for code in [400, 410, 504] {
            assert_eq!(is(&list(code)), [false, false, true], "{code}");
        }
        for code in [401, 403, 429, 500, 503] {
            assert_eq!(is(&list(code)), [false; 3], "{code}: etcd must not pay for it");
        }
        let too_long = FollowError::List(ListError::TooLong { limit_bytes: 1 });
        assert_eq!(is(&too_long), [true, false, true], "in pages it may fit");
        assert_eq!(is(&FollowError::Watch(refused(504))), [false; 3]);
    }

    #[test]
    fn a_watch_that_starts_too_far_back_needs_a_list() {
        assert!(FollowError::Watch(refused(410)).is_expired());
        assert!(!FollowError::Watch(refused(500)).is_expired());
        assert!(!FollowError::List(ListError::Request(refused(410))).is_expired());
    }
}
