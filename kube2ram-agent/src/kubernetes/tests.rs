//! The cluster against an API server with list, watch and create over real connections.

mod accounts;
mod api_server;
mod lists;

use std::time::Duration;

use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio::{task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

use self::api_server::{ApiServer, Mode};
use super::{lookup::LIST_INTERVAL, *};
use kube2ram_service::{clock::SystemClock, kubernetes::ClientConfig};

const ROLE: &str = "ram.aliyuncs.com/role";
const ALLOWED: &str = "ram.aliyuncs.com/allowed-roles";
/// The annotations that are kept, and how many bytes of each.
const KEYS: [(&str, usize); 5] =
    [(ROLE, 512), ("external-id", 1224), ("policy", 8192), ("duration", 128), ("session-name", 64)];
const LOOKUP_DEADLINE: Duration = Duration::from_millis(700);
/// The only pod that has a cgroup.
const LIVE: u32 = 30;
const HASH: &str = "9f86d081884c7d659a2feaa0c55ad015";

struct Running {
    cluster: Arc<Cluster>,
    registry: Registry,
    api: ApiServer,
    shutdown: CancellationToken,
    task: JoinHandle<()>,
}

impl Running {
    /// A cluster that runs against `api`, whether that is up or not.
    async fn start(api: ApiServer) -> Self {
        Self::start_with(api, None).await
    }

    /// The same, with what an agent before knew.
    async fn start_with(api: ApiServer, checkpoint: Option<Checkpoint>) -> Self {
        let lists = AllowLists {
            annotation: ALLOWED.into(),
            role_annotation: ROLE.into(),
            check: Arc::new(|text| match text.starts_with('[') {
                true => Ok(()),
                false => Err(format!("not a list: {text}")),
            }),
        };
        Self::start_as(api, checkpoint, Some(lists)).await
    }

    /// The same, where namespaces are not restricted.
    async fn unrestricted(api: ApiServer, checkpoint: Option<Checkpoint>) -> Self {
        Self::start_as(api, checkpoint, None).await
    }

    async fn start_as(
        api: ApiServer,
        checkpoint: Option<Checkpoint>,
        allow_lists: Option<AllowLists>,
    ) -> Self {
        Self::start_all(api, checkpoint, allow_lists, None).await
    }

    async fn start_all(
        api: ApiServer,
        checkpoint: Option<Checkpoint>,
        allow_lists: Option<AllowLists>,
        service_accounts: Option<ServiceAccountConfig>,
    ) -> Self {
        let config = ClusterConfig {
            node: "node-1".into(),
            pod_annotations: KEYS.map(|(key, bytes)| (key.into(), bytes)).into(),
            allow_lists,
            service_accounts,
            live_pods: Arc::new(|| Ok([LIVE].map(uid).into())),
            lookup: LOOKUP_DEADLINE,
        };
        let client = ClientConfig::Server { url: api.url(), token: None, insecure: false };
        let mut registry = Registry::default();
        let cluster = Cluster::connect(client, config, Arc::new(SystemClock), &mut registry).await.unwrap();
        checkpoint.into_iter().for_each(|checkpoint| cluster.offer(checkpoint));
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(Arc::clone(&cluster).run(shutdown.clone()));
        Self { cluster, registry, api, shutdown, task }
    }

    /// The same, with both watches open.
    async fn synced(api: ApiServer) -> Self {
        let running = Self::start(api).await;
        within(running.cluster.synced()).await;
        eventually("both watches", || running.api.watches() == 2).await;
        running
    }

    async fn pod(&self, n: u32) -> Result<Arc<Pod>, PodError> {
        self.cluster.pod(&uid(n)).await
    }

    fn knows(&self, n: u32) -> bool {
        self.cluster.pods().iter().any(|pod| pod.uid == uid(n))
    }

    /// A look-up that is known to wait.
    async fn waiter(&self, n: u32) -> JoinHandle<Result<Arc<Pod>, PodError>> {
        let cluster = Arc::clone(&self.cluster);
        let lists = self.api.direct_lists();
        let waiter = tokio::spawn(async move { cluster.pod(&uid(n)).await });
        eventually("a direct list", || self.api.direct_lists() > lists).await;
        waiter
    }

    async fn stop(self) {
        self.shutdown.cancel();
        within(self.task).await.unwrap();
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(10), future).await.expect("in time")
}

async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "never came: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn uid(n: u32) -> PodUid {
    PodUid::parse(&format!("00000000-0000-4000-8000-{n:012x}")).unwrap()
}

fn pod(n: u32, role: &str) -> Value {
    json!({
        "metadata": {"namespace": "team-a", "name": format!("pod-{n}"), "uid": uid(n).as_str(), "annotations": {ROLE: role}},
        "spec": {"nodeName": "node-1", "serviceAccountName": "sa"},
        "status": {"phase": "Running"},
    })
}

fn ended(n: u32, phase: &str) -> Value {
    let mut pod = pod(n, "r");
    pod["status"]["phase"] = phase.into();
    pod
}

fn mirror(n: u32, hash: &str) -> Value {
    let mut pod = pod(n, "r");
    pod["metadata"]["annotations"] =
        json!({"kubernetes.io/config.hash": hash, "kubernetes.io/config.mirror": hash});
    pod
}

fn namespace(name: &str, allow_list: Option<&str>) -> Value {
    let annotations = allow_list.map_or(json!({}), |text| json!({ ALLOWED: text }));
    json!({"metadata": {"name": name, "uid": name, "annotations": annotations}})
}

fn role(pod: &Pod) -> &str {
    &pod.annotations[ROLE]
}

#[tokio::test]
async fn knows_listed_and_watched_pods_without_asking_again() {
    let api = ApiServer::start().await;
    api.put("pods", pod(1, "one"));
    let running = Running::synced(api).await;

    running.api.put("pods", pod(2, "two"));
    eventually("pod 2", || running.knows(2)).await;

    assert_eq!(role(&running.pod(1).await.unwrap()), "one");
    assert_eq!(role(&running.pod(2).await.unwrap()), "two");
    assert_eq!(running.api.direct_lists(), 0);
    assert_eq!(running.api.selector("pods"), "spec.nodeName=node-1");
    running.stop().await;
}

#[tokio::test]
async fn an_event_after_the_connect_wakes_the_waiter() {
    let running = Running::synced(ApiServer::start().await).await;
    running.api.stall("direct lists");
    let waiter = running.waiter(1).await;

    running.api.put("pods", pod(1, "one"));

    assert_eq!(role(&within(waiter).await.unwrap().unwrap()), "one");
    running.stop().await;
}

#[tokio::test]
async fn a_direct_list_finds_a_pod_that_the_watch_has_not_shown() {
    let running = Running::synced(ApiServer::start().await).await;
    running.api.freeze_cache();
    running.api.put_unwatched("pods", pod(1, "one"));

    assert_eq!(role(&running.pod(1).await.unwrap()), "one");
    assert_eq!(role(&running.pod(1).await.unwrap()), "one");

    assert_eq!(running.api.direct_lists(), 1);
    assert_eq!(running.cluster.metrics.pod_waits.get_or_create(&[("result", "found")]).get(), 1);
    running.stop().await;
}

#[tokio::test]
async fn a_pod_that_the_api_servers_cache_has_costs_no_quorum_read() {
    let running = Running::synced(ApiServer::start().await).await;
    running.api.put_unwatched("pods", pod(1, "one"));

    assert_eq!(role(&running.pod(1).await.unwrap()), "one");

    // The watch's own list was the first.
    assert_eq!((running.api.cached_lists(), running.api.direct_lists()), (2, 0));
    running.stop().await;
}

#[tokio::test]
async fn a_direct_list_is_not_taken_from_a_cache_that_is_behind_the_watch() {
    let running = Running::synced(ApiServer::start().await).await;
    running.api.freeze_cache();
    running.api.put("pods", pod(2, "two"));
    eventually("pod 2", || running.knows(2)).await;

    assert!(matches!(running.pod(9).await, Err(PodError::Unknown(_))));

    assert_eq!(running.api.least_versions().len(), 1, "the cache is asked for the known version");
    assert_eq!(running.api.direct_lists(), 1, "and does not have it");
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn an_overloaded_api_server_is_asked_no_sooner_than_its_retry_after() {
    let running = Running::synced(ApiServer::start().await).await;
    let before = running.api.cached_lists();
    running.api.overload(5);
    let start = Instant::now();

    while start.elapsed() < Duration::from_secs(30) {
        assert!(matches!(running.pod(1).await, Err(PodError::Unavailable { .. })));
    }

    let lists = running.api.cached_lists() - before + running.api.direct_lists();
    assert!((2..=7).contains(&lists), "{lists} lists in 30 s");
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_silent_watch_is_given_up_within_a_minute_and_no_working_one_is() {
    let api = ApiServer::start().await;
    api.put("pods", pod(1, "one"));
    let running = Running::synced(api).await;
    let start = Instant::now();

    running.api.put_silently("pods", pod(1, "narrowed"));
    while role(&running.pod(1).await.unwrap()) != "narrowed" {
        assert!(start.elapsed() < Duration::from_secs(60), "still not heard of");
        tokio::time::sleep(Duration::from_secs(1)).await;
    }

    let silent = running.api.watch_seconds();
    let longest = silent.iter().max().unwrap();
    assert!(start.elapsed() > Duration::from_secs(*longest), "a watch may be silent until its end");
    assert!(silent.iter().all(|seconds| (40..=50).contains(seconds)), "{silent:?}");
    running.stop().await;
}

#[tokio::test]
async fn a_relist_does_not_bring_back_what_the_watch_has_shown_to_be_changed_or_deleted() {
    for as_status in [false, true] {
        let api = ApiServer::start().await;
        for n in [1, 2] {
            api.put("pods", pod(n, "old"));
        }
        let running = Running::synced(api).await;
        running.api.freeze_cache();
        running.api.put("pods", pod(1, "new"));
        running.api.remove("pods", uid(2).as_str());
        running.api.put("pods", pod(3, "three"));
        eventually("the changes", || running.knows(3) && !running.knows(2)).await;
        running.api.remove_unwatched("pods", uid(3).as_str());

        running.api.expire_watches(as_status);

        eventually("the question to a cache that is behind", || !running.api.least_versions().is_empty())
            .await;
        running.api.thaw_cache();
        eventually("the relist", || !running.knows(3)).await;
        assert_eq!(running.api.direct_lists(), 0, "etcd was not asked");
        assert_eq!(role(&running.pod(1).await.unwrap()), "new");
        assert!(!running.knows(2));
        running.stop().await;
    }
}

#[tokio::test]
async fn an_unknown_pod_is_refused_at_once_and_not_listed_for_again() {
    let api = ApiServer::start().await;
    api.put("pods", pod(1, "one"));
    let running = Running::synced(api).await;
    let start = Instant::now();

    for _ in 0..3 {
        assert!(matches!(running.pod(9).await, Err(PodError::Unknown(_))));
    }

    assert!(start.elapsed() < LOOKUP_DEADLINE, "{:?}", start.elapsed());
    assert_eq!(running.api.direct_lists(), 1);
    assert!(running.pod(1).await.is_ok());
    running.stop().await;
}

#[tokio::test]
async fn different_unknown_pods_cannot_make_lists_follow_each_other_fast() {
    let running = Running::synced(ApiServer::start().await).await;
    let start = Instant::now();

    for n in [8, 9] {
        assert!(matches!(running.pod(n).await, Err(PodError::Unknown(_))));
    }

    assert!(start.elapsed() >= LIST_INTERVAL, "{:?}", start.elapsed());
    assert_eq!(running.api.direct_lists(), 2);
    running.stop().await;
}

#[tokio::test]
async fn a_refused_pod_is_found_as_soon_as_the_watch_shows_it() {
    let running = Running::synced(ApiServer::start().await).await;
    assert!(matches!(running.pod(1).await, Err(PodError::Unknown(_))));

    running.api.put("pods", pod(1, "one"));
    eventually("pod 1", || running.knows(1)).await;

    assert!(running.pod(1).await.is_ok());
    running.stop().await;
}

#[tokio::test]
async fn many_waiters_share_one_list() {
    let running = Running::synced(ApiServer::start().await).await;
    running.api.freeze_cache();
    running.api.put_unwatched("pods", pod(1, "one"));

    let found = futures::future::join_all((0..50).map(|_| running.pod(1))).await;
    let lists_for_found = running.api.direct_lists();
    let refused = futures::future::join_all((0..50).map(|_| running.pod(9))).await;

    assert!(found.iter().all(Result::is_ok));
    assert_eq!(lists_for_found, 1);
    assert!(refused.iter().all(|result| matches!(result, Err(PodError::Unknown(_)))));
    assert_eq!(running.api.direct_lists(), 2);
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn answers_unavailable_at_the_deadline_while_the_api_server_does_not_answer() {
    let api = ApiServer::start().await;
    api.set_mode(Mode::Stalled);
    let running = Running::start(api).await;
    let start = Instant::now();

    let error = running.pod(1).await.unwrap_err();

    assert!(matches!(error, PodError::Unavailable { .. }), "{error:?}");
    assert!((LOOKUP_DEADLINE..Duration::from_secs(1)).contains(&start.elapsed()), "{:?}", start.elapsed());
    running.stop().await;
}

#[tokio::test]
async fn starts_without_the_api_server_and_recovers_when_it_comes() {
    let api = ApiServer::start().await;
    api.put("pods", pod(1, "one"));
    api.put("namespaces", namespace("team-a", None));
    api.set_mode(Mode::Down);
    let running = Running::start(api).await;
    assert!(matches!(running.pod(1).await, Err(PodError::Unavailable { .. })));
    assert!(!running.cluster.is_synced());

    running.api.set_mode(Mode::Up);
    within(running.cluster.synced()).await;

    assert_eq!(role(&running.pod(1).await.unwrap()), "one");
    assert_eq!(running.cluster.allow_list("team-a"), Some(None));
    running.stop().await;
}

#[tokio::test]
async fn the_reason_for_unavailable_is_kept() {
    let api = ApiServer::start().await;
    api.set_mode(Mode::Down);
    let running = Running::start(api).await;

    let Err(PodError::Unavailable { source: Some(source), .. }) = running.pod(1).await else {
        panic!("unavailable, with its cause")
    };

    assert_eq!(source.to_string(), "cannot list the pods of this node");
    running.stop().await;
}

#[tokio::test]
async fn what_is_known_keeps_working_while_the_api_server_is_away() {
    let api = ApiServer::start().await;
    api.put("pods", pod(1, "one"));
    api.put("namespaces", namespace("team-a", Some("[\"one\"]")));
    let running = Running::synced(api).await;

    running.api.set_mode(Mode::Down);
    let errors = running.cluster.metrics.watch_errors.get_or_create(&[("resource", "pods")]).clone();
    eventually("a watch error", || errors.get() > 0).await;

    assert_eq!(role(&running.pod(1).await.unwrap()), "one");
    assert_eq!(running.cluster.allow_list("team-a"), Some(Some("[\"one\"]".into())));
    assert!(matches!(running.pod(2).await, Err(PodError::Unavailable { .. })));
    running.stop().await;
}

#[tokio::test]
async fn an_expired_watch_lists_again_and_drops_the_pods_that_went_meanwhile() {
    for as_status in [false, true] {
        let api = ApiServer::start().await;
        api.put("pods", pod(1, "one"));
        api.put("pods", pod(2, "two"));
        let running = Running::synced(api).await;

        running.api.remove_unwatched("pods", uid(1).as_str());
        running.api.expire_watches(as_status);

        eventually("pod 1 to go", || !running.knows(1)).await;
        assert!(running.pod(2).await.is_ok());
        assert!(matches!(running.pod(1).await, Err(PodError::Unknown(_))));
        running.stop().await;
    }
}

#[tokio::test]
async fn a_terminating_pod_keeps_its_role_until_it_is_deleted() {
    let api = ApiServer::start().await;
    api.put("pods", pod(1, "one"));
    let running = Running::synced(api).await;

    let mut terminating = pod(1, "one");
    terminating["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
    running.api.put("pods", terminating);
    running.api.put("pods", pod(2, "two"));
    eventually("the events", || running.knows(2)).await;
    assert_eq!(role(&running.pod(1).await.unwrap()), "one");

    running.api.remove("pods", uid(1).as_str());
    eventually("pod 1 to go", || !running.knows(1)).await;
    assert!(matches!(running.pod(1).await, Err(PodError::Unknown(_))));
    running.stop().await;
}

#[tokio::test]
async fn a_pod_that_has_ended_is_no_longer_known() {
    let api = ApiServer::start().await;
    api.put("pods", ended(1, "Failed"));
    api.put("pods", pod(2, "two"));
    let running = Running::synced(api).await;
    assert!(running.pod(2).await.is_ok());

    running.api.put("pods", ended(2, "Succeeded"));
    eventually("pod 2 to go", || !running.knows(2)).await;

    for n in [1, 2] {
        assert!(matches!(running.pod(n).await, Err(PodError::Unknown(_))));
    }
    running.stop().await;
}

#[tokio::test]
async fn a_static_pod_is_found_by_the_config_hash_of_its_mirror_only() {
    let hash = PodUid::parse(HASH).unwrap();
    let mut impostor = mirror(1, HASH);
    impostor["metadata"]["annotations"].as_object_mut().unwrap().remove("kubernetes.io/config.mirror");
    let api = ApiServer::start().await;
    api.put("pods", impostor);
    let running = Running::synced(api).await;
    assert!(matches!(running.cluster.pod(&hash).await, Err(PodError::Unknown(_))));

    running.api.put("pods", mirror(2, HASH));
    eventually("the mirror pod", || running.knows(2)).await;
    assert_eq!(&*running.cluster.pod(&hash).await.unwrap().name, "pod-2");

    running.api.put("pods", mirror(3, HASH));
    eventually("a second claim", || running.knows(3)).await;
    assert!(matches!(running.cluster.pod(&hash).await, Err(PodError::Ambiguous(_))));
    running.stop().await;
}

#[tokio::test]
async fn a_static_pod_is_waited_for_although_the_api_server_has_no_mirror_yet() {
    let running = Running::synced(ApiServer::start().await).await;
    let hash = PodUid::parse(HASH).unwrap();
    let waiter = tokio::spawn({
        let cluster = Arc::clone(&running.cluster);
        async move { cluster.pod(&hash).await }
    });
    let lists = running.cluster.metrics.pod_lists.get_or_create(&[("result", "ok")]).clone();
    eventually("the direct list", || lists.get() == 1).await;

    running.api.put("pods", mirror(1, HASH));

    assert_eq!(&*within(waiter).await.unwrap().unwrap().name, "pod-1");
    running.stop().await;
}

#[tokio::test]
async fn a_known_pod_waits_until_namespaces_are_listed() {
    let api = ApiServer::start().await;
    api.put("pods", pod(1, "one"));
    api.stall("namespaces");
    let running = Running::start(api).await;
    eventually("pod 1", || running.knows(1)).await;

    assert!(matches!(running.pod(1).await, Err(PodError::Unavailable { .. })));
    assert!(!running.cluster.is_synced());
    running.stop().await;
}

#[tokio::test]
async fn without_restrictions_no_namespace_is_asked_for_and_nothing_waits_for_one() {
    let api = ApiServer::start().await;
    api.put("pods", pod(1, "one"));
    api.put("namespaces", namespace("team-a", Some("[]")));
    api.stall("namespaces");
    let running = Running::unrestricted(api, None).await;

    within(running.cluster.synced()).await;
    eventually("the only watch", || running.api.watches() == 1).await;

    assert_eq!(role(&running.pod(1).await.unwrap()), "one");
    assert_eq!(running.api.namespace_pages(), 0);
    assert_eq!(running.cluster.allow_list("team-a"), None);
    assert_eq!(running.cluster.resources(), [Resource::Pods]);
    // Otherwise an alert would report a watch that is closed on purpose.
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &running.registry).unwrap();
    let namespaces = text.lines().filter(|line| line.contains(r#"resource="namespaces""#));
    assert_eq!(namespaces.collect::<Vec<_>>(), [""; 0]);
    assert!(text.contains(r#"watches{resource="pods"} 1"#), "{text}");
    running.stop().await;
}

#[tokio::test]
async fn a_snapshot_without_allow_lists_opens_nothing_once_namespaces_are_restricted() {
    let api = ApiServer::start().await;
    api.put("pods", pod(LIVE, "one"));
    let running = Running::unrestricted(api, None).await;
    within(running.cluster.synced()).await;
    let checkpoint = running.cluster.checkpoint().expect("it needs no namespaces");
    running.stop().await;
    let api = ApiServer::start().await;
    api.put("namespaces", namespace("team-a", None));
    api.put("pods", pod(LIVE, "one"));
    api.set_mode(Mode::Down);

    let running = Running::start_with(api, Some(checkpoint)).await;
    eventually("the restored pod", || running.knows(LIVE)).await;

    assert!(matches!(running.pod(LIVE).await, Err(PodError::Unavailable { .. })), "not the last word");
    running.api.set_mode(Mode::Up);
    within(running.cluster.synced()).await;
    assert!(running.pod(LIVE).await.is_ok());
    running.stop().await;
}

#[tokio::test]
async fn a_snapshot_with_allow_lists_is_used_where_namespaces_are_no_longer_restricted() {
    let checkpoint = checkpoint().await;
    let api = ApiServer::start().await;
    api.set_mode(Mode::Down);

    let running = Running::unrestricted(api, Some(checkpoint)).await;
    eventually("the restored pod", || running.knows(LIVE)).await;

    assert_eq!(role(&running.pod(LIVE).await.unwrap()), "saved");
    assert_eq!(running.cluster.allow_list("team-a"), None);
    running.stop().await;
}

#[tokio::test]
async fn finds_whether_a_namespace_has_the_annotation_that_counts_on_pods_only() {
    let api = ApiServer::start().await;
    for (name, annotations) in
        [("team-a", json!({ ROLE: "r" })), ("team-b", json!({ ALLOWED: "[]" })), ("team-c", json!(null))]
    {
        api.put("namespaces", json!({"metadata": {"name": name, "uid": name, "annotations": annotations}}));
    }
    let running = Running::synced(api).await;

    let misplaced = ["team-a", "team-b", "team-c", "team-d"].map(|it| running.cluster.has_misplaced_role(it));

    assert_eq!(misplaced, [true, false, false, false], "of the list, which is cut down to what is used");
    running.api.put("namespaces", namespace("team-a", None));
    eventually("its correction", || !running.cluster.has_misplaced_role("team-a")).await;
    running.stop().await;
}

#[tokio::test]
async fn the_longest_allow_lists_have_no_room_and_their_pods_wait() {
    let api = ApiServer::start().await;
    let long = format!("[{:60000}]", "");
    for n in 0..200 {
        api.put("namespaces", namespace(&format!("ns-{n:03}"), Some(&long)));
    }
    let team = format!("[{:1000}]", "");
    api.put("namespaces", namespace("team-a", Some(&team)));

    let running = Running::synced(api).await;

    let kept = running.cluster.allow_lists().len();
    assert!((65..75).contains(&kept), "{kept} of 60 kB each in 4 MiB");
    assert_eq!(running.cluster.metrics.namespaces_without_room.get(), 201 - kept as i64);
    assert!(running.cluster.allow_list("team-a").is_some(), "whatever comes before it in the list");
    let known = running.cluster.allow_lists();
    let left_out =
        (0..200).map(|n| format!("ns-{n:03}")).find(|name| !known.contains_key(name.as_str())).unwrap();
    assert_eq!(
        running.cluster.allow_list(&left_out),
        None,
        "policy takes it for not known, which is no last word"
    );
    running.api.put("namespaces", namespace(&left_out, Some("[]")));
    eventually("room", || running.cluster.allow_list(&left_out).is_some()).await;
    running.stop().await;
}

#[tokio::test]
async fn follows_the_allow_list_of_a_namespace() {
    let api = ApiServer::start().await;
    api.put("namespaces", namespace("team-a", None));
    let running = Running::synced(api).await;
    assert_eq!(running.cluster.allow_list("team-a"), Some(None));
    assert_eq!(running.cluster.allow_list("team-b"), None);

    running.api.put("namespaces", namespace("team-a", Some("[]")));
    eventually("the allow-list", || running.cluster.allow_list("team-a") == Some(Some("[]".into()))).await;

    running.api.remove("namespaces", "team-a");
    eventually("the namespace to go", || running.cluster.allow_list("team-a").is_none()).await;
    running.stop().await;
}

#[tokio::test]
async fn a_malformed_allow_list_raises_one_event_where_this_node_has_pods() {
    let api = ApiServer::start().await;
    for (n, namespace) in [(1, "team-a"), (2, "team-b"), (3, "team-c")] {
        let mut pod = pod(n, "r");
        pod["metadata"]["namespace"] = namespace.into();
        api.put("pods", pod);
    }
    let running = Running::synced(api).await;

    running.api.put("namespaces", namespace("team-b", Some("[\"good\"]")));
    running.api.put("namespaces", namespace("elsewhere", Some("not for us to tell")));
    running.api.put("namespaces", namespace("team-a", Some("oops")));
    running.api.put("namespaces", namespace("team-c", Some("last")));
    eventually("the last Event", || {
        running.api.posted().iter().any(|event| event["note"] == "not a list: last")
    })
    .await;

    let posted = running.api.posted();
    assert_eq!(posted.len(), 2);
    assert_eq!(posted[0]["regarding"]["kind"], "Namespace");
    assert_eq!(posted[0]["regarding"]["namespace"], "team-a");
    assert_eq!(posted[0]["reason"], "MalformedAllowList");
    assert_eq!(posted[0]["note"], "not a list: oops");
    running.stop().await;
}

#[tokio::test]
async fn duplicate_notices_are_posted_once() {
    let running = Running::synced(ApiServer::start().await).await;
    let notice = |message: &str| Notice {
        about: About::Pod("team-a".into(), "web".into(), uid(1)),
        reason: "RoleDenied",
        message: message.into(),
    };

    for message in ["first", "first", "last", "first"] {
        running.cluster.warn(notice(message));
    }
    eventually("the last Event", || running.api.posted().iter().any(|event| event["note"] == "last")).await;

    let posted = running.api.posted();
    assert_eq!(posted.len(), 2);
    assert_eq!(posted[0]["type"], "Warning");
    assert_eq!(posted[0]["metadata"]["namespace"], "team-a");
    assert_eq!(posted[0]["regarding"]["uid"], uid(1).as_str());
    assert_eq!(running.cluster.metrics.events.get_or_create(&[("result", "duplicate")]).get(), 2);
    running.stop().await;
}

fn notice(message: &str) -> Notice {
    Notice {
        about: About::Pod("team-a".into(), "web".into(), uid(1)),
        reason: "RoleDenied",
        message: message.into(),
    }
}

fn refusal(code: u16, cause: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Forbidden", "message": "no", "code": code,
        "details": {"causes": [{"reason": cause, "message": "", "field": ""}]},
    })
}

#[tokio::test]
async fn what_is_repeated_is_counted_in_its_event() {
    let running = Running::synced(ApiServer::start().await).await;
    running.cluster.warn(notice("again"));
    eventually("the Event", || running.api.posted().len() == 1).await;

    running.cluster.warn(notice("again"));
    running.cluster.warn(notice("other"));
    eventually("the count", || !running.api.patched().is_empty()).await;

    let (path, series) = running.api.patched().remove(0);
    let name = running.api.posted()[0]["metadata"]["name"].as_str().unwrap().to_owned();
    assert_eq!(path, format!("/apis/events.k8s.io/v1/namespaces/team-a/events/{name}"));
    assert_eq!(series["series"]["count"], 2, "{series}");
    assert!(series["series"]["lastObservedTime"].as_str().unwrap().ends_with('Z'), "{series}");
    running.stop().await;
}

#[tokio::test]
async fn without_the_right_to_create_events_one_attempt_is_made() {
    let api = ApiServer::start().await;
    api.refuse(&http::Method::POST, Some(refusal(403, "")));
    let running = Running::synced(api).await;
    let events = &running.cluster.metrics.events;
    let count = |result| events.get_or_create(&[("result", result)]).get();
    running.cluster.warn(notice("first"));
    eventually("the refusal", || count("forbidden") == 1).await;

    running.api.refuse(&http::Method::POST, None);
    for number in 0..20 {
        running.cluster.warn(notice(&number.to_string()));
    }

    assert_eq!((count("forbidden"), count("dropped")), (1, 20), "nothing is queued for the time being");
    assert!(running.api.posted().is_empty());
    running.stop().await;
}

#[tokio::test]
async fn a_namespace_that_goes_takes_its_events_with_it_and_no_right() {
    let api = ApiServer::start().await;
    api.refuse(&http::Method::POST, Some(refusal(403, "NamespaceTerminating")));
    let running = Running::synced(api).await;
    let failed = running.cluster.metrics.events.get_or_create_owned(&[("result", "failed")]);
    running.cluster.warn(notice("in a namespace that goes"));
    eventually("the refusal", || failed.get() == 1).await;

    running.api.refuse(&http::Method::POST, None);
    running.cluster.warn(notice("elsewhere"));

    eventually("the next Event", || running.api.posted().len() == 1).await;
    running.stop().await;
}

#[tokio::test]
async fn an_event_of_while_the_api_server_was_away_is_posted_when_it_is_back() {
    let running = Running::synced(ApiServer::start().await).await;
    running.api.set_mode(Mode::Down);
    let failed = running.cluster.metrics.events.get_or_create_owned(&[("result", "failed")]);

    running.cluster.warn(notice("meanwhile"));
    eventually("an attempt", || failed.get() > 0).await;
    running.api.set_mode(Mode::Up);

    eventually("the Event", || !running.api.posted().is_empty()).await;
    assert_eq!(running.api.posted()[0]["note"], "meanwhile");
    running.stop().await;
}

#[tokio::test]
async fn the_nodes_own_events_are_where_kubectl_looks_for_them() {
    let running = Running::synced(ApiServer::start().await).await;

    running.cluster.warn(Notice { about: About::Node, reason: "DatapathRepaired", message: "m".into() });
    eventually("the Event", || !running.api.posted().is_empty()).await;

    let event = running.api.posted().remove(0);
    assert_eq!(event["metadata"]["namespace"], "default");
    assert_eq!(
        event["regarding"],
        json!({"apiVersion": "v1", "kind": "Node", "name": "node-1", "uid": "node-1"})
    );
    running.stop().await;
}

#[tokio::test]
async fn reports_whether_watches_are_open_and_when_they_last_answered() {
    let running = Running::synced(ApiServer::start().await).await;
    let metrics = &running.cluster.metrics;
    let open = || [Resource::Pods, Resource::Namespaces].map(|resource| metrics.watches(resource).get());
    eventually("both", || open() == [1, 1]).await;
    let heard = || metrics.watch_message(Resource::Pods).get();
    assert!(heard() < 1.0, "a watch that brings nothing is no message: {}", heard());

    running.api.put("pods", pod(2, "r"));
    eventually("the message", || heard() > 0.0).await;
    let now = jiff::Timestamp::now().as_duration().as_secs_f64();
    assert!((now - heard()).abs() < 60.0, "{}", heard());
    running.api.set_mode(Mode::Down);
    eventually("their end", || open() == [0, 0]).await;
    running.api.set_mode(Mode::Up);

    eventually("others", || open() == [1, 1]).await;
    running.stop().await;
}

#[tokio::test]
async fn a_pod_deleted_by_force_keeps_its_role_while_it_has_a_cgroup() {
    let api = ApiServer::start().await;
    api.put("pods", pod(LIVE, "one"));
    api.put("pods", pod(1, "two"));
    let running = Running::synced(api).await;

    for n in [LIVE, 1] {
        running.api.remove("pods", uid(n).as_str());
    }
    eventually("pod 1 to go", || !running.knows(1)).await;

    assert_eq!(role(&running.pod(LIVE).await.unwrap()), "one");
    assert!(matches!(running.pod(1).await, Err(PodError::Unknown(_))));
    running.stop().await;
}

/// What an agent saw of pods `LIVE` and 1, and of an allow-list.
async fn checkpoint() -> Checkpoint {
    let api = ApiServer::start().await;
    api.put("namespaces", namespace("team-a", Some(r#"["saved"]"#)));
    api.put("pods", pod(LIVE, "saved"));
    api.put("pods", pod(1, "saved"));
    let running = Running::synced(api).await;
    let checkpoint = running.cluster.checkpoint().unwrap();
    running.stop().await;
    checkpoint
}

#[tokio::test]
async fn pods_from_before_a_restart_are_served_while_the_api_server_is_away() {
    let checkpoint = checkpoint().await;
    let api = ApiServer::start().await;
    api.put("namespaces", namespace("team-a", Some(r#"["new"]"#)));
    api.put("pods", pod(LIVE, "new"));
    api.set_mode(Mode::Down);
    let running = Running::start_with(api, Some(checkpoint)).await;

    eventually("the restored pod", || running.knows(LIVE)).await;
    assert_eq!(role(&running.pod(LIVE).await.unwrap()), "saved");
    assert_eq!(running.cluster.allow_list("team-a"), Some(Some(r#"["saved"]"#.into())));
    assert!(matches!(running.pod(1).await, Err(PodError::Unavailable { .. })), "its cgroup is gone");
    assert!(running.cluster.is_known() && !running.cluster.is_synced());
    assert_eq!(running.cluster.checkpoint(), None, "nobody vouches for it any longer");

    running.api.set_mode(Mode::Up);
    within(running.cluster.synced()).await;
    assert_eq!(role(&running.pod(LIVE).await.unwrap()), "new");
    assert_eq!(running.cluster.allow_list("team-a"), Some(Some(r#"["new"]"#.into())));
    running.stop().await;
}

#[tokio::test]
async fn what_was_known_before_a_restart_is_not_used_while_the_api_server_answers() {
    let checkpoint = checkpoint().await;
    let api = ApiServer::start().await;
    api.put("namespaces", namespace("team-a", Some(r#"["new"]"#)));

    let running = Running::start_with(api, Some(checkpoint)).await;
    within(running.cluster.synced()).await;

    assert!(!running.knows(LIVE));
    assert_eq!(running.cluster.allow_list("team-a"), Some(Some(r#"["new"]"#.into())));
    running.stop().await;
}

#[tokio::test]
async fn five_thousand_namespaces_are_listed_in_pages() {
    let api = ApiServer::start().await;
    for n in 0..5_000 {
        api.put("namespaces", namespace(&format!("ns-{n}"), (n % 2 == 0).then_some(r#"["a"]"#)));
    }

    let running = Running::synced(api).await;

    assert_eq!(running.cluster.allow_list("ns-4998"), Some(Some(r#"["a"]"#.into())));
    assert_eq!(running.cluster.allow_list("ns-4999"), Some(None));
    assert_eq!(running.cluster.allow_list("ns-5000"), None);
    assert_eq!(running.api.namespace_pages(), 10, "pages of 500");
    running.stop().await;
}
