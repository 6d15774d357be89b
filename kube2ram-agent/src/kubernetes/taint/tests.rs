use kube2ram_sandbox::standin::{ApiServer, Bind};
use tokio::sync::watch;

use super::*;

const NODE: &str = "node-1";
/// With an unknown field.
const OTHER: &str = r#"{"key":"other","effect":"NoExecute","timeAdded":"2026-11-22T00:00:00Z","new":1}"#;

fn taint(text: &str) -> StartupTaint {
    text.parse().unwrap()
}

#[test]
fn is_written_as_kubectl_does() {
    for text in ["k", "k8s.io/k", "k=v", "k=", "k:NoSchedule", "kube2ram/agent=no-t_0:NoExecute"] {
        assert_eq!(taint(text).to_string(), text);
    }
    for text in ["", "=v", ":NoSchedule", "k:Never", "k:", "a b", "k=a=b", "k:v:NoSchedule"] {
        assert_eq!(text.parse::<StartupTaint>(), Err(TaintError), "{text}");
    }
}

#[test]
fn what_is_not_given_may_be_anything() {
    let found =
        json!({ "key": "k", "value": "v", "effect": "NoSchedule", "timeAdded": "2026-11-22T00:00:00Z" });

    for text in ["k", "k=v", "k:NoSchedule", "k=v:NoSchedule"] {
        assert!(taint(text).is(&found), "{text}");
    }
    for text in ["j", "k=w", "k=", "k:NoExecute", "k=v:NoExecute"] {
        assert!(!taint(text).is(&found), "{text}");
    }
    assert!(
        taint("k=").is(&json!({ "key": "k", "effect": "NoSchedule" })),
        "kubectl leaves an empty value out"
    );
}

fn other() -> Value {
    serde_json::from_str(OTHER).unwrap()
}

fn ours() -> Value {
    json!({ "key": "start", "effect": "NoSchedule" })
}

fn node(taints: &[Value]) -> Value {
    json!({
        "kind": "Node", "apiVersion": "v1", "metadata": { "name": NODE, "uid": "n", "labels": { "zone": "a" } },
        "spec": { "podCIDR": "10.0.0.0/24", "taints": taints }, "status": { "phase": "x" },
    })
}

fn api(taints: &[Value]) -> (ApiServer, Client) {
    let api = ApiServer::start(Bind::loopback()).unwrap();
    api.apply(node(taints)).unwrap();
    let mut config = kube::Config::new(api.url().parse().unwrap());
    config.root_cert = Some(Vec::new());
    (api, Client::try_from(config).unwrap())
}

fn taints(api: &ApiServer) -> Value {
    api.node(NODE).unwrap()["spec"]["taints"].clone()
}

fn patches(api: &ApiServer) -> usize {
    api.requests().iter().filter(|request| request.starts_with("PATCH ")).count()
}

/// As fast as a test can wait for.
const QUICK: Pace = Pace {
    early: Duration::from_millis(10),
    early_for: Duration::from_mins(15),
    late: Duration::from_millis(10),
};

/// Keeps the taint off until it is dropped. `is_ready` is the agent's readiness.
fn keep_off(client: &Client, is_ready: &watch::Sender<bool>) -> AbortOnDrop {
    let (client, is_ready) = (client.clone(), is_ready.subscribe());
    AbortOnDrop(tokio::spawn(async move {
        let ready = || {
            let mut is_ready = is_ready.clone();
            async move {
                is_ready.wait_for(|is_ready| *is_ready).await.unwrap();
            }
        };
        super::keep_off(&client, NODE, &taint("start"), &QUICK, ready).await;
    }))
}

struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn ready() -> watch::Sender<bool> {
    watch::Sender::new(true)
}

async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "never came: {what}");
        sleep(Duration::from_millis(5)).await;
    }
}

/// How often the node was read.
fn looks(api: &ApiServer) -> usize {
    api.requests().iter().filter(|request| request.starts_with("GET ")).count()
}

async fn some_looks(api: &ApiServer) {
    let before = looks(api);
    eventually("three more looks", || looks(api) >= before + 3).await;
}

#[tokio::test]
async fn takes_the_taint_and_leaves_all_else_as_it_is() {
    let (api, client) = api(&[ours(), other()]);

    let _keeping = keep_off(&client, &ready());
    eventually("its removal", || taints(&api) == json!([other()])).await;
    some_looks(&api).await;

    let mut left = api.node(NODE).unwrap();
    left["metadata"].as_object_mut().unwrap().remove("resourceVersion");
    assert_eq!(left, node(&[other()]));
    assert_eq!(patches(&api), 1);
}

#[tokio::test]
async fn writes_nothing_where_there_is_no_such_taint() {
    let (api, client) = api(&[other()]);

    let _keeping = keep_off(&client, &ready());
    some_looks(&api).await;

    assert_eq!(patches(&api), 0);
}

#[tokio::test]
async fn a_taint_that_comes_late_or_is_put_back_is_removed_again() {
    let (api, client) = api(&[other()]);
    let _keeping = keep_off(&client, &ready());
    some_looks(&api).await;

    for removals in 1..=3 {
        api.apply(node(&[ours(), other()])).unwrap();
        eventually("its removal", || taints(&api) == json!([other()])).await;
        assert_eq!(patches(&api), removals);
    }
}

#[tokio::test]
async fn is_left_while_the_agent_is_not_ready() {
    let (api, client) = api(&[ours()]);
    let is_ready = watch::Sender::new(false);
    let _keeping = keep_off(&client, &is_ready);
    sleep(Duration::from_millis(100)).await;
    assert_eq!((looks(&api), taints(&api)), (0, json!([ours()])), "not even looked at");

    is_ready.send_replace(true);
    eventually("its removal", || taints(&api) == json!([])).await;

    is_ready.send_replace(false);
    // One check may be in flight.
    let mut before = looks(&api);
    loop {
        sleep(Duration::from_millis(200)).await;
        if looks(&api) == before {
            break;
        }
        before = looks(&api);
    }
    api.apply(node(&[ours()])).unwrap();
    sleep(Duration::from_millis(100)).await;
    assert_eq!(taints(&api), json!([ours()]));
    is_ready.send_replace(true);
    eventually("its removal", || taints(&api) == json!([])).await;
}

#[tokio::test]
async fn a_change_in_between_is_not_overwritten_and_then_what_is_committed_is_read() {
    let (api, client) = api(&[ours()]);
    api.interfere(node(&[ours(), other()]));

    let _keeping = keep_off(&client, &ready());
    eventually("its removal", || taints(&api) == json!([other()])).await;

    assert_eq!(patches(&api), 2);
    let reads: Vec<_> = api.requests().into_iter().filter(|request| request.starts_with("GET ")).collect();
    assert!(reads[0].contains("resourceVersion=0"), "from the cache: {}", reads[0]);
    assert!(!reads[1].contains("resourceVersion"), "{}", reads[1]);
}

#[tokio::test]
async fn goes_on_until_it_may_or_can() {
    let (api, client) = api(&[ours()]);
    api.forbid_patches(true);
    let _keeping = keep_off(&client, &ready());
    eventually("a second attempt", || patches(&api) >= 2).await;
    assert_eq!(taints(&api), json!([ours()]));

    api.down();
    api.forbid_patches(false);
    api.up().unwrap();

    eventually("its removal", || taints(&api) == json!([])).await;
}

#[test]
fn the_node_is_looked_at_every_few_seconds_at_first_and_each_minute_later() {
    let seconds = |age: u64, jitter: f64| PACE.pause(Duration::from_secs(age), jitter).as_secs_f64();

    for age in [0, 899] {
        assert_eq!((seconds(age, 0.0), seconds(age, 1.0)), (3.75, 6.25));
    }
    for age in [900, 1_000_000] {
        assert_eq!((seconds(age, 0.0), seconds(age, 1.0)), (45.0, 75.0));
    }
}
