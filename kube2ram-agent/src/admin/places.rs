//! The bound of the admin listener's connections. Whoever comes gets a place, if need be that of an older connection, so that those who only hold theirs keep
//! nobody out. Depends on nothing of ours; used by `admin`.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

use tokio_util::sync::CancellationToken;

/// All places of a listener.
#[derive(Debug)]
pub(super) struct Places {
    total: usize,
    per_address: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    by_age: BTreeMap<u64, Holder>,
    next: u64,
}

#[derive(Debug)]
struct Holder {
    address: IpAddr,
    lost: CancellationToken,
}

/// A place of one connection; dropping it gives it back.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    age: u64,
    lost: CancellationToken,
}

impl Places {
    /// Both bounds are at least 1.
    pub(super) fn new(total: usize, per_address: usize) -> Arc<Self> {
        Arc::new(Self { total, per_address, taken: Mutex::default() })
    }

    /// A place for a connection from `address`. When there is none, the oldest connection loses its own: of this address where the address has all that one
    /// may have, otherwise of those that have most.
    pub(super) fn take(self: &Arc<Self>, address: IpAddr) -> Place {
        let lost = CancellationToken::new();
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let loser = self.loser(&taken.by_age, address);
        if let Some(holder) = loser.and_then(|age| taken.by_age.remove(&age)) {
            holder.lost.cancel();
        }
        let age = taken.next;
        taken.next += 1;
        taken.by_age.insert(age, Holder { address, lost: lost.clone() });
        drop(taken);
        Place { places: Arc::clone(self), age, lost }
    }

    fn loser(&self, by_age: &BTreeMap<u64, Holder>, address: IpAddr) -> Option<u64> {
        let mut counts = HashMap::<_, usize>::new();
        by_age.values().for_each(|holder| *counts.entry(holder.address).or_default() += 1);
        let count = |address| counts.get(&address).copied().unwrap_or_default();
        let oldest = |of: &dyn Fn(IpAddr) -> bool| {
            by_age.iter().find_map(|(age, holder)| of(holder.address).then_some(*age))
        };
        if count(address) >= self.per_address {
            return oldest(&|other| other == address);
        }
        let most = counts.values().copied().max();
        (by_age.len() >= self.total).then(|| oldest(&|other| Some(count(other)) == most)).flatten()
    }
}

impl Place {
    /// Cancelled when somebody else has got the place.
    pub(super) fn lost(&self) -> &CancellationToken {
        &self.lost
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.taken.lock().unwrap_or_else(PoisonError::into_inner).by_age.remove(&self.age);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    /// Which of them have lost their place.
    fn lost(places: &[Place]) -> Vec<usize> {
        (0..places.len()).filter(|&index| places[index].lost().is_cancelled()).collect()
    }

    #[test]
    fn an_address_at_its_bound_loses_its_oldest_and_others_nothing() {
        let places = Places::new(10, 2);
        let mut held: Vec<_> = [1, 2, 2].map(|last| places.take(address(last))).into();
        assert!(lost(&held).is_empty());

        held.push(places.take(address(2)));
        assert_eq!(lost(&held), [1]);
        held.push(places.take(address(2)));

        assert_eq!(lost(&held), [1, 2]);
    }

    #[test]
    fn when_all_are_taken_those_who_have_most_lose_their_oldest() {
        let places = Places::new(5, 3);
        let mut held: Vec<_> = [1, 2, 3, 2, 3].map(|last| places.take(address(last))).into();

        held.push(places.take(address(4)));
        assert_eq!(lost(&held), [1], "the older of 2, which has as many as 3");
        held.push(places.take(address(5)));

        assert_eq!(lost(&held), [1, 2], "3 has most now");
    }

    #[test]
    fn a_place_that_was_given_back_costs_nobody_his_own() {
        let places = Places::new(2, 1);
        let held = [places.take(address(1))];
        drop(places.take(address(2)));

        let more = [places.take(address(2)), places.take(address(3))];

        assert_eq!(lost(&held), [0], "the oldest where all have as many");
        assert!(lost(&more).is_empty());
        drop(held);
        assert_eq!(places.taken.lock().unwrap().by_age.len(), 2, "a lost place is not given back twice");
    }
}
