//! Each refusal, next to the same call allowed.

use std::sync::Arc;

use jiff::SignedDuration;

use super::*;
use crate::{
    clock::{Clock, iso8601},
    standin::{
        account::{Accounts, Role},
        oidc::{OidcIssuer, OidcTrust},
        server::Bind,
        sts::Sts,
    },
};

const SUBJECT: &str = "system:serviceaccount:kube-system:kube2ram";
const URL: &str = "https://oidc.example.com/c0123";

struct Bench {
    issuer: OidcIssuer,
    sts: Sts,
}

fn bench() -> Bench {
    let accounts = Arc::new(Accounts::new(Clock::default()));
    let issuer = OidcIssuer::new(URL).unwrap();
    let provider = Accounts::provider_arn("ack");
    accounts.add_provider(&provider, issuer.provider());
    let trust = OidcTrust::equals(provider, SUBJECT);
    accounts.add_role(Accounts::role_arn("kube2ram"), Role { oidc: Some(trust), ..Role::default() });
    accounts.add_role(Accounts::role_arn("other"), Role::default());
    Bench { issuer, sts: Sts::start(Bind::loopback(), accounts).unwrap() }
}

impl Bench {
    fn clock(&self) -> &Clock {
        self.sts.server.handler.accounts.clock()
    }

    fn token(&self, subject: &str, audience: &str) -> String {
        self.issuer.token(subject, audience, self.clock().now() + SignedDuration::from_hours(1)).unwrap()
    }

    fn good(&self) -> String {
        self.token(SUBJECT, OidcIssuer::AUDIENCE)
    }

    /// `OK` or the error's code.
    fn ask(&self, token: &str, changed: &[(&str, &str)]) -> String {
        let now = iso8601(self.clock().now());
        let (role, provider) = (Accounts::role_arn("kube2ram"), Accounts::provider_arn("ack"));
        let mut query = BTreeMap::from([
            ("Action", "AssumeRoleWithOIDC"),
            ("Format", "JSON"),
            ("Timestamp", &now),
            ("Version", "2015-04-01"),
        ]);
        let mut form = BTreeMap::from([
            ("OIDCProviderArn", &*provider),
            ("OIDCToken", token),
            ("RoleArn", &role),
            ("RoleSessionName", "kube2ram"),
        ]);
        for (name, value) in changed {
            let known = if query.contains_key(name) { &mut query } else { &mut form };
            known.insert(name, value);
        }
        let encode = |pairs: &BTreeMap<&str, &str>| {
            url::form_urlencoded::Serializer::new(String::new()).extend_pairs(pairs).finish()
        };
        let request = Request::post(format!("/?{}", encode(&query))).body(encode(&form).into()).unwrap();
        let mut call = Call::default();
        let asked = Unsigned::parse(&request, &mut call).unwrap();
        assert!(!call.params.contains_key("OIDCToken"), "the record holds no token");
        match self.sts.server.handler.assume_role_with_oidc(&asked, &mut call) {
            Ok(answer) => {
                assert!(answer["Credentials"]["AccessKeyId"].as_str().unwrap().starts_with("STS.kube2ram."));
                assert_eq!(answer["OIDCTokenInfo"]["Subject"], call.subject.as_str());
                "OK".to_owned()
            }
            Err(failure) => failure.code.into_owned(),
        }
    }
}

#[test]
fn takes_the_clusters_token_for_the_role_that_trusts_its_subject() {
    let bench = bench();
    let (good, ok) = (bench.good(), "OK".to_owned());

    assert_eq!(bench.ask(&good, &[]), ok);
    assert_eq!(bench.ask(&good, &[]), ok, "a token is for as often as one likes");
    let denied = "AuthenticationFail.NoPermission";
    assert_eq!(bench.ask(&good, &[("RoleArn", &Accounts::role_arn("other"))]), denied);
    let neighbour = bench.token("system:serviceaccount:shop:kube2ram", OidcIssuer::AUDIENCE);
    assert_eq!(bench.ask(&neighbour, &[]), denied);
    assert_eq!(bench.ask(&good, &[("RoleArn", &Accounts::role_arn("none"))]), "EntityNotExist.Role");
    assert_eq!(
        bench.ask(&good, &[("OIDCProviderArn", &Accounts::provider_arn("none"))]),
        "EntityNotExist.OIDCProvider"
    );
}

#[test]
fn refuses_tokens_that_its_provider_does_not_vouch_for() {
    let bench = bench();
    let good = bench.good();
    let invalid = "AuthenticationFail.OIDCToken.Invalid";

    let stranger = OidcIssuer::new(URL).unwrap();
    let hour = bench.clock().now() + SignedDuration::from_hours(1);
    let forged = stranger.token(SUBJECT, OidcIssuer::AUDIENCE, hour).unwrap();
    assert_eq!(bench.ask(&forged, &[]), invalid, "another key");
    let (claims, signature) = good.rsplit_once('.').unwrap();
    let (_, other) = forged.rsplit_once('.').unwrap();
    for token in [format!("{claims}.{other}"), format!("{claims}."), signature.to_owned(), "a.b.c".to_owned()]
    {
        assert_eq!(bench.ask(&token, &[]), invalid, "{token}");
    }
    let another = bench.token(SUBJECT, "https://kubernetes.default.svc");
    assert_eq!(bench.ask(&another, &[]), "AuthenticationFail.OIDCToken.AudienceNotMatch");
    assert_eq!(bench.ask("a.b", &[]), "InvalidParameter.OIDCToken");

    assert_eq!(bench.ask(&good, &[]), "OK");
    bench.clock().shift(SignedDuration::from_mins(61));
    assert_eq!(bench.ask(&good, &[]), "AuthenticationFail.OIDCToken.Expired");
    assert_eq!(bench.ask(&bench.good(), &[]), "OK");
}

#[test]
fn checks_the_other_parameters() {
    let bench = bench();
    let with = |name, value| bench.ask(&bench.good(), &[(name, value)]);

    assert_eq!(with("RoleSessionName", "x"), "InvalidParameter.RoleSessionName");
    assert_eq!(with("DurationSeconds", "3601"), "InvalidParameter.DurationSeconds");
    assert_eq!(with("Timestamp", "2015-01-01T00:00:00Z"), "InvalidTimeStamp.Expired");
    assert_eq!(with("Version", "2014-01-01"), "InvalidVersion");
    assert_eq!(with("DurationSeconds", "900"), "OK");
}

#[test]
fn tells_what_is_wrong_with_the_provider_by_a_code_of_its_own() {
    let bench = bench();
    let provider = Accounts::provider_arn("ack");
    let set = |settings| bench.sts.server.handler.accounts.add_provider(&provider, settings);
    let code = |name: &str| format!("AuthenticationFail.OIDCToken.{name}");

    bench.issuer.set_reachable(false);
    assert_eq!(bench.ask(&bench.good(), &[]), code("IssuerConfigurationBroken"));
    bench.issuer.set_reachable(true);
    set(bench.issuer.provider().with_wrong_fingerprint());
    assert_eq!(bench.ask(&bench.good(), &[]), code("PublicKeyFingerprintMismatch"));
    set(bench.issuer.provider().with_issuer("https://other.example.com"));
    assert_eq!(bench.ask(&bench.good(), &[]), code("IssuerNotMatch"));
    set(bench.issuer.provider().with_audience("other"));
    assert_eq!(bench.ask(&bench.good(), &[]), code("AudienceNotMatch"));
    set(bench.issuer.provider());
    bench.issuer.rotate_to_rsa().unwrap();
    assert_eq!(bench.ask(&bench.good(), &[]), code("Invalid"), "not published yet");
    bench.issuer.publish();
    assert_eq!(bench.ask(&bench.good(), &[]), "OK");
    bench.sts.server.handler.accounts.remove_provider(&provider);
    assert_eq!(bench.ask(&bench.good(), &[]), "EntityNotExist.OIDCProvider");
}
