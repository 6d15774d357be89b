//! RRSA's variables.

use super::*;
use crate::role::BaseArn;

const RRSA: [(&str, &str); 3] = [
    ("ALIBABA_CLOUD_ROLE_ARN", "acs:ram::1234567890123456:role/kube2ram"),
    ("ALIBABA_CLOUD_OIDC_PROVIDER_ARN", "acs:ram::1234567890123456:oidc-provider/ack-rrsa-c0123"),
    ("ALIBABA_CLOUD_OIDC_TOKEN_FILE", "/var/run/secrets/ack.alibabacloud.com/rrsa-tokens/token"),
];

fn settings(variables: &[(&str, &str)]) -> OidcSettings {
    match configured(variables).unwrap() {
        Configured::Oidc(settings) => settings,
        other => panic!("{other:?}"),
    }
}

#[test]
fn rrsas_variables_make_the_agents_own_role_the_signer() {
    let ours = settings(&RRSA);
    let named = settings(&[&RRSA[..], &[("ALIBABA_CLOUD_ROLE_SESSION_NAME", "agents")]].concat());

    assert_eq!((ours.role.account(), ours.role.name()), ("1234567890123456", "kube2ram"));
    assert_eq!((&*ours.provider, ours.token_file.to_str().unwrap()), (RRSA[1].1, RRSA[2].1));
    assert_eq!(ours.session.as_str(), "kube2ram@cn-hangzhou.10.0.0.1");
    assert_eq!(named.session.as_str(), "agents");
    let base = of_oidc(ours, SetClock::at("2026-11-21T21:30:00Z"));
    let account = base.account();
    assert_eq!(account.as_ref().map(BaseArn::as_str), Some("acs:ram::1234567890123456:role/"));
    assert_eq!(base.source(), BaseSource::Oidc);
    assert_eq!(base.state().role.as_deref(), Some("kube2ram"), "told before it was first needed");
}

#[test]
fn each_variable_that_is_missing_is_named_and_the_nodes_role_never_steps_in() {
    for (index, (missing, _)) in RRSA.iter().enumerate() {
        for empty in [false, true] {
            let mut variables = RRSA.to_vec();
            variables.remove(index);
            variables.extend(empty.then_some((*missing, "")));

            let error = configured(&variables).unwrap_err().to_string();

            assert!(error.ends_with(&format!("is set, but {missing} is not")), "{error}");
        }
        let alone = configured(&RRSA[index..=index]).unwrap_err();
        assert!(matches!(alone, BaseError::Missing { present, .. } if present == RRSA[index].0), "{alone}");
    }
    // The twins: all, none, and what is a name for a session of whatever role.
    settings(&RRSA);
    assert!(matches!(configured(&[]).unwrap(), Configured::NodeRole));
    let name_alone = configured(&[("ALIBABA_CLOUD_ROLE_SESSION_NAME", "agents")]).unwrap();
    assert!(matches!(name_alone, Configured::NodeRole), "{name_alone:?}");
}

#[test]
fn static_keys_win_over_oidc() {
    let keys = [("ACCESS_KEY_ID", "id"), ("ACCESS_KEY_SECRET", "s")];

    let both = configured(&[&RRSA[..], &keys[..]].concat()).unwrap();

    assert!(matches!(both, Configured::StaticKeys(_)), "{both:?}");
}

#[test]
fn what_is_no_arn_and_no_path_is_refused_with_its_form() {
    for (index, value, form) in [
        (0, "kube2ram", "acs:ram::<account>:role/<name>"),
        (0, "acs:ram::1:role/", "acs:ram::<account>:role/<name>"),
        (0, "acs:ram::one:role/a", "acs:ram::<account>:role/<name>"),
        (0, RRSA[1].1, "acs:ram::<account>:role/<name>"),
        (1, RRSA[0].1, "acs:ram::<account>:oidc-provider/<name>"),
        (1, "acs:ram:::oidc-provider/a", "acs:ram::<account>:oidc-provider/<name>"),
        (1, "acs:ram::1:oidc-provider/a&Action=x", "acs:ram::<account>:oidc-provider/<name>"),
        (1, "acs:ram::1:oidc-provider/", "acs:ram::<account>:oidc-provider/<name>"),
        (2, "token", "/<path>"),
    ] {
        let mut variables = RRSA.to_vec();
        variables[index].1 = value;

        let error = configured(&variables).unwrap_err();

        assert!(
            matches!(error, BaseError::NotOfForm { variable, form: is } if variable == RRSA[index].0 && is == form),
            "{value}: {error}"
        );
    }
    let session = [&RRSA[..], &[("ALIBABA_CLOUD_ROLE_SESSION_NAME", "x")]].concat();
    assert!(configured(&session).unwrap_err().to_string().contains("2–64"));
    let space = [&RRSA[..2], &[("ALIBABA_CLOUD_OIDC_TOKEN_FILE", "/a b")]].concat();
    assert!(matches!(configured(&space).unwrap_err(), BaseError::Malformed(_)));
}
