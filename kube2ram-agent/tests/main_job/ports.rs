//! Another process has a port of the agent's, as ingress-nginx has 8181.

use std::{net::TcpStream, process::Stdio};

use kube2ram_sandbox::node::PodSpec;
use serde_json::Value;

use crate::support::{Lab, eventually, run};

/// A pod's process that listens on a port of the node; ended with it.
struct Squatter(std::process::Child);

impl Squatter {
    fn start(lab: &Lab, pod: &str, port: u16) -> Self {
        let mut python = lab.pod(pod).unwrap().pod().command("app", "python3").unwrap();
        python.args(["-m", "http.server", &port.to_string()]);
        let squatter = Self(python.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        eventually(true, || TcpStream::connect((lab.node().ip(), port)).is_ok());
        squatter
    }
}

impl Drop for Squatter {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn lab(name: &str) -> Lab {
    let pods = [
        PodSpec::new("orders").role("orders-role"),
        PodSpec::new("daemon").role("daemon-role").host_network(),
        PodSpec::new("nginx").host_network(),
    ];
    let mut lab = Lab::new(name, &pods);
    lab.prepare(&[]);
    lab
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_taken_app_port_is_reported_and_pods_are_refused_until_it_is_free() {
    let mut lab = lab("app-port");
    let address = lab.agent().unwrap().app_addr();
    let nginx = Squatter::start(&lab, "nginx", address.port());

    lab.agent().unwrap().spawn().unwrap();

    let pending = "the port of --app-port";
    eventually(true, || lab.agent().unwrap().ready().is_err_and(|why| why.to_string().contains(pending)));
    let holder = format!("process python3 (pid {}) of pod default/nginx", nginx.0.id());
    eventually(holder.clone(), || {
        // The control socket is there a moment later than the probes'.
        let (_, text) = lab.kube2ram(&["status", "-o", "json"]);
        let status: Value = serde_json::from_str(&text).unwrap_or_default();
        status["agent"]["taken_ports"][0]["holder"].as_str().unwrap_or_default().to_owned()
    });
    let (code, text) = lab.kube2ram(&["status"]);
    let told = format!("cannot listen on 0.0.0.0:{} (--app-port): {holder} has the port", address.port());
    assert!(code == Some(1) && text.contains(&told), "{text}");
    // A pod that the host listener would serve is refused, and not sent to the process that listens instead.
    lab.assert_refused("daemon");
    // One with its own listener is served.
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
    assert_eq!(lab.agent().unwrap().live().unwrap(), "live", "a restart would not help");
    assert!(lab.agent().unwrap().admin("/readyz").unwrap().body.contains(pending));
    assert_eq!(lab.leaks(), []);

    drop(nginx);
    lab.agent().unwrap().await_ready().unwrap();

    assert_eq!(lab.credentials("daemon", "daemon-role"), "daemon-role");
    assert_eq!(lab.document(&["status"]).1["agent"]["taken_ports"], serde_json::json!([]));
    for kind in ["config", "targets"] {
        let repairs = format!(r#"kube2ram_datapath_repairs_total{{kind="{kind}"}}"#);
        assert_eq!(lab.metric(&repairs), 0.0, "{kind}: nobody else changed it");
    }
    let log = lab.agent().unwrap().log();
    assert_eq!(log.matches("another process has the agent's port").count(), 1, "one line a minute");
    assert_eq!(lab.leaks(), []);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_taken_metrics_port_keeps_no_pod_from_its_role_and_does_not_stop_an_upgrade() {
    let mut lab = lab("metrics-port");
    let port = lab.agent().unwrap().admin_addr().port();
    let nginx = Squatter::start(&lab, "nginx", port);

    lab.agent().unwrap().spawn().unwrap();

    let pending = "the port of --metrics-port";
    eventually(true, || lab.agent().unwrap().ready().is_err_and(|why| why.to_string().contains(pending)));
    eventually("daemon-role".to_owned(), || lab.credentials("daemon", "daemon-role"));
    // Without this listener nothing is handed over. The next agent starts as after a crash.
    assert_eq!(lab.agent().unwrap().terminate().unwrap().code(), Some(0));
    lab.assert_refused("orders");
    drop(nginx);
    lab.agent().unwrap().start().unwrap();

    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
    assert_eq!(lab.leaks(), []);
    let (_, links) = run(std::process::Command::new("ss").args(["-Hltn", &format!("sport = :{port}")]));
    assert!(links.contains(&port.to_string()), "{links}");
}
