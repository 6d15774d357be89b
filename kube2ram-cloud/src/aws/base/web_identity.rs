//! The agent's own role by AssumeRoleWithWebIdentity (IRSA). Depends on `exchange`, which has the call,
//! `wire`, `refusal` and the crate's `base`; called by the parent.

use std::path::PathBuf;

use bytes::Bytes;
use jiff::Timestamp;
use secrecy::SecretString;

use crate::{
    aws::{
        exchange::{WebIdentityCall, request},
        refusal,
        wire::{Issued, WireError, parse_web_identity},
    },
    base::{Exchange, TokenFile},
    credentials::{IssueError, IssueErrorKind},
    endpoint::Endpoint,
    role::{RoleArn, SessionName},
    sts::refusal::Table,
};

/// The role, the session's name and the token's path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WebIdentity {
    /// The agent's own role.
    pub role: RoleArn,
    /// Where the kubelet keeps the token, and replaces it before it ends.
    pub token_file: PathBuf,
    /// What CloudTrail shows.
    pub session: SessionName,
}

impl Exchange for WebIdentity {
    fn role(&self) -> &RoleArn {
        &self.role
    }

    fn token_file(&self) -> TokenFile<'_> {
        let variable = "AWS_WEB_IDENTITY_TOKEN_FILE";
        TokenFile { path: &self.token_file, audience: "sts.amazonaws.com", variable }
    }

    fn form(&self, token: &SecretString) -> Bytes {
        let Self { role, session, .. } = self;
        WebIdentityCall { role, session, policy: None, seconds: 3600 }.form(token)
    }

    fn request(
        &self,
        client: &reqwest::Client,
        endpoint: &Endpoint,
        form: &Bytes,
        _: Timestamp,
    ) -> reqwest::RequestBuilder {
        request(client, endpoint, form.clone())
    }

    fn read(&self, body: &[u8]) -> Result<Issued, WireError> {
        parse_web_identity(body)
    }

    fn refusals(&self) -> &Table {
        &refusal::TABLE
    }

    /// Which side of the trust is to be corrected.
    fn advice(&self, error: &IssueError) -> &'static str {
        match &*error.code {
            "ExpiredToken" | "ExpiredTokenException" => {
                "the token has expired: see that the kubelet renews it, and the node's clock"
            }
            "InvalidIdentityToken" => {
                "IAM has no OIDC provider for the token's issuer and audience: create the cluster's, with the audience sts.amazonaws.com"
            }
            "RegionDisabledException" => {
                "STS is off in the region for the account: activate it in IAM's account settings"
            }
            _ if matches!(error.kind, IssueErrorKind::Throttled | IssueErrorKind::Unavailable) => {
                refusal::advice(error.kind)
            }
            _ => {
                "have the trust policy of the role in AWS_ROLE_ARN allow sts:AssumeRoleWithWebIdentity to the cluster's OIDC provider, for the agent's service account"
            }
        }
    }
}

#[cfg(test)]
mod tests;
