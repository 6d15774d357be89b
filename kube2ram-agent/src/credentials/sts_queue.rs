//! Whose turn at STS is next: two token buckets for the node, one for each pod, and turns by pod. Pure: time
//! is passed in. Called by `sts_scheduler` only, under its lock.

use std::{
    collections::{HashMap, VecDeque},
    mem::replace,
    time::Duration,
};

use tokio::{sync::oneshot, time::Instant};

use crate::identity::PodUid;
use kube2ram_service::rate_limiter::{Rate, TokenBucket};

/// What a fetch is for. The smaller number goes first, always: what has to wait until credentials fall below
/// the floor becomes [`Self::Demand`] then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rank {
    /// Nobody waits: a prefetch, or a refresh ahead of time.
    Ahead = 2,
    /// Somebody waits.
    Demand = 0,
    /// Somebody waits for what has failed before: a crowd of those must not stand in the way of a first
    /// attempt.
    Retry = 1,
}

impl Rank {
    /// All of them.
    pub(super) const ALL: [Self; 3] = [Self::Demand, Self::Retry, Self::Ahead];

    /// The metrics label.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Ahead => "ahead",
            Self::Demand => "demand",
            Self::Retry => "retry",
        }
    }
}

/// What bounds the turns.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rates {
    /// How many turns are taken at once.
    pub(super) concurrent: usize,
    /// How many may be under way when one of [`Rank::Ahead`] is granted.
    pub(super) concurrent_ahead: usize,
    /// The node's, over minutes.
    pub(super) node: Rate,
    /// How much of the node's burst [`Rank::Ahead`] leaves to the others.
    pub(super) reserve: u32,
    /// The node's, over seconds: how fast its burst may be used up.
    pub(super) pace: Rate,
    /// Each pod's.
    pub(super) pod: Rate,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct TicketId(u64);

/// Everybody who waits, and everything that is counted against them.
pub(super) struct StsQueue {
    rates: Rates,
    node: TokenBucket,
    pace: TokenBucket,
    pods: HashMap<PodUid, TokenBucket>,
    lanes: [Lane; 3],
    tickets: HashMap<TicketId, Ticket>,
    next_id: u64,
    running: usize,
    /// Until when only [`Rank::Demand`] goes.
    paused_until: Option<Instant>,
    /// How often in a row STS has throttled.
    throttled: u32,
    /// When it last did.
    throttled_at: Option<Instant>,
}

struct Ticket {
    rank: Rank,
    granted: oneshot::Sender<()>,
}

/// The tickets of one rank by pod, and whose turn it is. A ticket may stand here for several pods, and may be
/// void.
#[derive(Default)]
struct Lane {
    order: VecDeque<PodUid>,
    waiting: HashMap<PodUid, VecDeque<TicketId>>,
}

impl StsQueue {
    pub(super) fn new(rates: Rates, now: Instant) -> Self {
        Self {
            rates,
            node: TokenBucket::full(rates.node, now),
            pace: TokenBucket::full(rates.pace, now),
            pods: HashMap::new(),
            lanes: Default::default(),
            tickets: HashMap::new(),
            next_id: 0,
            running: 0,
            paused_until: None,
            throttled: 0,
            throttled_at: None,
        }
    }

    /// Queues; what is received tells of the grant.
    pub(super) fn join(&mut self, pod: PodUid, rank: Rank) -> (TicketId, oneshot::Receiver<()>) {
        let id = TicketId(self.next_id);
        self.next_id += 1;
        let (granted, receiver) = oneshot::channel();
        self.tickets.insert(id, Ticket { rank, granted });
        self.lanes[rank as usize].push(pod, id);
        (id, receiver)
    }

    /// Somebody asks for what is queued: it is queued for `pod` as well, and never moves back.
    pub(super) fn promote(&mut self, id: TicketId, pod: PodUid, rank: Rank) {
        let Some(ticket) = self.tickets.get_mut(&id) else { return };
        if (rank as usize) < ticket.rank as usize {
            ticket.rank = rank;
        }
        let rank = ticket.rank;
        self.lanes[rank as usize].push(pod, id);
    }

    /// Leaves the queue. `false` when the turn was granted before.
    pub(super) fn leave(&mut self, id: TicketId) -> bool {
        self.tickets.remove(&id).is_some()
    }

    /// A granted turn has ended.
    pub(super) fn finish(&mut self) {
        self.running -= 1;
    }

    /// Whether STS has throttled, and has not answered since.
    pub(super) fn is_throttled(&self) -> bool {
        self.throttled > 0
    }

    /// STS has answered a call that began at `since`: the pause is over, unless STS throttled a later one.
    /// Whether it had throttled.
    pub(super) fn unthrottle(&mut self, since: Instant) -> bool {
        if self.throttled_at.is_some_and(|throttled_at| since <= throttled_at) {
            return false;
        }
        self.paused_until = None;
        replace(&mut self.throttled, 0) > 0
    }

    /// STS throttles the whole account: what nobody waits for, and what has failed before, pauses for as long
    /// as STS says, longer each time in a row; the rest goes at the node's rate, without a burst. A call that
    /// is throttled during a pause prolongs it, but does not count once more. `jitter` lies in 0 – 1.
    pub(super) fn throttle(&mut self, retry_after: Option<Duration>, now: Instant, jitter: f64) {
        if self.paused_until.is_none_or(|until| until <= now) {
            self.throttled = self.throttled.saturating_add(1);
        }
        self.throttled_at = Some(now);
        let doubled = PAUSE.saturating_mul(1 << self.throttled.saturating_sub(1).min(8)).min(PAUSE_LIMIT);
        let pause = retry_after.unwrap_or_default().min(PAUSE_LIMIT).max(doubled).mul_f64(1.0 + jitter);
        self.paused_until = self.paused_until.max(Some(now + pause));
    }

    /// How many wait.
    pub(super) fn waiting(&self) -> usize {
        self.tickets.len()
    }

    /// Grants what may be granted now, in order. Returns when there may be more, if time alone can make it
    /// so.
    pub(super) fn grant(&mut self, now: Instant) -> Option<Instant> {
        while self.running < self.rates.concurrent && !self.tickets.is_empty() {
            let pace = self.pace.ready_at(self.pace_at(now), 0, now);
            let ready_at = self.node.ready_at(self.rates.node, 0, now).max(pace);
            if ready_at > now {
                return Some(ready_at);
            }
            if let Err(due) = self.grant_one(now) {
                return due;
            }
        }
        None
    }

    fn pace_at(&self, now: Instant) -> Rate {
        match self.paused_until {
            Some(until) if now < until => Rate { burst: 1, ..self.rates.node },
            _ => self.rates.pace,
        }
    }

    fn grant_one(&mut self, now: Instant) -> Result<(), Option<Instant>> {
        let mut due: Option<Instant> = None;
        let mut sooner = |at| due = Some(due.map_or(at, |due| due.min(at)));
        for rank in [Rank::Demand, Rank::Retry, Rank::Ahead] {
            if rank != Rank::Demand
                && let Some(until) = self.paused_until.filter(|until| now < *until)
            {
                sooner(until);
                continue;
            }
            // After a pause one call finds out whether it is over.
            if rank != Rank::Demand && self.throttled > 0 && self.running > 0 {
                continue;
            }
            if rank == Rank::Ahead {
                let above_reserve_at = self.node.ready_at(self.rates.node, self.rates.reserve, now);
                if above_reserve_at > now {
                    sooner(above_reserve_at);
                    continue;
                }
                // The end of one that is under way is an occasion to look again.
                if self.running >= self.rates.concurrent_ahead {
                    continue;
                }
            }
            let lane = &mut self.lanes[rank as usize];
            for _ in 0..lane.order.len() {
                let Some(pod) = lane.order.pop_front() else { break };
                let Some(id) = lane.first(&pod, |id| self.tickets.get(&id).is_some_and(|t| t.rank == rank))
                else {
                    continue;
                };
                let bucket = Self::bucket(&mut self.pods, self.rates.pod, &pod, now);
                let ready_at = bucket.ready_at(self.rates.pod, 0, now);
                lane.order.push_back(pod);
                if ready_at > now {
                    sooner(ready_at);
                    continue;
                }
                bucket.take();
                self.node.take();
                self.pace.take();
                self.running += 1;
                if let Some(ticket) = self.tickets.remove(&id) {
                    // A receiver that has gone gives the turn back.
                    let _gone = ticket.granted.send(());
                }
                return Ok(());
            }
        }
        Err(due)
    }

    fn bucket<'p>(
        pods: &'p mut HashMap<PodUid, TokenBucket>,
        rate: Rate,
        pod: &PodUid,
        now: Instant,
    ) -> &'p mut TokenBucket {
        if pods.len() >= PODS_LIMIT && !pods.contains_key(pod) {
            pods.retain(|_, bucket| !bucket.is_full(rate, now));
        }
        pods.entry(pod.clone()).or_insert_with(|| TokenBucket::full(rate, now))
    }
}

impl Lane {
    fn push(&mut self, pod: PodUid, id: TicketId) {
        let queue = self.waiting.entry(pod.clone()).or_insert_with(|| {
            self.order.push_back(pod);
            VecDeque::new()
        });
        if !queue.contains(&id) {
            queue.push_back(id);
        }
    }

    /// The pod's first ticket that is not void. A pod without any leaves the lane.
    fn first(&mut self, pod: &PodUid, is_valid: impl Fn(TicketId) -> bool) -> Option<TicketId> {
        let queue = self.waiting.get_mut(pod)?;
        while let Some(id) = queue.front().copied() {
            if is_valid(id) {
                return Some(id);
            }
            queue.pop_front();
        }
        self.waiting.remove(pod);
        None
    }
}

/// The shortest pause after STS has throttled; it doubles.
const PAUSE: Duration = Duration::from_secs(1);
const PAUSE_LIMIT: Duration = Duration::from_secs(60);
/// Pods whose buckets are kept although they may be full.
const PODS_LIMIT: usize = 2048;

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn pod(n: u32) -> PodUid {
        PodUid::parse(&format!("00000000-0000-4000-8000-{n:012x}")).unwrap()
    }

    fn queue(concurrent: usize, node: u32, pod: u32) -> (StsQueue, Instant) {
        let now = Instant::now();
        let rate = |burst| Rate { burst, interval: SECOND };
        let (node, pod) = (rate(node), rate(pod));
        let rates = Rates { concurrent, concurrent_ahead: concurrent, node, reserve: 0, pace: node, pod };
        (StsQueue::new(rates, now), now)
    }

    /// Which of these have been granted, by index.
    fn granted(receivers: &mut [oneshot::Receiver<()>]) -> Vec<usize> {
        (0..receivers.len()).filter(|&n| receivers[n].try_recv().is_ok()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_goes_at_once_and_the_rest_at_the_nodes_rate() {
        let (mut queue, now) = queue(100, 3, 100);
        let mut receivers: Vec<_> = (0..5).map(|n| queue.join(pod(n), Rank::Demand).1).collect();

        assert_eq!(queue.grant(now), Some(now + SECOND));
        assert_eq!(granted(&mut receivers), [0, 1, 2]);
        assert_eq!(queue.grant(now + SECOND / 2), Some(now + SECOND));
        assert_eq!(granted(&mut receivers), [0; 0]);
        assert_eq!(queue.grant(now + SECOND), Some(now + 2 * SECOND));
        assert_eq!(granted(&mut receivers), [3]);
        assert_eq!(queue.grant(now + 2 * SECOND), None);
        assert_eq!(granted(&mut receivers), [4]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_long_burst_goes_at_its_own_pace_and_the_rest_at_the_nodes_rate() {
        let now = Instant::now();
        let rate = |burst, interval| Rate { burst, interval };
        let rates = Rates {
            node: rate(6, 10 * SECOND),
            pace: rate(2, SECOND),
            pod: rate(100, SECOND),
            ..queue(100, 1, 1).0.rates
        };
        let mut queue = StsQueue::new(rates, now);
        let mut receivers: Vec<_> = (0..8).map(|n| queue.join(pod(n), Rank::Demand).1).collect();

        let mut seen = Vec::new();
        let mut at = now;
        while let Some(due) = queue.grant(at) {
            seen.push(((at - now).as_secs(), granted(&mut receivers).len()));
            at = due;
        }
        seen.push(((at - now).as_secs(), granted(&mut receivers).len()));

        assert_eq!(seen, [(0, 2), (1, 1), (2, 1), (3, 1), (4, 1), (10, 1), (20, 1)]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_nobody_waits_for_leaves_burst_and_concurrency_to_those_who_wait() {
        let (node, now) = (Rate { burst: 6, interval: SECOND }, Instant::now());
        let rates = Rates { node, pace: node, reserve: 4, concurrent_ahead: 1, ..queue(100, 1, 100).0.rates };
        let mut queue = StsQueue::new(rates, now);
        let mut ahead: Vec<_> = (0..4).map(|n| queue.join(pod(n), Rank::Ahead).1).collect();

        assert_eq!((queue.grant(now), granted(&mut ahead)), (None, vec![0]), "one at once");
        queue.finish();
        assert_eq!((queue.grant(now), granted(&mut ahead)), (Some(now + SECOND), vec![1]));
        queue.finish();
        assert_eq!(
            (queue.grant(now), granted(&mut ahead)),
            (Some(now + SECOND), vec![]),
            "above the reserve"
        );

        let mut waiting: Vec<_> = (0..5).map(|n| queue.join(pod(n), Rank::Demand).1).collect();
        queue.grant(now);
        assert_eq!(granted(&mut waiting), [0, 1, 2, 3]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_with_many_requests_alternates_with_one_that_has_one() {
        let (mut queue, now) = queue(2, 100, 100);
        let mut receivers: Vec<_> = (0..10).map(|_| queue.join(pod(1), Rank::Demand).1).collect();
        receivers.push(queue.join(pod(2), Rank::Demand).1);

        queue.grant(now);

        assert_eq!(granted(&mut receivers), [0, 10]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_has_used_its_own_rate_leaves_the_nodes_to_others() {
        let (mut queue, now) = queue(100, 100, 2);
        let mut receivers: Vec<_> = (0..10).map(|_| queue.join(pod(1), Rank::Demand).1).collect();
        receivers.push(queue.join(pod(2), Rank::Ahead).1);

        let due = queue.grant(now);

        assert_eq!((granted(&mut receivers), due), (vec![0, 1, 10], Some(now + SECOND)));
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_goes_before_what_has_failed_and_that_before_what_nobody_waits_for() {
        let (mut queue, now) = queue(1, 100, 100);
        let mut receivers =
            [Rank::Ahead, Rank::Retry, Rank::Demand].map(|rank| queue.join(pod(rank as u32), rank).1);
        let mut order = Vec::new();

        for _ in 0..3 {
            queue.grant(now);
            order.extend(granted(&mut receivers));
            queue.finish();
        }

        assert_eq!(order, [2, 1, 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_queued_prefetch_that_is_asked_for_overtakes_the_others() {
        let (mut queue, now) = queue(1, 100, 100);
        let mut ids = Vec::new();
        let mut receivers = Vec::new();
        for n in 0..5 {
            let (id, permit) = queue.join(pod(n), Rank::Ahead);
            ids.push(id);
            receivers.push(permit);
        }

        queue.promote(ids[3], pod(9), Rank::Demand);
        queue.grant(now);

        assert_eq!(granted(&mut receivers), [3]);
        queue.finish();
        queue.grant(now);
        assert_eq!(granted(&mut receivers), [0], "and is not granted twice");
    }

    #[tokio::test(start_paused = true)]
    async fn what_two_pods_ask_for_comes_at_the_rate_of_the_one_that_may() {
        let (mut queue, now) = queue(100, 100, 1);
        let (_, spent) = queue.join(pod(1), Rank::Demand);
        queue.grant(now);
        let (id, shared) = queue.join(pod(1), Rank::Demand);
        let mut receivers = [spent, shared];
        queue.grant(now);
        assert_eq!(granted(&mut receivers), [0]);

        queue.promote(id, pod(2), Rank::Demand);
        // The pod that is out of turns asks again: it must not take the other's place away.
        queue.promote(id, pod(1), Rank::Demand);
        queue.grant(now);

        assert_eq!(granted(&mut receivers), [1]);
    }

    #[tokio::test(start_paused = true)]
    async fn throttling_holds_back_what_nobody_waits_for_longer_each_time() {
        let (mut queue, now) = queue(100, 100, 100);
        queue.throttle(Some(5 * SECOND), now, 0.0);
        let mut receivers = [Rank::Ahead, Rank::Retry, Rank::Demand].map(|rank| queue.join(pod(1), rank).1);

        assert_eq!(queue.grant(now), Some(now + SECOND), "one more that somebody waits for could go then");
        assert_eq!(granted(&mut receivers), [2]);
        assert_eq!(queue.grant(now + 2 * SECOND), Some(now + 5 * SECOND));
        assert_eq!(granted(&mut receivers), [0; 0]);
        for expected in [1, 0] {
            queue.finish();
            assert_eq!((queue.grant(now + 5 * SECOND), granted(&mut receivers)), (None, vec![expected]));
        }

        let later = now + 10 * SECOND;
        queue.join(pod(1), Rank::Ahead);
        queue.throttle(None, later, 0.0);
        assert_eq!(queue.grant(later), Some(later + 2 * SECOND));
        queue.throttle(None, later, 1.0);
        assert_eq!(queue.grant(later), Some(later + 4 * SECOND), "one that was under way with it");
        let answered = later + SECOND;
        assert!(queue.unthrottle(answered));
        queue.throttle(None, answered, 0.0);
        assert_eq!(queue.grant(answered), Some(answered + SECOND), "as after the first time");
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_of_sts_ends_the_pause() {
        let (mut queue, now) = queue(100, 100, 100);
        queue.throttle(Some(60 * SECOND), now, 1.0);
        let mut receivers = [Rank::Ahead, Rank::Retry].map(|rank| queue.join(pod(1), rank).1);
        queue.grant(now);
        assert_eq!(granted(&mut receivers), [0; 0]);

        assert!(!queue.unthrottle(now - SECOND), "that call was under way when STS throttled");
        queue.grant(now);
        assert_eq!(granted(&mut receivers), [0; 0]);
        assert!(queue.unthrottle(now + SECOND));
        queue.grant(now);
        assert_eq!(granted(&mut receivers), [1], "not all at once");
        queue.grant(now + SECOND);

        assert_eq!(granted(&mut receivers), [0]);
        assert!(!queue.unthrottle(now + SECOND), "it was over before");
    }

    #[tokio::test(start_paused = true)]
    async fn the_buckets_that_are_kept_are_bounded() {
        let (mut queue, now) = queue(100_000, 100_000, 4);
        for n in 0..20_000 {
            queue.join(pod(n), Rank::Demand);
            queue.grant(now + n * SECOND);
        }

        assert!(queue.pods.len() <= PODS_LIMIT, "{}", queue.pods.len());
    }
}
