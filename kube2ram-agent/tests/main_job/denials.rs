//! What nobody gets: another's role, the node's, and anything at all without a redirected connection of a
//! pod.

use std::fs;

use kube2ram_sandbox::{
    client::{Family, Request},
    node::PodSpec,
    standin::{Accounts, Role},
};

use crate::support::{
    ALLOW_LIST, INSTANCE_ID, LIST, Lab, assert_in_time, command_in, eventually, owner, run, url,
};

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_without_role_gets_404_and_never_the_nodes() {
    let pods = [PodSpec::new("plain"), PodSpec::new("orders").role("orders-role")];
    let lab = Lab::with_agent("no-role", &pods, &[]);

    assert_eq!(lab.ask("plain", LIST).status, 404);
    for role in ["orders-role", Accounts::NODE_ROLE] {
        assert_eq!(lab.credentials("plain", role), "404");
    }
    assert_eq!(lab.ask("plain", INSTANCE_ID).status, 200, "ordinary items pass");
    assert_eq!(lab.ask("orders", LIST).status, 200);
    assert_eq!(lab.leaks(), []);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_namespace_gives_the_roles_of_its_allow_list_only() {
    let pod =
        |name: &str, namespace: &str| PodSpec::new(name).namespace(namespace).role(&format!("{name}-role"));
    let pods = [pod("orders", "shop"), pod("vault", "shop"), pod("broken", "typo"), pod("bare", "empty")];
    let mut lab = Lab::new("namespaces", &pods);
    for (namespace, annotations) in [
        ("shop", &[(ALLOW_LIST, r#"["orders-*"]"#)][..]),
        ("typo", &[(ALLOW_LIST, "broken-*")]),
        ("empty", &[]),
    ] {
        lab.api().apply_namespace(namespace, annotations).unwrap();
    }
    lab.start(&["--namespace-restrictions"]);

    assert_eq!(lab.ask("orders", LIST).body, "orders-role");
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
    for pod in ["vault", "broken", "bare"] {
        assert_eq!(lab.ask(pod, LIST).status, 403, "{pod}");
        assert_eq!(lab.credentials(pod, &format!("{pod}-role")), "403", "{pod}");
    }
    assert_eq!(lab.sts().assumed(&Accounts::role_arn("vault-role")), []);
    let told = |pod: &str| lab.api().events().iter().any(|event| event["regarding"]["name"] == pod);
    eventually((true, true), || (told("vault"), told("broken")));
    assert!(!told("orders"));

    // The list changes: so does the answer, in both directions.
    lab.api().apply_namespace("shop", &[(ALLOW_LIST, r#"["vault-role"]"#)]).unwrap();
    eventually(("vault-role".into(), "403".into()), || {
        (lab.credentials("vault", "vault-role"), lab.credentials("orders", "orders-role"))
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn no_other_role_is_given_by_whatever_name() {
    let pods = [PodSpec::new("orders").role("orders-role"), PodSpec::new("billing").role("billing-role")];
    let lab = Lab::with_agent("other-roles", &pods, &[]);
    // A node role that trusts itself: if the agent asked, STS would allow it.
    lab.accounts().add_role(Accounts::role_arn(Accounts::NODE_ROLE), Role::default());
    lab.accounts().add_role("acs:ram::6543210987654321:role/orders-role", Role::default());

    let (billing, node) = (Accounts::role_arn("billing-role"), Accounts::role_arn(Accounts::NODE_ROLE));
    for role in [
        "billing-role",
        Accounts::NODE_ROLE,
        &billing,
        &node,
        "acs:ram::6543210987654321:role/orders-role",
        "no-such-role",
        "orders-role/billing-role",
    ] {
        let reply = lab.ask("orders", &format!("{LIST}{role}"));
        assert_eq!(owner(&reply), "403", "{role}");
        assert!(!reply.body.contains("billing") && !reply.body.contains("orders"), "{}", reply.body);
    }
    for role in ["orders-role", "orders-role/", "Orders-Role", &Accounts::role_arn("orders-role")] {
        assert_eq!(lab.credentials("orders", role), "orders-role", "its own, by any name; RAM ignores case");
    }
    assert_eq!(lab.sts().calls().iter().filter(|call| call.action == "AssumeRole").count(), 1);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn nothing_below_ram_is_ever_passed_on() {
    let lab = Lab::with_agent("below-ram", &[PodSpec::new("orders").role("orders-role")], &[]);
    // The agent's own questions come first, so that any later one is the pod's.
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
    let passed = || lab.metadata().seen().len();
    let before = passed();

    for (path, status) in [
        ("/latest/meta-data/ram", 200),
        ("/latest/meta-data/ram/", 200),
        ("/latest/meta-data/ram/other", 404),
        ("/latest/meta-data/ram/security-credential/", 404),
        ("/latest/meta-data/RAM/security-credentials/", 200),
        ("/2016-01-01/meta-data/ram/security-credentials/", 200),
        ("/2016-01-01/meta-data/Ram/security-credentials/KubernetesWorkerRole-sandbox", 403),
        ("/meta-data/ram/security-credentials/KubernetesWorkerRole-sandbox", 404),
        ("//latest//meta-data//ram//security-credentials//KubernetesWorkerRole-sandbox", 403),
        ("/latest/meta-data/%72am/security-credentials/KubernetesWorkerRole-sandbox", 403),
        ("/latest/x/../meta-data/ram/security-credentials/KubernetesWorkerRole-sandbox", 400),
        ("/latest/meta-data/all", 403),
        ("/latest/user-data", 403),
    ] {
        let reply = lab.ask("orders", path);
        assert_eq!(reply.status, status, "{path}: {}", reply.body);
        assert!(!reply.body.contains(Accounts::NODE_ROLE), "{path}: {}", reply.body);
    }
    assert_eq!(passed(), before);

    assert_eq!(lab.ask("orders", INSTANCE_ID).status, 200);
    assert_eq!(passed(), before + 1, "an ordinary item passes");
    assert_eq!(lab.leaks(), []);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn who_dials_the_agent_and_is_no_pod_gets_403_whatever_it_asks() {
    let mut lab = Lab::with_agent("direct", &[PodSpec::new("orders").role("orders-role")], &[]);
    let agent = lab.agent().unwrap().app_addr();
    let before = lab.metadata().seen().len();

    let role = format!("{LIST}orders-role");
    for target in [LIST, &role, INSTANCE_ID, "/", "/healthz", "/metrics", "/debug/store"] {
        let direct = format!("http://{agent}{target}");
        let curl = |args: &[&str]| {
            run(lab.node().host_command("curl").args(["--silent", "--write-out", "%{http_code}"]).args(args))
        };
        let refused = (Some(0), "the kernel has no record of the caller\n403".into());
        assert_eq!(curl(&[&direct]), refused, "host {target}");
        assert_eq!(
            curl(&["--proxy", &agent.to_string(), &url(target)]),
            refused,
            "host, as a proxy {target}"
        );
        assert_eq!(Request::get(&direct).send().unwrap().status, 403, "this process {target}");
    }
    assert_eq!(lab.metadata().seen().len(), before);

    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role", "redirected, it is served");
    let own =
        lab.pod("orders").unwrap().curl_from("app", Family::V4, &format!("http://{agent}{LIST}")).unwrap();
    assert_eq!((own.status, own.body.as_str()), (200, "orders-role"), "and so is a pod that dials");
    assert_eq!(lab.metric("kube2ram_unvouched_connections_total"), 21.0);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_process_among_the_pods_that_belongs_to_none_of_them_is_refused() {
    let lab = Lab::with_agent(
        "no-pod",
        &[PodSpec::new("orders").role("orders-role")],
        &["--default-role=orders-role"],
    );
    let class = lab.node().pods_cgroup().join("burstable");
    let unknown = class.join("pod0d9e1f4c-7a55-4c1e-8f0b-5f1d5a0c0001/app");
    let plain = class.join("not-a-pod");

    for cgroup in [class, plain, unknown] {
        fs::create_dir_all(&cgroup).unwrap();
        for target in [LIST, &format!("{LIST}orders-role"), &format!("{LIST}{}", Accounts::NODE_ROLE)] {
            let args = ["--silent", "--max-time", "1", "--write-out", "%{http_code}", &url(target)];
            let answer = run(command_in(&cgroup, "curl").args(args));
            let expected = (Some(0), "the caller is not a pod of this node\n403".into());
            assert_eq!(answer, expected, "{} {target}", cgroup.display());
        }
    }

    let own = lab.ask("orders", LIST);
    assert_eq!(own.body, "orders-role");
    assert_in_time(&own);
}
