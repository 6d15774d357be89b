//! A bounded memory of values, each until its own end, by the digest of a token. Time is passed in. Depends
//! on nothing; called by the parent.

use std::collections::{BTreeSet, HashMap};

use sha2::{Digest as _, Sha256};
use tokio::time::Instant;

/// The SHA-256 of a whole token: the token itself is never kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Digest([u8; 32]);

impl Digest {
    pub(super) fn of(token: &str) -> Self {
        Self(Sha256::digest(token.as_bytes()).into())
    }
}

/// When it is full, what would end next makes room.
#[derive(Debug)]
pub(super) struct Cache<V> {
    limit: usize,
    entries: HashMap<Digest, (Instant, V)>,
    ends: BTreeSet<(Instant, Digest)>,
}

impl<V: Clone> Cache<V> {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, entries: HashMap::new(), ends: BTreeSet::new() }
    }

    pub(super) fn get(&self, digest: &Digest, now: Instant) -> Option<V> {
        let (until, value) = self.entries.get(digest)?;
        (now < *until).then(|| value.clone())
    }

    /// Replaces what was there. A value whose end has come is not kept.
    pub(super) fn put(&mut self, digest: Digest, value: V, until: Instant, now: Instant) {
        self.remove(&digest);
        while let Some(&(end, next)) = self.ends.first()
            && (end <= now || self.entries.len() >= self.limit)
        {
            self.remove(&next);
        }
        if now < until {
            self.entries.insert(digest, (until, value));
            self.ends.insert((until, digest));
        }
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    fn remove(&mut self, digest: &Digest) {
        if let Some((until, _)) = self.entries.remove(digest) {
            self.ends.remove(&(until, *digest));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn digest(number: u8) -> Digest {
        Digest([number; 32])
    }

    #[test]
    fn digests_are_of_the_whole_token() {
        assert_ne!(Digest::of("a"), Digest::of("b"));
        assert_ne!(Digest::of("a"), Digest::of("a="));
        assert_eq!(Digest::of("a"), Digest::of("a"));
    }

    #[test]
    fn a_value_ends_at_its_time_and_one_without_time_is_not_kept() {
        let (mut cache, now) = (Cache::new(10), Instant::now());

        cache.put(digest(1), "a", now + SECOND, now);
        cache.put(digest(2), "b", now, now);

        assert_eq!(cache.get(&digest(1), now), Some("a"));
        assert_eq!(cache.get(&digest(1), now + SECOND), None);
        assert_eq!((cache.get(&digest(2), now), cache.len()), (None, 1));
        cache.put(digest(3), "c", now + 3 * SECOND, now + SECOND);
        assert_eq!(cache.len(), 1, "what has ended is dropped");
    }

    #[test]
    fn the_next_to_end_makes_room() {
        let (mut cache, now) = (Cache::new(2), Instant::now());
        cache.put(digest(1), "a", now + 3 * SECOND, now);
        cache.put(digest(2), "b", now + SECOND, now);

        cache.put(digest(3), "c", now + 2 * SECOND, now);

        assert_eq!([1, 2, 3].map(|n| cache.get(&digest(n), now)), [Some("a"), None, Some("c")]);
    }

    proptest! {
        #[test]
        fn stays_within_its_limit_and_agrees_with_itself(
            puts in proptest::collection::vec((0_u8..8, 0_u64..10, 0_u64..10), 0..100),
        ) {
            let (mut cache, begun) = (Cache::new(4), Instant::now());
            for (number, end, at) in puts {
                let (until, now) = (begun + Duration::from_secs(end), begun + Duration::from_secs(at));
                cache.put(digest(number), (number, end), until, now);
                prop_assert!(cache.len() <= 4 && cache.entries.len() == cache.ends.len());
                let expected = (until > now).then_some((number, end));
                prop_assert_eq!(cache.get(&digest(number), now), expected);
            }
        }
    }
}
