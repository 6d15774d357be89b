//! Pods come, change and go while the agent runs.

use kube2ram_sandbox::{
    client::Request,
    node::PodSpec,
    standin::{Accounts, Role},
};
use serde_json::Value;

use crate::support::{LIST, Lab, ROLE, assert_in_time, assert_try_again, eventually, owner};

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_that_connects_before_its_watch_event_gets_its_own_role_at_once() {
    let mut lab = Lab::with_agent("early", &[], &["--default-role=default-role"]);
    lab.accounts().add_role(Accounts::role_arn("default-role"), Role::default());
    lab.api().hold_watches();
    lab.add(&PodSpec::new("early").role("early-role"));
    lab.add(&PodSpec::new("plain"));

    let list = lab.ask("early", LIST);
    let credentials = lab.ask("early", &format!("{LIST}early-role"));

    assert_eq!((list.status, list.body.as_str()), (200, "early-role"));
    assert_in_time(&list);
    assert_eq!(owner(&credentials), "early-role");
    assert_in_time(&credentials);
    assert_eq!(lab.ask("plain", LIST).body, "default-role", "who is known and has none");
    let waits = lab.metric("kube2ram_kubernetes_pod_waits_total{result=\"found\"}");
    let lists = lab.metric("kube2ram_kubernetes_pod_lists_total{result=\"ok\"}");
    assert_eq!(
        (waits, lists),
        (2.0, 2.0),
        "the API server's cache is believed of the pod that is asked for only"
    );
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_that_cannot_be_looked_up_never_gets_the_default_role() {
    let mut lab = Lab::with_agent("unknown", &[PodSpec::new("plain")], &["--default-role=default-role"]);
    lab.accounts().add_role(Accounts::role_arn("default-role"), Role::default());
    assert_eq!(lab.ask("plain", LIST).body, "default-role");
    lab.api().down();
    lab.add(&PodSpec::new("late").role("late-role"));

    for _ in 0..3 {
        assert_try_again(&lab.ask("late", LIST));
        assert_try_again(&lab.ask("late", &format!("{LIST}default-role")));
    }

    lab.api().up().unwrap();
    eventually("late-role".to_owned(), || lab.credentials("late", "late-role"));
    assert_eq!(lab.credentials("late", "default-role"), "403");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_changed_annotation_changes_the_role_of_the_next_request() {
    let lab = Lab::with_agent("annotate", &[PodSpec::new("orders").role("orders-role")], &[]);
    lab.accounts().add_role(Accounts::role_arn("refunds-role"), Role::default());
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");

    lab.annotate("orders", ROLE, "refunds-role").unwrap();

    eventually("refunds-role".to_owned(), || lab.ask("orders", LIST).body);
    assert_eq!(lab.credentials("orders", "refunds-role"), "refunds-role");
    assert_eq!(lab.credentials("orders", "orders-role"), "403", "though its credentials are still cached");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_other_annotations_reach_sts() {
    let policy = r#"{"Version":"1","Statement":[]}"#;
    let pod = PodSpec::new("orders")
        .role("orders-role")
        .annotation("ram.aliyuncs.com/external-id", "ext:42")
        .annotation("ram.aliyuncs.com/policy", policy)
        .annotation("ram.aliyuncs.com/session-duration", "20m")
        .annotation("ram.aliyuncs.com/session-name", "orders@night");
    let lab = Lab::with_agent("annotations", &[pod], &[]);
    let external_id = Some("ext:42".to_owned());
    lab.accounts().add_role(Accounts::role_arn("orders-role"), Role { external_id, ..Role::default() });

    let reply = lab.ask("orders", &format!("{LIST}orders-role"));

    assert!(lab.caller(&reply).ends_with(":assumed-role/orders-role/orders@night"));
    let calls = lab.sts().assumed(&Accounts::role_arn("orders-role"));
    let params = ["ExternalId", "Policy", "DurationSeconds"].map(|name| calls[0].param(name).unwrap());
    assert_eq!(params, ["ext:42", policy, "1200"]);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_deleted_by_force_keeps_its_role_until_its_cgroup_is_removed() {
    let pods = [PodSpec::new("orders").role("orders-role"), PodSpec::new("billing").role("billing-role")];
    let mut lab = Lab::with_agent("deleted", &pods, &[]);
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");

    lab.api().delete_pod("default", "orders");

    eventually(1.0, || lab.metric("kube2ram_kubernetes_departed_pods"));
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
    lab.remove_pod("orders").unwrap();
    eventually(0.0, || lab.metric("kube2ram_kubernetes_departed_pods"));
    assert_eq!(
        lab.metric("kube2ram_credential_cache_entries"),
        2.0,
        "kept for a while, for the role's next pod"
    );
    lab.add(&PodSpec::new("next").role("orders-role"));
    assert_eq!(lab.credentials("next", "orders-role"), "orders-role");
    assert_eq!(lab.sts().assumed(&Accounts::role_arn("orders-role")).len(), 1);
    assert_eq!(lab.ask("billing", LIST).body, "billing-role");
    assert_eq!(lab.leaks(), []);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_terminating_pod_keeps_its_role_until_its_end() {
    let lab = Lab::with_agent("terminating", &[PodSpec::new("orders").role("orders-role")], &[]);
    let url = lab.api().url() + "/api/v1/namespaces/default/pods/orders";
    let mut object: Value = serde_json::from_str(&Request::get(url).send().unwrap().body).unwrap();
    object["metadata"]["deletionTimestamp"] = "2026-11-21T12:00:00Z".into();
    // So that the change is seen to have arrived.
    object["metadata"]["annotations"][ROLE] = "last-role".into();
    lab.accounts().add_role(Accounts::role_arn("last-role"), Role::default());

    lab.api().apply(object).unwrap();

    eventually("last-role".to_owned(), || lab.ask("orders", LIST).body);
    assert_eq!(lab.credentials("orders", "last-role"), "last-role");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn what_happened_while_the_api_server_was_away_is_learnt_when_it_is_back() {
    let pods = ["orders", "billing"].map(|name| PodSpec::new(name).role(&format!("{name}-role")));
    let mut lab = Lab::with_agent("relist", &pods, &[]);
    lab.accounts().add_role(Accounts::role_arn("refunds-role"), Role::default());
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
    lab.api().down();
    lab.annotate("billing", ROLE, "refunds-role").unwrap();
    lab.api().delete_pod("default", "orders");
    lab.api().expire();

    lab.api().up().unwrap();

    eventually("refunds-role".to_owned(), || lab.credentials("billing", "refunds-role"));
    assert_eq!(lab.credentials("billing", "billing-role"), "403");
    // Its cgroup is still there.
    eventually(1.0, || lab.metric("kube2ram_kubernetes_departed_pods"));
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_that_is_made_again_under_its_name_gets_the_role_of_the_new_one() {
    let mut lab = Lab::with_agent("again", &[PodSpec::new("orders").role("orders-role")], &[]);
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
    lab.remove_pod("orders").unwrap();

    lab.add(&PodSpec::new("orders").role("refunds-role"));

    assert_eq!(lab.ask("orders", LIST).body, "refunds-role", "at once: its UID is another");
    assert_eq!(lab.credentials("orders", "orders-role"), "403");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pods_credentials_are_fetched_before_it_asks_and_others_are_not() {
    let mut lab =
        Lab::with_agent("prefetch", &[], &["--namespace-restrictions", "--default-role=default-role"]);
    lab.accounts().add_role(Accounts::role_arn("default-role"), Role::default());
    lab.api()
        .apply_namespace("default", &[("ram.aliyuncs.com/allowed-roles", r#"["early-role", "new-role"]"#)])
        .unwrap();
    let assumed = |lab: &Lab, role: &str| lab.sts().assumed(&Accounts::role_arn(role)).len();

    for (name, role) in [("early", "early-role"), ("locked", "locked-role")] {
        lab.add(&PodSpec::new(name).role(role));
    }
    lab.add(&PodSpec::new("plain"));
    eventually(1, || assumed(&lab, "early-role"));
    lab.accounts().add_role(Accounts::role_arn("new-role"), Role::default());
    lab.annotate("early", ROLE, "new-role").unwrap();
    eventually(1, || assumed(&lab, "new-role"));

    assert_eq!(assumed(&lab, "locked-role"), 0, "what is not permitted is not asked for");
    assert_eq!(assumed(&lab, "default-role"), 0, "most pods never ask for it");
    assert_eq!(lab.credentials("early", "new-role"), "new-role");
    assert_eq!(assumed(&lab, "new-role"), 1, "from the cache");
}
