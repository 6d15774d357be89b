//! Issued credentials with the pods that were given them, so that each delivery is recorded once. Pure; held
//! by `entry`, asked by `cache` at each hand-out.

use std::{
    hash::{BuildHasher as _, RandomState},
    mem::replace,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::identity::PodUid;
use kube2ram_cloud::credentials::Credentials;

/// Credentials, and who has them.
#[derive(Debug)]
pub(super) struct Issued {
    pub(super) credentials: Arc<Credentials>,
    holders: Mutex<Holders>,
}

/// A pod is a hash of its UID, with keys of this process: a repeated request allocates nothing.
#[derive(Debug, Default)]
struct Holders {
    marks: Vec<u64>,
    /// Whether more pods have the credentials.
    has_more: bool,
    /// One permit for each mark, returned with the credentials.
    room: Option<OwnedSemaphorePermit>,
}

/// Whether credentials are given to a pod for the first time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Delivery {
    First,
    Repeated,
    /// There is no room to remember the pod.
    Unknown {
        /// Whether it is the first such pod of these credentials.
        is_first: bool,
    },
}

/// How many pods the node remembers, for all of its sessions.
#[derive(Debug)]
pub(super) struct HolderRoom {
    room: Arc<Semaphore>,
    hasher: RandomState,
}

impl HolderRoom {
    pub(super) fn new(marks: usize) -> Self {
        Self { room: Arc::new(Semaphore::new(marks)), hasher: RandomState::new() }
    }
}

impl Issued {
    pub(super) fn new(credentials: Credentials) -> Self {
        Self { credentials: Arc::new(credentials), holders: Mutex::default() }
    }

    /// Remembers that `pod` is given the credentials.
    pub(super) fn deliver(&self, pod: &PodUid, room: &HolderRoom) -> Delivery {
        let mark = room.hasher.hash_one(pod);
        let mut holders = self.holders.lock().unwrap_or_else(PoisonError::into_inner);
        if holders.marks.contains(&mark) {
            return Delivery::Repeated;
        }
        let permit = (holders.marks.len() < MAX_HOLDERS)
            .then(|| Arc::clone(&room.room).try_acquire_owned().ok())
            .flatten();
        let Some(permit) = permit else {
            return Delivery::Unknown { is_first: !replace(&mut holders.has_more, true) };
        };
        match &mut holders.room {
            Some(held) => held.merge(permit),
            None => holders.room = Some(permit),
        }
        holders.marks.push(mark);
        Delivery::First
    }
}

/// How many pods of one session are remembered.
const MAX_HOLDERS: usize = 256;
/// How many are for all sessions of a node. A pod has one session at a time, and each is issued again within
/// half an hour.
pub(super) const HOLDERS: usize = 16_384;
/// The memory that they take.
#[cfg(test)]
pub(super) const HOLDERS_LIMIT_BYTES: usize = 2 * HOLDERS * size_of::<u64>();

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;

    fn issued() -> Issued {
        Issued::new(Credentials {
            access_key_id: "STS.1".into(),
            access_key_secret: "hush".into(),
            security_token: "hush".into(),
            issued_at: Timestamp::UNIX_EPOCH,
            expires_at: Timestamp::UNIX_EPOCH,
            request_id: None,
            document: Default::default(),
        })
    }

    fn pod(n: u32) -> PodUid {
        PodUid::parse(&format!("00000000-0000-4000-8000-{n:012x}")).unwrap()
    }

    #[test]
    fn each_pod_is_first_once_for_each_issue() {
        let room = HolderRoom::new(HOLDERS);
        let (first, second) = (issued(), issued());

        let deliveries = [(&first, 1), (&first, 2), (&first, 1), (&second, 1), (&second, 1)];

        assert_eq!(
            deliveries.map(|(issued, n)| issued.deliver(&pod(n), &room)),
            [Delivery::First, Delivery::First, Delivery::Repeated, Delivery::First, Delivery::Repeated]
        );
    }

    #[test]
    fn the_first_pod_beyond_the_bound_is_told_from_those_after_it() {
        let (room, issued) = (HolderRoom::new(2), issued());

        let deliveries = [1, 2, 3, 3, 4, 2].map(|n| issued.deliver(&pod(n), &room));

        let unknown = |is_first| Delivery::Unknown { is_first };
        assert_eq!(deliveries[2..], [unknown(true), unknown(false), unknown(false), Delivery::Repeated]);
    }

    #[test]
    fn pods_beyond_the_bounds_are_unknown_until_there_is_room_again() {
        let room = HolderRoom::new(300);
        let (first, second) = (issued(), issued());
        let known = |issued: &Issued, pods: std::ops::Range<u32>| {
            pods.map(|n| issued.deliver(&pod(n), &room))
                .filter(|delivery| *delivery == Delivery::First)
                .count()
        };

        assert_eq!(known(&first, 0..400), 256, "of one session");
        assert_eq!(known(&second, 0..400), 300 - 256, "of all");
        assert_eq!(first.deliver(&pod(0), &room), Delivery::Repeated);
        assert_eq!(first.deliver(&pod(399), &room), Delivery::Unknown { is_first: false });
        drop(first);
        assert_eq!(known(&second, 44..400), 256 - 44);
    }
}
