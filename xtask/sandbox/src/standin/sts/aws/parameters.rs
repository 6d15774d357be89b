//! The parameters of STS's actions: the form that they come in, and each checked against the API's rules.
//! Pure. Called by the parent.

use std::{collections::BTreeSet, time::Duration};

use bytes::Bytes;
use http::Request;
use url::form_urlencoded;

use super::{Call, Failure};

/// What belongs to no action.
pub(super) struct Form {
    pub(super) version: String,
    pub(super) web_identity_token: String,
}

impl Form {
    /// Takes a form apart, and notes in `call` what it asks, but the token.
    pub(super) fn parse(request: &Request<Bytes>, call: &mut Call) -> Self {
        let query = request.uri().query().unwrap_or_default().as_bytes();
        let pairs = form_urlencoded::parse(query).chain(form_urlencoded::parse(request.body()));
        call.params = pairs.map(|(name, value)| (name.into_owned(), value.into_owned())).collect();
        let mut take = |name: &str| call.params.remove(name).unwrap_or_default();
        let (action, version) = (take("Action"), take("Version"));
        take("WebIdentityToken");
        call.action = action;
        // One in the query would end up in logs: it counts as none.
        let token = form_urlencoded::parse(request.body()).find(|(name, _)| name == "WebIdentityToken");
        let web_identity_token = token.map(|(_, token)| token.into_owned()).unwrap_or_default();
        Self { version, web_identity_token }
    }
}

/// What is wrong with a parameter.
pub(super) fn invalid(parameter: &str, rule: &str) -> Failure {
    let message =
        format!("1 validation error detected: Value at '{parameter}' failed to satisfy constraint: {rule}");
    Failure::bad("ValidationError", message)
}

/// The name in `RoleArn`, with its path.
pub(super) fn role_name(arn: &str) -> Result<&str, Failure> {
    let parsed = arn.strip_prefix("arn:aws:iam::").and_then(|rest| rest.split_once(":role/"));
    let is_account = |text: &str| text.len() == 12 && text.bytes().all(|b| b.is_ascii_digit());
    parsed
        .filter(|(account, name)| is_account(account) && !name.is_empty() && arn.len() <= 2048)
        .map(|(_, name)| name)
        .ok_or_else(|| Failure::bad("ValidationError", format!("{arn} is invalid")))
}

/// `RoleSessionName`: 2–64 of `[\w+=,.@-]`.
pub(super) fn session_name(call: &Call) -> Result<&str, Failure> {
    let name = call.param("RoleSessionName").unwrap_or_default();
    if is_of(name, 2..=64, NAME_MARKS) { Ok(name) } else { Err(invalid("roleSessionName", r"[\w+=,.@-]*")) }
}

/// `SourceIdentity`: the same, if it is given.
pub(super) fn source_identity(call: &Call) -> Result<Option<&str>, Failure> {
    let identity = call.param("SourceIdentity");
    if identity.is_none_or(|identity| is_of(identity, 2..=64, NAME_MARKS)) {
        Ok(identity)
    } else {
        Err(invalid("sourceIdentity", r"[\w+=,.@-]*"))
    }
}

/// `ExternalId`: 2–1224 of `[\w+=,.@:/-]`.
pub(super) fn check_external_id(call: &Call) -> Result<(), Failure> {
    let is_fine = call.param("ExternalId").is_none_or(|id| is_of(id, 2..=1224, "_+=,.@:/-"));
    if is_fine { Ok(()) } else { Err(invalid("externalId", r"[\w+=,.@:\/-]*")) }
}

/// `Policy`: at most 2048 characters of JSON, of the first 256 code points alone.
pub(super) fn check_policy(call: &Call) -> Result<(), Failure> {
    let Some(policy) = call.param("Policy") else { return Ok(()) };
    let is_plain = |c: char| matches!(c, '\t' | '\n' | '\r' | '\u{20}'..='\u{ff}');
    if !(1..=2048).contains(&policy.chars().count()) || !policy.chars().all(is_plain) {
        return Err(invalid("policy", "Member must have length less than or equal to 2048"));
    }
    if !serde_json::from_str::<serde_json::Value>(policy).is_ok_and(|policy| policy.is_object()) {
        return Err(Failure::bad("MalformedPolicyDocument", "Syntax errors in policy."));
    }
    Ok(())
}

/// `DurationSeconds`: 900–43200; 3600 unless given.
pub(super) fn duration(call: &Call) -> Result<Duration, Failure> {
    let seconds = call.param("DurationSeconds").map_or(Some(3600), |text| text.parse::<u64>().ok());
    let seconds = seconds.filter(|seconds| (900..=43_200).contains(seconds));
    let rule = "Member must have value between 900 and 43200";
    seconds.map(Duration::from_secs).ok_or_else(|| invalid("durationSeconds", rule))
}

/// `Tags.member.N` and `TransitiveTagKeys.member.N`: at most 50 tags, whose keys differ without regard to
/// case, and none of them AWS's own. Returns whether there are any.
pub(super) fn check_tags(call: &Call) -> Result<bool, Failure> {
    let given = |prefix: &str| call.params.keys().filter(|name| name.starts_with(prefix)).count();
    let members = (1..).map_while(|n: usize| Some((n, call.param(&format!("Tags.member.{n}.Key"))?)));
    let mut keys = BTreeSet::new();
    for (n, key) in members {
        let value = call.param(&format!("Tags.member.{n}.Value"));
        let value = value.ok_or_else(|| invalid("tags", "Member must not be null"))?;
        if !is_of(key, 1..=128, TAG_MARKS) || !is_of(value, 0..=256, TAG_MARKS) {
            return Err(invalid("tags", r"[\p{L}\p{Z}\p{N}_.:/=+\-@]*"));
        }
        let key = key.to_lowercase();
        if key.starts_with("aws:") || !keys.insert(key) {
            let message = "Duplicate tag keys found, or one of AWS's own. Tag keys are case insensitive.";
            return Err(Failure::bad("ValidationError", message));
        }
    }
    let transitive = (1..).map_while(|n: usize| call.param(&format!("TransitiveTagKeys.member.{n}")));
    let transitive: Vec<_> = transitive.map(str::to_lowercase).collect();
    let are_numbered = given("Tags.") == 2 * keys.len() && given("TransitiveTagKeys.") == transitive.len();
    if keys.len() > 50 || !are_numbered || !transitive.iter().all(|key| keys.contains(key)) {
        return Err(invalid("tags", "Member must have length less than or equal to 50, from 1 on"));
    }
    Ok(!keys.is_empty())
}

/// Whether a text has so many characters, all of them letters, digits or these.
fn is_of(text: &str, length: std::ops::RangeInclusive<usize>, marks: &str) -> bool {
    let is_word = |c: char| c.is_ascii_alphanumeric() || marks.contains(c);
    // Of tags, any letter.
    let is_any = |c: char| marks == TAG_MARKS && c.is_alphanumeric();
    length.contains(&text.chars().count()) && text.chars().all(|c| is_word(c) || is_any(c))
}

const NAME_MARKS: &str = "_+=,.@-";
const TAG_MARKS: &str = " _.:/=+-@";
