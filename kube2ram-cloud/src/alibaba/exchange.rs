//! AssumeRoleWithOIDC: a token for a session of a role. `base` calls it for the agent's own role, the issuer
//! here for pods' roles. Source: STS API 2015-04-01, "AssumeRoleWithOIDC". Depends on `sign`, `wire`,
//! `refusal` and the crate's `base` and `issuer`; called by `base`, composed by the crate's `provider`.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE};
use jiff::Timestamp;
use secrecy::SecretString;

use super::{
    DIALECT, OidcProviderArn, refusal,
    sign::canonical_query,
    wire::{Issued, WireError, parse_assume_role},
};
use crate::{
    base::form_with_token,
    credentials::{IssueErrorKind, TokenSource},
    endpoint::Endpoint,
    issuer::{Call, Protocol, ProvenAccount, RoleIssuer, TokenExchange},
    role::{RoleArn, SessionName, SessionPolicy},
    sts::{
        StsClient,
        refusal::{Refusal, Table, ours},
    },
};
use kube2ram_service::clock::Clock;

/// The parameters of the body, besides the token.
pub(super) struct OidcCall<'a> {
    pub(super) provider: &'a str,
    pub(super) role: &'a RoleArn,
    pub(super) session: &'a SessionName,
    pub(super) policy: Option<&'a SessionPolicy>,
    pub(super) seconds: u64,
}

impl OidcCall<'_> {
    /// The body, in memory that is zeroised.
    pub(super) fn form(&self, token: &SecretString) -> Bytes {
        let seconds = self.seconds.to_string();
        let mut parameters = vec![
            ("DurationSeconds", &*seconds),
            ("OIDCProviderArn", self.provider),
            ("RoleArn", self.role.as_str()),
            ("RoleSessionName", self.session.as_str()),
        ];
        parameters.extend(self.policy.map(|policy| ("Policy", policy.as_str())));
        form_with_token(&canonical_query(&parameters), "OIDCToken", token)
    }
}

/// The call: public parameters in the query, no signature.
pub(super) fn request(
    client: &reqwest::Client,
    endpoint: &Endpoint,
    form: Bytes,
    now: Timestamp,
) -> reqwest::RequestBuilder {
    let mut url = endpoint.url().clone();
    url.set_query(Some(&query(now, &uuid::Uuid::new_v4().to_string())));
    let request = client.post(url).header(ACCEPT, "application/json");
    request.header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(form)
}

/// The public parameters.
pub(super) fn query(now: Timestamp, nonce: &str) -> String {
    let now = now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    canonical_query(&[
        ("Action", "AssumeRoleWithOIDC"),
        // The default is XML.
        ("Format", "JSON"),
        ("SignatureNonce", nonce),
        ("Timestamp", &now),
        ("Version", "2015-04-01"),
    ])
}

/// Issues credentials of roles that trust ServiceAccounts. Connects on first use only. Tries `endpoints` in
/// order. Without a provider, it issues none.
pub(crate) fn issuer(
    client: StsClient,
    endpoints: Vec<Endpoint>,
    provider: Option<OidcProviderArn>,
    tokens: Arc<dyn TokenSource>,
    clock: Arc<dyn Clock>,
) -> RoleIssuer<AccountCall, TokenExchange> {
    let exchange = TokenExchange::new(tokens, DIALECT.audience, &refusal::EXPIRED_TOKEN);
    RoleIssuer::new(AccountCall { provider }, exchange, client, endpoints, clock)
}

/// The call for a pod's role.
pub(crate) struct AccountCall {
    provider: Option<OidcProviderArn>,
}

impl Protocol<ProvenAccount> for AccountCall {
    fn request(
        &self,
        client: &reqwest::Client,
        endpoint: &Endpoint,
        call: &Call<'_, ProvenAccount>,
    ) -> Result<reqwest::RequestBuilder, Refusal> {
        let Some(provider) = &self.provider else {
            let (kind, message) = (IssueErrorKind::ClusterConfiguration, "no OIDC provider is configured");
            return Err(ours(kind, "OidcProvider", message, None).into());
        };
        let Call { session, seconds, proof, now } = *call;
        let form = OidcCall {
            provider: provider.as_str(),
            role: &session.role,
            session: &session.session_name,
            policy: session.policy.as_ref(),
            seconds,
        }
        .form(&proof.token);
        Ok(request(client, endpoint, form, now))
    }

    fn read(&self, body: &[u8]) -> Result<Issued, WireError> {
        parse_assume_role(body)
    }

    fn refusals(&self) -> &Table {
        &refusal::EXCHANGE
    }
}

#[cfg(test)]
mod tests;
