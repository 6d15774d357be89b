//! A whole account's nodes at one STS with the account's limit: what a roll-out of the agent costs. One node
//! in twenty is simulated, against as many calls in twenty seconds as the account has in one, which leaves
//! chance as much room as it really has. `quota` asks the same of a day, of ServiceAccounts' sessions.

use super::*;

const SCALE: usize = 20;
const NODES: usize = 5_000 / SCALE;
const ROLES: usize = 20;
/// AssumeRole for each account and second (Alibaba Cloud notice of 2022-08-29).
pub(super) const LIMIT: usize = 100;
/// That second, scaled.
const PERIOD: Duration = Duration::from_secs(SCALE as u64);

/// An account's STS, one in `scale` of whose nodes is simulated.
pub(super) struct Account {
    start: Instant,
    scale: usize,
    /// Calls by period.
    periods: Mutex<Vec<usize>>,
    issued: AtomicUsize,
}

impl Account {
    pub(super) fn new(scale: usize) -> Arc<Self> {
        Arc::new(Self {
            start: Instant::now(),
            scale,
            periods: Mutex::default(),
            issued: AtomicUsize::new(0),
        })
    }

    /// Calls by period, throttled ones among them: a period is as many seconds long as the scale.
    pub(super) fn periods(&self) -> Vec<usize> {
        self.periods.lock().unwrap().clone()
    }

    pub(super) fn clock(&self) -> SystemTime {
        SystemTime(self.start)
    }
}

#[async_trait]
impl Issuer for Account {
    async fn issue(&self, session: &RoleSession) -> Result<Credentials, IssueError> {
        sleep(Duration::from_millis(50)).await;
        let elapsed = self.start.elapsed();
        let period = usize::try_from(elapsed.as_secs()).unwrap() / self.scale;
        let mut periods = self.periods.lock().unwrap();
        if periods.len() <= period {
            periods.resize(period + 1, 0);
        }
        periods[period] += 1;
        if periods[period] > LIMIT {
            let end = Duration::from_secs(((period + 1) * self.scale) as u64);
            let left = end.saturating_sub(elapsed) / u32::try_from(self.scale).unwrap();
            let (code, message, retry_after) = ("Throttling.User".into(), "m".into(), Some(left));
            let kind = IssueErrorKind::Throttled;
            return Err(IssueError { kind, code, message, request_id: None, retry_after, source: None });
        }
        drop(periods);
        self.issued.fetch_add(1, Ordering::SeqCst);
        let issued_at = self.clock().now();
        Ok(Credentials {
            access_key_id: "STS.fleet".into(),
            access_key_secret: "hush".into(),
            security_token: "hush".into(),
            issued_at,
            expires_at: issued_at + session.duration,
            request_id: None,
            document: Default::default(),
        })
    }
}

pub(super) struct SystemTime(Instant);

impl Clock for SystemTime {
    fn now(&self) -> Timestamp {
        "2026-11-21T00:00:00Z".parse::<Timestamp>().unwrap() + self.0.elapsed()
    }
}

#[derive(Debug)]
struct RollOut {
    /// The busiest minute of the hour after it began, in calls a second of the whole account, throttled ones
    /// among them.
    peak: f64,
    mean: f64,
    throttled: usize,
    issued: usize,
    /// Requests of pods that were not answered in time, of those that were made.
    late: usize,
    asked: usize,
}

/// All nodes restart within `within`; `asked` of the roles are asked for in the minute after that, every ten
/// seconds until answered.
async fn roll_out(within: Duration, warm_up: Duration, asked: usize) -> RollOut {
    let account = Account::new(SCALE);
    let start = account.start;
    let (late, requests) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let mut nodes = JoinSet::new();
    for node in 0..NODES {
        let (account, late, requests) = (Arc::clone(&account), Arc::clone(&late), Arc::clone(&requests));
        nodes.spawn(async move {
            sleep(within.mul_f64(node as f64 / NODES as f64)).await;
            let cache = Cache::new(
                Arc::clone(&account) as Arc<dyn Issuer>,
                Arc::new(account.clock()),
                TaskTracker::new(),
                CancellationToken::new(),
                Limits::default(),
                Metrics::new(&mut Registry::default()),
                Trail::for_tests(),
            );
            let role = |n: usize| session(&format!("role{n}"));
            let pod = |n: usize| pod(u32::try_from(n).unwrap());
            cache.set_claimed((0..ROLES).map(|n| (role(n).into(), (pod(n), true))).collect(), warm_up);
            for n in 0..asked {
                sleep(Duration::from_secs(60) / u32::try_from(asked).unwrap()).await;
                loop {
                    requests.fetch_add(1, Ordering::SeqCst);
                    if cache.of_session(role(n), &pod(n)).await.is_ok() {
                        break;
                    }
                    late.fetch_add(1, Ordering::SeqCst);
                    sleep(Duration::from_secs(10)).await;
                }
            }
            // Longer than any period that is checked.
            sleep((start + Duration::from_hours(1)).saturating_duration_since(Instant::now())).await;
        });
    }
    nodes.join_all().await;

    let periods = account.periods.lock().unwrap();
    let minute = usize::try_from(60 / PERIOD.as_secs()).unwrap();
    let busiest = periods.windows(minute).map(|window| window.iter().sum::<usize>()).max().unwrap();
    let account_wide = |calls: usize, seconds: u64| (calls * SCALE) as f64 / seconds as f64;
    RollOut {
        peak: account_wide(busiest, 60),
        mean: account_wide(periods.iter().sum(), 3600),
        throttled: periods.iter().map(|calls| calls.saturating_sub(LIMIT)).sum::<usize>() * SCALE,
        issued: account.issued.load(Ordering::SeqCst) * SCALE,
        late: late.load(Ordering::SeqCst) * SCALE,
        asked: requests.load(Ordering::SeqCst) * SCALE,
    }
}

#[tokio::test(start_paused = true)]
async fn a_roll_out_to_five_thousand_nodes_stays_below_the_accounts_limit() {
    let result = roll_out(minutes(10), WARM_UP, 0).await;

    println!("5,000 nodes × 20 roles, all restarted within 10 min: {result:?}");
    // Seen: 78 a second in the busiest minute, none throttled.
    assert!(result.mean < 70.0, "{result:?}");
    assert!(result.peak < 90.0 && result.throttled * 100 < result.issued, "{result:?}");
    // Every session once at the least, and refreshed in time.
    assert!(result.issued >= 5_000 * 20 * 2, "{result:?}");
}

#[tokio::test(start_paused = true)]
async fn pods_that_ask_in_a_roll_out_go_before_what_nobody_waits_for() {
    let result = roll_out(minutes(10), WARM_UP, 5).await;

    println!("the same, a quarter of the roles asked for within a minute: {result:?}");
    // Seen: 93 a second in the busiest minute, no request answered late.
    assert!(result.late * 50 < result.asked, "{result:?}");
    assert!(result.peak < 110.0, "{result:?}");
}

#[tokio::test(start_paused = true)]
async fn a_roll_out_without_spreading_would_use_up_the_accounts_limit() {
    let result = roll_out(minutes(10), Duration::ZERO, 0).await;

    println!("the same without spreading: {result:?}");
    // Seen: 217 a second in the busiest minute, three calls in ten throttled.
    assert!(result.peak > 150.0, "{result:?}");
}
