//! Limits a server's connections, in all and per caller. When a limit is reached, an idle connection is
//! closed for a new one, so that a caller that only holds connections cannot lock others out. Depends on no
//! other module; used by `server`, `admin` and `pass_through_limiter`.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// The permits of a server's connections.
#[derive(Debug)]
pub struct ConnectionLimiter<C: Eq + Hash> {
    total: usize,
    per_caller: usize,
    grace: Duration,
    begun: Instant,
    taken: Mutex<Taken<C>>,
}

#[derive(Debug)]
struct Taken<C> {
    /// Of each caller that has any, by age.
    by_caller: HashMap<C, BTreeMap<u64, Arc<Holder>>>,
    total: usize,
    next: u64,
}

#[derive(Debug)]
struct Holder {
    lost: CancellationToken,
    /// When it came, or its last answer ended, in microseconds; [`BUSY`] while a request is being answered.
    quiet_since: AtomicU64,
}

const BUSY: u64 = u64::MAX;

/// An answer that a connection waits for or is being sent; the connection is idle again once this is dropped.
#[derive(Debug)]
pub struct Busy {
    holder: Arc<Holder>,
    begun: Instant,
}

/// The permit of one connection; dropping it gives it back.
#[derive(Debug)]
pub struct ConnectionPermit<C: Clone + Eq + Hash> {
    limiter: Arc<ConnectionLimiter<C>>,
    caller: C,
    number: u64,
    holder: Arc<Holder>,
    /// Whether another connection was closed for it.
    pub displaced: bool,
}

impl<C: Clone + Eq + Hash> ConnectionLimiter<C> {
    /// Both limits are at least 1. A connection is idle after `grace` without a request or an answer: before
    /// that, its next request may be on its way.
    pub fn new(total: usize, per_caller: usize, grace: Duration) -> Arc<Self> {
        let taken = Taken { by_caller: HashMap::new(), total: 0, next: 0 };
        Arc::new(Self { total, per_caller, grace, begun: Instant::now(), taken: Mutex::new(taken) })
    }

    /// Returns a permit for a connection of `caller`. If the caller has reached its limit, its oldest idle
    /// connection is closed; without an idle one there is no permit. If all permits are taken, the oldest
    /// idle connection of the caller with most connections is closed, or, without an idle one, its oldest.
    pub fn take(self: &Arc<Self>, caller: C) -> Option<ConnectionPermit<C>> {
        let mut taken = self.taken();
        let mut displaced = None;
        if taken.of(&caller) >= self.per_caller {
            displaced = Some((caller.clone(), taken.oldest_idle(&caller, self.quiet_before())?));
        } else if taken.total >= self.total {
            let most = taken.who_has_most()?;
            let number = taken.oldest_idle(&most, self.quiet_before()).or_else(|| taken.oldest(&most))?;
            displaced = Some((most, number));
        }
        let holder = displaced.as_ref().and_then(|(caller, number)| taken.remove(caller, *number));
        if let Some(holder) = &holder {
            holder.lost.cancel();
        }
        Some(self.give(taken, caller, holder.is_some()))
    }

    /// As [`Self::take`], but closes no connection.
    pub fn take_free(self: &Arc<Self>, caller: C) -> Option<ConnectionPermit<C>> {
        let taken = self.taken();
        let is_free = taken.total < self.total && taken.of(&caller) < self.per_caller;
        is_free.then(|| self.give(taken, caller, false))
    }

    fn give(
        self: &Arc<Self>,
        mut taken: MutexGuard<'_, Taken<C>>,
        caller: C,
        displaced: bool,
    ) -> ConnectionPermit<C> {
        let holder = Holder { lost: CancellationToken::new(), quiet_since: self.now().into() };
        let (number, holder) = (taken.next, Arc::new(holder));
        taken.next += 1;
        taken.total += 1;
        taken.by_caller.entry(caller.clone()).or_default().insert(number, Arc::clone(&holder));
        ConnectionPermit { limiter: Arc::clone(self), caller, number, holder, displaced }
    }

    fn now(&self) -> u64 {
        micros_since(self.begun)
    }

    /// Connections that have been quiet since this time are idle; `None` when none can be.
    fn quiet_before(&self) -> Option<u64> {
        self.now().checked_sub(u64::try_from(self.grace.as_micros()).ok()?)
    }

    fn taken(&self) -> MutexGuard<'_, Taken<C>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<C: Clone + Eq + Hash> Taken<C> {
    fn of(&self, caller: &C) -> usize {
        self.by_caller.get(caller).map_or(0, BTreeMap::len)
    }

    /// Among callers with equally many, the one with the oldest connection.
    fn who_has_most(&self) -> Option<C> {
        let rank = |held: &BTreeMap<u64, _>| {
            (held.len(), std::cmp::Reverse(held.first_key_value().map(|(number, _)| *number)))
        };
        let most = self.by_caller.iter().max_by_key(|(_, held)| rank(held));
        most.map(|(caller, _)| caller.clone())
    }

    fn oldest(&self, caller: &C) -> Option<u64> {
        self.by_caller.get(caller)?.first_key_value().map(|(number, _)| *number)
    }

    fn oldest_idle(&self, caller: &C, quiet_before: Option<u64>) -> Option<u64> {
        let quiet_before = quiet_before?;
        let mut held = self.by_caller.get(caller)?.iter();
        let idle = held.find(|(_, holder)| holder.quiet_since.load(Ordering::Relaxed) <= quiet_before);
        idle.map(|(number, _)| *number)
    }

    fn remove(&mut self, caller: &C, number: u64) -> Option<Arc<Holder>> {
        let held = self.by_caller.get_mut(caller)?;
        let holder = held.remove(&number)?;
        if held.is_empty() {
            self.by_caller.remove(caller);
        }
        self.total -= 1;
        Some(holder)
    }
}

impl<C: Clone + Eq + Hash> ConnectionPermit<C> {
    /// Cancelled when the connection must be closed for another one.
    pub fn lost(&self) -> &CancellationToken {
        &self.holder.lost
    }

    /// The connection is not idle from now on, until what is returned is dropped: when the answer has ended.
    pub fn busy(&self) -> Busy {
        self.holder.quiet_since.store(BUSY, Ordering::Relaxed);
        Busy { holder: Arc::clone(&self.holder), begun: self.limiter.begun }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.holder.quiet_since.store(micros_since(self.begun), Ordering::Relaxed);
    }
}

fn micros_since(begun: Instant) -> u64 {
    u64::try_from(begun.elapsed().as_micros()).unwrap_or(BUSY - 1)
}

impl<C: Clone + Eq + Hash> Drop for ConnectionPermit<C> {
    fn drop(&mut self) {
        // Nothing is left to remove if it was lost.
        drop(self.limiter.taken().remove(&self.caller, self.number));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The indexes of connections that have lost their permits.
    fn lost(permits: &[ConnectionPermit<u8>]) -> Vec<usize> {
        (0..permits.len()).filter(|&index| permits[index].lost().is_cancelled()).collect()
    }

    fn held(limiter: &Arc<ConnectionLimiter<u8>>, callers: &[u8]) -> Vec<ConnectionPermit<u8>> {
        callers.iter().map(|&caller| limiter.take(caller).unwrap()).collect()
    }

    #[test]
    fn a_caller_at_its_bound_loses_its_oldest_and_others_nothing() {
        let limiter = ConnectionLimiter::new(10, 2, Duration::ZERO);
        let mut held = held(&limiter, &[1, 2, 2]);
        assert!(lost(&held).is_empty() && held.iter().all(|permit| !permit.displaced));

        held.push(limiter.take(2).unwrap());
        assert_eq!((lost(&held), held[3].displaced), (vec![1], true));
        held.push(limiter.take(2).unwrap());

        assert_eq!(lost(&held), [1, 2]);
    }

    #[test]
    fn a_caller_that_is_being_answered_on_all_of_its_connections_gets_no_other_one() {
        let limiter = ConnectionLimiter::new(10, 2, Duration::ZERO);
        let held = held(&limiter, &[1, 1, 2]);
        let answers: Vec<_> = held[..2].iter().map(ConnectionPermit::busy).collect();

        assert!(limiter.take(1).is_none());

        assert!(lost(&held).is_empty());
        assert!(limiter.take(2).is_some(), "the twin");
        drop(answers);
        assert!(limiter.take(1).is_some(), "the answers have ended");
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_whose_next_request_may_be_on_its_way_does_not_give_way() {
        const GRACE: Duration = Duration::from_secs(1);
        let limiter = ConnectionLimiter::new(10, 2, GRACE);
        let held = held(&limiter, &[1, 1]);
        assert!(limiter.take(1).is_none(), "they have just come");
        tokio::time::advance(GRACE).await;
        drop(held[0].busy());

        let third = limiter.take(1).unwrap();
        assert!(third.displaced);
        assert_eq!(lost(&held), [1], "not the one that was just answered, although it is older");
        assert!(limiter.take(1).is_none());
        tokio::time::advance(GRACE).await;
        drop(limiter.take(1).unwrap());

        assert_eq!((lost(&held), third.lost().is_cancelled()), (vec![0, 1], false));
    }

    #[test]
    fn when_all_are_taken_those_who_have_most_lose_their_oldest() {
        let limiter = ConnectionLimiter::new(5, 3, Duration::ZERO);
        let mut held = held(&limiter, &[1, 2, 3, 2, 3]);

        held.push(limiter.take(4).unwrap());
        assert_eq!(lost(&held), [1], "the older of 2, which has as many as 3");
        held.push(limiter.take(5).unwrap());

        assert_eq!(lost(&held), [1, 2], "3 has most now");
    }

    #[test]
    fn an_idle_connection_gives_way_before_one_that_is_being_answered() {
        let limiter = ConnectionLimiter::new(3, 3, Duration::ZERO);
        let mut held = held(&limiter, &[1, 1, 1]);
        let _first = held[0].busy();

        held.push(limiter.take(2).unwrap());
        assert_eq!(lost(&held), [1]);
        let _third = held[2].busy();
        held.push(limiter.take(3).unwrap());

        assert_eq!(lost(&held), [0, 1], "without an idle one, the oldest");
    }

    #[test]
    fn where_nobody_gives_way_there_is_a_permit_or_none() {
        let limiter = ConnectionLimiter::new(3, 2, Duration::ZERO);
        let held: Vec<_> = [1, 1].map(|caller| limiter.take_free(caller).unwrap()).into();

        assert!(limiter.take_free(1).is_none(), "its own bound");
        let third = limiter.take_free(2).unwrap();
        assert!(limiter.take_free(3).is_none(), "the bound of all");
        drop(third);

        assert!(limiter.take_free(3).is_some());
        assert!(lost(&held).is_empty());
    }

    #[test]
    fn a_permit_that_was_given_back_costs_nobody_another() {
        let limiter = ConnectionLimiter::new(2, 1, Duration::ZERO);
        let held = [limiter.take(1).unwrap()];
        drop(limiter.take(2));

        let more = [limiter.take(2).unwrap(), limiter.take(3).unwrap()];

        assert_eq!(lost(&held), [0], "the oldest where all have as many");
        assert!(lost(&more).is_empty());
        drop(held);
        assert_eq!(limiter.taken().total, 2, "a lost place is not given back twice");
        drop(more);
        let taken = limiter.taken();
        assert!(taken.total == 0 && taken.by_caller.is_empty(), "nothing stays of who is gone");
    }
}
