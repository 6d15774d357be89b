//! Who a connection belongs to: each kind of pod gets its own role, wherever its process sits.

use kube2ram_sandbox::{
    client::Family,
    node::{CgroupDriver, PodSpec, Qos},
    standin::Accounts,
};

use crate::support::{LIST, Lab, owner, run, url};

fn orders() -> PodSpec {
    PodSpec::new("orders")
        .namespace("shop")
        .service_account("orders-sa")
        .role("orders-role")
        .containers(&["app", "sidecar"])
}

fn billing() -> PodSpec {
    PodSpec::new("billing").namespace("pay").service_account("billing-sa").role("billing-role")
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn each_pod_gets_its_own_role_and_sts_knows_it_by_its_service_account() {
    let lab = Lab::with_agent("own-role", &[orders(), billing()], &[]);

    for (pod, role, session) in
        [("orders", "orders-role", "shop.orders-sa"), ("billing", "billing-role", "pay.billing-sa")]
    {
        assert_eq!(lab.ask(pod, LIST).body, role);
        let credentials = lab.ask(pod, &format!("{LIST}{role}"));

        let uid = Accounts::UID;
        assert_eq!(lab.caller(&credentials), format!("acs:ram::{uid}:assumed-role/{role}/{session}"));
        assert_eq!(credentials.headers["content-type"], "application/json");
    }
    assert_eq!(lab.leaks(), []);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn all_containers_of_a_pod_have_its_role_and_so_has_a_cgroup_of_their_own_making() {
    let lab = Lab::with_agent("containers", &[orders(), billing()], &[]);
    let pod = lab.pod("orders").unwrap();
    let own = format!("{LIST}orders-role");

    for container in ["app", "sidecar"] {
        assert_eq!(owner(&pod.curl_from(container, Family::V4, &url(&own)).unwrap()), "orders-role");
        assert_eq!(owner(&pod.curl_nested(container, &own).unwrap()), "orders-role");
        assert_eq!(pod.curl_nested(container, &format!("{LIST}billing-role")).unwrap().status, 403);
    }
    assert_eq!(lab.leaks(), []);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_nested_cgroup_that_is_called_like_another_pod_is_still_the_outer_pods() {
    let lab = Lab::with_agent("nested", &[orders(), billing()], &[]);
    let victim = lab.pod("billing").unwrap().pod().spec().uid.clone();
    let pod = lab.pod("orders").unwrap().pod();
    let nested = format!("kubepods/burstable/pod{victim}/app");

    let ask = |target: &str| {
        let mut curl = pod.nested_command("app", &nested, "curl").unwrap();
        run(curl.args(["--silent", "--write-out", " %{http_code}", &url(target)])).1
    };

    assert_eq!(ask(LIST), "orders-role 200");
    assert!(ask(&format!("{LIST}billing-role")).ends_with(" 403"));
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_annotated_host_network_pod_gets_its_own_role() {
    let daemon = PodSpec::new("daemon").role("daemon-role").host_network();
    let lab = Lab::with_agent("host-network", &[daemon, orders()], &[]);

    assert_eq!(lab.ask("daemon", LIST).body, "daemon-role");
    assert_eq!(lab.credentials("daemon", "daemon-role"), "daemon-role");
    assert_eq!(lab.credentials("daemon", "orders-role"), "403");
    assert_eq!(lab.credentials("daemon", Accounts::NODE_ROLE), "403");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_unannotated_host_network_pod_keeps_the_nodes_role_unless_that_is_denied() {
    let pods = [PodSpec::new("cni").host_network(), PodSpec::new("plain")];
    for (flag, list, credentials) in
        [("pass", Accounts::NODE_ROLE, Accounts::NODE_ROLE), ("deny", "the pod has no role", "404")]
    {
        let lab = Lab::with_agent("cni", &pods, &[&format!("--host-network-pods={flag}")]);

        assert_eq!(lab.ask("cni", LIST).body.trim(), list, "{flag}");
        assert_eq!(lab.credentials("cni", Accounts::NODE_ROLE), credentials, "{flag}");
        assert_eq!(lab.ask("plain", LIST).status, 404, "{flag}: no pod of its own network ever has it");
        assert_eq!(lab.credentials("plain", Accounts::NODE_ROLE), "404", "{flag}");
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_host_network_pod_with_the_nodes_role_reads_the_identity_document_and_others_do_not() {
    let document = "/latest/dynamic/instance-identity/document";
    let pods = [
        PodSpec::new("csi").host_network(),
        PodSpec::new("own").role("own-role").host_network(),
        PodSpec::new("plain"),
    ];
    for policy in ["standard", "strict"] {
        let lab = Lab::with_agent("identity-document", &pods, &[&format!("--metadata-policy={policy}")]);

        for target in [document, "/latest/dynamic/instance-identity/pkcs7", "/latest/meta-data/image-id"] {
            assert_eq!(lab.ask("csi", target).status, 200, "{policy} {target}");
        }
        assert!(lab.ask("csi", document).body.contains("instance-id"), "{policy}");
        assert_eq!(lab.ask("csi", "/latest/user-data").status, 403, "{policy}");
        for pod in ["own", "plain"] {
            assert_eq!(lab.ask(pod, document).status, 403, "{policy} {pod}");
        }
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn both_cgroup_drivers_and_all_qos_classes_are_understood() {
    for driver in [CgroupDriver::Cgroupfs, CgroupDriver::Systemd] {
        let classes = [
            (Qos::BestEffort, "best-effort"),
            (Qos::Burstable, "burstable"),
            (Qos::Guaranteed, "guaranteed"),
        ];
        let pods = classes.map(|(qos, name)| PodSpec::new(name).role(&format!("{name}-role")).qos(qos));
        let mut lab = Lab::with_driver("drivers", driver, &pods);
        lab.start(&[]);

        for (_, name) in classes {
            assert_eq!(lab.ask(name, LIST).body, format!("{name}-role"), "{driver:?}");
        }
        let nested = lab.pod("guaranteed").unwrap().curl_nested("app", LIST).unwrap();
        assert_eq!(nested.body, "guaranteed-role", "{driver:?}");
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_static_pod_has_the_role_of_its_mirror() {
    for driver in [CgroupDriver::Cgroupfs, CgroupDriver::Systemd] {
        let proxy = PodSpec::new("proxy").role("proxy-role").static_pod();
        let hash = proxy.uid.clone();
        // Who copies the hash without being a mirror is not believed.
        let thief = PodSpec::new("thief").role("thief-role").annotation("kubernetes.io/config.hash", &hash);
        let mut lab = Lab::with_driver("static", driver, &[proxy, thief]);
        lab.start(&[]);

        assert_eq!(lab.ask("proxy", LIST).body, "proxy-role", "{driver:?}");
        assert_eq!(lab.credentials("proxy", "proxy-role"), "proxy-role");
        assert_eq!(lab.credentials("thief", "proxy-role"), "403");
        assert_eq!(lab.credentials("thief", "thief-role"), "thief-role");
    }
}
