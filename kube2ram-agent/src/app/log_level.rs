//! The log level, changed at run time and reset by itself. Called by `app`.

use std::time::Duration;

use jiff::Timestamp;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};
use tracing::{info, level_filters::LevelFilter};

use kube2ram_service::telemetry::Verbosity;

/// The longest time for which it may differ from the flags.
const LONGEST: Duration = Duration::from_hours(24);

pub(super) struct LogLevel {
    verbosity: Verbosity,
    until: watch::Sender<Option<(Instant, Timestamp)>>,
}

impl LogLevel {
    pub(super) fn new(verbosity: Verbosity) -> Self {
        Self { verbosity, until: watch::Sender::new(None) }
    }

    /// The log level, and until when, if it is temporary.
    pub(super) fn read(&self) -> (LevelFilter, Option<Timestamp>) {
        (self.verbosity.level(), self.until.borrow().map(|(_, until)| until))
    }

    pub(super) fn set(&self, level: LevelFilter, span: Duration, now: Timestamp) {
        let span = span.min(LONGEST);
        let until = now.checked_add(span).unwrap_or(now);
        info!(level = %level, %until, "log level changed");
        self.verbosity.set(level);
        self.until.send_replace(Some((Instant::now() + span, until)));
    }

    pub(super) fn reset(&self) {
        self.verbosity.set(self.verbosity.configured());
        if self.until.send_replace(None).is_some() {
            info!(level = %self.verbosity.level(), "log level reset to that of the flags");
        }
    }

    /// Falls back in time, for ever.
    pub(super) async fn run(&self) {
        let mut changes = self.until.subscribe();
        loop {
            let until = *changes.borrow_and_update();
            let changed = match until {
                None => changes.changed().await,
                Some((at, _)) => tokio::select! {
                    changed = changes.changed() => changed,
                    () = sleep_until(at) => {
                        self.reset();
                        Ok(())
                    }
                },
            };
            if changed.is_err() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn falls_back_by_itself_and_the_last_change_counts() {
        let level = Arc::new(LogLevel::new(Verbosity::new(LevelFilter::INFO, None)));
        drop(tokio::spawn({
            let level = Arc::clone(&level);
            async move { level.run().await }
        }));
        let minute = Duration::from_mins(1);
        let read = async || {
            tokio::time::sleep(Duration::from_millis(1)).await;
            level.read()
        };

        level.set(LevelFilter::DEBUG, minute, Timestamp::UNIX_EPOCH);
        let until = Timestamp::from_second(60).unwrap();
        assert_eq!(read().await, (LevelFilter::DEBUG, Some(until)));
        tokio::time::sleep(minute / 2).await;
        level.set(LevelFilter::TRACE, minute, Timestamp::UNIX_EPOCH);
        tokio::time::sleep(minute * 3 / 4).await;
        assert_eq!(level.read().0, LevelFilter::TRACE, "the first one's time is over");
        tokio::time::sleep(minute / 2).await;
        assert_eq!(read().await, (LevelFilter::INFO, None));

        level.set(LevelFilter::OFF, 100 * LONGEST, Timestamp::UNIX_EPOCH);
        assert_eq!(read().await.1, Some(Timestamp::from_second(24 * 3600).unwrap()), "not longer than a day");
        level.reset();
        assert_eq!(read().await, (LevelFilter::INFO, None));
    }
}
