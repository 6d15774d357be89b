//! The agent's own credentials in the environment. Pure: a function looks up variables. Called by `app`,
//! through the parent.

use std::path::PathBuf;

use super::{BaseCredentials, BaseError, OidcSettings};
use crate::{
    alibaba::OidcProviderArn,
    base::environment::{all_or_none, read, static_keys},
    role::{ArnStyle, RoleArn, SessionName},
};

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
        for (pair, token) in KEYS {
            if let Some(keys) = static_keys(&variable, pair, token)? {
                return Ok(Self::StaticKeys(keys));
            }
        }
        Ok(oidc(&variable, node)?.map_or(Self::NodeRole, Self::Oidc))
    }
}

fn oidc(variable: &impl Fn(&str) -> Option<String>, node: &str) -> Result<Option<OidcSettings>, BaseError> {
    let Some([role, provider, token_file]) = all_or_none(variable, [ROLE, PROVIDER, TOKEN_FILE])? else {
        return Ok(None);
    };
    let role = RoleArn::parse(&role).ok().filter(|role| role.style() == ArnStyle::Acs);
    let role = role.ok_or(BaseError::NotOfForm { variable: ROLE, form: "acs:ram::<account>:role/<name>" })?;
    if OidcProviderArn::parse(&provider).is_err() {
        let form = "acs:ram::<account>:oidc-provider/<name>";
        return Err(BaseError::NotOfForm { variable: PROVIDER, form });
    }
    let token_file = PathBuf::from(token_file);
    if !token_file.is_absolute() {
        return Err(BaseError::NotOfForm { variable: TOKEN_FILE, form: "/<path>" });
    }
    let session = match read(variable, SESSION)? {
        Some(name) => SessionName::parse(&name)
            .or(Err(BaseError::NotOfForm { variable: SESSION, form: "2–64 of A-Za-z0-9.@_-" }))?,
        None => SessionName::fit(&format!("kube2ram@{node}")),
    };
    Ok(Some(OidcSettings { role, provider: provider.into(), token_file, session }))
}

/// Pairs of keys, and the token that goes with one.
const KEYS: [([&str; 2], Option<&str>); 2] = [
    (
        ["ALIBABA_CLOUD_ACCESS_KEY_ID", "ALIBABA_CLOUD_ACCESS_KEY_SECRET"],
        Some("ALIBABA_CLOUD_SECURITY_TOKEN"),
    ),
    (["ACCESS_KEY_ID", "ACCESS_KEY_SECRET"], None),
];
const ROLE: &str = "ALIBABA_CLOUD_ROLE_ARN";
const PROVIDER: &str = "ALIBABA_CLOUD_OIDC_PROVIDER_ARN";
const TOKEN_FILE: &str = "ALIBABA_CLOUD_OIDC_TOKEN_FILE";
const SESSION: &str = "ALIBABA_CLOUD_ROLE_SESSION_NAME";
