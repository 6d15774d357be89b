//! A node on which 250 pods of 250 roles start at once and all ask, at an STS that takes 200 ms and has the
//! account's limit.

use super::*;

const PODS: u32 = 250;
/// AssumeRole for each account and second (Alibaba Cloud notice of 2022-08-29).
const LIMIT: usize = 100;
const SECOND: Duration = Duration::from_secs(1);

/// Refuses a call beyond the limit within any second, whichever node makes it.
struct Account {
    clock: ManualClock,
    calls: Mutex<VecDeque<Instant>>,
    throttled: AtomicUsize,
}

impl Account {
    fn new() -> Arc<Self> {
        let clock = ManualClock { start: Instant::now(), jump_seconds: AtomicI64::new(0) };
        Arc::new(Self { clock, calls: Mutex::default(), throttled: AtomicUsize::new(0) })
    }

    fn admits(&self) -> bool {
        let mut calls = self.calls.lock().unwrap();
        while calls.front().is_some_and(|at| at.elapsed() >= SECOND) {
            calls.pop_front();
        }
        let is_admitted = calls.len() < LIMIT;
        if is_admitted {
            calls.push_back(Instant::now());
        }
        is_admitted
    }
}

#[async_trait]
impl Issuer for Account {
    async fn issue(&self, session: &RoleSession) -> Result<Credentials, IssueError> {
        let is_admitted = self.admits();
        sleep(Duration::from_millis(200)).await;
        if !is_admitted {
            self.throttled.fetch_add(1, Ordering::SeqCst);
            let (code, message) = ("Throttling.User".into(), "m".into());
            let kind = IssueErrorKind::Throttled;
            return Err(IssueError {
                kind,
                code,
                message,
                request_id: None,
                retry_after: None,
                source: None,
            });
        }
        let issued_at = self.clock.now();
        Ok(Credentials {
            access_key_id: "STS.start".into(),
            access_key_secret: "hush".into(),
            security_token: "hush".into(),
            issued_at,
            expires_at: issued_at + session.duration,
            request_id: None,
            document: Default::default(),
        })
    }
}

/// Starts the pods on each of some nodes, and returns when each pod had its credentials, in order. A pod asks
/// again a second after it was refused.
async fn start_pods(nodes: usize, account: &Arc<Account>) -> Vec<Duration> {
    let start = Instant::now();
    let mut pods = JoinSet::new();
    for node in 0..nodes {
        let clock = ManualClock { start, jump_seconds: AtomicI64::new(0) };
        let cache = Cache::new(
            Arc::clone(account) as Arc<dyn Issuer>,
            Arc::new(clock),
            TaskTracker::new(),
            CancellationToken::new(),
            Limits::default(),
            Metrics::new(&mut Registry::default()),
            Trail::for_tests(),
        );
        let role = move |n: u32| session(&format!("node{node}-role{n}"));
        // The pods are known, and what they may have is fetched ahead, before they run.
        cache.set_claimed((0..PODS).map(|n| (role(n).into(), (pod(n), true))).collect(), Duration::ZERO);
        for n in 0..PODS {
            let cache = cache.clone();
            pods.spawn(async move {
                sleep(Duration::from_millis(50)).await;
                while cache.of_session(role(n), &pod(n)).await.is_err() {
                    sleep(SECOND).await;
                }
                start.elapsed()
            });
        }
    }
    let mut served = pods.join_all().await;
    served.sort_unstable();
    served
}

fn within(served: &[Duration], limit: Duration) -> usize {
    served.iter().filter(|at| **at <= limit).count()
}

#[tokio::test(start_paused = true)]
async fn two_hundred_and_fifty_pods_of_different_roles_that_start_at_once_are_served_in_seconds() {
    let account = Account::new();

    let served = start_pods(1, &account).await;

    let seconds = [1, 2, 3, 4, 5, 10].map(|n| (n, within(&served, n * SECOND)));
    println!("250 pods on one node: {seconds:?}, throttled {}", account.throttled.load(Ordering::SeqCst));
    assert!(within(&served, SECOND) >= 70, "{seconds:?}");
    assert_eq!(within(&served, 6 * SECOND), 250, "{seconds:?}");
    assert_eq!(
        account.throttled.load(Ordering::SeqCst),
        0,
        "one node alone stays within the account's limit"
    );
}

#[tokio::test(start_paused = true)]
async fn four_nodes_that_start_at_once_share_the_accounts_limit() {
    let account = Account::new();

    let served = start_pods(4, &account).await;

    let seconds = [1, 2, 5, 10, 20, 30, 60].map(|n| (n, within(&served, n * SECOND)));
    let throttled = account.throttled.load(Ordering::SeqCst);
    println!("250 pods on each of four nodes: {seconds:?}, throttled {throttled}");
    // The limit alone takes ten seconds.
    assert_eq!(within(&served, 60 * SECOND), 1000, "{seconds:?}");
}
