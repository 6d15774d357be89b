//! Writing a token, byte by byte as ack-ram-tool does. Pure; called by the client, through the parent.

use std::collections::BTreeMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use jiff::Timestamp;
use kube2ram_cloud::{BaseCredentials, alibaba::caller_identity};
use secrecy::{SecretString, zeroize::Zeroizing};
use serde::Serialize;

use super::{CLUSTER_PARAMETER, ClusterId, PREFIX};

/// Compact, in this order of keys; the headers are sorted by their bytes, as Go sorts them.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Written<'a> {
    cluster_id: &'a str,
    method: &'static str,
    path: &'static str,
    query: BTreeMap<&'static str, &'a str>,
    headers: BTreeMap<&'static str, &'a str>,
}

/// Signs a call for `cluster`, and wraps it as a token. `user_agent` is what the trail of actions shows.
///
/// # Errors
/// serde_json's, which has no reason to fail here.
pub fn presign(
    cluster: &ClusterId,
    credentials: &BaseCredentials,
    now: Timestamp,
    user_agent: &str,
) -> serde_json::Result<SecretString> {
    let query = [(CLUSTER_PARAMETER, cluster.as_str())];
    let signed = caller_identity::presign(&query, credentials, now);
    let mut headers: BTreeMap<&'static str, &str> =
        signed.iter().map(|&(name, ref value)| (spelled(name), value.as_str())).collect();
    headers.insert("user-agent", user_agent);
    // What grows leaves copies behind. Nothing in it takes an escape but what a user agent may hold.
    let values: usize = headers.values().map(|value| value.len()).sum();
    let mut json = Zeroizing::new(Vec::with_capacity(KEYS_BYTES + 2 * values));
    serde_json::to_writer(
        &mut *json,
        &Written { cluster_id: cluster.as_str(), method: "POST", path: "/", query: query.into(), headers },
    )?;
    let mut token = String::with_capacity(PREFIX.len() + json.len().div_ceil(3) * 4);
    token.push_str(PREFIX);
    STANDARD.encode_string(&*json, &mut token);
    Ok(token.into())
}

/// Go's client writes this one name in upper case.
fn spelled(name: &'static str) -> &'static str {
    if name == "authorization" { "Authorization" } else { name }
}

/// All keys, and the cluster id twice.
const KEYS_BYTES: usize = 1024;
