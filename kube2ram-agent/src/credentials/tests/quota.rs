//! What roles by ServiceAccount cost the cloud's STS and the API server. Each session is a token of its
//! ServiceAccount and the exchange of that token. A ServiceAccount is read at each renewal, and for each new
//! pod.

use super::{
    fleet::{Account, LIMIT},
    *,
};

const DAY: Duration = Duration::from_hours(24);
/// What one API server lets the flow of all nodes do at once: 30 of 245 shares (apiserver's bootstrap
/// configuration: `system` and the sum of all levels) of 600 requests (`--max-requests-inflight` and
/// `--max-mutating-requests-inflight`). Requests by impersonation of a node belong to that flow.
const SEATS: f64 = 600.0 * 30.0 / 245.0;
/// How long a request takes a seat, at the worst: a token is signed, and the audit log is written.
const SEAT_SECONDS: f64 = 0.05;

/// The API server before STS, as one unit.
struct Exchange {
    sts: Arc<Account>,
    start: Instant,
    scale: usize,
    /// Requests to the API server by period, as those to STS.
    api_server: Mutex<Vec<usize>>,
}

impl Exchange {
    fn new(scale: usize) -> Arc<Self> {
        let (sts, start) = (Account::new(scale), Instant::now());
        Arc::new(Self { sts, start, scale, api_server: Mutex::default() })
    }

    fn ask_api_server(&self, requests: usize) {
        let period = usize::try_from(self.start.elapsed().as_secs()).unwrap() / self.scale;
        let mut periods = self.api_server.lock().unwrap();
        if periods.len() <= period {
            periods.resize(period + 1, 0);
        }
        periods[period] += requests;
    }

    /// An agent that starts, and reads the ServiceAccount of each of its pods.
    fn agent(self: &Arc<Self>, pods: usize) -> Cache {
        self.ask_api_server(pods);
        Cache::new(
            Arc::clone(self) as Arc<dyn Issuer>,
            Arc::new(self.sts.clock()),
            TaskTracker::new(),
            CancellationToken::new(),
            Limits::default(),
            Metrics::new(&mut Registry::default()),
            Trail::for_tests(),
        )
    }
}

#[async_trait]
impl Issuer for Exchange {
    async fn issue(&self, session: &RoleSession) -> Result<Credentials, IssueError> {
        // The ServiceAccount's annotations, and its token.
        self.ask_api_server(2);
        sleep(Duration::from_millis(20)).await;
        self.sts.issue(session).await
    }
}

/// The session of one of a node's ServiceAccounts.
fn of_account(n: usize, duration: Duration) -> RoleSession {
    let account = ServiceAccount { namespace: "shop".into(), name: format!("web-{n}").into() };
    RoleSession { grant: Grant::ServiceAccount(account), duration, ..session(&format!("role{n}")) }
}

fn numbered(n: usize) -> PodUid {
    pod(u32::try_from(n).unwrap())
}

fn busiest(periods: &[usize]) -> usize {
    periods.iter().copied().max().unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_day_of_a_thousand_pods_of_a_hundred_accounts_on_one_node() {
    const PODS: usize = 1000;
    const ACCOUNTS: usize = 100;
    let exchange = Exchange::new(1);
    let cache = exchange.agent(PODS);
    let role = |n: usize| of_account(n % ACCOUNTS, LIFE);
    // All pods of the node are new, and ask at once.
    cache.set_claimed((0..PODS).map(|n| (role(n).into(), (numbered(n), true))).collect(), Duration::ZERO);
    let mut pods = JoinSet::new();
    for n in 0..PODS {
        let (cache, start) = (cache.clone(), exchange.start);
        pods.spawn(async move {
            while cache.of_session(role(n), &numbered(n)).await.is_err() {
                sleep(Duration::from_secs(1)).await;
            }
            start.elapsed()
        });
    }
    let slowest = pods.join_all().await.into_iter().max().unwrap();
    tokio::time::sleep_until(exchange.start + DAY).await;

    let (sts, api_server) = (exchange.sts.periods(), exchange.api_server.lock().unwrap());
    let [sts_calls, api_calls] = [&sts, &*api_server].map(|periods| periods.iter().sum::<usize>());
    let [sts_peak, api_peak] = [&sts, &*api_server].map(|periods| busiest(periods));
    println!(
        "1,000 pods, 100 accounts: {sts_calls} calls to STS and {api_calls} to the API server a day, at most {sts_peak} and {api_peak} in a second; the slowest pod waited {slowest:?}"
    );
    // A session is used for 24 to 28.5 minutes, whatever the number of its pods.
    assert!((50 * ACCOUNTS..=61 * ACCOUNTS).contains(&sts_calls), "{sts_calls}");
    assert!(api_calls <= 2 * 61 * ACCOUNTS + PODS, "{api_calls}");
    // One node alone never exceeds what the account has.
    assert!(sts_peak <= LIMIT, "{sts_peak}");
    assert!(api_peak as f64 * SEAT_SECONDS < SEATS, "{api_peak}");
    assert!(slowest < Duration::from_secs(4), "{slowest:?}");
}

/// What the fleet does after its first two hours.
struct Fleet {
    /// Of the whole account in a second: calls that STS let through, and all.
    admitted: f64,
    all: f64,
    /// Of the whole cluster in a second, on average and in the busiest period of all.
    api_server: f64,
    api_server_peak: f64,
    /// The least that was left of any credentials, and how many sessions had none.
    shortest_left: Duration,
    without: u32,
}

/// 5,000 nodes with 50 pods of 30 accounts each, whose agents all start within ten minutes, for eight hours.
/// One node in a hundred is simulated, against as many calls in a hundred seconds as the account has in one.
async fn fleet(duration: Duration) -> Fleet {
    const SCALE: usize = 100;
    const NODES: usize = 5000 / SCALE;
    const ACCOUNTS: usize = 30;
    const PODS: usize = 50;
    let steady = Duration::from_hours(2);
    let exchange = Exchange::new(SCALE);
    let mut agents = Vec::new();
    for node in 0..NODES {
        tokio::time::sleep_until(exchange.start + minutes(10).mul_f64(node as f64 / NODES as f64)).await;
        let cache = exchange.agent(PODS);
        let claims = (0..ACCOUNTS).map(|n| (of_account(n, duration).into(), (numbered(n), true)));
        cache.set_claimed(claims.collect(), WARM_UP);
        agents.push(cache);
    }
    let (mut shortest_left, mut without) = (duration, 0);
    tokio::time::sleep_until(exchange.start + steady).await;
    while exchange.start.elapsed() < Duration::from_hours(8) {
        for survey in agents.iter().map(Cache::survey) {
            shortest_left = shortest_left.min(survey.shortest_left.unwrap_or_default());
            without += [Standing::Denied, Standing::Failing, Standing::Pending]
                .map(|standing| survey.count(standing))
                .iter()
                .sum::<u32>();
        }
        sleep(minutes(10)).await;
    }

    let first = usize::try_from(steady.as_secs()).unwrap() / SCALE;
    // A simulated period has as many calls as the whole fleet in a second.
    let mean = |periods: &[usize]| periods.iter().sum::<usize>() as f64 / periods.len() as f64;
    let (sts, api_server) = (exchange.sts.periods(), exchange.api_server.lock().unwrap());
    let admitted: Vec<_> = sts.iter().map(|calls| (*calls).min(LIMIT)).collect();
    let result = Fleet {
        admitted: mean(&admitted[first..]),
        all: mean(&sts[first..]),
        api_server: mean(&api_server[first..]),
        api_server_peak: busiest(&api_server) as f64,
        shortest_left,
        without,
    };
    println!(
        "5,000 nodes × 30 accounts, sessions of {duration:?}: {:.1} calls a second to STS ({:.0} a day), {:.1} let through; {:.1} to the API server ({:.0} a day), {:.0} in the busiest second; at least {:?} left",
        result.all,
        result.all * DAY.as_secs_f64(),
        result.admitted,
        result.api_server,
        result.api_server * DAY.as_secs_f64(),
        result.api_server_peak,
        result.shortest_left
    );
    result
}

/// 150,000 sessions that are used for 26 minutes: 95 calls a second.
#[tokio::test(start_paused = true)]
async fn five_thousand_nodes_with_thirty_accounts_use_up_the_accounts_limit_and_are_served() {
    let fleet = fleet(LIFE).await;

    assert!((88.0..=97.0).contains(&fleet.admitted), "{}", fleet.admitted);
    assert!(fleet.all > fleet.admitted, "there is no room: some calls are throttled, and come again");
    assert_eq!(fleet.without, 0, "and no pod notices");
    assert!(fleet.shortest_left > minutes(20), "{:?}", fleet.shortest_left);
    assert!(fleet.api_server_peak * SEAT_SECONDS < SEATS, "{}", fleet.api_server_peak);
}

/// `--ram-role-session-ttl=1h`, or a duration in an annotation.
#[tokio::test(start_paused = true)]
async fn sessions_of_two_hours_halve_what_the_fleet_asks_for() {
    let fleet = fleet(LIFE * 2).await;

    assert!((42.0..=53.0).contains(&fleet.admitted), "{}", fleet.admitted);
    assert!(fleet.all < fleet.admitted * 1.05, "{} of {}", fleet.admitted, fleet.all);
    assert_eq!(fleet.without, 0);
    assert!(fleet.api_server_peak * SEAT_SECONDS < SEATS, "{}", fleet.api_server_peak);
}
