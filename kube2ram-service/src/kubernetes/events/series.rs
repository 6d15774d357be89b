//! The posted Events of each object, how often each was repeated since, and what is to be posted next.
//! Bounded, and pure: time is passed in. Called by `events`, under its lock.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use jiff::Timestamp;
use tokio::time::Instant;

use super::Notice;

/// All that is remembered.
#[derive(Debug)]
pub(super) struct SeriesTable<N> {
    series: HashMap<N, Series>,
    /// What is to be posted; each has a series.
    queue: VecDeque<N>,
    /// Whether counts cannot be patched.
    counts_nothing: bool,
    /// Nothing is taken until then.
    refuses_until: Option<Instant>,
}

/// One text about one object, and its repetitions.
#[derive(Debug)]
struct Series {
    /// The name of its Event.
    name: Box<str>,
    times: i32,
    last: Timestamp,
    heard_at: Instant,
    queued_at: Instant,
    /// When the API server last received the count, and the count; `None` while queued.
    told: Option<(Instant, i32)>,
}

/// The result for a notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    Counted,
    Dropped,
    Queued,
}

/// A notice and the name of its Event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Said<N> {
    pub(super) notice: N,
    pub(super) name: Box<str>,
}

/// How often a notice was raised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Count<N> {
    pub(super) said: Said<N>,
    pub(super) times: i32,
    pub(super) last: Timestamp,
}

const QUEUE_LIMIT: usize = 64;
const SERIES_LIMIT: usize = 1_024;

/// Texts may contain what a pod asked for, so one pod must not use up all entries.
const PER_OBJECT_LIMIT: usize = 8;

/// A series ends when it was not repeated for so long. What waited longer for the API server is not posted
/// any more.
const SAID_FOR: Duration = Duration::from_mins(10);
/// A growing count is patched this often.
const COUNT_EVERY: Duration = Duration::from_mins(5);

impl<N> Default for SeriesTable<N> {
    fn default() -> Self {
        Self { series: HashMap::new(), queue: VecDeque::new(), counts_nothing: false, refuses_until: None }
    }
}

impl<N: Notice> SeriesTable<N> {
    /// Takes a notice. `name` is that of its Event, should it be the first of a series.
    pub(super) fn hear(&mut self, notice: N, name: &str, wall: Timestamp, now: Instant) -> Heard {
        if self.refuses_until.is_some_and(|until| now < until) {
            return Heard::Dropped;
        }
        self.refuses_until = None;
        self.end_series(now);
        if let Some(series) = self.series.get_mut(&notice) {
            series.times = series.times.saturating_add(1);
            (series.last, series.heard_at) = (wall, now);
            return Heard::Counted;
        }
        let of_object = self.series.keys().filter(|known| known.about() == notice.about()).count();
        if self.queue.len() >= QUEUE_LIMIT
            || self.series.len() >= SERIES_LIMIT
            || of_object >= PER_OBJECT_LIMIT
        {
            return Heard::Dropped;
        }
        let (name, queued_at) = (name.into(), now);
        let series = Series { name, times: 1, last: wall, heard_at: now, queued_at, told: None };
        self.series.insert(notice.clone(), series);
        self.queue.push_back(notice);
        Heard::Queued
    }

    /// What to post next.
    pub(super) fn next(&mut self, now: Instant) -> Option<Said<N>> {
        self.end_series(now);
        while let Some(notice) = self.queue.pop_front() {
            // One that has waited too long has ended.
            if let Some(series) = self.series.get(&notice) {
                return Some(Said { name: series.name.clone(), notice });
            }
        }
        None
    }

    /// It has been posted.
    pub(super) fn posted(&mut self, notice: &N, now: Instant) {
        if let Some(series) = self.series.get_mut(notice) {
            // Repetitions while it waited are part of the first count.
            series.told = Some((now, 1));
        }
    }

    /// It is posted later, after the others: possibly only its namespace accepts none.
    pub(super) fn put_back(&mut self, notice: N) {
        self.queue.push_back(notice);
    }

    /// It counts as never raised.
    pub(super) fn forget(&mut self, notice: &N) {
        self.series.remove(notice);
    }

    /// A count that is to be patched; it counts as patched.
    pub(super) fn due(&mut self, now: Instant) -> Option<Count<N>> {
        let due = |(at, count): (Instant, i32), times| {
            // A repetition is posted at once, its count later.
            times > count && (count == 1 || now.saturating_duration_since(at) >= COUNT_EVERY)
        };
        let (notice, series) = self
            .series
            .iter_mut()
            .find(|(_, series)| series.told.is_some_and(|told| due(told, series.times)))?;
        series.told = Some((now, series.times));
        let said = Said { notice: notice.clone(), name: series.name.clone() };
        Some(Count { said, times: series.times, last: series.last })
    }

    /// Counts cannot be patched: a continuing problem is posted again whenever its series would otherwise
    /// have ended.
    pub(super) fn stop_counting(&mut self) {
        self.counts_nothing = true;
    }

    /// Forgets everything, and takes nothing for a while.
    pub(super) fn refuse_until(&mut self, until: Instant) {
        self.series.clear();
        self.queue.clear();
        self.refuses_until = Some(until);
    }

    fn end_series(&mut self, now: Instant) {
        let counts_nothing = self.counts_nothing;
        self.series.retain(|_, series| {
            let since = match series.told {
                Some((told_at, _)) if counts_nothing => told_at,
                Some(_) => series.heard_at,
                // Still queued: repetitions do not keep it there.
                None => series.queued_at,
            };
            now.saturating_duration_since(since) < SAID_FOR
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Debug, PartialEq, Eq, Hash)]
    struct Text {
        object: usize,
        message: String,
    }

    impl Notice for Text {
        type About = usize;

        fn about(&self) -> &usize {
            &self.object
        }
    }

    struct Lab {
        table: SeriesTable<Text>,
        now: Instant,
    }

    impl Lab {
        fn new() -> Self {
            Self { table: SeriesTable::default(), now: Instant::now() }
        }

        fn hear(&mut self, object: usize, message: &str) -> Heard {
            self.table.hear(notice(object, message), message, Timestamp::UNIX_EPOCH, self.now)
        }

        fn post(&mut self) -> Option<Text> {
            let said = self.table.next(self.now)?;
            self.table.posted(&said.notice, self.now);
            Some(said.notice)
        }

        fn count(&mut self) -> Option<i32> {
            self.table.due(self.now).map(|count| count.times)
        }
    }

    fn notice(object: usize, message: &str) -> Text {
        Text { object, message: message.into() }
    }

    #[test]
    fn posts_the_same_once_and_counts_it() {
        let mut lab = Lab::new();
        assert_eq!([lab.hear(1, "a"), lab.hear(1, "b")], [Heard::Queued; 2]);
        assert_eq!([lab.post(), lab.post(), lab.post()], [Some(notice(1, "a")), Some(notice(1, "b")), None]);
        assert_eq!(lab.count(), None, "said once each");

        assert_eq!(lab.hear(1, "a"), Heard::Counted);
        assert_eq!([lab.count(), lab.count()], [Some(2), None]);
        // A crash loop: many repetitions, and no patch before the time.
        for _ in 0..1_000 {
            lab.hear(1, "a");
        }
        assert_eq!([lab.post().is_some(), lab.count().is_some()], [false; 2]);
        lab.now += COUNT_EVERY;
        assert_eq!([lab.count(), lab.count()], [Some(1_002), None]);
    }

    #[test]
    fn a_series_ends_when_it_is_not_repeated() {
        let mut lab = Lab::new();
        lab.hear(1, "a");
        lab.post();
        lab.now += SAID_FOR - Duration::from_secs(1);
        assert_eq!(lab.hear(1, "a"), Heard::Counted);
        lab.now += SAID_FOR - Duration::from_secs(1);
        assert_eq!(lab.hear(1, "a"), Heard::Counted, "it goes on");

        lab.now += SAID_FOR;

        assert_eq!(lab.hear(1, "a"), Heard::Queued);
    }

    #[test]
    fn without_counts_what_goes_on_is_posted_again() {
        let mut lab = Lab::new();
        lab.table.stop_counting();
        lab.hear(1, "a");
        lab.post();

        lab.now += SAID_FOR - Duration::from_secs(1);
        assert_eq!(lab.hear(1, "a"), Heard::Counted);
        lab.now += Duration::from_secs(1);

        assert_eq!(lab.hear(1, "a"), Heard::Queued);
    }

    #[test]
    fn one_object_cannot_take_the_others_share() {
        let mut lab = Lab::new();
        let heard: Vec<_> = (0..2 * PER_OBJECT_LIMIT).map(|text| lab.hear(1, &text.to_string())).collect();

        assert_eq!(heard.iter().filter(|heard| **heard == Heard::Queued).count(), PER_OBJECT_LIMIT);
        assert_eq!(lab.hear(2, "a"), Heard::Queued);
    }

    #[test]
    fn drops_what_does_not_fit() {
        let mut lab = Lab::new();
        let heard: Vec<_> = (0..QUEUE_LIMIT + 3).map(|object| lab.hear(object, "a")).collect();

        assert_eq!(heard[QUEUE_LIMIT..], [Heard::Dropped; 3]);
        lab.post();
        assert_eq!(lab.hear(QUEUE_LIMIT, "a"), Heard::Queued);
    }

    #[test]
    fn what_the_api_server_does_not_take_waits_but_not_for_ever() {
        let mut lab = Lab::new();
        lab.hear(1, "a");
        let first = lab.table.next(lab.now).unwrap();
        lab.table.put_back(first.notice.clone());
        assert_eq!(lab.table.next(lab.now), Some(first.clone()), "under the same name");
        lab.hear(2, "a");
        lab.table.put_back(first.notice.clone());
        assert_eq!(lab.post(), Some(notice(2, "a")), "the others do not wait for it");
        assert_eq!(lab.table.next(lab.now), Some(first.clone()));
        lab.table.put_back(first.notice);

        lab.now += SAID_FOR;

        assert_eq!(lab.table.next(lab.now), None);
        assert_eq!(lab.hear(1, "a"), Heard::Queued);
    }

    #[test]
    fn takes_nothing_while_it_may_not_post() {
        let mut lab = Lab::new();
        lab.hear(1, "a");
        let until = lab.now + Duration::from_secs(600);
        lab.table.refuse_until(until);
        assert_eq!((lab.hear(1, "b"), lab.post()), (Heard::Dropped, None));

        lab.now = until;

        assert_eq!(lab.hear(1, "b"), Heard::Queued);
    }
}
