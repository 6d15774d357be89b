//! The predecessors' way on clusters whose pods are not redirected: `http_proxy` names the agent's address on
//! the node.

use kube2ram_sandbox::{
    client::Family,
    node::PodSpec,
    standin::{Accounts, Role},
};

use crate::support::{INSTANCE_ID, LIST, Lab, run, url};

fn pods() -> [PodSpec; 4] {
    [
        PodSpec::new("orders").role("orders-role"),
        PodSpec::new("billing").role("billing-role"),
        PodSpec::new("daemon").role("daemon-role").host_network(),
        PodSpec::new("plain"),
    ]
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pod_that_uses_the_agent_as_its_proxy_gets_its_own_role() {
    let mut lab = Lab::with_agent("proxy", &pods(), &[]);
    let agent = lab.agent().unwrap().app_addr().to_string();
    let proxied = |pod: &str, target: &str| {
        lab.curl(
            pod,
            &["--silent", "--proxy", &agent, "--write-out", " %{http_code} %{remote_ip}", &url(target)],
        )
    };
    let node_ip = lab.node().ip();

    for (pod, role) in [("orders", "orders-role"), ("billing", "billing-role"), ("daemon", "daemon-role")] {
        let answer = proxied(pod, LIST);
        assert_eq!(
            answer,
            (Some(0), format!("{role} 200 {node_ip}")),
            "{pod}: the peer is the one it dialled"
        );
        let document = proxied(pod, &format!("{LIST}{role}")).1;
        assert!(document.contains(&format!("STS.{role}.")), "{pod}: {document}");
    }
    assert_eq!(proxied("orders", INSTANCE_ID).1, format!("i-bp1sandbox0000000001 200 {node_ip}"));
    for (pod, role, status) in
        [("orders", "billing-role", 403), ("orders", Accounts::NODE_ROLE, 403), ("plain", "orders-role", 404)]
    {
        let answer = proxied(pod, &format!("{LIST}{role}")).1;
        assert!(answer.ends_with(&format!(" {status} {node_ip}")), "{pod} {role}: {answer}");
    }
    assert_eq!(lab.leaks(), []);
    assert_eq!(lab.metric("kube2ram_kernel_outcomes_total{outcome=\"dialled_agent\"}"), 10.0);
    assert_eq!(lab.metric("kube2ram_unvouched_connections_total"), 0.0);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_environment_of_the_predecessors_pods_works() {
    let mut lab = Lab::with_agent("proxy-env", &pods(), &[]);
    let agent = lab.agent().unwrap().app_addr();
    // As OpenShift's documentation of the predecessors has it; a JVM's socket is IPv4-mapped.
    let script = format!(
        "from urllib.request import urlopen; print(urlopen('{}', timeout=1).read().decode())",
        url(LIST)
    );

    let mut python = lab.pod("orders").unwrap().pod().command("app", "python3").unwrap();
    python.env("http_proxy", format!("http://{agent}")).args(["-c", &script]);
    let mapped = lab
        .pod("billing")
        .unwrap()
        .curl_from("app", Family::V6Mapped, &format!("http://{agent}{LIST}"))
        .unwrap();

    assert_eq!(run(&mut python), (Some(0), "orders-role".into()));
    assert_eq!((mapped.status, mapped.body.as_str()), (200, "billing-role"));
    assert_eq!(lab.metric("kube2ram_kernel_outcomes_total{outcome=\"dialled_agent\"}"), 2.0);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_agent_is_a_proxy_to_nowhere_else() {
    let mut lab = Lab::with_agent("proxy-else", &pods(), &[]);
    lab.accounts().add_role(Accounts::role_arn(Accounts::NODE_ROLE), Role::default());
    let agent = lab.agent().unwrap().app_addr();
    let (proxy, admin) = (agent.to_string(), lab.agent().unwrap().admin_addr());
    let status = |args: &[&str]| {
        let args = [&["--silent", "--output", "/dev/null", "--proxy", &proxy, "--write-out"], args].concat();
        lab.curl("orders", &args).1
    };

    for other in ["http://example.com/", &format!("http://{agent}{LIST}"), &format!("http://{admin}/metrics")]
    {
        assert_eq!(status(&["%{http_code}", other]), "400", "{other}");
    }
    assert_eq!(status(&["%{http_connect}", "https://example.com/"]), "405");
    assert_eq!(status(&["%{http_code}", &url(LIST)]), "200");
}
