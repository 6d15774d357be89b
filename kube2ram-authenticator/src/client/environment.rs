//! Credentials in the environment, by the names of all of Alibaba Cloud's tools. Pure: a function looks up
//! variables. Called by `choice`.
//!
//! Source of the names: ack-ram-tool, the SDKs' default credential chains, aliyun-cli.

use kube2ram_cloud::alibaba::base::{CredentialsUri, OidcSettings};

use super::source::{Source, SourceError, keys, role, session};

/// Looks up a variable.
pub(super) type Variable<'a> = &'a dyn Fn(&str) -> Option<String>;

/// The first of these variables that is set; an empty one counts as unset.
pub(super) fn first(variable: Variable<'_>, names: &[&'static str]) -> Option<(&'static str, String)> {
    names.iter().find_map(|&name| Some((name, variable(name).filter(|value| !value.is_empty())?)))
}

/// Whether one of these variables is set to what means yes.
pub(super) fn is_set(variable: Variable<'_>, names: &[&'static str]) -> bool {
    first(variable, names)
        .is_some_and(|(_, value)| matches!(&*value.to_ascii_lowercase(), "true" | "1" | "yes"))
}

/// What the environment configures: a session's keys, then a role by an OIDC token, then a user's keys, with
/// a role to assume or without, then a URI. Half of something is an error: another source would hide it.
pub(super) fn source(variable: Variable<'_>) -> Result<Option<Source>, SourceError> {
    let (id, secret) = (first(variable, &IDS), first(variable, &SECRETS));
    let token = first(variable, &TOKENS);
    let role_arn = first(variable, &[ROLE]);
    let session_name = || session(first(variable, &SESSIONS).as_ref().map(|(_, name)| &**name));
    let pair = match (id, secret) {
        (Some((_, id)), Some((_, secret))) => Some((id, secret)),
        (Some((present, _)), None) => {
            return Err(SourceError::Missing { present: present.into(), missing: SECRETS[0] });
        }
        (None, Some((present, _))) => {
            return Err(SourceError::Missing { present: present.into(), missing: IDS[0] });
        }
        (None, None) => None,
    };
    if let (Some((id, secret)), Some((_, token))) = (&pair, &token) {
        let keys = keys(id, secret.as_str().into(), Some(token.as_str().into()))?;
        return Ok(Some(Source::Keys { keys, until: None }));
    }
    let (provider, token_file) = (first(variable, &[PROVIDER]), first(variable, &[TOKEN_FILE]));
    if let (Some((_, role_arn)), Some((_, provider)), Some((_, token_file))) =
        (&role_arn, &provider, &token_file)
    {
        return Ok(Some(Source::Oidc(OidcSettings {
            role: role(role_arn)?,
            provider: provider.as_str().into(),
            token_file: token_file.into(),
            session: session_name()?,
        })));
    }
    if let Some((id, secret)) = pair {
        let base = Source::Keys { keys: keys(&id, secret.into(), None)?, until: None };
        return Ok(Some(match role_arn {
            Some((_, role_arn)) => Source::assumed(base, role(&role_arn)?, session_name()?, None, None),
            None => base,
        }));
    }
    for (present, missing) in [(&provider, TOKEN_FILE), (&token_file, PROVIDER)]
        .map(|(present, missing)| (present.as_ref(), missing))
    {
        if let Some((present, _)) = present {
            let missing = if role_arn.is_none() { ROLE } else { missing };
            return Err(SourceError::Missing { present: (*present).into(), missing });
        }
    }
    match first(variable, &[URI]) {
        Some((_, uri)) => CredentialsUri::parse(&uri).map(Source::Uri).map(Some).map_err(SourceError::Uri),
        None => Ok(None),
    }
}

/// The name of the machine's role, if it is configured. It means that the machine's role is to be used.
pub(super) fn node_role(variable: Variable<'_>) -> Option<Box<str>> {
    first(variable, &[NODE_ROLE]).map(|(_, name)| name.into())
}

const IDS: [&str; 5] = [
    "ALIBABA_CLOUD_ACCESS_KEY_ID",
    "ALICLOUD_ACCESS_KEY",
    "ALIBABACLOUD_ACCESS_KEY_ID",
    "ALICLOUD_ACCESS_KEY_ID",
    "ACCESS_KEY_ID",
];
const SECRETS: [&str; 5] = [
    "ALIBABA_CLOUD_ACCESS_KEY_SECRET",
    "ALICLOUD_SECRET_KEY",
    "ALIBABACLOUD_ACCESS_KEY_SECRET",
    "ALICLOUD_ACCESS_KEY_SECRET",
    "ACCESS_KEY_SECRET",
];
const TOKENS: [&str; 5] = [
    "ALIBABA_CLOUD_SECURITY_TOKEN",
    "ALICLOUD_ACCESS_KEY_STS_TOKEN",
    "ALIBABACLOUD_SECURITY_TOKEN",
    "ALICLOUD_SECURITY_TOKEN",
    "SECURITY_TOKEN",
];
const SESSIONS: [&str; 3] =
    ["ALIBABA_CLOUD_ROLE_SESSION_NAME", "ALICLOUD_ROLE_SESSION_NAME", "ALIBABACLOUD_ROLE_SESSION_NAME"];
const ROLE: &str = "ALIBABA_CLOUD_ROLE_ARN";
const PROVIDER: &str = "ALIBABA_CLOUD_OIDC_PROVIDER_ARN";
const TOKEN_FILE: &str = "ALIBABA_CLOUD_OIDC_TOKEN_FILE";
const URI: &str = "ALIBABA_CLOUD_CREDENTIALS_URI";
const NODE_ROLE: &str = "ALIBABA_CLOUD_ECS_METADATA";

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret as _;

    use super::*;

    fn of(variables: &[(&str, &str)]) -> Result<Option<Source>, SourceError> {
        source(&|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    fn text(variables: &[(&str, &str)]) -> String {
        of(variables).unwrap().map_or_else(|| "nothing".into(), |source| source.to_string())
    }

    const PAIR: [(&str, &str); 2] =
        [("ALIBABA_CLOUD_ACCESS_KEY_ID", "id"), ("ALIBABA_CLOUD_ACCESS_KEY_SECRET", "secret")];
    const OIDC: [(&str, &str); 3] = [
        ("ALIBABA_CLOUD_ROLE_ARN", "acs:ram::1:role/pod"),
        ("ALIBABA_CLOUD_OIDC_PROVIDER_ARN", "acs:ram::1:oidc-provider/ack"),
        ("ALIBABA_CLOUD_OIDC_TOKEN_FILE", "/var/run/token"),
    ];

    #[test]
    fn prefers_a_session_then_oidc_then_a_users_keys_then_a_uri() {
        let uri = [("ALIBABA_CLOUD_CREDENTIALS_URI", "http://127.0.0.1/x")];
        let token = [("ALIBABA_CLOUD_SECURITY_TOKEN", "token")];

        assert_eq!(text(&[]), "nothing");
        assert!(text(&uri).starts_with("uri "));
        assert_eq!(text(&[&uri[..], &PAIR].concat()), "keys \"id\"");
        assert!(text(&[&uri[..], &PAIR, &OIDC].concat()).starts_with("oidc \"acs:ram::1:role/pod\""));
        let all = of(&[&uri[..], &PAIR, &OIDC, &token].concat()).unwrap().unwrap();
        let Source::Keys { keys, .. } = all else { panic!("{all}") };
        assert_eq!(keys.security_token.unwrap().expose_secret(), "token");
    }

    #[test]
    fn a_users_keys_with_a_role_assume_it() {
        let role =
            [("ALIBABA_CLOUD_ROLE_ARN", "acs:ram::1:role/x"), ("ALICLOUD_ROLE_SESSION_NAME", "me@here")];

        let text = text(&[&PAIR[..], &role].concat());

        assert_eq!(text, "role \"acs:ram::1:role/x\" \"me@here\" None 3600 by (keys \"id\")");
    }

    #[test]
    fn takes_each_alias_and_an_empty_one_for_none() {
        for index in 0..IDS.len() {
            assert_eq!(text(&[(IDS[index], "id"), (SECRETS[index], "secret")]), "keys \"id\"");
        }
        let empty =
            [("ALIBABA_CLOUD_ACCESS_KEY_ID", ""), ("ACCESS_KEY_ID", "id"), ("ACCESS_KEY_SECRET", "s")];
        assert_eq!(text(&empty), "keys \"id\"");
    }

    #[test]
    fn half_of_something_is_an_error() {
        for variables in [&PAIR[..1], &PAIR[1..], &OIDC[1..], &OIDC[..2], &[OIDC[0], OIDC[2]]] {
            assert!(matches!(of(variables), Err(SourceError::Missing { .. })), "{variables:?}");
        }
        assert_eq!(text(&OIDC[..1]), "nothing", "a role alone is for whoever has keys");
    }

    #[test]
    fn reads_flags_and_the_machines_role() {
        let variable = |name: &str| {
            let value = match name {
                "YES" => "TRUE",
                "NO" => "false",
                "ALIBABA_CLOUD_ECS_METADATA" => "worker",
                _ => return None,
            };
            Some(value.to_owned())
        };

        assert!(is_set(&variable, &["YES"]) && !is_set(&variable, &["NO"]) && !is_set(&variable, &["OTHER"]));
        assert_eq!(node_role(&variable).as_deref(), Some("worker"));
        assert_eq!(node_role(&|_| None), None);
    }
}
