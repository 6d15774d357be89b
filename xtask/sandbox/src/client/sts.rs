//! STS calls as an application makes them with what it was given.
//! Depends on the stand-ins' signatures, not on the agent's. Called by `show` and tests.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::Value;
use uuid::Uuid;

use super::{Reply, Request};
use crate::{
    clock::iso8601,
    standin::{AccessKey, pe, v1_signature},
};

/// The document that the metadata service serves, or a static key.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Credentials {
    /// `AccessKeyId`.
    pub access_key_id: String,
    /// `AccessKeySecret`.
    pub access_key_secret: String,
    /// `SecurityToken`.
    pub security_token: Option<String>,
}

impl From<&AccessKey> for Credentials {
    fn from(key: &AccessKey) -> Self {
        Self {
            access_key_id: key.id.clone(),
            access_key_secret: key.secret.clone(),
            security_token: key.security_token.clone(),
        }
    }
}

/// Asks who the credentials belong to: the ARN.
///
/// # Errors
/// When STS refuses them or cannot be reached.
pub fn caller_identity(sts_url: &str, credentials: &Credentials) -> Result<String> {
    let reply = call(sts_url, credentials, "GetCallerIdentity", &[])?;
    ensure!(reply.status == 200, "STS says {}: {}", reply.status, reply.body);
    let answer = serde_json::from_str::<Value>(&reply.body)?;
    Ok(answer["Arn"].as_str().context("no Arn in the answer")?.to_owned())
}

/// Asks for a session of a role.
///
/// # Errors
/// When STS cannot be reached; a refusal is a [`Reply`].
pub fn assume_role(sts_url: &str, credentials: &Credentials, params: &[(&str, &str)]) -> Result<Reply> {
    call(sts_url, credentials, "AssumeRole", params)
}

fn call(sts_url: &str, credentials: &Credentials, action: &str, params: &[(&str, &str)]) -> Result<Reply> {
    let mut all = params
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect::<BTreeMap<_, _>>();
    let nonce = Uuid::new_v4().to_string();
    let date = iso8601(Timestamp::now());
    for (name, value) in [
        ("AccessKeyId", credentials.access_key_id.as_str()),
        ("Action", action),
        ("Format", "JSON"),
        ("SignatureMethod", "HMAC-SHA1"),
        ("SignatureNonce", &nonce),
        ("SignatureVersion", "1.0"),
        ("Timestamp", &date),
        ("Version", "2015-04-01"),
    ] {
        all.insert(name.into(), value.into());
    }
    if let Some(token) = &credentials.security_token {
        all.insert("SecurityToken".into(), token.clone());
    }
    let signature = v1_signature(&credentials.access_key_secret, "GET", &all);
    all.insert("Signature".into(), signature);
    let query = all.iter().map(|(name, value)| format!("{}={}", pe(name), pe(value))).collect::<Vec<_>>();

    Request::get(format!("{sts_url}/?{}", query.join("&"))).send()
}
