//! STS accepts no token of the cluster: that is nobody's fault but the configuration's. What is cached keeps
//! working, the rest is told to ask again, and the operator learns of it by one event on the node.

use kube2ram_sandbox::{
    Cloud,
    standin::{OidcProvider, TokenRequestFault},
};

use crate::support::{CLOUDS, COLD, Lab, SHOP, pod};

/// A lab whose pod `orders` has credentials.
fn lab(name: &str, cloud: Cloud) -> Lab {
    let lab = Lab::with_agent(name, cloud, &["orders"], &["--default-role=cold-role"]);
    lab.assert_served("orders", "orders");
    lab
}

/// An administrator's change of a provider; `None` removes it.
type Change = fn(OidcProvider) -> Option<OidcProvider>;

const CHANGES: [(&str, Change); 4] = [
    ("removed", |_| None),
    ("audience", |provider| Some(provider.with_audience("other.example.com"))),
    ("fingerprint", |provider| Some(provider.with_wrong_fingerprint())),
    ("issuer", |provider| Some(provider.with_issuer("https://other.example.com"))),
];

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_provider_that_does_not_fit_is_the_clusters_fault_and_leaves_sessions_alone() {
    for cloud in CLOUDS {
        let mut lab = lab("sa-provider", cloud);
        let (arn, sound) = (cloud.cluster_provider(), lab.api().issuer().provider_in(cloud));

        for (name, change) in CHANGES {
            // AWS finds the provider by the token's issuer, in the role's account. The agent does not know
            // whether that account is the wrong one.
            let result = match cloud {
                Cloud::Aws if ["removed", "issuer"].contains(&name) => "token",
                _ => "cluster_configuration",
            };
            let before = lab.results(result);
            match change(sound.clone()) {
                None => lab.accounts().remove_provider(&arn),
                Some(provider) => lab.accounts().add_provider(&arn, provider),
            }
            lab.add_account(name);
            lab.add_pod(&pod(name)).unwrap();

            lab.assert_try_again(name, name);
            lab.await_result_after(result, before);
            lab.await_verdict(name, "unavailable");
            lab.assert_served("orders", "orders");
            let outcomes: Vec<_> = lab.exchanges(name).into_iter().map(|call| call.outcome).collect();
            assert!(!outcomes.is_empty() && !outcomes.iter().any(|it| it == "OK"), "{name}: {outcomes:?}");
        }

        lab.await_node_event("ClusterConfigurationBroken");
        let events = lab.api().events();
        let of_reason = |reason: &str| events.iter().filter(|event| event["reason"] == reason).count();
        assert_eq!(of_reason("AssumeRoleDenied"), 0, "it is not the roles' fault: {events:?}");

        lab.accounts().add_provider(&arn, sound);
        for (name, _) in CHANGES {
            lab.assert_served(name, name);
            lab.await_verdict(name, "granted");
        }
        lab.assert_node_role_unused();
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_issuer_whose_keys_cannot_be_fetched_is_waited_for() {
    for cloud in CLOUDS {
        let mut lab = lab("sa-issuer", cloud);
        lab.add_cold_pod();
        lab.api().issuer().set_reachable(false);

        lab.assert_try_again(COLD, COLD);
        lab.await_event(COLD, "CredentialsUnavailable");
        lab.await_verdict(COLD, "unavailable");
        lab.assert_served("orders", "orders");
        let outcomes: Vec<_> = lab.exchanges(COLD).into_iter().map(|call| call.outcome).collect();
        assert!(!outcomes.is_empty() && !outcomes.iter().any(|it| it == "OK"), "{outcomes:?}");

        lab.api().issuer().set_reachable(true);
        lab.assert_served(COLD, COLD);
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_key_that_signs_before_it_is_published_costs_new_sessions_until_it_is() {
    for cloud in CLOUDS {
        let mut lab = lab("sa-rotation", cloud);
        lab.add_cold_pod();
        // The twin: published first, as the documents want it. RSA, as most API servers have it.
        lab.api().issuer().rotate_to_rsa().unwrap();
        lab.api().issuer().publish();
        lab.add_account("before");
        lab.add_pod(&pod("before")).unwrap();
        lab.assert_served("before", "before");

        lab.api().issuer().rotate().unwrap();
        lab.assert_try_again(COLD, COLD);
        lab.await_result("cluster_configuration");
        lab.await_node_event("ClusterConfigurationBroken");
        let tokens = lab.api().token_requests_of(SHOP, COLD);
        assert!(tokens.len() >= 2, "a fresh token is tried once: {tokens:?}");
        for name in ["orders", "before"] {
            lab.assert_served(name, name);
        }

        lab.api().issuer().publish();
        lab.assert_served(COLD, COLD);
        // And without the keys of before.
        lab.api().issuer().retire();
        lab.add_account("after");
        lab.add_pod(&pod("after")).unwrap();
        lab.assert_served("after", "after");
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_token_that_is_not_what_was_asked_for_gets_no_session() {
    for cloud in CLOUDS {
        let mut lab = lab("sa-wrong-token", cloud);
        let faults = [
            ("audience", TokenRequestFault::WrongAudience),
            ("issuer", TokenRequestFault::WrongIssuer),
            ("key", TokenRequestFault::UnknownKey),
        ];

        for (name, fault) in faults {
            let result = match (cloud, name) {
                (Cloud::Aws, "issuer") => "token",
                _ => "cluster_configuration",
            };
            let before = lab.results(result);
            lab.api().fail_tokens(Some(fault));
            lab.add_account(name);
            lab.add_pod(&pod(name)).unwrap();
            lab.assert_try_again(name, name);
            lab.await_result_after(result, before);
            let outcomes: Vec<_> = lab.exchanges(name).into_iter().map(|call| call.outcome).collect();
            assert!(!outcomes.is_empty() && !outcomes.iter().any(|it| it == "OK"), "{name}: {outcomes:?}");

            lab.api().fail_tokens(None);
            lab.assert_served(name, name);
        }
        lab.assert_node_role_unused();
    }
}
