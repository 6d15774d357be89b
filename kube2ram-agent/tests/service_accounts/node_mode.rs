//! `--service-account-roles` where the node's role assumes pods' roles: annotations of ServiceAccounts count,
//! and no token is asked for.

use kube2ram_sandbox::{
    Cloud,
    standin::{Right, Role},
};

use crate::support::{AGENT, CLOUDS, Lab, SHOP, eventually, pod};

fn lab(name: &str, cloud: Cloud, flags: &[&str]) -> Lab {
    let mut lab = Lab::of_node(name, cloud);
    for role in ["orders-role", "own-role"] {
        lab.accounts().add_role(cloud.role_arn(role), Role::default());
    }
    for name in ["orders", "own"] {
        lab.annotate_account(name, &[("role", "orders-role")]);
    }
    lab.add_pod(&pod("orders")).unwrap();
    lab.add_pod(&pod("own").role("own-role")).unwrap();
    let flags = [&["--auto-discover-base-arn"], flags].concat();
    lab.start_agent(AGENT.as_ref(), &flags).unwrap();
    lab
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_accounts_annotation_gives_a_role_that_the_node_assumes() {
    for cloud in CLOUDS {
        let lab = lab("sa-node", cloud, &["--service-account-roles"]);

        lab.assert_served("orders", "orders");
        lab.assert_served("own", "own");

        assert_eq!(lab.ask_for("own", "orders").status, 403, "the pod's own annotation counts");
        let calls = lab.exchanges("orders");
        assert_eq!((calls.len(), &*calls[0].action, &*calls[0].outcome), (1, "AssumeRole", "OK"));
        assert_eq!(lab.sts().count(cloud.exchange()), 0);
        assert_eq!(lab.api().token_requests(), []);
        assert!(lab.api().service_account_reads(SHOP, "orders") > 0);
    }
}

/// The twin.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn without_the_flag_accounts_are_not_even_read() {
    for cloud in CLOUDS {
        let lab = lab("sa-node-off", cloud, &[]);

        lab.assert_served("own", "own");
        assert_eq!(lab.ask("orders", cloud.list()).status, 404);
        assert_eq!(lab.credentials("orders", "orders"), "404");

        assert_eq!(lab.api().service_account_reads(SHOP, "orders"), 0);
        assert_eq!(lab.api().token_requests(), []);
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn without_the_right_to_read_accounts_pods_wait_and_the_operator_learns_why() {
    for cloud in CLOUDS {
        let mut lab = Lab::of_node("sa-node-rbac", cloud);
        lab.accounts().add_role(cloud.role_arn("orders-role"), Role::default());
        lab.annotate_account("orders", &[("role", "orders-role")]);
        lab.add_pod(&pod("orders")).unwrap();
        lab.api().set_rights(&[]);
        lab.add_agent(AGENT.as_ref(), &["--auto-discover-base-arn", "--service-account-roles"]).unwrap();
        lab.agent().unwrap().spawn().unwrap();

        eventually(Some(503), || {
            lab.pod("orders").unwrap().curl(cloud.list()).ok().map(|reply| reply.status)
        });
        lab.await_problem("serviceaccounts");

        lab.api().set_rights(&[Right::GetAccounts]);
        lab.assert_served("orders", "orders");
    }
}
