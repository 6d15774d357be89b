//! A request to STS taken apart: which signature it carries, over what, and its parameters checked against
//! the API's rules. Pure. Called by the STS stand-in.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, Request, header};
use jiff::{Timestamp, civil::DateTime, tz::TimeZone};

use super::{Call, Failure};
use crate::standin::signature::{V3Request, hex_sha256, v1_signature, v3_signature};

/// A request with its signature.
pub(super) struct Signed {
    pub(super) nonce: String,
    pub(super) security_token: Option<String>,
    pub(super) version: String,
    pub(super) wants_json: bool,
    date: String,
    method: String,
    signature: Signature,
}

enum Signature {
    V1 {
        given: String,
        params: BTreeMap<String, String>,
    },
    V3 {
        body_hash: String,
        given: String,
        headers: HeaderMap,
        query: BTreeMap<String, String>,
        signed: String,
    },
}

/// The public parameters of a V1 request; the others are the action's own.
const V1_PUBLIC: [&str; 9] = [
    "AccessKeyId",
    "Action",
    "Format",
    "SecurityToken",
    "SignatureMethod",
    "SignatureNonce",
    "SignatureVersion",
    "Timestamp",
    "Version",
];

impl Signed {
    /// Takes a request apart and notes in `call` what it asks.
    pub(super) fn parse(request: &Request<Bytes>, call: &mut Call) -> Result<Self, Failure> {
        let query = decoded(request.uri().query().unwrap_or_default().as_bytes());
        let is_form = text(request.headers(), header::CONTENT_TYPE.as_str())
            .starts_with("application/x-www-form-urlencoded");
        let mut params = query.clone();
        if is_form {
            params.extend(decoded(request.body()));
        }
        if text(request.headers(), "authorization").starts_with("ACS3-") {
            Self::v3(request, query, params, call)
        } else {
            Self::v1(request, params, call)
        }
    }

    fn v1(
        request: &Request<Bytes>,
        mut params: BTreeMap<String, String>,
        call: &mut Call,
    ) -> Result<Self, Failure> {
        let given = params.remove("Signature").unwrap_or_default();
        let public = |name: &str| params.get(name).cloned().unwrap_or_default();
        call.action = public("Action");
        call.access_key_id = public("AccessKeyId");
        call.signature = "V1";
        call.params = params.clone();
        call.params.retain(|name, _| !V1_PUBLIC.contains(&name.as_str()));
        if given.is_empty() || public("SignatureMethod") != "HMAC-SHA1" || public("SignatureVersion") != "1.0"
        {
            return Err(Failure::bad(
                "IncompleteSignature",
                "The request signature does not conform to Aliyun standards.",
            ));
        }

        Ok(Self {
            nonce: public("SignatureNonce"),
            security_token: params.get("SecurityToken").cloned(),
            version: public("Version"),
            wants_json: public("Format").eq_ignore_ascii_case("json"),
            date: public("Timestamp"),
            method: request.method().to_string(),
            signature: Signature::V1 { given, params },
        })
    }

    fn v3(
        request: &Request<Bytes>,
        query: BTreeMap<String, String>,
        params: BTreeMap<String, String>,
        call: &mut Call,
    ) -> Result<Self, Failure> {
        let headers = request.headers();
        let authorization = text(headers, "authorization");
        let mut fields = authorization
            .strip_prefix("ACS3-HMAC-SHA256 ")
            .unwrap_or_default()
            .split(',')
            .filter_map(|field| field.split_once('='))
            .collect::<BTreeMap<_, _>>();
        let mut field = |name| fields.remove(name).unwrap_or_default().to_owned();
        call.action = text(headers, "x-acs-action").to_owned();
        call.access_key_id = field("Credential");
        call.signature = "V3";
        call.params = params;
        let wants_json = text(headers, "accept").contains("json")
            || call.params.remove("Format").is_some_and(|format| format.eq_ignore_ascii_case("json"));
        let signature = Signature::V3 {
            body_hash: hex_sha256(request.body()),
            given: field("Signature"),
            headers: headers.clone(),
            query,
            signed: field("SignedHeaders"),
        };
        if call.access_key_id.is_empty() {
            return Err(Failure::bad(
                "IncompleteSignature",
                "The request signature does not conform to Aliyun standards.",
            ));
        }

        Ok(Self {
            nonce: text(headers, "x-acs-signature-nonce").to_owned(),
            security_token: headers
                .contains_key("x-acs-security-token")
                .then(|| text(headers, "x-acs-security-token").to_owned()),
            version: text(headers, "x-acs-version").to_owned(),
            wants_json,
            date: text(headers, "x-acs-date").to_owned(),
            method: request.method().to_string(),
            signature,
        })
    }

    /// The client's time of signing; `None` unless it is exactly `YYYY-MM-DDThh:mm:ssZ`.
    pub(super) fn timestamp(&self) -> Option<Timestamp> {
        timestamp(&self.date)
    }

    /// Whether it is a call that its signer has given to somebody else to send: then neither the host nor a
    /// nonce is signed. Only GetCallerIdentity is known to be called so.
    pub(super) fn is_presigned(&self) -> bool {
        match &self.signature {
            Signature::V1 { .. } => false,
            Signature::V3 { headers, signed, .. } => {
                text(headers, "x-acs-action") == "GetCallerIdentity"
                    && self.nonce.is_empty()
                    && !signed.split(';').any(|name| name == "host")
            }
        }
    }

    /// Whether the signature is this secret's, over everything that must be signed.
    pub(super) fn verify(&self, secret: &str) -> bool {
        match &self.signature {
            Signature::V1 { given, params } => *given == v1_signature(secret, &self.method, params),
            Signature::V3 { body_hash, given, headers, query, signed } => {
                let names = signed.split(';').collect::<Vec<_>>();
                let must_be_signed = |name: &str| {
                    let is_host = name == "host" && !self.is_presigned();
                    name.starts_with("x-acs-") || is_host || name == "content-type"
                };
                let required = if self.is_presigned() { &V3_PRESIGNED[..] } else { &V3_REQUIRED[..] };
                if headers.keys().any(|name| must_be_signed(name.as_str()) && !names.contains(&name.as_str()))
                    || required.iter().any(|name| !headers.contains_key(*name))
                    || text(headers, "x-acs-content-sha256") != body_hash
                {
                    return false;
                }
                let pairs = names
                    .iter()
                    .flat_map(|name| headers.get_all(*name).iter().map(move |value| (name, value)))
                    .map(|(name, value)| ((*name).to_owned(), value.to_str().unwrap_or_default().to_owned()))
                    .collect::<Vec<_>>();
                let request =
                    V3Request { method: &self.method, query, headers: &pairs, payload_hash: body_hash };
                request.signed_headers() == *signed && *given == v3_signature(secret, &request)
            }
        }
    }
}

const V3_REQUIRED: [&str; 6] =
    ["host", "x-acs-action", "x-acs-content-sha256", "x-acs-date", "x-acs-signature-nonce", "x-acs-version"];

const V3_PRESIGNED: [&str; 4] = ["x-acs-action", "x-acs-content-sha256", "x-acs-date", "x-acs-version"];

/// The name in `RoleArn`.
pub(super) fn role_name(arn: &str) -> Result<&str, Failure> {
    arn.strip_prefix("acs:ram::")
        .and_then(|rest| rest.split_once(":role/"))
        .filter(|(uid, _)| !uid.is_empty() && uid.bytes().all(|b| b.is_ascii_digit()))
        .map(|(_, name)| name)
        .ok_or_else(|| Failure::bad("InvalidParameter.RoleArn", "The parameter RoleArn is wrongly formed."))
}

/// `RoleSessionName`: 2–64 of `[A-Za-z0-9.@_-]`.
pub(super) fn session_name(call: &Call) -> Result<&str, Failure> {
    call.param("RoleSessionName")
        .filter(|name| (2..=64).contains(&name.len()))
        .filter(|name| name.bytes().all(|b| b.is_ascii_alphanumeric() || b".@_-".contains(&b)))
        .ok_or_else(|| {
            Failure::bad(
                "InvalidParameter.RoleSessionName",
                "The parameter RoleSessionName is wrongly formed.",
            )
        })
}

/// `Policy`: at most 2048 characters of JSON.
pub(super) fn check_policy(call: &Call) -> Result<(), Failure> {
    let Some(policy) = call.param("Policy") else { return Ok(()) };
    if !(1..=2048).contains(&policy.chars().count()) {
        return Err(Failure::bad("InvalidParameter.PolicySize", "The size of Policy is out of range."));
    }
    if !serde_json::from_str::<serde_json::Value>(policy).is_ok_and(|policy| policy.is_object()) {
        return Err(Failure::bad(
            "InvalidParameter.PolicyGrammar",
            "The parameter Policy has wrong grammar.",
        ));
    }

    Ok(())
}

/// `DurationSeconds`: 900 up to what the role allows; 3600 unless given.
pub(super) fn duration(call: &Call, max: Duration) -> Result<Duration, Failure> {
    let seconds = call.param("DurationSeconds").map_or(Some(3600), |text| text.parse().ok());
    seconds
        .map(Duration::from_secs)
        .filter(|asked| (Duration::from_secs(900)..=max).contains(asked))
        .ok_or_else(|| {
            Failure::bad(
                "InvalidParameter.DurationSeconds",
                "The Min/Max value of DurationSeconds is 15min/1hr.",
            )
        })
}

pub(super) fn decoded(pairs: &[u8]) -> BTreeMap<String, String> {
    url::form_urlencoded::parse(pairs).into_owned().collect()
}

/// Exactly `YYYY-MM-DDThh:mm:ssZ`.
pub(super) fn timestamp(text: &str) -> Option<Timestamp> {
    if text.len() != "YYYY-MM-DDThh:mm:ssZ".len() {
        return None;
    }
    let time = DateTime::strptime("%Y-%m-%dT%H:%M:%SZ", text).ok()?;
    Some(time.to_zoned(TimeZone::UTC).ok()?.timestamp())
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
}
