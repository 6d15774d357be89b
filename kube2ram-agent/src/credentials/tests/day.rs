//! Days in the life of a node with 1,000 pods and 50 roles, in seconds: an STS that keeps its own time, pods
//! that ask all the time.

use super::*;

const ROLES: u64 = 50;
const PODS: u32 = 1000;
const DAY: Duration = Duration::from_hours(24);
/// How long credentials are used with a jitter of a half: 0.8 to 0.95 of what is above the floor.
const WINDOW: Duration = Duration::from_secs(30 * 60 * 7 / 8);
const LATENCY: Duration = Duration::from_millis(50);
const FLOOR: i64 = 30 * 60;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mood {
    /// No call is answered.
    Silent,
    /// The account's limit is used up.
    Throttling,
    Well,
}

/// Knows the true time, whatever the node's clock shows.
struct Sts {
    clock: Arc<ManualClock>,
    mood: Mutex<Mood>,
    calls: Mutex<Vec<(Duration, RoleArn)>>,
}

impl Sts {
    fn now(&self) -> Timestamp {
        self.clock.now() - SignedDuration::from_secs(self.clock.jump_seconds.load(Ordering::SeqCst))
    }

    fn calls_between(&self, from: Duration, to: Duration) -> usize {
        self.calls.lock().unwrap().iter().filter(|(at, _)| (from..to).contains(at)).count()
    }
}

#[async_trait]
impl Issuer for Sts {
    async fn issue(&self, session: &RoleSession) -> Result<Credentials, IssueError> {
        self.calls.lock().unwrap().push((self.clock.start.elapsed(), session.role.clone()));
        let mood = *self.mood.lock().unwrap();
        let (kind, retry_after) = match mood {
            Mood::Well => {
                sleep(LATENCY).await;
                let issued_at = self.now();
                return Ok(Credentials {
                    access_key_id: "STS.day".into(),
                    access_key_secret: "hush".into(),
                    security_token: "hush".into(),
                    issued_at,
                    expires_at: issued_at + session.duration,
                    request_id: None,
                    document: Default::default(),
                });
            }
            Mood::Silent => {
                sleep(Duration::from_secs(6)).await;
                (IssueErrorKind::Unavailable, None)
            }
            Mood::Throttling => {
                sleep(LATENCY).await;
                (IssueErrorKind::Throttled, Some(Duration::from_secs(1)))
            }
        };
        let (code, message) = ("Code".into(), "message".into());
        Err(IssueError { kind, code, message, request_id: None, retry_after, source: None })
    }
}

/// What a pod was handed out.
#[derive(Clone, Copy, Debug)]
struct HandOut {
    at: Duration,
    /// Seconds left by the true time, and by the node's clock, which is that of the pod's SDK.
    left: [i64; 2],
}

struct Day {
    sts: Arc<Sts>,
    clock: Arc<ManualClock>,
    hand_outs: Arc<Mutex<Vec<HandOut>>>,
    failures: Arc<Mutex<Vec<(Duration, ErrorKind)>>>,
}

impl Day {
    /// Simulates a day in which `events` happen. Each pod asks every twenty minutes, from its own moment in
    /// the first five minutes on.
    #[expect(clippy::type_complexity, reason = "written out only here")]
    async fn live(jitter: fn() -> f64, events: &[(Duration, &dyn Fn(&Sts))]) -> Self {
        let clock = Arc::new(ManualClock { start: Instant::now(), jump_seconds: AtomicI64::new(0) });
        let (mood, calls) = (Mutex::new(Mood::Well), Mutex::default());
        let sts = Arc::new(Sts { clock: Arc::clone(&clock), mood, calls });
        let cache = Cache::new(
            Arc::clone(&sts) as Arc<dyn Issuer>,
            Arc::clone(&clock) as Arc<dyn Clock>,
            TaskTracker::new(),
            CancellationToken::new(),
            Limits { jitter, ..Limits::default() },
            Metrics::new(&mut Registry::default()),
            Trail::for_tests(),
        );
        let role = |n: u32| session(&format!("role{}", u64::from(n) % ROLES));
        cache.set_claimed((0..PODS).map(|n| (role(n).into(), (pod(n), true))).collect(), minutes(20));

        let (hand_outs, failures) = (Arc::new(Mutex::default()), Arc::new(Mutex::default()));
        let day = Self { sts, clock, hand_outs, failures };
        let mut pods = JoinSet::new();
        for n in 0..PODS {
            pods.spawn(day.ask_all_day(cache.clone(), role(n), n));
        }
        for (at, event) in events {
            tokio::time::sleep_until(day.clock.start + *at).await;
            event(&day.sts);
        }
        pods.join_all().await;
        day
    }

    fn ask_all_day(&self, cache: Cache, role: RoleSession, n: u32) -> impl Future<Output = ()> + use<> {
        let (sts, clock) = (Arc::clone(&self.sts), Arc::clone(&self.clock));
        let (hand_outs, failures) = (Arc::clone(&self.hand_outs), Arc::clone(&self.failures));
        async move {
            sleep(Duration::from_secs(6) * (n % 50)).await;
            while clock.start.elapsed() < DAY {
                let answer = cache.of_session(role.clone(), &pod(n)).await;
                let at = clock.start.elapsed();
                match answer {
                    Ok(credentials) => {
                        let left = [sts.now(), clock.now()]
                            .map(|now| credentials.expires_at.duration_since(now).as_secs());
                        hand_outs.lock().unwrap().push(HandOut { at, left });
                    }
                    Err(error) => failures.lock().unwrap().push((at, error.kind())),
                }
                sleep(minutes(20)).await;
            }
        }
    }

    /// Asserts that every request was answered, with credentials that have not expired, and that have less
    /// than the floor left only in `exempt`.
    fn assert_served(&self, exempt: std::ops::Range<Duration>) {
        assert_eq!(*self.failures.lock().unwrap(), []);
        let hand_outs = self.hand_outs.lock().unwrap();
        assert!(hand_outs.len() > 71 * PODS as usize, "{}", hand_outs.len());
        for HandOut { at, left } in &*hand_outs {
            let least = left.iter().min().unwrap();
            assert!(*least > 0, "expired: {left:?} at {at:?}");
            assert!(*least >= FLOOR || exempt.contains(at), "below the floor: {left:?} at {at:?}");
        }
    }

    fn below_floor(&self) -> usize {
        self.hand_outs.lock().unwrap().iter().filter(|out| out.left[0] < FLOOR).count()
    }
}

const NEVER: std::ops::Range<Duration> = Duration::ZERO..Duration::ZERO;

fn hour(n: u64) -> Duration {
    Duration::from_hours(n)
}

#[tokio::test(start_paused = true)]
async fn a_quiet_day_costs_exactly_sessions_times_windows() {
    let day = Day::live(|| 0.5, &[]).await;

    day.assert_served(NEVER);
    let mut calls = day.sts.calls.lock().unwrap();
    calls.retain(|(at, _)| *at < DAY);
    let mut expected = 0;
    for role in 0..ROLES {
        let role = session(&format!("role{role}")).role;
        let first = calls.iter().find(|(_, called)| *called == role).unwrap().0;
        let windows = (DAY - first).as_millis() / (WINDOW + LATENCY).as_millis();
        expected += 1 + usize::try_from(windows).unwrap();
    }
    println!(
        "{} calls in a day of {ROLES} sessions, {} hand-outs",
        calls.len(),
        day.hand_outs.lock().unwrap().len()
    );
    assert_eq!(calls.len(), expected);
    assert_eq!(expected, 50 * 55);
}

#[tokio::test(start_paused = true)]
async fn a_day_with_jitter_costs_what_the_shortest_and_the_longest_window_allow() {
    let day = Day::live(Limits::default().jitter, &[]).await;

    day.assert_served(NEVER);
    let calls = day.sts.calls.lock().unwrap().len();
    println!("{calls} calls");
    // 24 to 28.5 minutes.
    assert!((50 * 50..=50 * 61).contains(&calls), "{calls}");
}

#[tokio::test(start_paused = true)]
async fn an_outage_of_twenty_minutes_is_not_noticed() {
    let mood = |mood| move |sts: &Sts| *sts.mood.lock().unwrap() = mood;
    let (from, to) = (hour(3), hour(3) + minutes(20));

    let day =
        Day::live(Limits::default().jitter, &[(from, &mood(Mood::Silent)), (to, &mood(Mood::Well))]).await;

    // The longest back-off is five minutes.
    day.assert_served(from..to + minutes(6));
    let calls = day.sts.calls_between(from, to);
    println!("{calls} calls during the outage, {} hand-outs below the floor", day.below_floor());
    // 1, 2, 4, … 256, 300 seconds.
    assert!(calls <= 50 * 12, "{calls}");
    assert!(day.below_floor() > 0, "the outage came between");
}

#[tokio::test(start_paused = true)]
async fn a_throttling_storm_is_waited_out_with_few_calls() {
    let mood = |mood| move |sts: &Sts| *sts.mood.lock().unwrap() = mood;
    let (from, to) = (hour(9), hour(9) + minutes(20));

    let day =
        Day::live(Limits::default().jitter, &[(from, &mood(Mood::Throttling)), (to, &mood(Mood::Well))])
            .await;

    day.assert_served(from..to + minutes(8));
    let calls = day.sts.calls_between(from, to);
    println!("{calls} calls during the storm");
    assert!(calls <= 50 * 12, "{calls}");
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_jumps_ten_minutes_either_way_costs_one_call_for_each_session() {
    let jump = |seconds| move |sts: &Sts| sts.clock.jump_seconds.store(seconds, Ordering::SeqCst);

    let day = Day::live(
        || 0.5,
        &[(hour(4), &jump(600)), (hour(8), &jump(0)), (hour(12), &jump(-600)), (hour(16), &jump(0))],
    )
    .await;

    day.assert_served(NEVER);
    let calls = day.sts.calls.lock().unwrap().len();
    println!("{calls} calls");
    // For four hours the node's clock leaves 20 minutes above the floor instead of 30.
    let expected = 20 * 3600 / WINDOW.as_secs() + 4 * 3600 / (WINDOW.as_secs() * 2 / 3) + 5;
    assert!(calls as u64 <= ROLES * (expected + 3), "{calls}");
}
