//! hyper's timer for request heads, with one timer of tokio's for all heads of a connection. hyper creates a
//! timer for each head. With tokio's timers, each would be added to the runtime's wheel and removed again,
//! under a lock that all connections share. Moving one timer to a later time takes no lock. Depends on no
//! other module; used by the parent.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use hyper::rt::{Sleep, Timer};
use tokio::time::sleep_until;

/// For one connection, which waits for one head at a time.
#[derive(Clone, Debug)]
pub(super) struct HeadTimer(Arc<Mutex<Pin<Box<tokio::time::Sleep>>>>);

/// The wait for one head.
struct Head {
    until: tokio::time::Instant,
    timer: HeadTimer,
}

impl HeadTimer {
    pub(super) fn new() -> Self {
        Self(Arc::new(Mutex::new(Box::pin(sleep_until(tokio::time::Instant::now())))))
    }
}

impl Timer for HeadTimer {
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Sleep>> {
        self.sleep_until(self.now() + duration)
    }

    fn sleep_until(&self, deadline: Instant) -> Pin<Box<dyn Sleep>> {
        Box::pin(Head { until: deadline.into(), timer: self.clone() })
    }

    /// tokio's, which tests can pause.
    fn now(&self) -> Instant {
        tokio::time::Instant::now().into()
    }
}

impl Future for Head {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut timer = self.timer.0.lock().unwrap_or_else(PoisonError::into_inner);
        if timer.deadline() != self.until {
            timer.as_mut().reset(self.until);
        }
        timer.as_mut().poll(cx)
    }
}

impl Sleep for Head {}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn each_head_has_its_own_time_one_after_the_other() {
        let timer = HeadTimer::new();
        let begun = timer.now();

        let mut first = timer.sleep(Duration::from_secs(15));
        assert!(first.as_mut().now_or_never().is_none());
        drop(first);
        timer.sleep(Duration::from_secs(5)).await;
        assert_eq!(timer.now() - begun, Duration::from_secs(5));
        timer.sleep(Duration::from_secs(15)).await;

        assert_eq!(timer.now() - begun, Duration::from_secs(20));
    }
}
