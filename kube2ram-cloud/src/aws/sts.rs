//! AssumeRole at STS: the production [`Issuer`]. Source: STS API 2011-06-15, AssumeRole. Depends on `base`,
//! `endpoint`, `sign`, `wire` and the crate's `issuer`; called by `credentials`, composed by `app`.

use std::sync::Arc;

use async_trait::async_trait;

use super::{
    base::{Base, BaseCredentials},
    endpoint::{Endpoint, Region, signing_region},
    refusal,
    sign::FormCall,
    wire::{Issued, WireError, parse_assume_role},
};
pub use crate::sts::{StsClient, StsClientError};
use crate::{
    canonical::encode,
    credentials::{Credentials, IssueError, Issuer},
    issuer::{AssumeRole, Call, Protocol, RoleIssuer},
    role::{RoleSession, SourceIdentity, Tag},
    sts::refusal::{Refusal, Table, unsendable},
};
use kube2ram_service::clock::Clock;

/// Issues credentials through AssumeRole.
pub struct StsIssuer(RoleIssuer<Query, AssumeRole>);

impl StsIssuer {
    /// Connects on first use only. Tries `endpoints` in order. Signs for the region that an endpoint's host
    /// names, else for `region`.
    pub fn new(
        client: StsClient,
        endpoints: Vec<Endpoint>,
        region: Region,
        base: Base,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self(RoleIssuer::new(Query { region }, AssumeRole(base), client, endpoints, clock))
    }
}

#[async_trait]
impl Issuer for StsIssuer {
    async fn issue(&self, session: &RoleSession) -> Result<Credentials, IssueError> {
        self.0.issue(session).await
    }
}

/// The query protocol, version 2011-06-15: a form in, XML out.
struct Query {
    region: Region,
}

impl Protocol<Arc<BaseCredentials>> for Query {
    fn request(
        &self,
        client: &reqwest::Client,
        endpoint: &Endpoint,
        call: &Call<'_, Arc<BaseCredentials>>,
    ) -> Result<reqwest::RequestBuilder, Refusal> {
        let form = form(call.session, call.seconds);
        let headers = FormCall {
            host: endpoint.host(),
            region: signing_region(endpoint, &self.region),
            form: form.as_bytes(),
            date: call.now,
        }
        .headers(call.proof)
        .map_err(unsendable)?;
        Ok(client.post(endpoint.url().clone()).headers(headers).body(form))
    }

    fn read(&self, body: &[u8]) -> Result<Issued, WireError> {
        parse_assume_role(body)
    }

    fn refusals(&self) -> &Table {
        &refusal::TABLE
    }
}

fn form(session: &RoleSession, seconds: u64) -> String {
    let seconds = seconds.to_string();
    let tags = tag_parameters(&session.tags);
    let mut parameters = vec![
        ("Action", "AssumeRole"),
        ("Version", "2011-06-15"),
        ("RoleArn", session.role.as_str()),
        ("RoleSessionName", session.session_name.as_str()),
        ("DurationSeconds", &*seconds),
    ];
    parameters.extend(session.grant.external_id().map(|id| ("ExternalId", id.as_str())));
    parameters.extend(session.policy.as_ref().map(|policy| ("Policy", policy.as_str())));
    let source_identity = session.source_identity.as_ref().map(SourceIdentity::as_str);
    parameters.extend(source_identity.map(|identity| ("SourceIdentity", identity)));
    parameters.extend(tags.iter().map(|(name, value)| (name.as_str(), *value)));
    encode(&parameters)
}

/// Each tag as a member of two lists: of the tags, and of those that a later session of a chain inherits.
fn tag_parameters(tags: &[Tag]) -> Vec<(String, &str)> {
    let mut parameters = Vec::with_capacity(3 * tags.len());
    for (index, Tag { key, value }) in tags.iter().enumerate() {
        let number = index + 1;
        parameters.extend([
            (format!("Tags.member.{number}.Key"), *key),
            (format!("Tags.member.{number}.Value"), value.as_str()),
            (format!("TransitiveTagKeys.member.{number}"), *key),
        ]);
    }
    parameters
}

#[cfg(test)]
mod tests;
