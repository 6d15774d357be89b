//! The API server gives no tokens, or not the right ones: what is cached keeps working, the rest is told to
//! ask again, and nobody falls back to another role.

use http::StatusCode;
use jiff::SignedDuration;
use kube2ram_sandbox::{
    Cloud, Sandbox,
    standin::{Right, TokenRequestFault},
};

use crate::support::{CLOUDS, COLD, Lab, SHOP, eventually, pod};

const DEFAULT_ROLE: &str = "--default-role=cold-role";

/// A lab whose pod `orders` has credentials, and whose cold pod nobody has fetched any for.
fn lab(name: &str, cloud: Cloud) -> Lab {
    let mut lab = Lab::new(name, cloud, &["orders"]);
    lab.add_cold_pod();
    lab.start(&[DEFAULT_ROLE]);
    lab.assert_served("orders", "orders");
    assert_eq!(lab.exchanges(COLD), [], "not fetched before it asks");
    lab
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn one_that_is_away_is_missed_by_new_sessions_only() {
    for cloud in CLOUDS {
        let mut lab = lab("sa-away", cloud);

        lab.api().down();
        lab.assert_try_again(COLD, COLD);
        lab.assert_served("orders", "orders");
        lab.await_result("token");
        lab.await_verdict(COLD, "unavailable");
        lab.await_problem("api_server");
        assert_eq!(lab.exchanges(COLD), []);
        lab.add_account("late");
        lab.add_pod(&pod("late")).unwrap();
        lab.assert_try_again("late", "late");

        lab.api().up().unwrap();
        for name in ["orders", COLD, "late"] {
            lab.assert_served(name, name);
        }
        lab.await_event(COLD, "CredentialsUnavailable");
        lab.assert_node_role_unused();
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_replica_that_lags_behind_is_asked_again() {
    for cloud in CLOUDS {
        let lab = lab("sa-lag", cloud);
        lab.api().set_token_faults(&[TokenRequestFault::PodUnknown]);

        lab.assert_served(COLD, COLD);

        let statuses: Vec<_> =
            lab.api().token_requests_of(SHOP, COLD).iter().map(|call| call.status).collect();
        assert_eq!(statuses, [404, 201]);
    }
}

/// What it does, and what its metric calls that.
const TRANSIENT: [(TokenRequestFault, &str); 4] = [
    (TokenRequestFault::Cut, "token"),
    (TokenRequestFault::Hang, "token"),
    (TokenRequestFault::Refuse(StatusCode::INTERNAL_SERVER_ERROR, "etcd is away", None), "token"),
    (
        TokenRequestFault::Refuse(
            StatusCode::TOO_MANY_REQUESTS,
            "too many requests, please try again later",
            Some(2),
        ),
        "throttled",
    ),
];

#[test]
#[ignore = "needs root: cargo xtask test"]
fn one_that_is_broken_slow_or_busy_is_asked_again_later() {
    for cloud in CLOUDS {
        let mut lab = lab("sa-busy", cloud);

        for (number, (fault, result)) in TRANSIENT.into_iter().enumerate() {
            let (name, before) = (format!("late-{number}"), lab.results(result));
            lab.api().fail_tokens(Some(fault.clone()));
            lab.add_account(&name);
            lab.add_pod(&pod(&name)).unwrap();

            lab.assert_try_again(&name, &name);
            lab.await_result_after(result, before);
            lab.await_verdict(&name, "unavailable");
            lab.assert_served("orders", "orders");
            assert!(lab.exchanges(&name).iter().all(|call| call.outcome != "OK"), "{fault:?}");

            lab.api().fail_tokens(None);
            lab.assert_served(&name, &name);
        }
        lab.assert_node_role_unused();
    }
}

/// Each rule of the shipped ones, and the object that the operator is told to look at.
const MISSING: [(Cloud, Right, &str); 3] = [
    (Cloud::Alibaba, Right::CreateTokensAsNode, "kube2ram-node-tokens"),
    (Cloud::Aws, Right::ImpersonateNode, "kube2ram-node-tokens"),
    (Cloud::Alibaba, Right::RequestAudience, "kube2ram-audience"),
];

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_right_that_is_missing_is_one_event_on_the_node_and_no_fault_of_a_pod() {
    for (cloud, missing, object) in MISSING {
        let mut lab = lab("sa-rbac", cloud);
        let left: Vec<_> = Right::AS_NODE.into_iter().filter(|right| *right != missing).collect();
        lab.api().set_rights(&left);

        lab.assert_try_again(COLD, COLD);
        lab.assert_served("orders", "orders");

        lab.await_result("cluster_configuration");
        let note = lab.await_node_event("TokensUnavailable");
        assert!(note.contains(object), "{missing:?}: {note}");
        lab.await_problem(object);
        lab.await_verdict(COLD, "unavailable");
        let events = lab.api().events();
        let of_reason = |reason: &str| events.iter().filter(|event| event["reason"] == reason).count();
        assert_eq!(of_reason("TokensUnavailable"), 1, "repetitions are counted: {events:?}");
        assert_eq!(of_reason("AssumeRoleDenied"), 0, "it is not the role's fault: {events:?}");

        lab.api().set_rights(&Right::AS_NODE);
        lab.assert_served(COLD, COLD);
        lab.await_verdict(COLD, "granted");
        lab.assert_node_role_unused();
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_agents_own_right_that_is_missing_is_reported_likewise() {
    let mut lab = Lab::new("sa-own-rbac", Cloud::Alibaba, &["orders"]);
    lab.api().set_rights(&[Right::GetAccounts]);
    lab.start(&["--token-requests-as=agent"]);

    lab.assert_try_again("orders", "orders");

    lab.await_result("cluster_configuration");
    lab.await_node_event("TokensUnavailable");
    lab.api().set_rights(&Right::AS_AGENT);
    lab.assert_served("orders", "orders");
}

/// As before Kubernetes 1.30, or where the token of the agent is none of its pod's.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_agent_whose_own_token_names_no_node_or_another_serves_nobody_and_tells_why() {
    for node in [None, Some("another-node")] {
        let mut lab = Lab::new("sa-unbound", Cloud::Aws, &["orders"]);
        lab.api().bind_agent(node);
        // Pods' ServiceAccounts are read by the node's right, too: none is known.
        lab.prepare(&[]);
        lab.agent().unwrap().spawn().unwrap();
        // Until its programs are attached, pods reach the metadata server.
        eventually(true, || lab.agent().unwrap().log().contains("serving agent="));

        eventually(Some(503), || {
            lab.pod("orders").unwrap().curl(Cloud::Aws.list()).ok().map(|reply| reply.status)
        });
        lab.await_problem("node");
        assert_eq!(lab.sts().count(Cloud::Aws.exchange()), 0);
        lab.assert_node_role_unused();

        lab.api().bind_agent(Some(Sandbox::NODE));
        lab.assert_served("orders", "orders");
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_account_that_is_deleted_keeps_its_sessions_and_gets_no_new_ones_until_it_is_made_again() {
    for cloud in CLOUDS {
        let mut lab = lab("sa-deleted", cloud);
        // Another pod has its account read again, which is gone by then.
        lab.api().hold_watches();
        lab.add_pod(&pod("late").service_account("orders")).unwrap();
        for name in ["orders", COLD] {
            lab.api().delete_service_account(SHOP, name);
        }
        lab.api().release_watches();
        let absent = r#"kube2ram_kubernetes_service_account_reads_total{result="absent"}"#;
        eventually(true, || lab.agent().unwrap().metric(absent).is_ok_and(|reads| reads > 0.0));
        lab.assert_served("late", "orders");

        lab.assert_try_again(COLD, COLD);
        lab.await_result("token");
        lab.assert_served("orders", "orders");
        let calls = lab.api().token_requests_of(SHOP, COLD);
        assert!(!calls.is_empty() && calls.iter().all(|call| call.status == 404), "{calls:?}");

        // With another UID, which a cloud does not see.
        lab.api().apply_service_account(SHOP, COLD, &[]).unwrap();
        lab.assert_served(COLD, COLD);
        assert_eq!(lab.exchanges(COLD).last().unwrap().subject, "system:serviceaccount:shop:cold");
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_that_is_made_again_under_its_name_is_bound_by_its_new_uid() {
    for cloud in CLOUDS {
        let mut lab = lab("sa-again", cloud);
        lab.remove_pod(COLD).unwrap();
        lab.add_pod(&pod(COLD)).unwrap();

        lab.assert_served(COLD, COLD);

        let uid = lab.pod(COLD).unwrap().pod().spec().uid.clone();
        let bound = lab.api().token_requests_of(SHOP, COLD).pop().unwrap();
        assert_eq!((bound.pod, bound.status), (Some((COLD.to_owned(), uid)), 201));
    }
}

/// Its tokens have expired before STS sees them.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_clock_that_is_late_gets_a_longer_token() {
    for cloud in CLOUDS {
        let lab = lab("sa-late-clock", cloud);
        lab.api().clock().shift(SignedDuration::from_secs(-1000));

        lab.assert_served(COLD, COLD);

        let calls = lab.api().token_requests_of(SHOP, COLD);
        let seconds: Vec<_> = calls.iter().map(|call| call.expiration_seconds).collect();
        assert_eq!(seconds, [Some(600), Some(3600)]);
        let outcomes: Vec<_> = lab.exchanges(COLD).into_iter().map(|call| call.outcome).collect();
        assert_eq!((outcomes.len(), outcomes.last().map(String::as_str)), (2, Some("OK")), "{outcomes:?}");
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_clock_that_is_early_is_waited_for_and_nobody_is_denied() {
    for cloud in CLOUDS {
        let mut lab = lab("sa-early-clock", cloud);
        lab.api().clock().shift(SignedDuration::from_secs(120));

        lab.assert_try_again(COLD, COLD);
        lab.assert_served("orders", "orders");
        let agent = lab.agent().unwrap();
        eventually(true, || agent.log().contains("clock"));
        let outcomes: Vec<_> = lab.exchanges(COLD).into_iter().map(|call| call.outcome).collect();
        assert!(!outcomes.is_empty() && !outcomes.iter().any(|outcome| outcome == "OK"), "{outcomes:?}");
        let events = lab.api().events();
        assert!(!events.iter().any(|event| event["reason"] == "AssumeRoleDenied"), "{events:?}");

        lab.api().clock().shift(SignedDuration::from_secs(-120));
        lab.assert_served(COLD, COLD);
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_token_that_lives_shorter_than_was_asked_for_is_used_all_the_same() {
    for cloud in CLOUDS {
        let lab = lab("sa-short", cloud);
        lab.api().set_max_expiration(Some(std::time::Duration::from_secs(300)));

        lab.assert_served(COLD, COLD);
    }
}
