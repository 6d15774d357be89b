//! AssumeRole at STS: the production [`Issuer`]. Source: STS API 2015-04-01, AssumeRole.
//! Depends on `base`, `sign`, `wire` and the crate's `issuer`; called by `credentials`, composed by `app`.

use std::sync::Arc;

use async_trait::async_trait;

use super::{
    base::{Base, BaseCredentials},
    endpoint::Endpoint,
    refusal,
    sign::{RpcCall, canonical_query},
    wire::{Issued, WireError, parse_assume_role},
};
pub use crate::sts::{StsClient, StsClientError};
use crate::{
    credentials::{Credentials, IssueError, Issuer},
    issuer::{AssumeRole, Call, Protocol, RoleIssuer},
    role::RoleSession,
    sts::refusal::{Refusal, Table, unsendable},
};
use kube2ram_service::clock::Clock;

/// Issues credentials through AssumeRole.
pub struct StsIssuer(RoleIssuer<Acs, AssumeRole>);

impl StsIssuer {
    /// Connects on first use only. Tries `endpoints` in order.
    pub fn new(client: StsClient, endpoints: Vec<Endpoint>, base: Base, clock: Arc<dyn Clock>) -> Self {
        Self(RoleIssuer::new(Acs, AssumeRole(base), client, endpoints, clock))
    }
}

#[async_trait]
impl Issuer for StsIssuer {
    async fn issue(&self, session: &RoleSession) -> Result<Credentials, IssueError> {
        self.0.issue(session).await
    }
}

/// RPC style, version 2015-04-01, JSON.
struct Acs;

impl Protocol<Arc<BaseCredentials>> for Acs {
    fn request(
        &self,
        client: &reqwest::Client,
        endpoint: &Endpoint,
        call: &Call<'_, Arc<BaseCredentials>>,
    ) -> Result<reqwest::RequestBuilder, Refusal> {
        let query = query(call.session, call.seconds);
        let headers = RpcCall {
            host: Some(endpoint.host()),
            action: "AssumeRole",
            version: "2015-04-01",
            canonical_query: &query,
            date: call.now,
            nonce: Some(&uuid::Uuid::new_v4().to_string()),
        }
        .headers(call.proof)
        .map_err(unsendable)?;
        let mut url = endpoint.url().clone();
        url.set_query(Some(&query));
        Ok(client.post(url).headers(headers).header("accept", "application/json"))
    }

    fn read(&self, body: &[u8]) -> Result<Issued, WireError> {
        parse_assume_role(body)
    }

    fn refusals(&self) -> &Table {
        &refusal::TABLE
    }
}

fn query(session: &RoleSession, seconds: u64) -> String {
    let seconds = seconds.to_string();
    let mut parameters = vec![
        ("DurationSeconds", &*seconds),
        // The default is XML.
        ("Format", "JSON"),
        ("RoleArn", session.role.as_str()),
        ("RoleSessionName", session.session_name.as_str()),
    ];
    parameters.extend(session.grant.external_id().map(|id| ("ExternalId", id.as_str())));
    parameters.extend(session.policy.as_ref().map(|policy| ("Policy", policy.as_str())));
    canonical_query(&parameters)
}

#[cfg(test)]
mod tests;
