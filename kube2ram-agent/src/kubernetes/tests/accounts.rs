//! ServiceAccounts: their annotations, and their tokens.

use std::{error::Error, time::Duration};

use kube2ram_cloud::{
    credentials::{AccountToken, IssueError, IssueErrorKind, TokenSource as _},
    role::ServiceAccount,
};
use kube2ram_service::telemetry::chain;
use secrecy::ExposeSecret as _;

use super::{
    api_server::{AccountRequest, TOKEN},
    *,
};

const ALIAS: &str = "pod-identity.alibabacloud.com/role-name";
const AUDIENCE: &str = "sts.example";
const LIFETIME: Duration = Duration::from_secs(600);
const PATH: &str = "/api/v1/namespaces/team-a/serviceaccounts/sa";

/// So much time passes at once. With a clock that is paused all the time, waits would end before the answers
/// to what is sent over sockets.
async fn passes(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}

impl Running {
    /// One that reads ServiceAccounts.
    async fn with_accounts(api: ApiServer, tokens: Option<TokenRequester>) -> Self {
        Self::restored_with_accounts(api, tokens, None).await
    }

    async fn restored_with_accounts(
        api: ApiServer,
        tokens: Option<TokenRequester>,
        checkpoint: Option<Checkpoint>,
    ) -> Self {
        let annotations = vec![(ROLE.into(), 512), (ALIAS.into(), 8)];
        let accounts = ServiceAccountConfig { annotations, tokens };
        Self::start_all(api, checkpoint, None, Some(accounts)).await
    }

    /// One with pod 1, and pod 2 of the account `other`. Both are known.
    async fn with_another_account() -> Self {
        let api = ApiServer::start().await;
        let mut other = pod(2, "r");
        other["spec"]["serviceAccountName"] = "other".into();
        api.put("pods", other);
        api.put_account("team-a", "other", json!({}));
        let running = Self::with_tokens(api, TokenRequester::Agent).await;
        eventually("pod 2", || running.knows(2)).await;
        running
    }

    /// One with pod 1, which is known.
    async fn with_tokens(api: ApiServer, tokens: TokenRequester) -> Self {
        api.put_account("team-a", "sa", json!({}));
        api.put("pods", pod(1, "r"));
        let running = Self::with_accounts(api, Some(tokens)).await;
        eventually("pod 1", || running.knows(1)).await;
        running
    }

    async fn token(&self) -> Result<AccountToken, IssueError> {
        self.cluster.token(&account("sa"), AUDIENCE, LIFETIME).await
    }

    /// How often something happened to a request for a token.
    fn outcomes(&self, outcome: &'static str) -> u64 {
        self.cluster.metrics.token_requests.get_or_create(&[("outcome", outcome)]).get()
    }

    fn reads(&self, result: &'static str) -> u64 {
        self.cluster.metrics.service_account_reads.get_or_create(&[("result", result)]).get()
    }
}

fn account(name: &str) -> ServiceAccount {
    ServiceAccount { namespace: "team-a".into(), name: name.into() }
}

fn created(n: u32, at: &str) -> Value {
    let mut pod = pod(n, "r");
    pod["metadata"]["creationTimestamp"] = at.into();
    pod
}

fn status(code: u16, reason: &str, kind: &str, message: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": message,
        "details": {"kind": kind}})
}

fn forbidden(message: &str) -> Value {
    status(403, "Forbidden", "serviceaccounts", message)
}

/// What the pod's account is annotated with, if that is known.
fn of_account(pod: &Pod) -> Vec<(&str, &str)> {
    let annotations = pod.account_annotations.as_ref().expect("the account is known");
    annotations.iter().map(|(key, value)| (&**key, &**value)).collect()
}

fn bound_to(requests: &[AccountRequest]) -> Vec<String> {
    let name = |it: &AccountRequest| it.body["spec"]["boundObjectRef"]["name"].as_str().unwrap().to_owned();
    requests.iter().map(name).collect()
}

fn as_node() -> Vec<(String, String)> {
    vec![("impersonate-user".into(), "system:node:node-1".into())]
}

#[tokio::test]
async fn a_pod_has_the_annotations_of_its_account_that_are_asked_for() {
    let api = ApiServer::start().await;
    api.put_account("team-a", "sa", json!({ROLE: "of-account", ALIAS: "too-long-for-it", "other": "x"}));
    api.put("pods", pod(1, "of-pod"));
    let running = Running::with_accounts(api, None).await;

    let found = within(running.pod(1)).await.unwrap();

    assert_eq!(role(&found), "of-pod");
    assert_eq!(of_account(&found), [(ALIAS, "too-long…"), (ROLE, "of-account")]);
    let reads = running.api.account_reads();
    assert_eq!((reads.len(), &*reads[0].path, reads[0].impersonate.len()), (1, PATH, 0));
    assert!(reads[0].accept.as_deref().unwrap().contains("as=PartialObjectMetadata"));
    assert_eq!(running.reads("ok"), 1);
    running.stop().await;
}

#[tokio::test]
async fn a_pod_waits_for_its_account_and_is_unavailable_at_the_deadline() {
    let api = ApiServer::start().await;
    api.put("pods", pod(1, "one"));
    api.stall("accounts");
    let running = Running::with_accounts(api, None).await;
    within(running.cluster.synced()).await;
    let start = Instant::now();

    assert!(matches!(within(running.pod(1)).await, Err(PodError::Unavailable { .. })));

    assert!(start.elapsed() >= LOOKUP_DEADLINE, "{:?}", start.elapsed());
    assert!(running.cluster.known_pod(&uid(1)).is_none());
    assert!(!running.knows(1), "those that wait are left out");
    assert_eq!(running.cluster.pod_views().len(), 1, "people see it");
    running.stop().await;
}

#[tokio::test]
async fn the_pods_are_known_when_their_accounts_have_been_tried() {
    let api = ApiServer::start().await;
    api.put("pods", pod(1, "one"));
    api.refuse_accounts(Some(forbidden("no right to get it")));
    let running = Running::with_accounts(api, None).await;
    within(running.cluster.known()).await;
    assert!(running.reads("forbidden") > 0 && running.cluster.is_synced());
    running.stop().await;
    let api = ApiServer::start().await;
    api.put("pods", pod(1, "one"));
    api.stall("accounts");

    let running = Running::with_accounts(api, None).await;
    within(running.cluster.synced()).await;

    assert!(!running.cluster.is_known(), "it may still be read");
    running.stop().await;
}

#[tokio::test]
async fn pods_of_an_account_that_does_not_exist_wait() {
    let api = ApiServer::start().await;
    api.put("pods", pod(1, "one"));
    let running = Running::with_accounts(api, None).await;

    let Err(PodError::Unavailable { source: Some(source), .. }) = within(running.pod(1)).await else {
        panic!("unavailable, with its cause")
    };

    assert!(chain(&*source).contains("404"), "{}", chain(&*source));
    assert!(!running.knows(1), "it must not get the default role");
    eventually("the second read", || running.reads("absent") == 2).await;
    assert_eq!(running.cluster.token_state().accounts_failure, None, "no fault of the cluster");
    running.api.put_account("team-a", "sa", json!({ROLE: "of-account"}));
    eventually("the pod", || running.knows(1)).await;
    assert_eq!(of_account(&running.pod(1).await.unwrap()), [(ROLE, "of-account")]);
    running.stop().await;
}

#[tokio::test]
async fn an_account_that_is_deleted_keeps_its_annotations_for_all_its_pods() {
    let api = ApiServer::start().await;
    api.put_account("team-a", "sa", json!({ROLE: "of-account"}));
    api.put("pods", pod(1, "one"));
    let running = Running::with_accounts(api, None).await;
    eventually("pod 1", || running.knows(1)).await;
    running.api.refuse_accounts(Some(status(404, "NotFound", "serviceaccounts", "\"sa\" not found")));

    passes(Duration::from_secs(6)).await;
    running.api.put("pods", pod(2, "two"));
    eventually("the read of a deleted account", || running.reads("absent") > 0).await;

    for n in [1, 2] {
        assert_eq!(of_account(&within(running.pod(n)).await.unwrap()), [(ROLE, "of-account")]);
    }
    running.stop().await;
}

#[tokio::test]
async fn an_answer_that_is_no_status_does_not_count_as_an_account_without_annotations() {
    let api = ApiServer::start().await;
    api.put("pods", pod(1, "one"));
    api.refuse_accounts(Some(json!({"code": 404})));
    let running = Running::with_accounts(api, None).await;

    assert!(matches!(within(running.pod(1)).await, Err(PodError::Unavailable { .. })));

    assert!(running.reads("error") > 0);
    running.stop().await;
}

#[tokio::test]
async fn without_the_right_to_read_accounts_pods_wait_and_status_reports_why() {
    let api = ApiServer::start().await;
    api.put("pods", pod(1, "one"));
    api.refuse_accounts(Some(forbidden("no right to get it")));
    let running = Running::with_accounts(api, None).await;
    eventually("the first read", || running.reads("forbidden") == 1).await;

    let Err(PodError::Unavailable { source: Some(source), .. }) = within(running.pod(1)).await else {
        panic!("unavailable, with its cause")
    };

    assert_eq!(chain(&*source), "the API server refuses: 403 no right to get it");
    eventually("the second read", || running.reads("forbidden") == 2).await;
    eventually("the state", || running.cluster.token_state().accounts_failure.is_some()).await;
    let (_, reason) = running.cluster.token_state().accounts_failure.unwrap();
    assert!(reason.contains("no right to get it"), "{reason}");
    running.stop().await;
}

#[tokio::test]
async fn pods_of_one_account_cost_one_read() {
    let api = ApiServer::start().await;
    api.put_account("team-a", "sa", json!({ROLE: "of-account"}));
    for n in 1..=20 {
        api.put("pods", pod(n, "one"));
    }
    let running = Running::with_accounts(api, None).await;
    for n in 1..=20 {
        assert_eq!(of_account(&within(running.pod(n)).await.unwrap()), [(ROLE, "of-account")]);
    }

    running.api.put("pods", pod(21, "one"));
    eventually("pod 21", || running.knows(21)).await;

    assert_eq!(of_account(&running.pod(21).await.unwrap()), [(ROLE, "of-account")]);
    assert_eq!(running.api.account_reads().len(), 1, "it was just read");
    running.stop().await;
}

#[tokio::test]
async fn many_accounts_are_all_read() {
    let api = ApiServer::start().await;
    for n in 1..=40 {
        let mut pod = pod(n, "one");
        pod["spec"]["serviceAccountName"] = format!("sa-{n}").into();
        api.put_account("team-a", &format!("sa-{n}"), json!({ROLE: format!("role-{n}")}));
        api.put("pods", pod);
    }
    let running = Running::with_accounts(api, None).await;

    eventually("all pods", || running.cluster.pods().len() == 40).await;

    for found in running.cluster.pods() {
        let number = found.name.strip_prefix("pod-").unwrap();
        assert_eq!(of_account(&found), [(ROLE, &*format!("role-{number}"))]);
    }
    assert_eq!(running.api.account_reads().len(), 40);
    running.stop().await;
}

#[tokio::test]
async fn a_changed_annotation_counts_when_a_later_pod_appears_and_an_unchanged_pod_stays_the_same_object() {
    let api = ApiServer::start().await;
    api.put_account("team-a", "sa", json!({ROLE: "before"}));
    api.put("pods", pod(1, "one"));
    let running = Running::with_accounts(api, None).await;
    eventually("pod 1", || running.knows(1)).await;
    let first = running.pod(1).await.unwrap();

    passes(Duration::from_secs(6)).await;
    running.api.put("pods", pod(2, "two"));
    eventually("the second read", || running.reads("ok") == 2).await;
    assert!(Arc::ptr_eq(&running.pod(1).await.unwrap(), &first));
    running.api.put_account("team-a", "sa", json!({ROLE: "after"}));
    passes(Duration::from_secs(6)).await;
    running.api.put("pods", pod(3, "three"));
    eventually("the third read", || running.reads("ok") == 3).await;

    let later = running.pod(1).await.unwrap();
    assert_eq!((of_account(&first), of_account(&later)), (vec![(ROLE, "before")], vec![(ROLE, "after")]));
    assert!(!Arc::ptr_eq(&later, &first));
    running.stop().await;
}

#[tokio::test]
async fn accounts_are_read_again_while_pods_use_them() {
    let api = ApiServer::start().await;
    api.put_account("team-a", "sa", json!({ROLE: "before"}));
    api.put("pods", pod(1, "one"));
    let running = Running::with_accounts(api, None).await;
    eventually("pod 1", || running.knows(1)).await;
    running.api.put_account("team-a", "sa", json!({ROLE: "after"}));

    passes(Duration::from_mins(23)).await;
    assert_eq!(running.reads("ok"), 1);
    passes(Duration::from_mins(6)).await;
    eventually("the second read", || running.reads("ok") == 2).await;

    assert_eq!(of_account(&running.pod(1).await.unwrap()), [(ROLE, "after")]);
    running.stop().await;
}

#[tokio::test]
async fn without_service_accounts_none_is_asked_for() {
    let api = ApiServer::start().await;
    api.put_account("team-a", "sa", json!({ROLE: "of-account"}));
    api.put("pods", pod(1, "one"));
    let running = Running::unrestricted(api, None).await;

    let found = within(running.pod(1)).await.unwrap();

    assert_eq!(found.account_annotations, None);
    assert!(running.api.account_reads().is_empty() && running.api.reviews().is_empty());
    let error = running.token().await.unwrap_err();
    assert_eq!((error.kind, &*error.code), (IssueErrorKind::ClusterConfiguration, "TokensOff"));
    assert!(running.api.token_requests().is_empty());
    running.stop().await;
}

#[tokio::test]
async fn a_snapshot_has_the_accounts_that_its_pods_use() {
    let api = ApiServer::start().await;
    api.put_account("team-a", "sa", json!({ROLE: "saved"}));
    api.put("pods", pod(LIVE, "one"));
    let running = Running::with_accounts(api, None).await;
    within(running.cluster.synced()).await;
    assert!(within(running.pod(LIVE)).await.is_ok());
    let checkpoint = running.cluster.checkpoint().unwrap();
    running.stop().await;
    let api = ApiServer::start().await;
    api.put_account("team-a", "sa", json!({ROLE: "new"}));
    api.put("pods", pod(LIVE, "one"));
    api.set_mode(Mode::Down);

    let running = Running::restored_with_accounts(api, None, Some(checkpoint)).await;
    eventually("the restored pod", || running.knows(LIVE)).await;
    assert_eq!(of_account(&running.pod(LIVE).await.unwrap()), [(ROLE, "saved")]);
    running.api.set_mode(Mode::Up);

    let is_new = || running.cluster.pods().iter().any(|pod| of_account(pod) == [(ROLE, "new")]);
    eventually("the account's present state", is_new).await;
    running.stop().await;
}

#[tokio::test]
async fn a_snapshot_without_accounts_lets_pods_wait_once_they_are_asked_for() {
    let checkpoint = checkpoint().await;
    let api = ApiServer::start().await;
    api.set_mode(Mode::Down);

    let running = Running::restored_with_accounts(api, None, Some(checkpoint)).await;
    eventually("the restored pod", || !running.cluster.pod_views().is_empty()).await;

    assert!(!running.knows(LIVE));
    assert!(matches!(within(running.pod(LIVE)).await, Err(PodError::Unavailable { .. })));
    running.stop().await;
}

#[tokio::test]
async fn a_token_is_asked_for_as_the_node_and_bound_to_the_pod() {
    let api = ApiServer::start().await;
    api.set_own_extra(json!({"authentication.kubernetes.io/node-name": ["node-1"]}));
    let running = Running::with_tokens(api, TokenRequester::Node).await;

    let token = running.token().await.unwrap();

    assert_eq!(token.token.expose_secret(), TOKEN);
    assert_eq!(token.expires_at, "2026-01-01T00:10:00Z".parse().unwrap());
    let [request] = running.api.token_requests().try_into().unwrap();
    assert_eq!((request.path, request.impersonate), (format!("{PATH}/token"), as_node()));
    assert_eq!(
        request.body["spec"],
        json!({
            "audiences": [AUDIENCE], "expirationSeconds": 600,
            "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": "pod-1", "uid": uid(1).as_str()},
        })
    );
    assert_eq!(running.api.account_reads()[0].impersonate, as_node());
    eventually("the review", || running.cluster.token_state().own_node == OwnNode::Bound).await;
    assert!(running.api.reviews()[0].impersonate.is_empty(), "about the agent's own token");
    assert_eq!(running.cluster.token_state().failure, None);
    assert_eq!(
        (running.outcomes("issued"), running.cluster.token_state().requester),
        (1, Some(TokenRequester::Node))
    );
    running.stop().await;
}

#[tokio::test]
async fn a_token_is_asked_for_as_the_agent_where_it_is_configured() {
    let running = Running::with_tokens(ApiServer::start().await, TokenRequester::Agent).await;

    assert!(running.token().await.is_ok());

    assert!(running.api.token_requests()[0].impersonate.is_empty());
    assert!(running.api.account_reads()[0].impersonate.is_empty());
    assert!(running.api.reviews().is_empty());
    assert_eq!(running.cluster.token_state().own_node, OwnNode::Unknown);
    running.stop().await;
}

#[tokio::test]
async fn no_token_is_asked_for_without_a_pod_of_the_account() {
    let running = Running::with_tokens(ApiServer::start().await, TokenRequester::Node).await;

    let error = running.cluster.token(&account("other"), AUDIENCE, LIFETIME).await.unwrap_err();
    let odd = running.cluster.token(&account("../x"), AUDIENCE, LIFETIME).await.unwrap_err();

    assert_eq!((error.kind, &*error.code), (IssueErrorKind::Token, "NoPod"));
    assert_eq!((odd.kind, &*odd.code), (IssueErrorKind::Token, "NoServiceAccount"));
    assert!(running.api.token_requests().is_empty());
    assert_eq!(running.cluster.token_state().failure, None, "it concerns one account only");
    assert!(running.token().await.is_ok(), "the allowed twin");
    running.stop().await;
}

#[tokio::test]
async fn another_pod_is_tried_when_the_api_server_does_not_know_the_newest() {
    let api = ApiServer::start().await;
    for (n, at) in [(2, "2026-01-01T00:00:03Z"), (3, "2026-01-01T00:00:02Z"), (4, "2026-01-01T00:00:01Z")] {
        api.put("pods", created(n, at));
    }
    let running = Running::with_tokens(api, TokenRequester::Node).await;
    let absent = || status(404, "NotFound", "pods", r#"pods "web" not found"#);

    running.api.refuse_token(absent(), None);
    running.api.refuse_token(status(409, "Conflict", "Pod", "the UID does not match"), None);
    assert!(running.token().await.is_ok());
    assert_eq!(bound_to(&running.api.token_requests()), ["pod-2", "pod-3", "pod-4"]);

    for _ in 0..4 {
        running.api.refuse_token(absent(), None);
    }
    let error = running.token().await.unwrap_err();

    assert_eq!((error.kind, &*error.code), (IssueErrorKind::Token, "NoPod"));
    let later = &bound_to(&running.api.token_requests())[3..];
    assert_eq!(later, ["pod-2", "pod-3", "pod-4", "pod-2"], "three pods, and the newest once more");
    assert_eq!(running.cluster.token_state().failure, None);
    running.stop().await;
}

#[tokio::test]
async fn an_api_server_that_lags_behind_is_asked_once_more() {
    let running = Running::with_tokens(ApiServer::start().await, TokenRequester::Node).await;
    for lag in [
        status(404, "NotFound", "pod", r#"pod "pod-1" not found"#),
        forbidden("no relationship found between node 'node-1' and this object"),
    ] {
        let before = running.api.token_requests().len();
        let start = Instant::now();
        running.api.refuse_token(lag, None);

        assert!(running.token().await.is_ok());

        assert!(start.elapsed() >= Duration::from_millis(100), "{:?}", start.elapsed());
        assert_eq!(running.api.token_requests().len() - before, 2);
    }
    running.stop().await;
}

#[tokio::test]
async fn each_refusal_has_its_kind_and_is_asked_for_once() {
    use IssueErrorKind::{ClusterConfiguration, Throttled, Token};
    let running = Running::with_tokens(ApiServer::start().await, TokenRequester::Node).await;
    for (code, kind, message, expected, expected_code) in [
        (400, "", "bad", ClusterConfiguration, "TokenInvalid"),
        (401, "", "Unauthorized", Token, "NoToken"),
        (403, "", "cannot impersonate resource \"users\"", ClusterConfiguration, "TokenForbidden"),
        (403, "", "audience \"x\" not found in pod spec volume", ClusterConfiguration, "TokenForbidden"),
        (403, "", "denied", ClusterConfiguration, "TokenForbidden"),
        (403, "", "because it is being terminated", Token, "NamespaceTerminating"),
        (403, "", "the namespace has not opted in to tokens for agents", Token, "NamespaceNotOptedIn"),
        (404, "serviceaccounts", "not found", Token, "NoServiceAccount"),
        (422, "", "invalid", ClusterConfiguration, "TokenInvalid"),
        (429, "", "too many requests", Throttled, "TooManyRequests"),
        (500, "", "oops", Token, "NoToken"),
        (503, "", "not now", Token, "NoToken"),
        (504, "", "too late", Token, "NoToken"),
    ] {
        let before = running.api.token_requests().len();
        let reason = if code == 404 { "NotFound" } else { "" };
        running.api.refuse_token(status(code, reason, kind, message), None);

        let error = running.token().await.unwrap_err();

        assert_eq!((error.kind, &*error.code), (expected, expected_code), "{code} {message}");
        assert_eq!(running.api.token_requests().len() - before, 1, "{code} {message}");
        let is_of_one = code == 404 || expected_code.starts_with("Namespace");
        assert_eq!(running.cluster.token_state().failure.is_some(), !is_of_one, "{code} {message}");
        assert!(running.token().await.is_ok());
        assert_eq!(running.cluster.token_state().failure, None);
    }
    let counts = ["cluster_configuration", "issued", "throttled", "token"].map(|it| running.outcomes(it));
    assert_eq!(counts, [5, 13, 1, 7]);
    running.stop().await;
}

#[tokio::test]
async fn an_overloaded_api_server_says_how_long_to_wait() {
    let running = Running::with_tokens(ApiServer::start().await, TokenRequester::Agent).await;
    running.api.refuse_token(status(429, "TooManyRequests", "", "later"), Some(7));

    let error = running.token().await.unwrap_err();

    assert_eq!((error.kind, error.retry_after), (IssueErrorKind::Throttled, Some(Duration::from_secs(7))));
    running.stop().await;
}

#[tokio::test]
async fn what_is_missing_is_named_by_who_asks() {
    let impersonation = "User \"u\" cannot impersonate resource \"users\"";
    let policy = "ValidatingAdmissionPolicy 'kube2ram-tokens' denied request: not for this audience";
    for (requester, extra, refused, expected) in [
        (
            TokenRequester::Node,
            json!({}),
            "audience \"x\" not found in pod spec volume",
            "ClusterRole kube2ram-audience",
        ),
        (TokenRequester::Node, json!({}), impersonation, "bound to no node"),
        (
            TokenRequester::Node,
            json!({"authentication.kubernetes.io/node-name": ["node-1"]}),
            impersonation,
            "ClusterRole kube2ram-node-tokens",
        ),
        (
            TokenRequester::Node,
            json!({"authentication.kubernetes.io/node-name": ["node-2"]}),
            impersonation,
            "bound to another node",
        ),
        (TokenRequester::Agent, json!({}), policy, policy),
        (TokenRequester::Agent, json!({}), "cannot create", "create serviceaccounts/token"),
    ] {
        let api = ApiServer::start().await;
        api.set_own_extra(extra);
        let running = Running::with_tokens(api, requester).await;
        if requester == TokenRequester::Node {
            eventually("the review", || running.cluster.token_state().own_node != OwnNode::Unknown).await;
        }
        running.api.refuse_token(forbidden(refused), None);

        let error = running.token().await.unwrap_err();

        assert_eq!(error.kind, IssueErrorKind::ClusterConfiguration);
        assert!(error.message.contains(expected), "{}", error.message);
        let (_, reason) = running.cluster.token_state().failure.unwrap();
        assert_eq!(reason, error.message);
        running.stop().await;
    }
}

#[tokio::test]
async fn what_one_namespace_causes_raises_no_event_on_the_node() {
    let running = Running::with_tokens(ApiServer::start().await, TokenRequester::Agent).await;
    for message in ["because it is being terminated", "the namespace has not opted in to tokens for agents"] {
        running.api.refuse_token(forbidden(message), None);
        assert!(running.token().await.is_err());
    }
    running.cluster.warn(notice("last"));

    eventually("the last Event", || running.api.posted().iter().any(|event| event["note"] == "last")).await;

    assert_eq!(running.api.posted().len(), 1, "{:?}", running.api.posted());
    running.stop().await;
}

#[tokio::test]
async fn a_success_of_another_account_does_not_hide_a_failure() {
    let running = Running::with_another_account().await;
    running.api.refuse_token(forbidden("denied"), None);
    assert!(running.token().await.is_err());

    assert!(running.cluster.token(&account("other"), AUDIENCE, LIFETIME).await.is_ok());

    assert!(running.cluster.token_state().failure.is_some());
    assert!(running.token().await.is_ok());
    assert_eq!(running.cluster.token_state().failure, None);
    running.stop().await;
}

#[tokio::test]
async fn a_wrong_configuration_raises_one_event_on_the_node() {
    let running = Running::with_another_account().await;
    for name in ["sa", "other"] {
        running.api.refuse_token(forbidden(&format!("serviceaccounts {name} is forbidden")), None);
        assert!(running.cluster.token(&account(name), AUDIENCE, LIFETIME).await.is_err());
    }
    running.cluster.warn(notice("last"));

    eventually("the last Event", || running.api.posted().iter().any(|event| event["note"] == "last")).await;

    let posted = running.api.posted();
    assert_eq!(posted.len(), 2, "{posted:?}");
    assert_eq!(
        (&posted[0]["reason"], &posted[0]["action"]),
        (&json!("TokensUnavailable"), &json!("RequestToken"))
    );
    assert_eq!(posted[0]["regarding"]["kind"], "Node");
    let note = posted[0]["note"].as_str().unwrap();
    assert!(note.contains("create serviceaccounts/token") && !note.contains("other"), "{note}");
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_token_that_does_not_come_in_a_second_is_given_up() {
    let running = Running::with_tokens(ApiServer::start().await, TokenRequester::Node).await;
    running.api.stall("accounts");
    let start = Instant::now();

    let error = running.token().await.unwrap_err();

    assert_eq!((error.kind, &*error.code), (IssueErrorKind::Token, "NoAnswer"));
    let elapsed = start.elapsed();
    assert!((Duration::from_secs(1)..Duration::from_millis(1100)).contains(&elapsed), "{elapsed:?}");
    running.stop().await;
}

#[tokio::test]
async fn the_reason_is_kept_when_the_time_is_used_up_after_a_refusal() {
    let running = Running::with_tokens(ApiServer::start().await, TokenRequester::Node).await;
    running.api.refuse_token(status(404, "NotFound", "pods", r#"pods "pod-1" not found"#), None);
    let stall = async {
        eventually("the first attempt", || running.api.token_requests().len() == 1).await;
        running.api.stall("accounts");
    };

    let (result, ()) = tokio::join!(running.token(), stall);

    let error = result.unwrap_err();
    assert_eq!((error.kind, &*error.code), (IssueErrorKind::Token, "NoPod"));
    assert!(error.message.contains("pod-1"), "{}", error.message);
    running.stop().await;
}

#[tokio::test]
async fn an_api_server_that_is_away_gives_no_token_and_the_reason_is_kept() {
    let running = Running::with_tokens(ApiServer::start().await, TokenRequester::Node).await;
    running.api.set_mode(Mode::Down);

    let error = running.token().await.unwrap_err();

    assert_eq!((error.kind, &*error.code), (IssueErrorKind::Token, "NoAnswer"));
    assert!(error.source().is_some());
    running.api.set_mode(Mode::Up);
    assert!(running.token().await.is_ok());
    running.stop().await;
}

#[tokio::test]
async fn an_answer_that_is_too_long_or_no_token_is_refused_and_never_quoted() {
    let running = Running::with_tokens(ApiServer::start().await, TokenRequester::Node).await;
    let expires = "\"expirationTimestamp\": \"2026-01-01T00:10:00Z\"";
    for text in [
        format!(
            "{{\"status\": {{\"token\": \"{TOKEN}\", {expires}}}, \"x\": \"{}\"}}",
            "x".repeat(64 * 1024)
        ),
        format!("{{\"status\": \"{TOKEN}\"}}"),
        format!("{{\"status\": {{\"token\": [\"{TOKEN}\"], {expires}}}}}"),
        format!("{{\"status\": {{\"token\": \"{TOKEN}\", \"expirationTimestamp\": \"{TOKEN}\"}}}}"),
        TOKEN.to_owned(),
        String::new(),
    ] {
        running.api.answer_tokens(text);

        let error = running.token().await.unwrap_err();

        assert_eq!(error.kind, IssueErrorKind::Token);
        let state = format!("{:?}", running.cluster.token_state());
        let shown = format!("{error:?} {} {state}", chain(&error));
        assert!(TOKEN.split('.').all(|part| !shown.contains(part)), "{shown}");
        assert!(running.cluster.token_state().failure.is_some());
    }
    running.stop().await;
}
