//! The last sessions and the pods that were given their credentials. Bounded by number and by bytes: the
//! oldest session makes room. Pure; called by the parent, under its lock.

use std::collections::VecDeque;

use jiff::Timestamp;

use super::{Event, PodNames, Record};

/// The sessions, the oldest first.
#[derive(Debug)]
pub(super) struct Memory {
    sessions: VecDeque<Session>,
    max_sessions: usize,
    bytes: usize,
    max_bytes: usize,
}

#[derive(Debug)]
struct Session {
    issued: Record,
    deliveries: Vec<Delivery>,
    bytes: usize,
}

#[derive(Debug)]
struct Delivery {
    at: Timestamp,
    event: Event,
    pod: PodNames,
}

impl Memory {
    pub(super) fn new(max_sessions: usize, max_bytes: usize) -> Self {
        Self { sessions: VecDeque::new(), max_sessions, bytes: 0, max_bytes }
    }

    pub(super) fn issued(&mut self, issued: Record) {
        let bytes = SESSION_BYTES + issued.text_bytes();
        self.bytes += bytes;
        self.sessions.push_back(Session { issued, deliveries: Vec::new(), bytes });
        self.make_room();
    }

    /// A delivery of a session that was forgotten is forgotten, too.
    pub(super) fn delivered(&mut self, record: &Record) {
        let is_it = |session: &&mut Session| session.issued.access_key_id == record.access_key_id;
        // Most are of a session that was issued a moment ago.
        let Some(session) = self.sessions.iter_mut().rev().find(is_it) else { return };
        let bytes = DELIVERY_BYTES + record.pod.text_bytes();
        session.deliveries.push(Delivery { at: record.at, event: record.event, pod: record.pod.clone() });
        session.bytes += bytes;
        self.bytes += bytes;
        self.make_room();
    }

    pub(super) fn find(&self, access_key_id: &str) -> Vec<Record> {
        let is_it = |session: &&Session| *session.issued.access_key_id == *access_key_id;
        let Some(Session { issued, deliveries, .. }) = self.sessions.iter().rev().find(is_it) else {
            return Vec::new();
        };
        let delivered = deliveries.iter().map(|Delivery { at, event, pod }| Record {
            at: *at,
            event: *event,
            pod: pod.clone(),
            ..issued.clone()
        });
        std::iter::once(issued.clone()).chain(delivered).collect()
    }

    fn make_room(&mut self) {
        while self.sessions.len() > self.max_sessions || self.bytes > self.max_bytes {
            let Some(oldest) = self.sessions.pop_front() else { return };
            self.bytes -= oldest.bytes;
        }
    }

    #[cfg(test)]
    pub(super) fn size(&self) -> (usize, usize) {
        (self.sessions.len(), self.bytes)
    }
}

/// A queue and a list that have just grown are half empty.
const SESSION_BYTES: usize = 2 * size_of::<Session>();
const DELIVERY_BYTES: usize = 2 * size_of::<Delivery>();
