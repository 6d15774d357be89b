//! AssumeRoleWithWebIdentity: a token for a session of a role. `base` calls it for the agent's own role, the
//! issuer here for pods' roles. Source: STS API 2011-06-15, "AssumeRoleWithWebIdentity". Depends on `sign`,
//! `wire`, `refusal` and the crate's `base` and `issuer`; called by `base`, composed by the crate's
//! `provider`.

use std::sync::Arc;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use secrecy::SecretString;

use super::{
    DIALECT, refusal,
    sign::FORM,
    wire::{Issued, WireError, parse_web_identity},
};
use crate::{
    base::form_with_token,
    canonical::encode,
    credentials::TokenSource,
    endpoint::Endpoint,
    issuer::{Call, Protocol, ProvenAccount, RoleIssuer, TokenExchange},
    role::{RoleArn, SessionName, SessionPolicy},
    sts::{
        StsClient,
        refusal::{Refusal, Table},
    },
};
use kube2ram_service::clock::Clock;

/// The parameters, besides the token.
pub(super) struct WebIdentityCall<'a> {
    pub(super) role: &'a RoleArn,
    pub(super) session: &'a SessionName,
    pub(super) policy: Option<&'a SessionPolicy>,
    pub(super) seconds: u64,
}

impl WebIdentityCall<'_> {
    /// The body, in memory that is zeroised.
    pub(super) fn form(&self, token: &SecretString) -> Bytes {
        let seconds = self.seconds.to_string();
        let mut parameters = vec![
            ("Action", "AssumeRoleWithWebIdentity"),
            ("Version", "2011-06-15"),
            ("DurationSeconds", &*seconds),
            ("RoleArn", self.role.as_str()),
            ("RoleSessionName", self.session.as_str()),
        ];
        parameters.extend(self.policy.map(|policy| ("Policy", policy.as_str())));
        form_with_token(&encode(&parameters), "WebIdentityToken", token)
    }
}

/// The call: a form without a signature.
pub(super) fn request(client: &reqwest::Client, endpoint: &Endpoint, form: Bytes) -> reqwest::RequestBuilder {
    client.post(endpoint.url().clone()).header(CONTENT_TYPE, FORM).body(form)
}

/// Issues credentials of roles that trust ServiceAccounts. Connects on first use only. Tries `endpoints` in
/// order.
pub(crate) fn issuer(
    client: StsClient,
    endpoints: Vec<Endpoint>,
    tokens: Arc<dyn TokenSource>,
    clock: Arc<dyn Clock>,
) -> RoleIssuer<AccountCall, TokenExchange> {
    let exchange = TokenExchange::new(tokens, DIALECT.audience, &refusal::EXPIRED_TOKEN);
    RoleIssuer::new(AccountCall, exchange, client, endpoints, clock)
}

/// The call for a pod's role.
pub(crate) struct AccountCall;

impl Protocol<ProvenAccount> for AccountCall {
    fn request(
        &self,
        client: &reqwest::Client,
        endpoint: &Endpoint,
        call: &Call<'_, ProvenAccount>,
    ) -> Result<reqwest::RequestBuilder, Refusal> {
        let Call { session, seconds, proof, .. } = *call;
        let form = WebIdentityCall {
            role: &session.role,
            session: &session.session_name,
            policy: session.policy.as_ref(),
            seconds,
        }
        .form(&proof.token);
        Ok(request(client, endpoint, form))
    }

    fn read(&self, body: &[u8]) -> Result<Issued, WireError> {
        parse_web_identity(body)
    }

    fn refusals(&self) -> &Table {
        &refusal::EXCHANGE
    }
}

#[cfg(test)]
mod tests;
