//! What AWS sends: STS answers and errors in XML, the metadata server's credentials document in JSON. Pure
//! and total: any bytes in, a value or a [`WireError`] out. Sources: STS API 2011-06-15 (AssumeRole,
//! AssumeRoleWithWebIdentity, "Common errors"), EC2 user guide, "Retrieve security credentials from instance
//! metadata". Called by `sts`, `base`, `metadata`.

use jiff::Timestamp;
use secrecy::SecretString;
use serde::Deserialize;

use super::xml::Leaves;
use crate::wire::parse_time;
pub use crate::wire::{BODY_LIMIT_BYTES, ErrorDocument, Holder, Issued, WireError};

/// Parses the answer of AssumeRole.
///
/// # Errors
/// See [`WireError`].
pub fn parse_assume_role(body: &[u8]) -> Result<Issued, WireError> {
    issued(body, "AssumeRole")
}

/// Parses the answer of AssumeRoleWithWebIdentity.
///
/// # Errors
/// See [`WireError`].
pub fn parse_web_identity(body: &[u8]) -> Result<Issued, WireError> {
    issued(body, "AssumeRoleWithWebIdentity")
}

/// Parses an error of STS; `None` without a usable `Code`: then the answer is not from STS.
pub fn parse_error(body: &[u8]) -> Option<ErrorDocument> {
    let leaves = leaves(body).ok()?;
    let code = leaves.text("ErrorResponse/Error/Code")?;
    let message = leaves.text("ErrorResponse/Error/Message").unwrap_or_default();
    ErrorDocument::of(code, &message, leaves.text("ErrorResponse/RequestId"))
}

/// Parses the metadata server's `iam/security-credentials/<role>`.
///
/// # Errors
/// See [`WireError`].
pub fn parse_node_credentials(body: &[u8]) -> Result<Issued, WireError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Document {
        code: String,
        access_key_id: Option<String>,
        // Zeroised from here on, also when the document turns out to be malformed.
        secret_access_key: Option<SecretString>,
        token: Option<SecretString>,
        expiration: Option<String>,
    }

    let Document { code, access_key_id, secret_access_key, token, expiration } = json(body)?;
    // A failure is a document of status 200, too, and has none of the other keys.
    if code != "Success" {
        return Err(WireError::Unsuccessful);
    }
    let (Some(id), Some(secret), Some(token), Some(expiration)) =
        (access_key_id, secret_access_key, token, expiration)
    else {
        return Err(WireError::Json);
    };
    let keys = ["AccessKeyId", "SecretAccessKey", "Token"];
    Issued::try_new(keys, &id, secret, token, time(&expiration)?)
}

/// Parses the metadata server's `iam/info`: the ARN of the instance profile, which has the node's partition
/// and account.
///
/// # Errors
/// See [`WireError`].
pub fn parse_profile_arn(body: &[u8]) -> Result<String, WireError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Document {
        code: String,
        instance_profile_arn: Option<String>,
    }

    let Document { code, instance_profile_arn } = json(body)?;
    if code != "Success" {
        return Err(WireError::Unsuccessful);
    }
    instance_profile_arn.ok_or(WireError::Json)
}

/// The credentials in the answer to an action.
fn issued(body: &[u8], action: &str) -> Result<Issued, WireError> {
    let leaves = leaves(body)?;
    let result = format!("{action}Response/{action}Result");
    let raw = |name: &str| leaves.raw(&format!("{result}/Credentials/{name}")).ok_or(WireError::Xml);
    let keys = ["AccessKeyId", "SecretAccessKey", "SessionToken"];
    let [id, secret, token] = keys;
    // As they stand: none of their characters is ever written as a reference.
    let (id, secret, token) = (raw(id)?, raw(secret)?, raw(token)?);
    if [id, secret, token].iter().any(|value| value.contains('&')) {
        return Err(WireError::Xml);
    }
    let expires_at = time(raw("Expiration")?)?;
    let issued = Issued::try_new(keys, id, secret.into(), token.into(), expires_at)?;
    let request_id = leaves.text(&format!("{action}Response/ResponseMetadata/RequestId"));
    let holder = Holder {
        session_arn: optional(&leaves, &format!("{result}/AssumedRoleUser/Arn"))?,
        subject: optional(&leaves, &format!("{result}/SubjectFromWebIdentityToken"))?,
    };
    Ok(issued.of_sts(request_id, holder))
}

/// The text at a path, if the document has one. One that is there twice, or cannot be read, must not pass
/// for one that is not there.
fn optional(leaves: &Leaves<'_>, path: &str) -> Result<Option<Box<str>>, WireError> {
    if !leaves.has(path) {
        return Ok(None);
    }
    leaves.text(path).map(|text| Some(text.into())).ok_or(WireError::Xml)
}

fn leaves(body: &[u8]) -> Result<Leaves<'_>, WireError> {
    if body.len() > BODY_LIMIT_BYTES {
        return Err(WireError::TooLong);
    }
    str::from_utf8(body).ok().and_then(Leaves::parse).ok_or(WireError::Xml)
}

fn json<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, WireError> {
    if body.len() > BODY_LIMIT_BYTES {
        return Err(WireError::TooLong);
    }
    // serde_json's error quotes values, which may be secret.
    serde_json::from_slice(body).or(Err(WireError::Json))
}

/// `YYYY-MM-DDThh:mm:ssZ`. A fraction of the second may stand before the `Z`, as some stand-ins of STS write
/// it; it is cut off, so that credentials never seem to last longer than they do.
fn time(text: &str) -> Result<Timestamp, WireError> {
    let Some((seconds, fraction)) = text.strip_suffix('Z').and_then(|text| text.split_once('.')) else {
        return parse_time(text);
    };
    let fits = (1..=9).contains(&fraction.len()) && fraction.bytes().all(|c| c.is_ascii_digit());
    if fits { parse_time(&format!("{seconds}Z")) } else { Err(WireError::Time) }
}

#[cfg(test)]
mod tests;
