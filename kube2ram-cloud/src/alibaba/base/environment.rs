//! The agent's own credentials in the environment. Pure: a function looks up variables. Called by `app`,
//! through the parent.

use std::path::PathBuf;

use secrecy::SecretString;

use super::{BaseCredentials, BaseError, OidcSettings};
use crate::role::{RoleArn, SessionName};

/// What the agent is to sign with.
#[derive(Debug)]
pub enum Configured {
    /// The role attached to the node: nothing else is configured.
    NodeRole,
    /// A role of the agent's own, by a token.
    Oidc(OidcSettings),
    /// These keys.
    StaticKeys(BaseCredentials),
}

impl Configured {
    /// Static keys first: `ALIBABA_CLOUD_ACCESS_KEY_ID`, `…_SECRET` and `ALIBABA_CLOUD_SECURITY_TOKEN`, else
    /// the predecessors' `ACCESS_KEY_ID` and `ACCESS_KEY_SECRET`. Then OIDC: `ALIBABA_CLOUD_ROLE_ARN`,
    /// `ALIBABA_CLOUD_OIDC_PROVIDER_ARN` and `ALIBABA_CLOUD_OIDC_TOKEN_FILE`, with
    /// `ALIBABA_CLOUD_ROLE_SESSION_NAME`. Else the node's role. An empty variable counts as unset. `node`
    /// becomes part of the session's name unless one is given.
    ///
    /// Source of the names: ACK, "Use RRSA to authorize pods", and the SDKs' default credential chains.
    ///
    /// # Errors
    /// [`BaseError::Missing`], [`BaseError::Malformed`] and [`BaseError::NotOfForm`]: falling back to the
    /// node's role would hide the mistake.
    pub fn from_env(variable: impl Fn(&str) -> Option<String>, node: &str) -> Result<Self, BaseError> {
        let read = |name| match variable(name).filter(|value| !value.is_empty()) {
            Some(value) if !value.bytes().all(|c| c.is_ascii_graphic()) => Err(BaseError::Malformed(name)),
            value => Ok(value),
        };
        if let Some(keys) = static_keys(read)? {
            return Ok(Self::StaticKeys(keys));
        }
        Ok(oidc(read, node)?.map_or(Self::NodeRole, Self::Oidc))
    }
}

fn static_keys(
    read: impl Fn(&'static str) -> Result<Option<String>, BaseError>,
) -> Result<Option<BaseCredentials>, BaseError> {
    for (id, secret, token) in [
        (
            "ALIBABA_CLOUD_ACCESS_KEY_ID",
            "ALIBABA_CLOUD_ACCESS_KEY_SECRET",
            Some("ALIBABA_CLOUD_SECURITY_TOKEN"),
        ),
        ("ACCESS_KEY_ID", "ACCESS_KEY_SECRET", None),
    ] {
        match (read(id)?, read(secret)?) {
            (None, None) => {}
            (Some(_), None) => return Err(BaseError::Missing { present: id, missing: secret }),
            (None, Some(_)) => return Err(BaseError::Missing { present: secret, missing: id }),
            (Some(access_key_id), Some(access_key_secret)) => {
                return Ok(Some(BaseCredentials {
                    access_key_id: access_key_id.into(),
                    access_key_secret: access_key_secret.into(),
                    security_token: token.map(&read).transpose()?.flatten().map(SecretString::from),
                }));
            }
        }
    }
    Ok(None)
}

fn oidc(
    read: impl Fn(&'static str) -> Result<Option<String>, BaseError>,
    node: &str,
) -> Result<Option<OidcSettings>, BaseError> {
    let values = [read(ROLE)?, read(PROVIDER)?, read(TOKEN_FILE)?];
    let names = [ROLE, PROVIDER, TOKEN_FILE];
    let find = |is_set: bool| names.iter().zip(&values).find(|(_, value)| value.is_some() == is_set);
    let missing = match (find(true), find(false)) {
        (None, _) => return Ok(None),
        (Some((present, _)), Some((missing, _))) => Some(BaseError::Missing { present, missing }),
        (Some(_), None) => None,
    };
    let [Some(role), Some(provider), Some(token_file)] = values else {
        return missing.map_or(Ok(None), Err);
    };
    let role = RoleArn::parse(&role);
    let role =
        role.or(Err(BaseError::NotOfForm { variable: ROLE, form: "acs:ram::<account>:role/<name>" }))?;
    if !is_provider(&provider) {
        let form = "acs:ram::<account>:oidc-provider/<name>";
        return Err(BaseError::NotOfForm { variable: PROVIDER, form });
    }
    let token_file = PathBuf::from(token_file);
    if !token_file.is_absolute() {
        return Err(BaseError::NotOfForm { variable: TOKEN_FILE, form: "/<path>" });
    }
    let session = match read(SESSION)? {
        Some(name) => SessionName::parse(&name)
            .or(Err(BaseError::NotOfForm { variable: SESSION, form: "2–64 of A-Za-z0-9.@_-" }))?,
        None => SessionName::fit(&format!("kube2ram@{node}")),
    };
    Ok(Some(OidcSettings { role, provider: provider.into(), token_file, session }))
}

/// `acs:ram::<account>:oidc-provider/<name>`; names as of RAM's CreateOIDCProvider, and a little more.
fn is_provider(arn: &str) -> bool {
    let legal = |c: u8| c.is_ascii_alphanumeric() || b"._-".contains(&c);
    let parts = arn.strip_prefix("acs:ram::").and_then(|rest| rest.split_once(":oidc-provider/"));
    parts.is_some_and(|(account, name)| {
        (1..=32).contains(&account.len())
            && account.bytes().all(|c| c.is_ascii_digit())
            && (1..=128).contains(&name.len())
            && name.bytes().all(legal)
    })
}

const ROLE: &str = "ALIBABA_CLOUD_ROLE_ARN";
const PROVIDER: &str = "ALIBABA_CLOUD_OIDC_PROVIDER_ARN";
const TOKEN_FILE: &str = "ALIBABA_CLOUD_OIDC_TOKEN_FILE";
const SESSION: &str = "ALIBABA_CLOUD_ROLE_SESSION_NAME";
