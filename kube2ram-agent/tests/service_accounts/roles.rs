//! Who gets which role: by the ServiceAccount's annotations, by the pod's own, and in which order they count.

use kube2ram_sandbox::{
    Cloud, CredentialsFrom,
    show::show,
    standin::{Accounts, OidcTrust, Right, Role},
};

use crate::support::{AGENT, CLOUDS, Lab, SHOP, eventually, owner, pod, trusted_by_both};

#[test]
#[ignore = "needs root: cargo xtask test"]
fn each_account_gets_its_role_on_a_node_that_may_assume_nothing() {
    for cloud in CLOUDS {
        let lab = Lab::with_agent("sa-own", cloud, &["orders", "billing"], &[]);

        for name in ["orders", "billing"] {
            let role = format!("{name}-role");
            assert!(lab.pod(name).unwrap().pod().spec().annotations.is_empty(), "nothing is injected");
            lab.assert_served(name, name);
            assert_eq!(lab.ask(name, cloud.list()).body, role);
            let identity = format!(":assumed-role/{role}/{SHOP}.{name}");
            let arn = lab.caller(name, name);
            assert!(arn.ends_with(&identity), "{arn}");

            let exchanges = lab.exchanges(name);
            assert_eq!(exchanges.len(), 1, "{exchanges:?}");
            assert_eq!(exchanges[0].action, cloud.exchange());
            assert_eq!(exchanges[0].subject, format!("system:serviceaccount:{SHOP}:{name}"));
            assert_eq!((exchanges[0].signature, &*exchanges[0].access_key_id), ("", ""), "nobody signs");
            let tokens = lab.api().token_requests_of(SHOP, name);
            assert_eq!(tokens.len(), 1, "{tokens:?}");
            assert_eq!(tokens[0].audiences, [cloud.audience()]);
            assert_eq!(tokens[0].expiration_seconds, Some(600));
            assert_eq!(tokens[0].impersonates.as_deref(), Some("system:node:sandbox-node"));
            let uid = lab.pod(name).unwrap().pod().spec().uid.clone();
            assert_eq!(tokens[0].pod, Some((name.to_owned(), uid)), "bound to the pod");
        }
        assert_eq!(lab.ask_for("orders", "billing").status, 403, "another account's role");
        assert_eq!(lab.ask("orders", &format!("{}{}", cloud.list(), Accounts::NODE_ROLE)).status, 403);
        lab.assert_node_role_unused();
        assert_eq!(lab.leaks(), []);
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn pods_of_one_account_share_a_session_and_two_accounts_never_do() {
    for cloud in CLOUDS {
        let mut lab = Lab::new("sa-share", cloud, &[]);
        let everybody = OidcTrust::like(cloud.cluster_provider(), format!("system:serviceaccount:{SHOP}:*"));
        lab.accounts().add_role(cloud.role_arn("shared-role"), Role::trusting(everybody));
        // Nothing but the ServiceAccount is different.
        for account in ["orders", "billing"] {
            lab.annotate_account(account, &[("role", "shared-role"), ("session-name", "shared")]);
        }
        for (name, account) in [("orders", "orders"), ("orders-2", "orders"), ("billing", "billing")] {
            lab.add_pod(&pod(name).service_account(account)).unwrap();
        }
        lab.start(&[]);

        let [orders, second, billing] = ["orders", "orders-2", "billing"].map(|pod| lab.key(pod, "shared"));

        assert_eq!(orders, second);
        assert_ne!(orders, billing);
        let exchanges = lab.exchanges("shared");
        let mut subjects: Vec<_> = exchanges.iter().map(|call| &*call.subject).collect();
        subjects.sort_unstable();
        assert_eq!(subjects, ["system:serviceaccount:shop:billing", "system:serviceaccount:shop:orders"]);
        let names: Vec<_> = exchanges.iter().map(|call| call.param("RoleSessionName")).collect();
        assert_eq!(names, [Some("shared"), Some("shared")]);
        lab.assert_node_role_unused();
    }
}

/// What the cloud's own webhook reads on a ServiceAccount: a role's name, or its ARN.
fn of_the_webhook(cloud: Cloud, role: &str) -> String {
    match cloud {
        Cloud::Alibaba => role.to_owned(),
        Cloud::Aws => cloud.role_arn(role),
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_pods_annotation_counts_before_the_accounts_and_that_before_the_webhooks() {
    for cloud in CLOUDS {
        let mut lab = Lab::new("sa-order", cloud, &[]);
        let (key, alias) = (cloud.annotation("role"), cloud.account_annotation());
        let webhooks = of_the_webhook(cloud, "webhook-role");
        type Row<'a> = (&'a str, Option<&'a str>, &'a [(&'a str, &'a str)], &'a str);
        let rows: [Row<'_>; 5] = [
            ("own", Some("own-role"), &[(&*key, "account-role"), (alias, &*webhooks)], "own-role"),
            ("account", None, &[(&*key, "account-role"), (alias, &*webhooks)], "account-role"),
            ("webhook", None, &[(alias, &*webhooks)], "webhook-role"),
            ("neither", None, &[], "default-role"),
            ("other", None, &[("example.com/role", "account-role")], "default-role"),
        ];
        for (name, own, annotations, expected) in rows {
            // All of them trust all that ask, so that the choice is the agent's alone.
            let all = OidcTrust::like(cloud.cluster_provider(), "system:serviceaccount:shop:*");
            lab.accounts().add_role(cloud.role_arn(expected), Role::trusting(all));
            lab.api().apply_service_account(SHOP, name, annotations).unwrap();
            let spec = own.map_or_else(|| pod(name), |role| pod(name).role(role));
            lab.add_pod(&spec).unwrap();
        }
        lab.start(&["--default-role=default-role"]);

        for (name, _, _, expected) in rows {
            let expected = expected.trim_end_matches("-role");
            lab.assert_served(name, expected);
            for other in
                ["own", "account", "webhook", "default"].into_iter().filter(|other| *other != expected)
            {
                assert_eq!(lab.ask_for(name, other).status, 403, "{name} asks for {other}-role");
            }
        }
        let (_, explained) = lab.kube2ram(&["explain", "shop/webhook"]);
        assert!(explained.contains(alias), "{explained}");
        lab.assert_node_role_unused();
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_annotation_that_cannot_be_used_denies_and_nothing_stands_in() {
    for cloud in CLOUDS {
        let mut lab = Lab::new("sa-broken", cloud, &[]);
        let (key, alias) = (cloud.annotation("role"), cloud.account_annotation());
        let webhooks = of_the_webhook(cloud, "webhook-role");
        let all = OidcTrust::like(cloud.cluster_provider(), "system:serviceaccount:shop:*");
        for role in ["webhook-role", "default-role"] {
            lab.accounts().add_role(cloud.role_arn(role), Role::trusting(all.clone()));
        }
        let rows: [(&str, &[(&str, &str)]); 3] = [
            ("empty", &[(&*key, ""), (alias, &*webhooks)]),
            ("spaces", &[(&*key, "two words"), (alias, &*webhooks)]),
            ("webhook", &[(alias, "two words")]),
        ];
        for (name, annotations) in rows {
            lab.api().apply_service_account(SHOP, name, annotations).unwrap();
            lab.add_pod(&pod(name)).unwrap();
        }
        lab.start(&["--default-role=default-role"]);

        for (name, _) in rows {
            for role in ["webhook", "default"] {
                assert_eq!(lab.credentials(name, role), "403", "{name} asks for {role}-role");
            }
            let note = lab.await_event(name, "MalformedAnnotation");
            assert!(note.contains(if name == "webhook" { alias } else { &*key }), "{note}");
        }
        assert_eq!(lab.sts().count(cloud.exchange()), 0);
        // The twin.
        lab.api().apply_service_account(SHOP, "sound", &[(alias, &*webhooks)]).unwrap();
        lab.add_pod(&pod("sound")).unwrap();
        lab.assert_served("sound", "webhook");
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn session_name_duration_and_policy_are_of_the_pod_or_else_of_its_account() {
    const POLICY: &str = r#"{"Version":"1","Statement":[]}"#;
    for cloud in CLOUDS {
        let mut lab = Lab::new("sa-session", cloud, &[]);
        for name in ["account", "own"] {
            lab.add_role_of_account(&format!("{name}-role"), SHOP, name);
            let role = format!("{name}-role");
            let annotations = [
                ("role", &*role),
                ("session-name", "of-account"),
                ("session-duration", "30m"),
                ("policy", POLICY),
            ];
            lab.annotate_account(name, &annotations);
        }
        lab.add_pod(&pod("account")).unwrap();
        lab.add_pod(&pod("own").annotation(&cloud.annotation("session-name"), "of-pod")).unwrap();
        lab.start(&[]);

        for (name, session) in [("account", "of-account"), ("own", "of-pod")] {
            lab.assert_served(name, name);
            let call = lab.exchanges(name).pop().unwrap();
            assert_eq!(call.param("RoleSessionName"), Some(session), "{call:?}");
            assert_eq!(call.param("DurationSeconds"), Some("1800"), "{call:?}");
            assert_eq!(call.param("Policy"), Some(POLICY), "{call:?}");
            assert_eq!(
                (call.param("ExternalId"), call.tags().len()),
                (None, 0),
                "the exchange takes neither"
            );
        }
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_host_network_pod_gets_its_accounts_role_and_not_the_nodes() {
    for cloud in CLOUDS {
        let mut lab = Lab::new("sa-host", cloud, &[]);
        lab.add_account("daemon");
        lab.add_pod(&pod("daemon").host_network()).unwrap();
        lab.start(&[]);

        lab.assert_served("daemon", "daemon");
        assert_eq!(lab.ask("daemon", cloud.list()).body, "daemon-role");
        let node = format!("{}{}", cloud.list(), Accounts::NODE_ROLE);
        assert_eq!(owner(&lab.ask("daemon", &node)), "403");
    }
}

/// The roles trust the node, too, and it may assume them: that is offered, and not taken.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_role_that_trusts_another_account_is_refused_and_the_nodes_role_never_steps_in() {
    for cloud in CLOUDS {
        let mut lab = Lab::of_node("sa-thief", cloud);
        for name in ["orders", "thief"] {
            lab.annotate_account(name, &[("role", "orders-role")]);
            lab.add_pod(&pod(name)).unwrap();
        }
        let orders = OidcTrust::equals(cloud.cluster_provider(), "system:serviceaccount:shop:orders");
        lab.accounts().add_role(cloud.role_arn("orders-role"), trusted_by_both(Role::trusting(orders)));
        lab.start(&[]);

        lab.assert_served("orders", "orders");
        assert_eq!(lab.credentials("thief", "orders"), "403");
        assert_eq!(lab.credentials("thief", "orders"), "403");

        let note = lab.await_event("thief", "AssumeRoleDenied");
        assert!(note.contains("orders-role"), "{note}");
        let of_thief = lab.exchanges("orders").into_iter().filter(|call| call.outcome != "OK");
        assert_eq!(of_thief.count(), 1, "a denial is remembered");
        assert_eq!(lab.sts().count("AssumeRole"), 0);
        lab.assert_served("orders", "orders");
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_external_id_is_refused_with_the_reason() {
    for cloud in CLOUDS {
        let mut lab = Lab::new("sa-external", cloud, &["orders"]);
        lab.add_account("partner");
        let key = cloud.annotation("external-id");
        lab.add_pod(&pod("partner").annotation(&key, "team-7")).unwrap();
        lab.start(&[]);

        assert_eq!(lab.credentials("partner", "partner"), "403");
        let told = || {
            let events = lab.api().events();
            events.iter().any(|event| {
                event["regarding"]["name"] == "partner" && event["note"].to_string().contains(&key)
            })
        };
        eventually(true, told);
        assert_eq!(lab.exchanges("partner"), []);
        lab.assert_served("orders", "orders");
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_agents_own_right_serves_pods_without_impersonation() {
    for cloud in CLOUDS {
        let mut lab = Lab::new("sa-agent", cloud, &["orders"]);
        lab.api().set_rights(&Right::AS_AGENT);
        lab.start(&["--token-requests-as=agent"]);

        lab.assert_served("orders", "orders");

        let tokens = lab.api().token_requests_of(SHOP, "orders");
        assert_eq!((tokens.len(), &tokens[0].impersonates, tokens[0].status), (1, &None, 201), "{tokens:?}");
        assert_eq!(tokens[0].audiences, [cloud.audience()]);
        assert!(tokens[0].pod.is_some(), "bound to a pod all the same");
        lab.assert_node_role_unused();
    }
}

/// `cargo xtask sandbox --credentials-from=service-account`.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_shop_window_shows_what_it_should() {
    for cloud in CLOUDS {
        let mut table = Vec::new();

        let (sandbox, is_right) =
            show(AGENT.as_ref(), cloud, CredentialsFrom::ServiceAccount, &mut table).unwrap();

        let table = String::from_utf8(table).unwrap();
        assert!(is_right, "{table}");
        assert!(table.contains("AssumeRole of orders-role"), "{table}");
        assert_eq!(sandbox.sts().count(cloud.exchange()), sandbox.api().issued_tokens().len(), "{table}");
    }
}
