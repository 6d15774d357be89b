//! The agent signs with its own role, by the token of its service account, on a node whose role may assume
//! nothing.

use std::fs;

use jiff::{SignedDuration, Timestamp};
use kube2ram_sandbox::{
    node::PodSpec,
    standin::{Accounts, OidcIssuer, OidcTrust, Role},
};
use tempfile::TempDir;

use crate::support::{LIST, Lab, eventually};

const SUBJECT: &str = "system:serviceaccount:kube-system:kube2ram";

/// A cluster with RRSA, and the file of the agent's token.
struct Cluster {
    issuer: OidcIssuer,
    directory: TempDir,
}

impl Cluster {
    /// Its provider, the agent's role, and a node whose own role may assume nothing.
    fn of(lab: &Lab) -> Self {
        let issuer = OidcIssuer::new("https://oidc.example.com/c0123").unwrap();
        let provider = Accounts::provider_arn("ack-rrsa-c0123");
        lab.accounts().add_provider(&provider, issuer.provider());
        let oidc = Some(OidcTrust::equals(provider, SUBJECT));
        let role = Role { oidc, may_assume: true, ..Role::default() };
        lab.accounts().add_role(Accounts::role_arn("kube2ram"), role);
        lab.accounts().deny_node();
        Self { issuer, directory: tempfile::tempdir().unwrap() }
    }

    /// What the kubelet does, within an hour's time of it.
    fn mount(&self, left: SignedDuration) -> String {
        let token = self.issuer.token(SUBJECT, OidcIssuer::AUDIENCE, Timestamp::now() + left).unwrap();
        fs::write(self.directory.path().join("token"), &token).unwrap();
        token
    }

    /// What RRSA's webhook, or the manifest, sets.
    fn variables(&self) -> [(&'static str, String); 3] {
        let file = self.directory.path().join("token");
        [
            ("ALIBABA_CLOUD_ROLE_ARN", Accounts::role_arn("kube2ram")),
            ("ALIBABA_CLOUD_OIDC_PROVIDER_ARN", Accounts::provider_arn("ack-rrsa-c0123")),
            ("ALIBABA_CLOUD_OIDC_TOKEN_FILE", file.to_str().unwrap().to_owned()),
        ]
    }

    fn configure(&self, lab: &mut Lab) {
        for (name, value) in self.variables() {
            lab.agent().unwrap().set_env(name, &value);
        }
    }
}

fn orders() -> PodSpec {
    PodSpec::new("orders").role("orders-role")
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_agents_own_role_serves_pods_where_the_nodes_may_assume_nothing() {
    let mut lab = Lab::new("oidc", &[orders()]);
    let cluster = Cluster::of(&lab);
    let token = cluster.mount(SignedDuration::from_hours(1));
    lab.prepare(&["--log-level=trace", "--debug"]);
    cluster.configure(&mut lab);
    lab.agent().unwrap().start().unwrap();

    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");

    let calls = lab.sts().calls();
    let exchanged: Vec<_> = calls.iter().filter(|call| call.action == "AssumeRoleWithOIDC").collect();
    assert_eq!(exchanged.len(), 1, "{calls:?}");
    assert!(exchanged[0].param("RoleSessionName").unwrap().starts_with("kube2ram@"), "{exchanged:?}");
    let signer = &lab.sts().assumed(&Accounts::role_arn("orders-role"))[0].access_key_id;
    assert!(signer.starts_with("STS.kube2ram."), "{signer}");
    let asked = lab.metadata().seen();
    let is_foreign = |target: &str| target.contains("security-credentials") || target.contains("account-id");
    assert!(!asked.iter().any(|seen| is_foreign(&seen.target)), "the account is in the ARN: {asked:?}");

    let (_, status) = lab.document(&["status"]);
    let base = &status["base_credentials"];
    assert_eq!((&base["source"], &base["role"]), (&"oidc".into(), &"kube2ram".into()), "{base}");
    assert!(base["expires_at"].is_string() && base["account"] == Accounts::UID, "{base}");
    assert_eq!(lab.metric(r#"kube2ram_base_credentials{source="oidc"}"#), 1.0);
    let told = lab.kube2ram(&["status"]).1;
    assert!(told.contains("the agent's own role kube2ram (OIDC)"), "{told}");
    let store = lab.kube2ram(&["store"]).1;
    let agent = lab.agent().unwrap();
    let page = store + &agent.admin("/metrics").unwrap().body;
    let signature = token.rsplit('.').next().unwrap();
    for text in [agent.log(), told, page, status.to_string()] {
        assert!(!text.contains(signature), "the token is told: {text}");
    }
}

/// The twin of the above.
#[test]
#[ignore = "needs root: cargo xtask test"]
fn without_it_a_node_whose_role_may_assume_nothing_serves_nobody() {
    let mut lab = Lab::new("oidc-twin", &[orders()]);
    let _cluster = Cluster::of(&lab);
    lab.start(&[]);

    assert_eq!(lab.ask("orders", &format!("{LIST}orders-role")).status, 403);

    let calls = lab.sts().calls();
    assert!(
        calls.iter().all(|call| call.action == "AssumeRole" && call.outcome == "NoPermission"),
        "{calls:?}"
    );
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_token_that_has_expired_is_reported_and_the_next_one_used() {
    let mut lab = Lab::new("oidc-expired", &[orders()]);
    let cluster = Cluster::of(&lab);
    cluster.mount(SignedDuration::from_secs(-1));
    lab.prepare(&[]);
    cluster.configure(&mut lab);
    lab.agent().unwrap().start().unwrap();

    assert_eq!(lab.ask("orders", &format!("{LIST}orders-role")).status, 503);
    let (code, status) = lab.document(&["status"]);
    let failure = status["base_credentials"]["failure"].as_str().unwrap();
    assert!(failure.contains("OIDCToken.Expired") && failure.contains("kubelet renews it"), "{failure}");
    assert_eq!(code, Some(1), "{status:#}");

    // In the same file, as the kubelet does it. The agent runs on.
    cluster.mount(SignedDuration::from_hours(1));

    eventually(200, || lab.ask("orders", &format!("{LIST}orders-role")).status);
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_variable_that_is_missing_stops_the_agent_instead_of_the_nodes_role_stepping_in() {
    let mut lab = Lab::new("oidc-half", &[orders()]);
    let cluster = Cluster::of(&lab);
    cluster.mount(SignedDuration::from_hours(1));
    lab.prepare(&[]);
    for (name, value) in &cluster.variables()[..2] {
        lab.agent().unwrap().set_env(name, value);
    }

    let error = lab.agent().unwrap().start().unwrap_err().to_string();

    assert!(error.contains("exit status: 64"), "{error}");
    assert!(error.contains("ALIBABA_CLOUD_OIDC_TOKEN_FILE is not"), "{error}");
    // The twin.
    let (name, value) = &cluster.variables()[2];
    lab.agent().unwrap().set_env(name, value);
    lab.agent().unwrap().start().unwrap();
    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
}
