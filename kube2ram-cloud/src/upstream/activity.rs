//! When the metadata server last answered, and since when it does not: for `kube2ram status`.
//! Written by the parent alone, at each request; read by `app`.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::{CONNECT_TIMEOUT, UpstreamError};
use kube2ram_service::telemetry::chain;

/// How the metadata server answers. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct UpstreamActivity(Arc<Mutex<Times>>);

#[derive(Debug, Default)]
struct Times {
    answered_at: Option<Instant>,
    failing: Option<Failing>,
}

#[derive(Clone, Debug)]
struct Failing {
    since: Instant,
    last: Instant,
    error: Box<str>,
}

/// What is known of it, as spans before now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// When it last answered, with whatever status.
    pub answered: Option<Duration>,
    /// Set while the last request got no answer.
    pub failing: Option<FailingReading>,
}

/// Requests that got no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailingReading {
    /// The first one after the last answer.
    pub since: Duration,
    /// The last one.
    pub last: Duration,
    /// Why the last one got none.
    pub error: Box<str>,
}

/// A request in flight.
pub(super) struct Attempt {
    activity: UpstreamActivity,
    begun: Instant,
    is_over: bool,
}

impl UpstreamActivity {
    /// How it stands.
    pub fn read(&self) -> Reading {
        let times = self.times();
        let failing = times.failing.as_ref().map(|failing| FailingReading {
            since: failing.since.elapsed(),
            last: failing.last.elapsed(),
            error: failing.error.clone(),
        });
        Reading { answered: times.answered_at.map(|at| at.elapsed()), failing }
    }

    pub(super) fn attempt(&self) -> Attempt {
        Attempt { activity: self.clone(), begun: Instant::now(), is_over: false }
    }

    fn failed(&self, error: &UpstreamError) {
        let (now, error) = (Instant::now(), chain(error).into());
        let mut times = self.times();
        let since = times.failing.as_ref().map_or(now, |failing| failing.since);
        times.failing = Some(Failing { since, last: now, error });
    }

    fn times(&self) -> MutexGuard<'_, Times> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Attempt {
    pub(super) fn ended<T>(mut self, outcome: &Result<T, UpstreamError>) {
        self.is_over = true;
        match outcome {
            Ok(_) => {
                *self.activity.times() = Times { answered_at: Some(Instant::now()), failing: None };
            }
            Err(error) => self.activity.failed(error),
        }
    }
}

impl Drop for Attempt {
    /// The caller has not waited for the end: a pod that hangs up at once proves nothing, one that was kept
    /// waiting does.
    fn drop(&mut self) {
        if !self.is_over && self.begun.elapsed() >= CONNECT_TIMEOUT {
            self.activity.failed(&UpstreamError::Timeout);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn returns_since_when_there_is_no_answer_until_there_is_one() {
        let activity = UpstreamActivity::default();
        let refused = || Err::<(), _>(UpstreamError::Connect("refused".into()));
        assert_eq!(activity.read(), Reading::default());
        activity.attempt().ended(&Ok(()));
        advance(SECOND).await;
        activity.attempt().ended(&refused());
        advance(SECOND).await;
        activity.attempt().ended(&refused());
        advance(SECOND).await;

        let error = "cannot connect to the metadata server: refused".into();
        let failing = FailingReading { since: 2 * SECOND, last: SECOND, error };
        assert_eq!(activity.read(), Reading { answered: Some(3 * SECOND), failing: Some(failing) });

        activity.attempt().ended(&Ok(()));

        assert_eq!(activity.read(), Reading { answered: Some(Duration::ZERO), failing: None });
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_that_was_kept_waiting_counts_and_one_that_hangs_up_at_once_does_not() {
        let activity = UpstreamActivity::default();
        drop(activity.attempt());
        assert_eq!(activity.read().failing, None);
        let attempt = activity.attempt();
        advance(CONNECT_TIMEOUT).await;

        drop(attempt);

        assert_eq!(&*activity.read().failing.unwrap().error, "the metadata server did not answer in time");
    }
}
