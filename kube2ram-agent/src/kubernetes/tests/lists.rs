//! Lists and watches of pods that are large, many or malformed, and the first list after a restart.

use std::{
    io::{self, Write},
    sync::Mutex,
};

use super::*;

/// What this thread logs, as text.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    /// Captures until the guard is dropped.
    fn capture(&self) -> tracing::subscriber::DefaultGuard {
        let log = self.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_max_level(tracing::Level::DEBUG)
            .with_writer(move || log.clone())
            .finish();
        tracing::subscriber::set_default(subscriber)
    }

    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_malformed_item_is_counted_and_named_and_costs_the_others_nothing() {
    let odd = |key: &str, value: Value| {
        let mut pod = pod(9, "secret");
        pod["metadata"][key] = value;
        pod
    };
    let mut without_spec = pod(9, "secret");
    without_spec.as_object_mut().unwrap().remove("spec");
    for item in [
        json!("secret"),
        json!({"metadata": "secret", "spec": {}}),
        odd("annotations", json!("secret")),
        odd("annotations", json!([["secret"]])),
        odd("uid", json!({"secret": 1})),
        without_spec,
    ] {
        let log = Log::default();
        let _capturing = log.capture();
        let api = ApiServer::start().await;
        api.put("pods", pod(1, "one"));
        api.list_malformed("pods", item.clone());
        let running = Running::synced(api).await;
        let unreadable = || running.cluster.metrics.unreadable_pods.get();
        assert_eq!((role(&running.pod(1).await.unwrap()), unreadable()), ("one", 1), "{item}");

        running.api.watch_malformed("pods", &item);
        running.api.put("pods", pod(2, "two"));
        eventually("the pod after it", || running.knows(2)).await;

        assert_eq!(unreadable(), 2, "{item}");
        assert!(!running.knows(9), "{item}");
        let text = log.text();
        assert_eq!(text.matches("sent a pod that cannot be read").count(), 2, "{item}: {text}");
        assert!(!text.contains("secret"), "{item}: {text}");
        running.stop().await;
    }
}

#[tokio::test]
async fn a_node_full_of_pods_with_full_annotations_is_listed_and_each_is_still_too_long() {
    let api = ApiServer::start().await;
    let long: serde_json::Map<String, Value> =
        KEYS.iter().map(|(key, _)| ((*key).to_owned(), "x".repeat(20 * 1024).into())).collect();
    for n in 100..210 {
        let mut full = pod(n, "r");
        full["metadata"]["annotations"] = long.clone().into();
        api.put("pods", full);
    }
    api.put("pods", pod(1, "one"));

    let running = Running::synced(api).await;

    assert_eq!(role(&running.pod(1).await.unwrap()), "one");
    for n in 100..210 {
        let pod = running.pod(n).await.unwrap();
        for (key, limit) in KEYS {
            let value = &pod.annotations[key];
            assert_eq!(value.len(), limit + '…'.len_utf8(), "{key} of pod {n}");
            assert!(value.ends_with('…'), "{key} of pod {n}");
        }
    }
    running.stop().await;
}

/// Characters of six bytes each in JSON: an object of 1.5 MiB has an answer of 9 MiB.
#[tokio::test]
async fn a_pod_with_an_endless_text_costs_the_others_nothing_in_lists_and_watches() {
    let large = |n| {
        let mut large = pod(n, "reader");
        let text = "\u{1}".repeat(1024 * 1024);
        large["metadata"]["annotations"]["note"] = text.clone().into();
        large["spec"]["containers"] = json!([{"name": "c", "env": [{"name": "V", "value": text}]}]);
        large
    };
    let api = ApiServer::start().await;
    api.put("pods", large(2));
    api.put("pods", pod(3, "three"));
    let running = Running::synced(api).await;
    assert_eq!(role(&running.pod(2).await.unwrap()), "reader");
    assert_eq!(role(&running.pod(3).await.unwrap()), "three");

    running.api.put("pods", large(4));
    running.api.put("pods", pod(5, "five"));
    eventually("the pod after it", || running.knows(5)).await;

    assert_eq!(role(&running.pod(4).await.unwrap()), "reader");
    assert_eq!(running.api.direct_lists(), 0);
    running.stop().await;
}

#[tokio::test]
async fn many_pods_are_listed_from_the_cache_also_when_the_watch_has_expired() {
    let api = ApiServer::start().await;
    for n in 1..=1_100 {
        api.put("pods", pod(n, "r"));
    }
    let running = Running::synced(api).await;
    running.api.remove_unwatched("pods", uid(7).as_str());

    running.api.expire_watches(false);
    eventually("pod 7 to go", || !running.knows(7)).await;

    assert_eq!((running.api.cached_lists(), running.api.direct_lists()), (2, 0), "etcd does not notice");
    assert_eq!(running.api.least_versions().len(), 1, "the second list is not older than the watch");
    assert!(running.knows(1) && running.knows(1_100));
    running.stop().await;
}

/// An agent that has seen the role of `LIVE` change from `old` to `new`, and what it leaves. The API server's
/// cache is behind: it has the old role.
async fn restarted() -> (ApiServer, Checkpoint) {
    let api = ApiServer::start().await;
    api.put("pods", pod(LIVE, "old"));
    let running = Running::synced(api).await;
    running.api.freeze_cache();
    running.api.put("pods", pod(LIVE, "new"));
    let has_changed = || running.cluster.pods().iter().any(|pod| role(pod) == "new");
    eventually("the change", has_changed).await;
    let checkpoint = running.cluster.checkpoint().unwrap();
    let Running { api, shutdown, task, .. } = running;
    shutdown.cancel();
    within(task).await.unwrap();
    (api, checkpoint)
}

#[tokio::test]
async fn the_first_list_after_a_restart_is_not_older_than_the_snapshot() {
    let (api, checkpoint) = restarted().await;
    let lists = api.direct_lists();

    let running = Running::start_with(api, Some(checkpoint)).await;
    eventually("a cache that is behind is asked again", || running.api.least_versions().len() >= 2).await;
    assert!(running.cluster.pods().iter().all(|pod| role(pod) == "new"), "the old role is not believed");
    running.api.thaw_cache();
    within(running.cluster.synced()).await;

    assert_eq!(role(&running.cluster.known_pod(&uid(LIVE)).unwrap()), "new");
    assert_eq!(running.api.direct_lists(), lists, "etcd was not asked");
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_version_that_no_cache_has_is_given_up_for_the_committed_state() {
    let (api, checkpoint) = restarted().await;
    let asked = api.least_versions().len();

    let running = Running::start_with(api, Some(checkpoint)).await;
    let synced = tokio::time::timeout(Duration::from_secs(30), running.cluster.synced()).await;

    synced.expect("in time");
    assert_eq!(running.api.least_versions().len() - asked, 3);
    assert_eq!(role(&running.cluster.known_pod(&uid(LIVE)).unwrap()), "new");
    running.stop().await;
}

#[tokio::test]
async fn without_a_version_the_first_list_is_as_old_as_the_cache() {
    let mut former = serde_json::to_value(checkpoint().await).unwrap();
    assert!(former.as_object_mut().unwrap().remove("version").is_some());
    let former: Checkpoint = serde_json::from_value(former).unwrap();
    for checkpoint in [None, Some(former)] {
        let api = ApiServer::start().await;
        api.put("pods", pod(1, "one"));

        let running = Running::start_with(api, checkpoint).await;
        within(running.cluster.synced()).await;

        assert!(running.knows(1));
        let lists = (running.api.cached_lists(), running.api.direct_lists());
        assert_eq!((lists, running.api.least_versions()), ((1, 0), vec![]), "etcd does not notice");
        running.stop().await;
    }
}
