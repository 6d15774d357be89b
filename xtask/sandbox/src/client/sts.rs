//! STS calls as an application makes them with what it was given, in either cloud.
//! Depends on the stand-ins' signatures, not on the agent's. Called by `show` and tests.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::Value;
use uuid::Uuid;

use super::{Reply, Request};
use crate::{
    Cloud,
    clock::iso8601,
    standin::{AccessKey, V4Request, V4Scope, pe, v1_signature, v4_authorization, xml_text},
};

/// The document that the metadata service serves, or a static key.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Credentials {
    /// `AccessKeyId`.
    pub access_key_id: String,
    /// `AccessKeySecret`, on AWS `SecretAccessKey`.
    #[serde(alias = "SecretAccessKey")]
    pub access_key_secret: String,
    /// `SecurityToken`, on AWS `Token`.
    #[serde(alias = "Token")]
    pub security_token: Option<String>,
}

impl Credentials {
    /// The role that they are of: `STS.<role>.<unique>`, on AWS `ASIA.<role>.<unique>`.
    pub fn role(&self) -> &str {
        self.access_key_id.split('.').nth(1).unwrap_or_default()
    }

    /// The cloud that issued them: all ids of AWS begin with `A`, and none of Alibaba Cloud's.
    fn cloud(&self) -> Cloud {
        if self.access_key_id.starts_with('A') { Cloud::Aws } else { Cloud::Alibaba }
    }
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
    let arn = match credentials.cloud() {
        Cloud::Alibaba => serde_json::from_str::<Value>(&reply.body)?["Arn"].as_str().map(str::to_owned),
        Cloud::Aws => xml_text(&reply.body, "Arn").map(str::to_owned),
    };
    arn.context("no Arn in the answer")
}

/// Asks for a session of a role.
///
/// # Errors
/// When STS cannot be reached; a refusal is a [`Reply`].
pub fn assume_role(sts_url: &str, credentials: &Credentials, params: &[(&str, &str)]) -> Result<Reply> {
    call(sts_url, credentials, "AssumeRole", params)
}

fn call(sts_url: &str, credentials: &Credentials, action: &str, params: &[(&str, &str)]) -> Result<Reply> {
    match credentials.cloud() {
        Cloud::Alibaba => call_v1(sts_url, credentials, action, params),
        Cloud::Aws => call_v4(sts_url, credentials, action, params, Timestamp::now()),
    }
}

fn call_v1(sts_url: &str, credentials: &Credentials, action: &str, params: &[(&str, &str)]) -> Result<Reply> {
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

/// The query protocol of AWS, by POST, signed at this time.
pub(crate) fn call_v4(
    sts_url: &str,
    credentials: &Credentials,
    action: &str,
    params: &[(&str, &str)],
    at: Timestamp,
) -> Result<Reply> {
    let all = [("Action", action), ("Version", "2011-06-15")];
    let pairs = all.iter().chain(params).map(|(name, value)| format!("{}={}", pe(name), pe(value)));
    let body = pairs.collect::<Vec<_>>().join("&");
    let date = at.strftime("%Y%m%dT%H%M%SZ").to_string();
    let host = sts_url.trim_start_matches("http://");
    let mut headers = vec![
        ("content-type", "application/x-www-form-urlencoded; charset=utf-8"),
        ("host", host),
        ("x-amz-date", &*date),
    ];
    headers.extend(credentials.security_token.as_deref().map(|token| ("x-amz-security-token", token)));
    let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let headers = headers.collect::<Vec<_>>();
    let payload = body.as_bytes();
    let signed = V4Request { method: "POST", path: "/", query: "", headers: &headers, payload };
    let scope = V4Scope { date: &date, region: Cloud::Aws.region(), service: "sts" };
    let authorization =
        v4_authorization(&credentials.access_key_id, &credentials.access_key_secret, scope, &signed);

    let mut request = Request::get(format!("{sts_url}/")).header("authorization", authorization);
    request.method = "POST".into();
    request.headers.extend(headers.into_iter().filter(|(name, _)| name != "host"));
    request.body = body.into_bytes();
    request.send()
}
