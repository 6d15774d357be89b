//! Base credentials on AWS: the variables of the SDKs, and the two origins, a role of the agent's own by its
//! web identity (IRSA), and the node's role. Depends on `metadata` and the crate's `base`; called by `sts`,
//! composed by `app`.

mod web_identity;

use std::{path::PathBuf, sync::Arc};

pub use self::web_identity::WebIdentity;
use super::metadata::Metadata;
pub use crate::base::{Base, BaseCredentials, BaseError, BaseSource, BaseState, OidcError};
use crate::{
    base::{
        Oidc,
        environment::{all_or_none, read, static_keys},
    },
    role::{ArnStyle, RoleArn, SessionName, SessionRules},
};
use kube2ram_service::clock::Clock;

/// What the agent is to sign with.
#[derive(Debug)]
pub enum Configured {
    /// The role attached to the node: nothing else is configured.
    NodeRole,
    /// These keys.
    StaticKeys(BaseCredentials),
    /// A role of the agent's own, by a token.
    WebIdentity(WebIdentity),
}

impl Configured {
    /// Static keys first: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` and `AWS_SESSION_TOKEN`. Then web
    /// identity: `AWS_ROLE_ARN` and `AWS_WEB_IDENTITY_TOKEN_FILE`, with `AWS_ROLE_SESSION_NAME`. Else the
    /// node's role. An empty variable counts as unset. `node` becomes part of the session's name unless one
    /// is given.
    ///
    /// Source: AWS SDKs and tools reference guide, "Standardized credential providers".
    ///
    /// # Errors
    /// [`BaseError::Missing`], [`BaseError::Malformed`] and [`BaseError::NotOfForm`]: falling back to the
    /// node's role would hide the mistake.
    pub fn from_env(variable: impl Fn(&str) -> Option<String>, node: &str) -> Result<Self, BaseError> {
        if let Some(keys) = static_keys(&variable, KEYS, Some("AWS_SESSION_TOKEN"))? {
            return Ok(Self::StaticKeys(keys));
        }
        Ok(web_identity(&variable, node)?.map_or(Self::NodeRole, Self::WebIdentity))
    }

    /// The credentials: fetched on first use, and renewed well ahead of their expiry.
    pub fn into_base(self, metadata: Metadata, clock: Arc<dyn Clock>) -> Base {
        match self {
            Self::NodeRole => Base::renewed(metadata.into_client(), clock),
            Self::StaticKeys(keys) => Base::of_keys(keys),
            Self::WebIdentity(identity) => Base::renewed(Oidc(identity), clock),
        }
    }
}

fn web_identity(
    variable: &impl Fn(&str) -> Option<String>,
    node: &str,
) -> Result<Option<WebIdentity>, BaseError> {
    let Some([role, token_file]) = all_or_none(variable, [ROLE, TOKEN_FILE])? else { return Ok(None) };
    let role = RoleArn::parse(&role).ok().filter(|role| role.style() == ArnStyle::Aws);
    let form = "arn:<partition>:iam::<12 digits>:role/<name>";
    let role = role.ok_or(BaseError::NotOfForm { variable: ROLE, form })?;
    let token_file = PathBuf::from(token_file);
    if !token_file.is_absolute() {
        return Err(BaseError::NotOfForm { variable: TOKEN_FILE, form: "/<path>" });
    }
    let session = match read(variable, SESSION)? {
        Some(name) => SessionName::parse_in(&SessionRules::AWS, &name)
            .or(Err(BaseError::NotOfForm { variable: SESSION, form: "2–64 of A-Za-z0-9_+=,.@-" }))?,
        None => SessionName::fit(&format!("kube2ram@{node}")),
    };
    Ok(Some(WebIdentity { role, token_file, session }))
}

const KEYS: [&str; 2] = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"];
const ROLE: &str = "AWS_ROLE_ARN";
const TOKEN_FILE: &str = "AWS_WEB_IDENTITY_TOKEN_FILE";
const SESSION: &str = "AWS_ROLE_SESSION_NAME";

#[cfg(test)]
mod tests;
