//! The backends on real files, and against an API server over real connections.

mod add;
mod api_server;

use std::fs;

use kube2ram_service::clock::SystemClock;
use prometheus_client::encoding::text;
use serde_json::{Value, json};
use tokio::{
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

use self::api_server::ApiServer;
use super::*;
use crate::{
    identity::{Identity, Mapped},
    mapping::testing::{ACCOUNT, role, user},
};

const CONFIG_MAPS: &str = "configmaps";
const OBJECTS: &str = "ramidentitymappings";

struct Running {
    backends: Arc<Backends>,
    registry: Registry,
    readiness: Readiness,
    shutdown: CancellationToken,
    task: JoinHandle<Result<(), BackendError>>,
}

fn settings(modes: &[Mode], url: &str) -> Settings {
    Settings {
        backends: modes.iter().map(|mode| (*mode, Restrictions::default())).collect(),
        config_file: None,
        dynamic_file: None,
        client: ClientConfig::Server { url: url.to_owned(), token: None, insecure: false },
        instance: "node-1".into(),
        readiness: Readiness::default(),
    }
}

async fn connect(settings: Settings) -> Result<(Arc<Backends>, Registry), BackendError> {
    let mut registry = Registry::default();
    let backends = Backends::connect(settings, Arc::new(SystemClock), &mut registry).await?;
    Ok((Arc::new(backends), registry))
}

impl Running {
    async fn start(settings: Settings) -> Self {
        let readiness = settings.readiness.clone();
        let (backends, registry) = connect(settings).await.unwrap();
        let shutdown = CancellationToken::new();
        let running = (Arc::clone(&backends), shutdown.clone());
        let task = tokio::spawn(async move { running.0.run(running.1).await });
        Self { backends, registry, readiness, shutdown, task }
    }

    /// A backend of the cluster that has been listed.
    async fn listed(api: &ApiServer, mode: Mode) -> Self {
        let running = Self::start(settings(&[mode], &api.url())).await;
        eventually("the first list", || running.is_loaded()).await;
        running
    }

    fn is_loaded(&self) -> bool {
        self.backends.map().is_loaded()
    }

    fn username(&self, identity: &Identity) -> Option<String> {
        username(&self.backends, identity)
    }

    fn metric(&self, name: &str) -> u64 {
        let mut metrics = String::new();
        text::encode(&mut metrics, &self.registry).unwrap();
        let line = metrics.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("no {name} in {metrics}")).trim().parse().unwrap()
    }

    async fn stop(self) {
        self.shutdown.cancel();
        timeout(Duration::from_secs(10), self.task).await.unwrap().unwrap().unwrap();
    }
}

fn username(backends: &Backends, identity: &Identity) -> Option<String> {
    match backends.map().map(identity) {
        Mapped::User(user) => Some(user.username.into()),
        Mapped::Conflict(_) | Mapped::Nobody => None,
    }
}

async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "never came: {what}");
        sleep(Duration::from_millis(5)).await;
    }
}

fn object(role: &str, username: &str) -> Value {
    json!({
        "apiVersion": "ramauthenticator.k8s.alibabacloud/v1alpha1", "kind": "RAMIdentityMapping",
        "metadata": { "generation": 1 },
        "spec": { "arn": format!("acs:ram::{ACCOUNT}:role/{role}"), "username": username, "groups": ["g"] },
    })
}

fn config_map(users: &str) -> Value {
    json!({ "metadata": { "namespace": "kube-system" }, "data": { "mapUsers": users } })
}

fn users(name: &str) -> String {
    format!("- userarn: acs:ram::{ACCOUNT}:user/{name}\n  username: {name}\n")
}

#[tokio::test]
async fn objects_count_from_the_moment_they_change() {
    let api = ApiServer::start();
    api.put(OBJECTS, "a", object("admin", "one"));
    let running = Running::listed(&api, Mode::Crd).await;
    assert_eq!(running.username(&role("Admin", "s")).as_deref(), Some("one"));

    api.put(OBJECTS, "a", object("admin", "two"));
    eventually("the change", || running.username(&role("admin", "s")).as_deref() == Some("two")).await;
    api.put(OBJECTS, "b", object("dev", "dev"));
    eventually("another object", || running.username(&role("dev", "s")).is_some()).await;
    api.delete(OBJECTS, "a");
    eventually("the end", || running.username(&role("admin", "s")).is_none()).await;

    assert_eq!(running.metric("mappings{backend=\"CRD\"}"), 1);
    running.stop().await;
}

/// Whoever may write an object may write its `managedFields`.
#[tokio::test]
async fn metadata_that_cannot_be_read_costs_no_mapping() {
    let odd = |mut object: Value| {
        object["metadata"]["managedFields"] = json!([{ "time": "9999-12-31T23:59:59Z" }]);
        object
    };
    for mode in [Mode::Crd, Mode::AckConfigMap] {
        let api = ApiServer::start();
        let put = |name: &str| match mode {
            Mode::Crd => api.put(OBJECTS, "a", odd(object("admin", name))),
            _ => api.put(CONFIG_MAPS, "alibabacloud-auth", odd(config_map(&users(name)))),
        };
        let of = |backends: &Backends, name: &str| match mode {
            Mode::Crd => username(backends, &role("admin", "s")).as_deref() == Some(name),
            _ => username(backends, &user(name)).is_some(),
        };
        put("one");
        let running = Running::listed(&api, mode).await;
        assert!(of(&running.backends, "one"), "{mode}");

        put("two");
        eventually("the change", || of(&running.backends, "two")).await;

        assert_eq!(running.metric(&format!("mapping_failures_total{{backend=\"{mode}\"}}")), 0);
        running.stop().await;
        let (backends, _) = connect(settings(&[mode], &api.url())).await.unwrap();
        backends.read_once().await.unwrap();
        assert!(of(&backends, "two"), "{mode}");
    }
}

#[tokio::test]
async fn an_item_without_a_name_is_counted_and_costs_the_others_nothing() {
    let api = ApiServer::start();
    api.put(OBJECTS, "a", object("admin", "one"));
    api.list_odd(json!({ "metadata": { "uid": "u" }, "spec": {} }));

    let running = Running::listed(&api, Mode::Crd).await;

    assert_eq!(running.username(&role("admin", "s")).as_deref(), Some("one"));
    assert_eq!(running.metric("mapping_failures_total{backend=\"CRD\"}"), 1);
    running.stop().await;
}

#[tokio::test]
async fn a_status_is_written_once_and_says_what_became_of_the_object() {
    let api = ApiServer::start();
    api.put(OBJECTS, "a", object("admin", "one"));
    api.put(OBJECTS, "b", object("admin", "other"));
    let running = Running::listed(&api, Mode::Crd).await;
    eventually("both", || api.patches().len() >= 2).await;

    api.delete(OBJECTS, "b");

    let ready = || api.get(OBJECTS, "a")["status"]["conditions"][1]["status"].clone();
    eventually("no conflict any more", || ready() == "True").await;
    assert_eq!(api.get(OBJECTS, "a")["status"]["canonicalARN"], format!("acs:ram::{ACCOUNT}:role/admin"));
    // The watch shows the server its own write, which is no reason for another one.
    let written = api.patches().len();
    api.put(OBJECTS, "c", object("dev", "dev"));
    eventually("another object's", || api.get(OBJECTS, "c")["status"]["conditions"].is_array()).await;
    assert_eq!(api.patches().len(), written + 1);
    running.stop().await;
}

/// ack-ram-authenticator's custom resource definition has neither `userID` nor conditions, and the API server
/// drops what a definition does not have.
#[tokio::test]
async fn a_definition_that_drops_ids_and_reports_gets_no_reports_and_strict_mappings_map_nobody() {
    let api = ApiServer::start();
    api.publish_schema(&["arn", "username", "groups"], &["canonicalARN", "userID"]);
    let mut with_id = object("admin", "one");
    with_id["spec"]["userID"] = "1".into();
    api.put(OBJECTS, "a", with_id);
    let running = Running::listed(&api, Mode::Crd).await;
    let is_read = |request: &String| request.starts_with("GET /openapi/v3/apis/ramauthenticator.");
    eventually("the schema", || api.requests().iter().any(is_read)).await;

    for n in 0..10 {
        let username = format!("dev{n}");
        api.put(OBJECTS, "b", object("dev", &username));
        eventually("the change", || running.username(&role("dev", "s")) == Some(username.clone())).await;
    }

    assert!(api.patches().len() < 5, "at most those from before the schema was read: {:?}", api.patches());
    assert_eq!(running.username(&role("admin", "s")).as_deref(), Some("one"), "the id is lost");
    running.stop().await;
    let strict = Restrictions { needs_user_id: true, ..Restrictions::default() };
    let backends = vec![(Mode::Crd, strict)];
    let running = Running::start(Settings { backends, ..settings(&[], &api.url()) }).await;
    eventually("the refusals", || running.metric("mappings_refused{backend=\"CRD\"}") == 2).await;
    assert_eq!(running.username(&role("admin", "s")), None);
    running.stop().await;
}

#[tokio::test]
async fn a_definition_that_keeps_ids_and_reports_gets_reports() {
    let api = ApiServer::start();
    api.publish_schema(&["arn", "username", "groups", "userID"], &["canonicalARN", "conditions"]);
    api.put(OBJECTS, "a", object("admin", "one"));
    let running = Running::listed(&api, Mode::Crd).await;
    let is_read = |request: &String| request.starts_with("GET /openapi/v3/apis/ramauthenticator.");
    eventually("the schema", || api.requests().iter().any(is_read)).await;

    api.put(OBJECTS, "b", object("dev", "dev"));

    eventually("the report", || api.get(OBJECTS, "b")["status"]["conditions"].is_array()).await;
    assert_eq!(api.get(OBJECTS, "b")["status"]["conditions"][1]["message"], "");
    running.stop().await;
}

#[tokio::test]
async fn mappings_count_without_the_right_to_say_so() {
    let api = ApiServer::start();
    api.forbid_patches(true);
    api.put(OBJECTS, "a", object("admin", "one"));
    let running = Running::listed(&api, Mode::Crd).await;

    eventually("an attempt", || !api.patches().is_empty()).await;

    assert_eq!(running.username(&role("admin", "s")).as_deref(), Some("one"));
    eventually("its count", || running.metric("mapping_status_writes_total{result=\"forbidden\"}") == 1)
        .await;
    api.put(OBJECTS, "a", object("admin", "two"));
    eventually("the change", || running.username(&role("admin", "s")).as_deref() == Some("two")).await;
    running.stop().await;
}

#[tokio::test]
async fn the_config_map_counts_from_the_moment_it_changes() {
    let api = ApiServer::start();
    let running = Running::listed(&api, Mode::AckConfigMap).await;
    assert_eq!(running.username(&user("alice")), None, "there is no such ConfigMap");

    api.put(CONFIG_MAPS, "alibabacloud-auth", config_map(&users("alice")));
    eventually("the ConfigMap", || running.username(&user("Alice")).is_some()).await;
    api.put(CONFIG_MAPS, "alibabacloud-auth", config_map("x: ["));
    eventually("the fault", || running.metric("mapping_sections_broken{backend=\"ACKConfigMap\"}") == 1)
        .await;
    assert!(running.username(&user("alice")).is_some(), "what was last read counts");
    api.delete(CONFIG_MAPS, "alibabacloud-auth");
    eventually("the end", || running.username(&user("alice")).is_none()).await;

    assert_eq!(running.metric("mapping_sections_broken{backend=\"ACKConfigMap\"}"), 0);
    let asked: Vec<_> = api.requests().into_iter().filter(|request| request.starts_with("GET ")).collect();
    let is_named = |request: &String| request.contains("/namespaces/kube-system/configmaps?");
    assert!(asked.iter().all(is_named), "no other namespace is asked for");
    assert!(asked.iter().all(|request| request.contains("metadata.name%3Dalibabacloud-auth")));
    running.stop().await;
}

#[tokio::test]
async fn lists_of_which_one_was_never_readable_are_not_loaded() {
    let api = ApiServer::start();
    let with_roles = |roles: &str| {
        let mut map = config_map(&users("alice"));
        map["data"]["mapRoles"] = roles.into();
        map
    };
    let broken = "mapping_sections_broken{backend=\"ACKConfigMap\"}";
    api.put(CONFIG_MAPS, "alibabacloud-auth", with_roles("["));
    let running = Running::start(settings(&[Mode::AckConfigMap], &api.url())).await;
    eventually("the fault", || running.metric(broken) == 1).await;
    assert!(!running.is_loaded(), "the list would count as empty");
    assert_eq!(running.username(&user("alice")), None);

    api.put(CONFIG_MAPS, "alibabacloud-auth", with_roles(""));
    eventually("the mended list", || running.is_loaded()).await;
    assert!(running.username(&user("alice")).is_some());
    api.put(CONFIG_MAPS, "alibabacloud-auth", with_roles("["));
    eventually("the fault again", || running.metric(broken) == 1).await;

    assert!(running.is_loaded() && running.username(&user("alice")).is_some(), "what was last read counts");
    running.stop().await;
}

#[tokio::test]
async fn a_list_that_broke_after_it_was_read_is_named_and_the_server_stays_ready() {
    let api = ApiServer::start();
    api.put(CONFIG_MAPS, "alibabacloud-auth", config_map(&users("alice")));
    let running = Running::listed(&api, Mode::AckConfigMap).await;
    assert!(running.readiness.notes().is_empty());

    api.put(CONFIG_MAPS, "alibabacloud-auth", config_map("a secret: ["));
    eventually("the note", || !running.readiness.notes().is_empty()).await;

    let note = "ACKConfigMap: mapUsers cannot be read; what was last read is used";
    assert_eq!(running.readiness.notes(), [note], "and nothing of what is written there");
    assert!(running.readiness.pending().is_empty());
    api.put(CONFIG_MAPS, "alibabacloud-auth", config_map(&users("bob")));
    eventually("the end of the note", || running.readiness.notes().is_empty()).await;
    assert!(running.username(&user("bob")).is_some());
    running.stop().await;
}

#[tokio::test]
async fn a_mapping_that_maps_nobody_is_said_once_in_an_event_on_its_object() {
    let api = ApiServer::start();
    let with_uid = |mut object: Value, uid: &str| {
        object["metadata"]["uid"] = uid.into();
        object
    };
    api.put(OBJECTS, "a", with_uid(object("admin", "one"), "uid-a"));
    api.put(OBJECTS, "b", with_uid(object("admin", "other"), "uid-b"));
    api.put(OBJECTS, "c", with_uid(object("dev", "{SessionName}"), "uid-c"));
    let running = Running::listed(&api, Mode::Crd).await;
    eventually("three Events", || api.events().len() == 3).await;
    // Another index, in which the same is wrong.
    api.put(OBJECTS, "d", with_uid(object("other", "other"), "uid-d"));
    eventually("its status", || api.get(OBJECTS, "d")["status"]["conditions"].is_array()).await;

    let events = api.events();

    assert_eq!(events.len(), 3, "{events:?}");
    assert!(events.iter().all(|(namespace, _)| namespace == "default"));
    let of = |uid: &str| &events.iter().find(|(_, event)| event["regarding"]["uid"] == uid).unwrap().1;
    assert_eq!(
        (&of("uid-a")["reason"], &of("uid-c")["reason"]),
        (&json!("MappingConflict"), &json!("MappingRefused"))
    );
    assert_eq!(of("uid-a")["regarding"]["kind"], "RAMIdentityMapping");
    assert!(of("uid-c")["note"].as_str().unwrap().contains("two braces on each side"), "{}", of("uid-c"));
    assert_eq!(of("uid-c")["reportingInstance"], "node-1");
    eventually("their count", || running.metric("mapping_events_total{result=\"posted\"}") == 3).await;
    running.stop().await;
}

#[tokio::test]
async fn what_is_wrong_with_a_list_of_the_config_map_is_said_in_an_event_on_it() {
    let api = ApiServer::start();
    let mut map = config_map("x: [");
    map["metadata"]["uid"] = "uid-of-map".into();
    map["data"]["mapRoles"] = "- rolearn: nonsense\n  username: x\n".into();
    let running = Running::start(settings(&[Mode::AckConfigMap], &api.url())).await;
    eventually("the empty list", || running.is_loaded()).await;

    api.put(CONFIG_MAPS, "alibabacloud-auth", map);
    eventually("two Events", || api.events().len() == 2).await;

    let events = api.events();
    for ((namespace, event), (reason, label)) in
        events.iter().zip([("MappingsUnreadable", "mapUsers: "), ("MappingRefused", "mapRoles[0]: ")])
    {
        assert_eq!((namespace.as_str(), &event["reason"]), ("kube-system", &json!(reason)));
        assert_eq!(event["regarding"]["uid"], "uid-of-map");
        assert!(event["note"].as_str().unwrap().starts_with(label), "{event}");
    }
    running.stop().await;
}

/// The API server starts after its webhook, or has no such resource.
#[tokio::test]
async fn an_api_server_that_does_not_answer_holds_up_its_own_backends_only() {
    let api = ApiServer::start();
    api.fail_with(Some(500));
    api.put(OBJECTS, "a", object("admin", "admin"));
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("mappings.json");
    fs::write(
        &file,
        json!({ "mapUsers": [{ "userarn": format!("acs:ram::{ACCOUNT}:user/alice"), "username": "alice" }] })
            .to_string(),
    )
    .unwrap();
    let settings =
        Settings { dynamic_file: Some(file), ..settings(&[Mode::DynamicFile, Mode::Crd], &api.url()) };

    let running = Running::start(settings).await;

    eventually("a failure", || running.metric("mapping_failures_total{backend=\"CRD\"}") > 0).await;
    assert_eq!(running.username(&user("alice")).as_deref(), Some("alice"));
    assert_eq!(running.username(&role("admin", "s")), None);
    assert!(!running.is_loaded(), "so it is no denial");
    api.fail_with(None);
    eventually("the list", || running.is_loaded()).await;
    assert_eq!(running.username(&role("admin", "s")).as_deref(), Some("admin"));
    running.stop().await;
}

#[tokio::test]
async fn mappings_stay_while_the_api_server_is_away() {
    let api = ApiServer::start();
    api.put(OBJECTS, "a", object("admin", "admin"));
    let running = Running::listed(&api, Mode::Crd).await;

    api.fail_with(Some(500));
    eventually("a failure", || running.metric("mapping_failures_total{backend=\"CRD\"}") > 0).await;

    assert_eq!(running.username(&role("admin", "s")).as_deref(), Some("admin"));
    assert!(running.is_loaded());
    running.stop().await;
}

#[tokio::test]
async fn all_backends_can_be_read_once() {
    let api = ApiServer::start();
    api.put(OBJECTS, "a", object("admin", "admin"));
    api.put(OBJECTS, "b", json!({ "spec": { "arn": "nonsense", "username": "x" } }));
    api.put(CONFIG_MAPS, "alibabacloud-auth", config_map(&users("alice")));
    let (backends, _) = connect(settings(&[Mode::Crd, Mode::AckConfigMap], &api.url())).await.unwrap();

    backends.read_once().await.unwrap();

    assert_eq!(username(&backends, &role("admin", "s")).as_deref(), Some("admin"));
    assert_eq!(username(&backends, &user("alice")).as_deref(), Some("alice"));
    assert!(matches!(backends.reports(Mode::Crd)["b"], State::Refused(_)));
    assert!(api.patches().is_empty(), "looking changes nothing");
    api.fail_with(Some(403));
    assert!(matches!(backends.read_once().await, Err(BackendError::Request { mode: Mode::Crd, .. })));
}

fn config_file(directory: &tempfile::TempDir, username: &str) -> PathBuf {
    let path = directory.path().join("config.yaml");
    let text = format!(
        "clusterID: c\nserver:\n  mapUsers:\n  - {{userARN: 'acs:ram::{ACCOUNT}:user/alice', username: '{username}'}}\n"
    );
    fs::write(&path, text).unwrap();
    path
}

#[tokio::test(start_paused = true)]
async fn the_lists_of_the_configuration_file_count_when_it_changes() {
    let directory = tempfile::tempdir().unwrap();
    let config = config_file(&directory, "one");
    let settings = Settings { config_file: Some(config.clone()), ..settings(&[Mode::MountedFile], "") };
    let running = Running::start(settings).await;
    assert!(running.is_loaded(), "from the start");
    assert_eq!(running.username(&user("alice")).as_deref(), Some("one"));

    let _rewritten = config_file(&directory, "two");
    sleep(LOOK_EVERY * 3).await;
    assert_eq!(running.username(&user("alice")).as_deref(), Some("two"));
    fs::write(&config, "server: [").unwrap();
    sleep(LOOK_EVERY * 3).await;
    assert_eq!(running.username(&user("alice")).as_deref(), Some("two"), "what was last read counts");
    assert_eq!(running.metric("mapping_sections_broken{backend=\"MountedFile\"}"), 3);
    let note = "MountedFile: mapAccounts, mapRoles, mapUsers cannot be read; what was last read is used";
    assert_eq!(running.readiness.notes(), [note]);
    fs::remove_file(&config).unwrap();
    sleep(LOOK_EVERY * 3).await;
    assert_eq!(running.username(&user("alice")).as_deref(), Some("two"));
    fs::write(&config, "server: {mapUsers: []}").unwrap();
    sleep(LOOK_EVERY * 3).await;
    assert_eq!(running.username(&user("alice")), None);
    assert_eq!(running.metric("mapping_sections_broken{backend=\"MountedFile\"}"), 0);
    assert!(running.readiness.notes().is_empty());
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_file_of_mappings_may_come_later_and_is_not_known_while_it_cannot_be_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("mappings.json");
    let dynamic = || Settings { dynamic_file: Some(path.clone()), ..settings(&[Mode::DynamicFile], "") };
    let running = Running::start(dynamic()).await;
    assert!(running.is_loaded(), "a file that is not there maps nobody");
    running.stop().await;
    fs::write(&path, "{").unwrap();

    let running = Running::start(dynamic()).await;

    assert!(!running.is_loaded());
    let notes = running.readiness.notes();
    assert!(notes[0].ends_with("cannot be read; nothing was read before"), "{notes:?}");
    fs::write(&path, json!({ "mapAccounts": [ACCOUNT] }).to_string()).unwrap();
    sleep(LOOK_EVERY * 3).await;
    assert!(running.is_loaded());
    assert_eq!(running.username(&user("Bob")), Some(format!("acs:ram::{ACCOUNT}:user/Bob")));
    running.stop().await;
}

#[tokio::test]
async fn what_keeps_a_backend_from_starting_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let broken = directory.path().join("config.yaml");
    fs::write(&broken, "server: {mapRoles: x}").unwrap();
    let with = |config_file| Settings { config_file, ..settings(&[Mode::MountedFile], "") };

    let missing = connect(with(None)).await.err();
    let elsewhere = connect(with(Some(directory.path().join("other")))).await.err();
    let broken = connect(with(Some(broken))).await.err();

    assert!(matches!(missing, Some(BackendError::FileMissing(Mode::MountedFile))));
    assert!(matches!(elsewhere, Some(BackendError::File { .. })));
    assert!(broken.unwrap().to_string().contains("mapRoles"));
    let no_url = connect(settings(&[Mode::Crd], "nonsense")).await.err();
    assert!(matches!(no_url, Some(BackendError::Client(_))));
    assert!(connect(with(Some(config_file(&directory, "x")))).await.is_ok(), "the allowed twin");
}
