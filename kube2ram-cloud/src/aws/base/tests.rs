//! Base credentials from the environment and from a stand-in metadata server. Renewal itself is tested with
//! Alibaba Cloud's.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use jiff::ToSpan as _;
use secrecy::ExposeSecret as _;

use super::*;
use crate::{
    MetadataAddr,
    aws::metadata::imdsv2,
    sts::{StsClient, transport::Transport},
    testing::{CountingPass, Server, SetClock, answer},
    upstream::MetadataServer,
};

const NOW: &str = "2026-11-28T10:00:00Z";
const KEYS: [(&str, &str); 2] = [("AWS_ACCESS_KEY_ID", "AKIA"), ("AWS_SECRET_ACCESS_KEY", "hush")];
const IRSA: [(&str, &str); 2] = [
    ("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/kube2ram"),
    ("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/secrets/eks.amazonaws.com/serviceaccount/token"),
];

fn configured(variables: &[(&str, &str)]) -> Result<Configured, BaseError> {
    let variables: HashMap<&str, &str> = variables.iter().copied().collect();
    Configured::from_env(|name| variables.get(name).map(ToString::to_string), "ip-10-0-0-1.ec2.internal")
}

fn nowhere() -> Transport {
    // Another test may have installed it.
    let _installed = rustls::crypto::ring::default_provider().install_default();
    Transport::new(StsClient::try_new(false).unwrap(), Vec::new(), SetClock::at(NOW))
}

fn metadata(server: &Server) -> Metadata {
    let pass = Arc::new(CountingPass::default());
    let upstream = MetadataServer::new(MetadataAddr::v4_only(server.address), pass);
    Metadata::new(Arc::new(imdsv2(upstream)))
}

#[test]
fn static_keys_come_first_and_then_web_identity() {
    let Configured::StaticKeys(keys) =
        configured(&[&KEYS[..], &IRSA[..], &[("AWS_SESSION_TOKEN", "tok")]].concat()).unwrap()
    else {
        panic!("no keys");
    };
    assert_eq!((&*keys.access_key_id, keys.access_key_secret.expose_secret()), ("AKIA", "hush"));
    assert_eq!(keys.security_token.as_ref().unwrap().expose_secret(), "tok");
    assert!(!format!("{keys:?}").contains("hush") && !format!("{keys:?}").contains("tok\""));
    let Configured::StaticKeys(keys) = configured(&KEYS).unwrap() else { panic!("no keys") };
    assert!(keys.security_token.is_none());

    let Configured::WebIdentity(identity) = configured(&IRSA).unwrap() else { panic!("no web identity") };
    assert_eq!((identity.role.account(), identity.role.name()), ("123456789012", "kube2ram"));
    assert_eq!(identity.token_file.to_str(), Some(IRSA[1].1));
    assert_eq!(identity.session.as_str(), "kube2ram@ip-10-0-0-1.ec2.internal");
    let named = configured(&[&IRSA[..], &[("AWS_ROLE_SESSION_NAME", "a+b=c")]].concat()).unwrap();
    assert!(matches!(named, Configured::WebIdentity(identity) if identity.session.as_str() == "a+b=c"));

    for nothing in [&[][..], &[("AWS_ACCESS_KEY_ID", ""), ("AWS_ROLE_ARN", "")]] {
        assert!(matches!(configured(nothing).unwrap(), Configured::NodeRole), "{nothing:?}");
    }
}

#[test]
fn half_of_what_goes_together_is_an_error_and_the_nodes_role_never_steps_in() {
    let token_alone = configured(&[("AWS_SESSION_TOKEN", "tok")]).unwrap_err();
    assert!(token_alone.to_string().contains("AWS_ACCESS_KEY_ID"), "{token_alone}");
    for pair in [KEYS, IRSA] {
        for (present, missing) in [(0, 1), (1, 0)] {
            for empty in [false, true] {
                let mut variables = vec![pair[present]];
                variables.extend(empty.then_some((pair[missing].0, "")));

                let error = configured(&variables).unwrap_err();

                let expected = format!("variable {} is set, but {} is not", pair[present].0, pair[missing].0);
                assert!(error.to_string().ends_with(&expected), "{error}");
                assert!(!format!("{error:?}").contains("hush"));
            }
        }
    }
}

#[test]
fn what_is_no_arn_and_no_path_is_refused_with_its_form() {
    for (index, value) in [
        (0, "kube2ram"),
        (0, "arn:aws:iam::1:role/a"),
        (0, "arn:aws:iam::123456789012:user/a"),
        (0, "acs:ram::123456789012:role/a"),
        (1, "token"),
    ] {
        let mut variables = IRSA;
        variables[index].1 = value;

        let error = configured(&variables).unwrap_err();

        assert!(
            matches!(error, BaseError::NotOfForm { variable, .. } if variable == IRSA[index].0),
            "{error}"
        );
    }
    let session = [&IRSA[..], &[("AWS_ROLE_SESSION_NAME", "a:b")]].concat();
    assert!(configured(&session).unwrap_err().to_string().contains("2–64"));
    let blank = [KEYS[0], ("AWS_SECRET_ACCESS_KEY", "hu sh")];
    assert!(matches!(configured(&blank).unwrap_err(), BaseError::Malformed("AWS_SECRET_ACCESS_KEY")));
}

#[tokio::test]
async fn the_nodes_role_is_fetched_once_and_renewed_before_it_ends() {
    let (fetches, down) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let (count, is_down) = (Arc::clone(&fetches), Arc::clone(&down));
    let server = Server::start(move |asked| match asked.uri().path() {
        "/latest/api/token" => answer(200, "token"),
        _ if is_down.load(Ordering::SeqCst) => answer(500, ""),
        "/latest/meta-data/iam/security-credentials/" => answer(200, "node"),
        "/latest/meta-data/iam/security-credentials/node" => {
            let number = count.fetch_add(1, Ordering::SeqCst) + 1;
            let text = format!(
                r#"{{"Code":"Success","AccessKeyId":"ASIA{number}","SecretAccessKey":"hush","Token":"tok",
                "Expiration":"2026-11-28T16:00:00Z"}}"#
            );
            answer(200, text)
        }
        _ => answer(404, ""),
    })
    .await;
    let clock = SetClock::at(NOW);
    let base = Configured::NodeRole.into_base(metadata(&server), Arc::clone(&clock) as Arc<dyn Clock>);
    let sts = nowhere();
    assert_eq!((base.source(), base.account()), (BaseSource::NodeRole, None));

    let first = base.current(&sts).await.unwrap();
    assert_eq!(&*base.current(&sts).await.unwrap().access_key_id, "ASIA1");
    let other = base.refresh(&first, &sts).await.unwrap().unwrap();

    assert_eq!((&*first.access_key_id, &*other.access_key_id), ("ASIA1", "ASIA2"));
    assert_eq!(base.state().role.as_deref(), Some("node"));
    down.store(true, Ordering::SeqCst);
    *clock.0.lock().unwrap() += 5.hours();
    assert_eq!(&*base.current(&sts).await.unwrap().access_key_id, "ASIA2", "valid still");
    *clock.0.lock().unwrap() += 1.hours();
    assert!(matches!(base.current(&sts).await.unwrap_err(), BaseError::Metadata(_)));
}

#[tokio::test]
async fn a_node_without_role_is_named_as_such() {
    let server = Server::start(|asked| match asked.uri().path() {
        "/latest/api/token" => answer(200, "token"),
        _ => answer(404, ""),
    })
    .await;
    let base = Configured::NodeRole.into_base(metadata(&server), SetClock::at(NOW));

    assert!(matches!(base.current(&nowhere()).await.unwrap_err(), BaseError::NoNodeRole));
}

#[tokio::test]
async fn static_keys_have_no_others() {
    let server = Server::start(|_| answer(500, "")).await;
    let base = configured(&KEYS).unwrap().into_base(metadata(&server), SetClock::at(NOW));
    let sts = nowhere();

    let current = base.current(&sts).await.unwrap();

    assert_eq!((&*current.access_key_id, base.source()), ("AKIA", BaseSource::StaticKeys));
    assert!(base.refresh(&current, &sts).await.unwrap().is_none());
    assert_eq!(server.asked().len(), 0);
}
