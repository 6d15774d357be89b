//! The agent's own role by AssumeRoleWithOIDC (RRSA). Depends on `exchange`, which has the call, `wire` and
//! the crate's `base`; called by the parent.

use std::path::PathBuf;

use bytes::Bytes;
use jiff::Timestamp;
use secrecy::SecretString;

use crate::{
    alibaba::{
        exchange::{OidcCall, request},
        refusal,
        wire::{Issued, WireError, parse_assume_role},
    },
    base::{Exchange, TokenFile},
    credentials::{IssueError, IssueErrorKind},
    endpoint::Endpoint,
    role::{RoleArn, SessionName},
    sts::refusal::Table,
};

/// The role, its provider and the token's path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OidcSettings {
    /// The agent's own role.
    pub role: RoleArn,
    /// `acs:ram::<account>:oidc-provider/<name>`: the cluster, as RAM knows it.
    pub provider: Box<str>,
    /// Where the kubelet keeps the token, and replaces it before it ends.
    pub token_file: PathBuf,
    /// What ActionTrail shows.
    pub session: SessionName,
}

impl Exchange for OidcSettings {
    fn role(&self) -> &RoleArn {
        &self.role
    }

    fn token_file(&self) -> TokenFile<'_> {
        let variable = "ALIBABA_CLOUD_OIDC_TOKEN_FILE";
        TokenFile { path: &self.token_file, audience: "sts.aliyuncs.com", variable }
    }

    fn form(&self, token: &SecretString) -> Bytes {
        let Self { role, provider, session, .. } = self;
        OidcCall { provider, role, session, policy: None, seconds: 3600 }.form(token)
    }

    fn request(
        &self,
        client: &reqwest::Client,
        endpoint: &Endpoint,
        form: &Bytes,
        now: Timestamp,
    ) -> reqwest::RequestBuilder {
        request(client, endpoint, form.clone(), now)
    }

    fn read(&self, body: &[u8]) -> Result<Issued, WireError> {
        parse_assume_role(body)
    }

    fn refusals(&self) -> &Table {
        &refusal::TABLE
    }

    fn advice(&self, error: &IssueError) -> &'static str {
        advice(error)
    }
}

/// Which side of the trust is to be mended. Codes: RAM, "FAQ about OIDC-based SSO".
fn advice(error: &IssueError) -> &'static str {
    match &*error.code {
        "AuthenticationFail.OIDCToken.Expired" => {
            "the token has expired: see that the kubelet renews it, and the node's clock"
        }
        "AuthenticationFail.OIDCToken.AudienceNotMatch" => {
            "give the mounted token an audience that the OIDC provider lists as client id: sts.aliyuncs.com"
        }
        code if code.starts_with("AuthenticationFail.OIDCToken") => {
            "the provider does not vouch for the token: see that ALIBABA_CLOUD_OIDC_PROVIDER_ARN is this cluster's"
        }
        "EntityNotExist.Role" => "create the role that ALIBABA_CLOUD_ROLE_ARN names, or correct the variable",
        code if code.starts_with("EntityNotExist") => {
            "enable RRSA for the cluster, or correct ALIBABA_CLOUD_OIDC_PROVIDER_ARN"
        }
        _ if matches!(error.kind, IssueErrorKind::Throttled | IssueErrorKind::Unavailable) => {
            refusal::advice(error.kind)
        }
        _ => {
            "have the trust policy of the role in ALIBABA_CLOUD_ROLE_ARN name the provider, the audience and the agent's service account"
        }
    }
}

#[cfg(test)]
mod tests;
