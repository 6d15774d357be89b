use kube2ram_sandbox::standin::{ApiServer, Bind};
use tokio::time::{Instant, sleep, timeout};

use super::*;

const NODE: &str = "node-1";
/// With a field that nobody here knows.
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

async fn remove_in_time(client: &Client) {
    timeout(Duration::from_secs(20), remove(client, NODE, &taint("start"))).await.expect("in time");
}

#[tokio::test]
async fn takes_the_taint_and_leaves_all_else_as_it_is() {
    let (api, client) = api(&[ours(), other()]);

    remove_in_time(&client).await;

    let mut left = api.node(NODE).unwrap();
    left["metadata"].as_object_mut().unwrap().remove("resourceVersion");
    assert_eq!(left, node(&[other()]));
    assert_eq!(patches(&api), 1);
}

#[tokio::test]
async fn writes_nothing_where_there_is_no_such_taint() {
    let (api, client) = api(&[other()]);

    remove_in_time(&client).await;

    assert_eq!(patches(&api), 0);
}

#[tokio::test]
async fn a_change_in_between_is_not_overwritten() {
    let (api, client) = api(&[ours()]);
    api.interfere(node(&[ours(), other()]));

    remove_in_time(&client).await;

    assert_eq!(taints(&api), json!([other()]));
    assert_eq!(patches(&api), 2);
}

#[tokio::test]
async fn goes_on_until_it_may_or_can() {
    let (api, client) = api(&[ours()]);
    api.forbid_patches(true);
    let removal = tokio::spawn(async move { remove_in_time(&client).await });
    let deadline = Instant::now() + Duration::from_secs(10);
    while patches(&api) < 2 {
        assert!(Instant::now() < deadline, "it gave up");
        sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(taints(&api), json!([ours()]));

    api.down();
    api.forbid_patches(false);
    api.up().unwrap();
    removal.await.unwrap();

    assert_eq!(taints(&api), json!([]));
}
