//! STS as AWS has it: regions that are off, sessions that end, and answers that take longer than the most
//! impatient SDK waits.

use std::{
    fs,
    net::TcpListener,
    thread,
    time::{Duration, Instant},
};

use http::StatusCode;
use kube2ram_sandbox::{
    Cloud,
    node::PodSpec,
    standin::{Authority, OidcIssuer, OidcTrust, Role, StsMode},
};

use crate::support::{LIST, Lab, eventually, owner, pod, role_arn};

/// The region's endpoint and the global one, and where they are here.
const ENDPOINTS: [(&str, &str); 2] =
    [("sts.eu-west-1.amazonaws.com", "127.0.1.1:443"), ("sts.amazonaws.com", "127.0.1.2:443")];

#[test]
#[ignore = "needs root: cargo xtask test"]
fn where_sts_is_off_in_the_region_the_global_endpoint_is_asked() {
    let mut lab = Lab::new("aws-region-off", &[pod("early"), pod("late"), pod("later")]);
    let global = lab.sts_for_pods().unwrap();
    let authority = Authority::new().unwrap();
    let upstreams = [lab.sts().url(), global.url()];
    let fronts = ENDPOINTS.iter().zip(&upstreams).map(|((name, addr), upstream)| {
        let upstream = upstream.trim_start_matches("http://").parse().unwrap();
        authority.front(TcpListener::bind(addr).unwrap(), upstream, &[name]).unwrap()
    });
    let _fronts: Vec<_> = fronts.collect();
    let directory = tempfile::tempdir().unwrap();
    let (hosts, bundle) = (directory.path().join("hosts"), directory.path().join("ca.pem"));
    let lines = ENDPOINTS.map(|(name, addr)| format!("{} {name}\n", addr.trim_end_matches(":443")));
    fs::write(&hosts, lines.concat()).unwrap();
    fs::write(&bundle, authority.pem()).unwrap();
    lab.prepare(&[]);
    let agent = lab.agent().unwrap();
    // The endpoints by their names, as on a node.
    agent.remove_flag("--sts-endpoint");
    let script = format!("mount --bind {} /etc/hosts && exec \"$@\"", hosts.display());
    agent.set_wrapper(&["unshare", "--mount", "--", "sh", "-c", &script, "sh"]);
    agent.set_env("SSL_CERT_FILE", bundle.to_str().unwrap());
    agent.start().unwrap();
    assert_eq!(lab.credentials("early", "early-role"), "early-role");
    assert!(global.calls().is_empty(), "the region's own comes first: {:?}", global.calls());

    lab.sts().set_mode(StsMode::Error(StatusCode::FORBIDDEN, "RegionDisabledException")).unwrap();
    // Another process remembers nothing of before.
    lab.agent().unwrap().restart(None).unwrap();
    for pod in ["late", "later"] {
        assert_eq!(lab.credentials(pod, &format!("{pod}-role")), format!("{pod}-role"));
    }

    // Its stand-in takes signatures for us-east-1 alone.
    for pod in ["late", "later"] {
        let calls = global.assumed(&role_arn(&format!("{pod}-role")));
        assert_eq!((calls.len(), &*calls[0].outcome), (1, "OK"), "{calls:?}");
    }
    let refused = lab.sts().assumed(&role_arn("late-role"));
    let codes: Vec<_> = refused.iter().map(|call| call.outcome.as_str()).collect();
    assert!(codes.ends_with(&["RegionDisabledException"]), "{codes:?}");
}

/// As long as credentials last here: asked for again after 24 to 29 s.
const LIFETIME: Duration = Duration::from_secs(60);

#[test]
#[ignore = "needs root: cargo xtask test"]
fn credentials_are_refreshed_once_before_their_end_without_a_pod_noticing() {
    let mut lab = Lab::new("aws-refresh", &[pod("orders")]);
    lab.sts().set_lifetime(Some(LIFETIME));
    lab.start(&[]);
    let target = format!("{LIST}orders-role");
    let first = lab.ask_until_ready("orders", &target).body;
    let begun = Instant::now();

    let second = loop {
        let reply = lab.ask("orders", &target);
        assert_eq!(owner(&reply), "orders-role", "after {:?}", begun.elapsed());
        if reply.body != first {
            break reply;
        }
        assert!(begun.elapsed() < LIFETIME, "still the first ones");
        thread::sleep(Duration::from_millis(200));
    };

    assert!(lab.caller(&second).contains("assumed-role/orders-role/"));
    assert_eq!(lab.sts().assumed(&role_arn("orders-role")).len(), 2, "one call for each");
}

/// Go's SDK gives up without a response's head after this long.
const PATIENCE: Duration = Duration::from_millis(500);

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_cold_miss_while_sts_takes_400_ms_is_answered_before_sdks_give_up() {
    const PODS: [&str; 5] = ["one", "two", "three", "four", "five"];
    let mut lab = Lab::with_agent("aws-slow", &[], &[]);
    lab.sts().set_mode(StsMode::Slow(Duration::from_millis(400))).unwrap();

    let mut late = Vec::new();
    for name in PODS {
        lab.add(&pod(name));
        let reply = lab.ask(name, &format!("{LIST}{name}-role"));
        let took = Duration::from_micros(reply.latency_us);
        assert!([200, 503].contains(&reply.status), "{reply:?}");
        assert_eq!(reply.status == 503, reply.headers.contains_key("retry-after"), "{reply:?}");
        println!("{name}: {} after {took:?}", reply.status);
        // Of a client's own start on a busy machine, which is not the agent's.
        assert!(took < 2 * PATIENCE, "{reply:?}");
        late.extend((took >= PATIENCE).then_some(took));
        // What was begun goes on.
        eventually(format!("{name}-role"), || owner(&lab.ask(name, &format!("{LIST}{name}-role"))));
    }

    assert!(late.len() <= 1, "{late:?}");
    for name in PODS {
        assert_eq!(lab.sts().assumed(&role_arn(&format!("{name}-role"))).len(), 1, "{name}");
    }
}

const SUBJECT: &str = "system:serviceaccount:kube-system:kube2ram";

/// IRSA for the agent itself, on a node whose role may assume nothing.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_agents_own_web_identity_serves_pods_where_the_nodes_role_may_assume_nothing() {
    let mut lab = Lab::new("aws-irsa", &[pod("orders"), PodSpec::new("plain")]);
    let issuer = OidcIssuer::new("https://oidc.eks.eu-west-1.amazonaws.com/id/C0123").unwrap();
    let provider = Cloud::Aws.provider_arn("oidc.eks.eu-west-1.amazonaws.com/id/C0123");
    lab.accounts().add_provider(&provider, issuer.provider_in(Cloud::Aws));
    let oidc = Some(OidcTrust::equals(provider, SUBJECT));
    lab.accounts().add_role(role_arn("kube2ram"), Role { oidc, may_assume: true, ..Role::default() });
    lab.accounts().deny_node();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("token");
    let hour = jiff::Timestamp::now() + jiff::SignedDuration::from_hours(1);
    let token = issuer.token(SUBJECT, Cloud::Aws.audience(), hour).unwrap();
    fs::write(&file, &token).unwrap();
    lab.prepare(&[]);
    // The twin: without it, nobody is served.
    lab.agent().unwrap().start().unwrap();
    assert_eq!(lab.credentials("orders", "orders-role"), "403");

    let agent = lab.agent().unwrap();
    agent.terminate().unwrap();
    agent.set_env("AWS_ROLE_ARN", &role_arn("kube2ram"));
    agent.set_env("AWS_WEB_IDENTITY_TOKEN_FILE", file.to_str().unwrap());
    agent.start().unwrap();

    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
    assert_eq!(lab.ask("plain", LIST).status, 404);
    let calls = lab.sts().calls();
    let exchanged = calls.iter().filter(|call| call.action == "AssumeRoleWithWebIdentity").count();
    assert_eq!(exchanged, 1, "{calls:?}");
    let signer = &calls.last().unwrap().access_key_id;
    assert!(signer.starts_with("ASIA.kube2ram."), "{signer}");
    assert!(!lab.agent().unwrap().log().contains(token.rsplit('.').next().unwrap()));
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn static_keys_sign_sessions_of_a_user_which_no_hour_bounds() {
    let orders = pod("orders").annotation(&Cloud::Aws.annotation("session-duration"), "4h");
    let mut lab = Lab::new("aws-static-keys", &[orders]);
    let max_session = Duration::from_secs(12 * 3600);
    lab.accounts().add_role(role_arn("orders-role"), Role { max_session, ..Role::default() });
    let key = lab.accounts().add_user("kube2ram");
    lab.prepare(&[]);
    // The twin: keys of the node's role chain roles, and get an hour.
    lab.agent().unwrap().start().unwrap();
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
    let seconds = |lab: &Lab| {
        let calls = lab.sts().assumed(&role_arn("orders-role"));
        let issued = calls.iter().rfind(|call| call.outcome == "OK").unwrap();
        (issued.access_key_id.clone(), issued.param("DurationSeconds").map(str::to_owned))
    };
    assert_eq!(seconds(&lab).1.as_deref(), Some("3600"));

    let agent = lab.agent().unwrap();
    agent.terminate().unwrap();
    agent.set_env("AWS_ACCESS_KEY_ID", &key.id);
    agent.set_env("AWS_SECRET_ACCESS_KEY", &key.secret);
    agent.start().unwrap();

    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
    assert_eq!(seconds(&lab), (key.id.clone(), Some("14400".to_owned())));
}
