//! The whole way from a configuration to an ExecCredential, against the STS stand-in.

use std::fs;

use kube2ram_cloud::StsClient;
use kube2ram_sandbox::{
    clock::Clock as SandboxClock,
    standin::{AccessKey, Accounts, Bind, Role, Sts},
};
use kube2ram_service::clock::SystemClock;
use prometheus_client::registry::Registry;
use serde_json::Value;
use tokio_util::task::TaskTracker;

use super::*;
use crate::{
    identity::Identity,
    testing::CLUSTER,
    verify::{MAX_TTL, Rates, Settings, Verifier},
};

struct Bench {
    accounts: Arc<Accounts>,
    sts: Sts,
    home: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let accounts = Arc::new(Accounts::new(SandboxClock::default()));
        accounts.add_role(Accounts::role_arn("admin"), Role::default());
        let sts = Sts::start(Bind::loopback(), Arc::clone(&accounts)).unwrap();
        Self { accounts, sts, home: tempfile::tempdir().unwrap() }
    }

    fn endpoint(&self) -> Endpoint {
        Endpoint::parse(&self.sts.url()).unwrap()
    }

    fn request(&self) -> Request {
        Request {
            cluster: ClusterId::parse(CLUSTER).unwrap(),
            role: None,
            version: Version::V1Beta1,
            options: Options::default(),
            sts: StsChoice::Only(self.endpoint()),
            cache: Some(self.home.path().join(".kube/cache/kube2ram-authenticator")),
        }
    }

    fn as_admin(&self) -> Request {
        let role = AssumedRole {
            role: RoleArn::parse(&Accounts::role_arn("admin")).unwrap(),
            session: SessionName::parse("alice@laptop").unwrap(),
            external_id: None,
        };
        Request { role: Some(role), ..self.request() }
    }

    async fn token(&self, request: Request, variables: &[(&str, &str)]) -> Result<Value, ClientError> {
        let variable = |name: &str| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        };
        let home = Some(self.home.path().to_owned());
        let document = token(request, variable, home, Arc::new(SystemClock)).await?;
        Ok(serde_json::from_str(&document).unwrap())
    }

    /// Whom our own server takes a token for.
    async fn identity(&self, document: &Value) -> Identity {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let client = StsClient::try_new(false).unwrap();
        let sts = kube2ram_cloud::alibaba::caller_identity::CallerIdentityClient::new(
            client,
            vec![self.endpoint()],
            Arc::clone(&clock),
        );
        let settings = Settings { cache_ttl: MAX_TTL, rates: Rates::default() };
        let cluster = ClusterId::parse(CLUSTER).unwrap();
        let mut registry = Registry::default();
        let verifier = Verifier::new(cluster, settings, sts, clock, TaskTracker::new(), &mut registry);
        let verified = verifier.verify(document["status"]["token"].as_str().unwrap()).await.unwrap();
        (*verified.identity).clone()
    }

    fn assumed(&self) -> usize {
        self.sts.assumed(&Accounts::role_arn("admin")).len()
    }
}

fn variables(key: &AccessKey) -> [(&'static str, &str); 2] {
    [("ALIBABA_CLOUD_ACCESS_KEY_ID", &key.id), ("ALIBABA_CLOUD_ACCESS_KEY_SECRET", &key.secret)]
}

#[tokio::test]
async fn keys_of_the_environment_become_a_token_without_a_call() {
    let bench = Bench::new();
    let alice = bench.accounts.add_user("alice");

    let document = bench.token(bench.request(), &variables(&alice)).await.unwrap();

    assert_eq!(document["apiVersion"], "client.authentication.k8s.io/v1beta1");
    assert_eq!(bench.sts.calls().len(), 0);
    let end: Timestamp = document["status"]["expirationTimestamp"].as_str().unwrap().parse().unwrap();
    let left = end.duration_since(Timestamp::now());
    assert!(left <= TOKEN_LIFETIME && left > SignedDuration::from_mins(9), "{left}");
    let identity = bench.identity(&document).await;
    assert_eq!(&*identity.canonical_arn, "acs:ram::1234567890123456:user/alice");
    assert_eq!(fs::read_dir(bench.home.path()).unwrap().count(), 0, "nothing is kept");
}

#[tokio::test]
async fn a_role_is_assumed_once_for_many_tokens() {
    let bench = Bench::new();
    let alice = bench.accounts.add_user("alice");

    let document = bench.token(bench.as_admin(), &variables(&alice)).await.unwrap();
    bench.token(bench.as_admin(), &variables(&alice)).await.unwrap();

    let identity = bench.identity(&document).await;
    assert_eq!(&*identity.canonical_arn, "acs:ram::1234567890123456:role/admin");
    assert_eq!(identity.session_name.as_deref(), Some("alice@laptop"));
    assert_eq!(bench.assumed(), 1);
    let kept = bench.as_admin().cache.unwrap();
    let files: Vec<_> = fs::read_dir(kept).unwrap().map(|file| file.unwrap().path()).collect();
    assert_eq!(files.len(), 1);
    assert!(!fs::read_to_string(&files[0]).unwrap().contains(&alice.secret));
    let bob = bench.accounts.add_user("bob");
    bench.token(bench.as_admin(), &variables(&bob)).await.unwrap();
    assert_eq!(bench.assumed(), 2, "another user's own session");
}

#[tokio::test]
async fn many_runs_at_once_assume_a_role_once() {
    let bench = Bench::new();
    let alice = bench.accounts.add_user("alice");
    let variables = variables(&alice);

    let runs = (0..8).map(|_| bench.token(bench.as_admin(), &variables));
    for document in futures::future::join_all(runs).await {
        document.unwrap();
    }

    assert_eq!(bench.assumed(), 1);
}

#[tokio::test]
async fn without_a_cache_nothing_is_written() {
    let bench = Bench::new();
    let alice = bench.accounts.add_user("alice");

    for _ in 0..2 {
        let request = Request { cache: None, ..bench.as_admin() };
        bench.token(request, &variables(&alice)).await.unwrap();
    }

    assert_eq!(bench.assumed(), 2);
    assert_eq!(fs::read_dir(bench.home.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn a_profile_of_the_cli_is_found_in_the_home_directory() {
    let bench = Bench::new();
    let alice = bench.accounts.add_user("alice");
    fs::create_dir(bench.home.path().join(".aliyun")).unwrap();
    let profile = serde_json::json!({
        "current": "work",
        "profiles": [{
            "name": "work", "mode": "RamRoleArn", "access_key_id": alice.id, "access_key_secret": alice.secret,
            "ram_role_arn": Accounts::role_arn("admin"), "ram_session_name": "of-profile",
        }],
    });
    fs::write(bench.home.path().join(".aliyun/config.json"), profile.to_string()).unwrap();

    let document = bench.token(bench.request(), &[]).await.unwrap();

    assert_eq!(bench.identity(&document).await.session_name.as_deref(), Some("of-profile"));
}

#[tokio::test]
async fn follows_the_version_that_kubectl_names() {
    let bench = Bench::new();
    let alice = bench.accounts.add_user("alice");
    let info = r#"{"kind":"ExecCredential","apiVersion":"client.authentication.k8s.io/v1","spec":{"interactive":false}}"#;
    let mut variables = variables(&alice).to_vec();
    variables.push(("KUBERNETES_EXEC_INFO", info));

    let document = bench.token(bench.request(), &variables).await.unwrap();

    assert_eq!(document["apiVersion"], "client.authentication.k8s.io/v1");
}

#[tokio::test]
async fn a_role_that_does_not_trust_the_user_is_named() {
    let bench = Bench::new();
    let alice = bench.accounts.add_user("alice");
    let arn = Accounts::role_arn("admin");
    bench.accounts.add_role(arn.clone(), Role { trusts_node: false, ..Role::default() });

    let error = bench.token(bench.as_admin(), &variables(&alice)).await.unwrap_err();

    let text = kube2ram_service::telemetry::chain(&error);
    assert!(text.contains(&arn) && text.contains("NoPermission"), "{text}");
    assert!(!text.contains(&alice.secret));
}

#[test]
fn a_token_ends_with_its_keys() {
    let now: Timestamp = "2026-01-02T03:04:05Z".parse().unwrap();
    let minutes = SignedDuration::from_mins;

    assert_eq!(expiry(now, None), now + minutes(10));
    assert_eq!(expiry(now, Some(now + minutes(60))), now + minutes(10));
    assert_eq!(expiry(now, Some(now + minutes(3))), now + minutes(3));
}
