//! Logins over TLS against the STS stand-in, which checks every signature by its own code. The server is the
//! whole one but its backends; the client's tokens are signed with keys of the stand-in's account.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

mod bench;
mod load;
mod process;

use std::{fs, sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use kube2ram_authenticator::{
    tls,
    token::{ClusterId, presign},
};
use kube2ram_cloud::{
    Base, BaseCredentials, Endpoint, StsClient,
    alibaba::sts::StsIssuer,
    credentials::Issuer as _,
    role::{Grant, RoleArn, RoleSession, SessionName},
};
use kube2ram_sandbox::{
    login::review,
    standin::{Accounts, Role, StsMode},
};
use kube2ram_service::clock::SystemClock;
use secrecy::ExposeSecret as _;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use self::bench::{bench, exchange, keys, token, token_at};

#[tokio::test]
async fn a_user_and_a_session_of_a_role_become_whom_they_are_mapped_to() {
    let bench = bench().await;
    let alice = keys(&bench.accounts.add_user("alice"));
    let role = Accounts::role_arn("admin");
    bench.accounts.add_role(role.clone(), Role::default());
    let issuer = StsIssuer::new(
        StsClient::try_new(false).unwrap(),
        vec![Endpoint::parse(&bench.sts.url()).unwrap()],
        Base::of_keys(alice.clone()),
        Arc::new(SystemClock),
    );
    let session = RoleSession {
        role: RoleArn::parse(&role).unwrap(),
        grant: Grant::ASSUME_ROLE,
        policy: None,
        session_name: SessionName::parse("alice@laptop").unwrap(),
        duration: Duration::from_secs(3600),
        tags: Box::default(),
        source_identity: None,
    };
    let issued = issuer.issue(&session).await.unwrap();
    let admin = BaseCredentials {
        access_key_id: issued.access_key_id,
        access_key_secret: issued.access_key_secret,
        security_token: Some(issued.security_token),
    };

    let as_alice = bench.decided(&token(&alice)).await;
    let as_admin = bench.decided(&token(&admin)).await;

    assert_eq!(as_alice["user"]["username"], "alice", "{as_alice}");
    assert_eq!(as_admin["user"]["username"], "admin:alice@laptop", "{as_admin}");
    assert_eq!(as_admin["user"]["groups"], json!(["developers"]));
    assert_eq!(as_admin["user"]["extra"]["canonicalArn"], json!(["acs:ram::1234567890123456:role/admin"]));
    assert_eq!(bench.ask_admin("/readyz").await.0, 200);
    bench.end().await;
}

#[tokio::test]
async fn intruders_are_denied() {
    let bench = bench().await;
    let alice = keys(&bench.accounts.add_user("alice"));
    let bob = keys(&bench.accounts.add_user("bob"));
    let forged = BaseCredentials { access_key_secret: "guessed".into(), ..alice.clone() };
    let invented = BaseCredentials { access_key_id: "LTAI.nobody".into(), ..alice.clone() };
    let elsewhere = {
        let other = ClusterId::parse("another-cluster").unwrap();
        presign(&other, &alice, Timestamp::now(), "a test").unwrap().expose_secret().to_owned()
    };
    let old = Timestamp::now() - SignedDuration::from_mins(16);
    assert_eq!(bench.decided(&token(&alice)).await["authenticated"], true, "the allowed twin");

    for (who, token) in [
        ("a user who is not mapped", token(&bob)),
        ("a wrong secret", token(&forged)),
        ("an invented key", token(&invented)),
        ("a token of another cluster", elsewhere),
        ("a token after its window", token_at(&alice, old)),
        ("a token of another authenticator", "eyJhbGciOiJSUzI1NiJ9.e30.c2ln".into()),
    ] {
        assert_eq!(bench.decided(&token).await, json!({ "authenticated": false }), "{who}");
    }
    bench.end().await;
}

#[tokio::test]
async fn an_outage_of_sts_is_503_and_ends_and_throttling_is_429() {
    let bench = bench().await;
    let alice = keys(&bench.accounts.add_user("alice"));
    let token = token(&alice);
    for (mode, status) in [(StsMode::Refuse, 503), (StsMode::Unavailable, 503), (StsMode::Throttle, 429)] {
        bench.sts.set_mode(mode).unwrap();
        let (answered, answer) = bench.login(&token).await;
        assert_eq!(answered, status, "{answer}");
        assert!(answer.to_ascii_lowercase().contains("\r\nretry-after: "), "{answer}");
        for path in ["/healthz", "/readyz"] {
            assert_eq!(bench.ask_admin(path).await.0, 200, "a restart would not help: {path}");
        }
    }

    bench.sts.set_mode(StsMode::Ok).unwrap();

    assert_eq!(bench.decided(&token).await["authenticated"], true);
    bench.end().await;
}

#[tokio::test]
async fn many_logins_with_one_token_cost_one_call() {
    let bench = Arc::new(bench().await);
    let alice = keys(&bench.accounts.add_user("alice"));
    let token: Arc<str> = token(&alice).into();

    let logins: Vec<_> = (0..40)
        .map(|_| {
            let (bench, token) = (Arc::clone(&bench), Arc::clone(&token));
            tokio::spawn(async move { bench.decided(&token).await })
        })
        .collect();
    for login in logins {
        assert_eq!(login.await.unwrap()["user"]["username"], "alice");
    }

    assert_eq!(bench.sts.calls().len(), 1);
    let metrics = bench.ask_admin("/metrics").await.1;
    assert!(metrics.contains("kube2ram_authenticator_logins_total{result=\"success\"} 40\n"), "{metrics}");
    for secret in [alice.access_key_secret.expose_secret(), &*token] {
        assert!(!metrics.contains(secret));
    }
    let Some(bench) = Arc::into_inner(bench) else { panic!("every login has ended") };
    bench.end().await;
}

#[tokio::test]
async fn a_restart_keeps_what_the_api_server_trusts() {
    let bench = bench().await;
    let state = bench.directory.path().join("state");
    let made = fs::read(state.join("cert.pem")).unwrap();
    let kubeconfig = fs::read_to_string(bench.directory.path().join("kubeconfig.yaml")).unwrap();
    let wanted = tls::Init {
        directory: state.clone(),
        kubeconfig: bench.directory.path().join("kubeconfig.yaml"),
        hostname: "localhost".into(),
        address: bench.webhook.ip(),
        port: bench.webhook.port(),
        client: None,
    };

    let again = tls::init(&wanted, Timestamp::now()).unwrap();

    assert!(!again.made_authority && !again.wrote_kubeconfig);
    assert_eq!(fs::read(state.join("cert.pem")).unwrap(), made);
    assert!(kubeconfig.contains(&format!("https://localhost:{}/authenticate", bench.webhook.port())));
    bench.end().await;
}

/// ack-ram-authenticator has no time-outs: connections that do nothing stay for ever.
#[tokio::test]
async fn a_client_that_does_not_go_on_is_cut_off() {
    let bench = bench().await;
    let alice = keys(&bench.accounts.add_user("alice"));
    let request = review(&token(&alice), "keep-alive");
    let (head, body) = request.split_once("\r\n\r\n").unwrap();
    let half_a_body = format!("{head}\r\n\r\n{}", &body[..body.len() / 2]);
    let until_the_end = async |sent: &str| {
        let mut stream = bench.client.connect().await.unwrap();
        stream.write_all(sent.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        drop(stream.read_to_end(&mut answer).await);
        String::from_utf8(answer).unwrap()
    };
    let without_handshake = async {
        let mut stream = TcpStream::connect(bench.webhook).await.unwrap();
        stream.read_to_end(&mut Vec::new()).await
    };

    let cut_off = async { tokio::join!(without_handshake, until_the_end(head), until_the_end(&half_a_body)) };
    let (handshake, head, body) = timeout(Duration::from_secs(30), cut_off).await.unwrap();

    assert!(handshake.is_ok_and(|length| length == 0));
    assert!(!head.contains("200 OK"), "{head}");
    assert!(body.starts_with("HTTP/1.1 408 "), "{body}");
    assert_eq!(bench.decided(&token(&alice)).await["authenticated"], true, "the allowed twin");
    bench.end().await;
}

/// ack-ram-authenticator has no deadline for STS. The API server gives up after 30 s, and then asks again.
#[tokio::test]
async fn a_silent_sts_is_503_before_the_api_server_gives_up() {
    let bench = bench().await;
    let alice = keys(&bench.accounts.add_user("alice"));
    bench.sts.set_mode(StsMode::Slow(Duration::from_mins(1))).unwrap();

    let token = token(&alice);
    let (status, answer) = timeout(Duration::from_secs(15), bench.login(&token)).await.unwrap();

    assert_eq!(status, 503, "{answer}");
    bench.end().await;
}

#[tokio::test]
async fn a_head_over_the_limit_is_refused() {
    let bench = bench().await;
    let alice = keys(&bench.accounts.add_user("alice"));
    let request = |header: usize| {
        let filler = format!("X-Filler: {}\r\nHost: ", "x".repeat(header));
        review(&token(&alice), "close").replacen("Host: ", &filler, 1)
    };

    let (status, answer) = exchange(bench.client.connect().await.unwrap(), request(16 * 1024)).await;

    assert_eq!(status, 431, "{answer}");
    assert_eq!(
        exchange(bench.client.connect().await.unwrap(), request(1024)).await.0,
        200,
        "the allowed twin"
    );
    bench.end().await;
}
