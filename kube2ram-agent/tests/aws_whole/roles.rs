//! Who gets which role: by both addresses, in every spelling that clients have, and as the annotations of
//! kube2iam name it.

use jiff::{SignedDuration, Timestamp};
use kube2ram_sandbox::{
    Cloud,
    client::Family,
    node::PodSpec,
    standin::{Accounts, Role, Tokens},
};

use crate::support::{
    INSTANCE_ID, LIST, Lab, TOKEN, TOKEN_HEADER, TTL_HEADER, eventually, owner, pod, role_arn, url, url6,
};

#[test]
#[ignore = "needs root: cargo xtask test"]
fn each_pod_gets_its_own_role_in_both_spellings_and_sts_knows_it_by_its_service_account() {
    let pods = [
        pod("orders").namespace("shop").service_account("orders-sa"),
        pod("billing").namespace("pay").service_account("billing-sa"),
    ];
    let lab = Lab::with_agent("aws-own-role", &pods, &[]);

    for (pod, session) in [("orders", "shop.orders-sa"), ("billing", "pay.billing-sa")] {
        let role = format!("{pod}-role");
        let lists = [
            LIST.to_owned(),
            LIST.trim_end_matches('/').to_owned(),
            LIST.replace("latest", "2018-09-24"),
            LIST.replace("meta-data", "/meta-data"),
        ];
        for list in lists {
            let reply = lab.ask(pod, &list);
            assert_eq!((reply.status, &reply.body), (200, &role), "{list}: no newline, no redirect");
        }
        for name in [role.clone(), format!("{role}/"), role_arn(&role)] {
            assert_eq!(lab.credentials(pod, &name), role, "{name}");
        }

        let reply = lab.ask_until_ready(pod, &format!("{LIST}{role}"));
        let expected = format!("arn:aws:sts::{}:assumed-role/{role}/{session}", Cloud::Aws.account());
        assert_eq!(lab.caller(&reply), expected);
        let keys: Vec<_> = reply.body.lines().filter_map(|line| line.split('"').nth(1)).collect();
        let documented =
            ["Code", "LastUpdated", "Type", "AccessKeyId", "SecretAccessKey", "Token", "Expiration"];
        assert_eq!(keys, documented, "{pod}: as EC2 writes it");
        let document: serde_json::Value = serde_json::from_str(&reply.body).unwrap();
        assert_eq!((&document["Code"], &document["Type"]), (&"Success".into(), &"AWS-HMAC".into()));
        let end: Timestamp = document["Expiration"].as_str().unwrap().parse().unwrap();
        assert!(end > Timestamp::now() + SignedDuration::from_mins(30), "SDKs stretch what ends sooner");
    }
    assert_eq!(lab.credentials("orders", "billing-role"), "403");
    assert_eq!(lab.credentials("orders", Accounts::NODE_ROLE), "403");
    assert_eq!(lab.leaks(), []);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_ipv6_endpoint_serves_the_same_as_the_ipv4_endpoint() {
    let pods = [pod("dual"), pod("six").ipv6_only(), pod("daemon").host_network()];
    let mut lab = Lab::with_agent("aws-ipv6", &pods, &[]);
    // Until its own listener is there, a pod without IPv4 cannot reach the host's.
    eventually(2.0, || lab.agent().unwrap().metric("kube2ram_pod_listeners").unwrap());
    let ask6 = |pod: &str, target: &str| lab.pod(pod).unwrap().curl6(target).unwrap();

    for pod in ["dual", "six", "daemon"] {
        let role = format!("{pod}-role");
        assert_eq!(lab.credentials(pod, &role), role, "{pod}: by IPv4");
        assert_eq!(ask6(pod, LIST).body, role, "{pod}");
        assert_eq!(owner(&ask6(pod, &format!("{LIST}{role}"))), role, "{pod}");
        assert_eq!(ask6(pod, &format!("{LIST}{}", Accounts::NODE_ROLE)).status, 403, "{pod}");
        assert_eq!(ask6(pod, INSTANCE_ID).body, Cloud::Aws.instance_id(), "{pod}: passed through");
        let mapped = lab.pod(pod).unwrap().curl_from("app", Family::V6Mapped, &url(LIST)).unwrap();
        assert_eq!(mapped.body, role, "{pod}");
    }
    assert_eq!(ask6("dual", &format!("{LIST}six-role")).status, 403);
    assert_eq!(lab.leaks(), []);
    // The control: processes of the host reach the server itself.
    assert_eq!(lab.host_curl_url(&url6(LIST)).unwrap().body, Accounts::NODE_ROLE);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_without_annotation_gets_404_and_one_in_the_hosts_network_the_nodes_role_unless_that_is_denied() {
    let pods = [PodSpec::new("plain"), PodSpec::new("cni").host_network(), pod("daemon").host_network()];
    let info = "/latest/meta-data/iam/info";
    for (flag, list, credentials, status) in
        [("pass", Accounts::NODE_ROLE, Accounts::NODE_ROLE, 200), ("deny", "the pod has no role", "404", 404)]
    {
        let lab = Lab::with_agent("aws-cni", &pods, &[&format!("--host-network-pods={flag}")]);

        assert_eq!(lab.ask("cni", LIST).body.trim(), list, "{flag}");
        assert_eq!(lab.credentials("cni", Accounts::NODE_ROLE), credentials, "{flag}");
        let read = lab.ask("cni", info);
        assert_eq!(read.status, status, "{flag}: what goes with the node's role: {read:?}");
        assert_eq!(read.body.contains(":instance-profile/"), status == 200, "{flag}: {read:?}");
        assert_eq!(lab.ask("plain", LIST).status, 404, "{flag}: Rust's SDK goes on to its next source");
        assert_eq!(lab.credentials("plain", Accounts::NODE_ROLE), "404", "{flag}");
        assert_eq!(lab.credentials("daemon", "daemon-role"), "daemon-role", "{flag}");
        assert_eq!(lab.credentials("daemon", Accounts::NODE_ROLE), "403", "{flag}");
        for pod in ["plain", "daemon"] {
            assert_eq!(lab.ask(pod, info).status, 404, "{flag}: {pod}");
        }
        // Closed to everybody: the keys of the instance itself sign as the node.
        let own = "/latest/meta-data/identity-credentials/ec2/security-credentials/ec2-instance";
        for pod in ["plain", "cni", "daemon"] {
            assert_eq!(lab.ask(pod, own).status, 404, "{flag}: {pod}");
        }
        assert_eq!(lab.leaks(), []);
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_annotations_of_kube2iam_name_role_external_id_and_allow_list() {
    let key = |name| Cloud::Aws.annotation(name);
    let pods = [
        pod("orders").annotation(&key("external-id"), "team-7"),
        pod("locked"),
        // Not this cloud's.
        PodSpec::new("other").annotation("ram.aliyuncs.com/role", "orders-role"),
    ];
    let mut lab = Lab::new("aws-annotations", &pods);
    let trusting = Role { external_id: Some("team-7".to_owned()), ..Role::default() };
    lab.accounts().add_role(role_arn("orders-role"), trusting);
    let list = key("allowed-roles");
    lab.api().apply_namespace("default", &[(&*list, r#"["orders-*"]"#)]).unwrap();
    lab.start(&["--namespace-restrictions"]);

    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
    assert_eq!(lab.ask("locked", LIST).status, 403);
    assert_eq!(lab.ask("other", LIST).status, 404);

    let calls = lab.sts().assumed(&role_arn("orders-role"));
    assert_eq!((calls.len(), calls[0].param("ExternalId")), (1, Some("team-7")), "{calls:?}");
    assert_eq!(calls[0].param("DurationSeconds"), Some("3600"), "the most that a role's session gets");
    assert_eq!(lab.sts().assumed(&role_arn("locked-role")), []);
}

/// What most of kube2iam's questions are about.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn tokens_that_are_required_and_make_one_hop_are_no_concern_of_pods() {
    let pods = [pod("orders"), PodSpec::new("cni").host_network()];
    let mut lab = Lab::new("aws-one-hop", &pods);
    lab.metadata().set_hop_limit(1);
    lab.metadata().set_tokens(Tokens::Required);
    let put = |lab: &Lab, pod| lab.request(pod, "PUT", &url(TOKEN), &[(TTL_HEADER, "60")]);
    // Without an agent, the answer does not reach a pod's own network.
    assert!(put(&lab, "orders").is_err());
    assert_eq!(put(&lab, "cni").unwrap().status, 200);
    assert_eq!(lab.ask("orders", LIST).status, 401);
    let asked = lab.metadata().seen().len();

    lab.start(&[]);

    // The connection whose answer got lost is being closed, until the guards are there.
    let leaked = lab.leaks().len();
    // Twice: before and after the real server has forgotten the agent's token.
    for _ in 0..2 {
        assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
        assert_eq!(lab.ask("orders", INSTANCE_ID).body, Cloud::Aws.instance_id(), "without a token");
        assert_eq!(lab.credentials("cni", Accounts::NODE_ROLE), Accounts::NODE_ROLE);
        lab.metadata().forget_tokens();
    }
    assert_eq!(put(&lab, "orders").unwrap().status, 200);
    let seen = lab.metadata().seen().split_off(asked);
    // A policy can give what is fetched without a token fewer rights.
    assert!(seen.iter().all(|seen| seen.method == "PUT" || seen.headers.contains_key(TOKEN_HEADER)));
    assert_eq!(lab.leaks()[leaked..], []);
    assert_eq!(lab.host_curl(INSTANCE_ID).unwrap().status, 401, "the real server requires tokens");
}
