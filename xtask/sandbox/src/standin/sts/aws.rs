//! AWS's STS, 2011-06-15: AssumeRole and GetCallerIdentity behind Signature Version 4,
//! AssumeRoleWithWebIdentity behind a token, with STS's own checks, answers and errors. Depends on the
//! parent, the account and the signature; called by the parent.
//!
//! Sources: STS API 2011-06-15 with "Common errors"; IAM user guide, "Role chaining" and "Passing session
//! tags in STS"; botocore's model of STS.

mod parameters;
mod signed;

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode};
use uuid::Uuid;

use self::signed::Signed;
use super::{Call, Failure, State};
use crate::{
    Cloud,
    clock::iso8601,
    locked,
    standin::{
        account::{AccessKey, Accounts, Principal},
        oidc::{OidcTrust, TokenFault},
        server::{Body, reply},
    },
};

/// Answers a call, unless the stand-in is to fail; notes in `call` what it asks in any case.
pub(super) fn answer(
    state: &State,
    request: &Request<Bytes>,
    mood: Result<(), Failure>,
    call: &mut Call,
) -> Result<String, Failure> {
    let form = parameters::Form::parse(request, call);
    let signed = Signed::parse(request, call);
    mood?;
    if form.version != VERSION {
        let message = format!("Could not find operation {} for version {}", call.action, form.version);
        return Err(Failure::bad("InvalidAction", message));
    }
    let action = call.action.clone();
    match action.as_str() {
        "AssumeRole" => assume_role(state, &signed?.authenticate(&state.accounts)?, call),
        "AssumeRoleWithWebIdentity" => assume_role_with_web_identity(state, &form.web_identity_token, call),
        "GetCallerIdentity" => Ok(caller_identity(&signed?.authenticate(&state.accounts)?)),
        _ => {
            let message = format!("Could not find operation {action} for version {VERSION}");
            Err(Failure::bad("InvalidAction", message))
        }
    }
}

/// In XML, whatever the client accepts, with the request's id in a header, too.
pub(super) fn response(outcome: Result<String, Failure>) -> Response<Body> {
    let (status, body) = match outcome {
        Ok(body) => (StatusCode::OK, body),
        Err(Failure { status, code, message }) => {
            let side = if status.is_server_error() { "Receiver" } else { "Sender" };
            let error = [leaf("Type", side), leaf("Code", &code), leaf("Message", &message)].concat();
            let body = element("Error", &error) + &leaf("RequestId", &request_id());
            (status, document("ErrorResponse", &body))
        }
    };
    let id = xml_text(&body, "RequestId").map(HeaderValue::from_str);
    let mut response = reply(status, "text/xml", body);
    if let Some(Ok(id)) = id {
        response.headers_mut().insert("x-amzn-requestid", id);
    }
    response
}

fn assume_role(state: &State, caller: &AccessKey, call: &Call) -> Result<String, Failure> {
    let arn = call.param("RoleArn").unwrap_or_default();
    state.refusal(arn)?;
    let name = parameters::role_name(arn)?;
    let session = parameters::session_name(call)?;
    parameters::check_external_id(call)?;
    parameters::check_policy(call)?;
    let source_identity = parameters::source_identity(call)?;
    let has_tags = parameters::check_tags(call)?;
    let lifetime = parameters::duration(call)?;

    let user = identity(&caller.principal).arn;
    let denied = |action: &str| {
        let message = format!("User: {user} is not authorized to perform: {action} on resource: {arn}");
        Failure::new(StatusCode::FORBIDDEN, "AccessDenied", message)
    };
    // The same for a role that does not exist.
    let role = state.accounts.role(arn).filter(|role| role.trusts_node);
    let role = role
        .filter(|role| role.external_id.is_none() || role.external_id.as_deref() == call.param("ExternalId"));
    let role = role.filter(|_| state.accounts.may_assume(&caller.principal));
    let role = role.ok_or_else(|| denied("sts:AssumeRole"))?;
    if has_tags && !role.allows_tags {
        return Err(denied("sts:TagSession"));
    }
    if source_identity.is_some() && !role.allows_source_identity {
        return Err(denied("sts:SetSourceIdentity"));
    }
    let is_chained = !matches!(caller.principal, Principal::User(_));
    if is_chained && lifetime > CHAINED_MAX {
        return Err(Failure::bad(
            "ValidationError",
            "The requested DurationSeconds exceeds the 1 hour session limit for roles assumed by role \
             chaining.",
        ));
    }
    check_max_session(lifetime, role.max_session)?;

    let more = source_identity.map(|identity| leaf("SourceIdentity", identity)).unwrap_or_default();
    Ok(issue(state, call, name, session, lifetime, &more))
}

fn assume_role_with_web_identity(state: &State, token: &str, call: &mut Call) -> Result<String, Failure> {
    let arn = call.param("RoleArn").unwrap_or_default().to_owned();
    state.refusal(&arn)?;
    let name = parameters::role_name(&arn)?;
    let session = parameters::session_name(call)?.to_owned();
    parameters::check_policy(call)?;
    let lifetime = parameters::duration(call)?;
    if !(4..=20_000).contains(&token.len()) {
        return Err(parameters::invalid("webIdentityToken", "Member must have length of 4 to 20000"));
    }
    // The call names no provider: it is the one of the token's issuer.
    let provider = state.accounts.providers().into_iter().find(|(_, provider)| provider.is_named_by(token));
    let (provider_arn, provider) = provider.ok_or_else(|| {
        let message = "No OpenIDConnect provider found in your account for the token's issuer";
        Failure::bad("InvalidIdentityToken", message)
    })?;
    let verified = provider.verify(token, state.accounts.clock().now()).map_err(refusal)?;
    let role = state.accounts.role(&arn).filter(|role| {
        let trusts = |trust: &OidcTrust| trust.holds(&provider_arn, &verified.subject);
        role.oidc.as_ref().is_some_and(trusts)
    });
    let role = role.ok_or_else(|| {
        let message = "Not authorized to perform sts:AssumeRoleWithWebIdentity";
        Failure::new(StatusCode::FORBIDDEN, "AccessDenied", message)
    })?;
    check_max_session(lifetime, role.max_session)?;

    let more = [
        leaf("SubjectFromWebIdentityToken", &verified.subject),
        leaf("Audience", Cloud::Aws.audience()),
        leaf("Provider", &provider_arn),
    ];
    let answer = issue(state, call, name, &session, lifetime, &more.concat());
    call.subject = verified.subject;
    Ok(answer)
}

fn refusal(fault: TokenFault) -> Failure {
    let (code, message) = match fault {
        TokenFault::Audience => ("InvalidIdentityToken", "Incorrect token audience"),
        TokenFault::Expired => ("ExpiredTokenException", "Token expired: current date/time must be before"),
        TokenFault::Fingerprint => (
            "InvalidIdentityToken",
            "OpenIDConnect provider's HTTPS certificate doesn't match configured thumbprint",
        ),
        TokenFault::IssuerAway => (
            "IDPCommunicationError",
            "The identity provider (IDP) that you are attempting to access is not reachable",
        ),
        TokenFault::UnknownKey => (
            "InvalidIdentityToken",
            "Couldn't retrieve verification key from your identity provider, please reference \
             AssumeRoleWithWebIdentity documentation for requirements",
        ),
        TokenFault::Invalid | TokenFault::Issuer | TokenFault::NotYet | TokenFault::TooOld => {
            ("InvalidIdentityToken", "The web identity token could not be validated")
        }
    };
    Failure::bad(code, message)
}

fn check_max_session(lifetime: Duration, max: Duration) -> Result<(), Failure> {
    if lifetime <= max {
        return Ok(());
    }
    let message = "The requested DurationSeconds exceeds the MaxSessionDuration set for this role.";
    Err(Failure::bad("ValidationError", message))
}

/// A role's session, as both actions answer. `name` has the role's path, which its session's ARN has not.
fn issue(state: &State, call: &Call, name: &str, session: &str, lifetime: Duration, more: &str) -> String {
    let lifetime = locked(&state.lifetime).unwrap_or(lifetime);
    let principal = Principal::AssumedRole { role: name.into(), session: session.into() };
    let Identity { arn, id } = identity(&principal);
    let key = state.accounts.issue(principal, Some(lifetime));
    let user = leaf("AssumedRoleId", &id) + &leaf("Arn", &arn);
    let credentials = [
        leaf("AccessKeyId", &key.id),
        leaf("SecretAccessKey", &key.secret),
        leaf("SessionToken", key.security_token.as_deref().unwrap_or_default()),
        leaf("Expiration", &key.expires.map(iso8601).unwrap_or_default()),
    ];
    // In percent of what fits.
    let is_packed = call.param("Policy").is_some() || !call.tags().is_empty();
    let packed = if is_packed { leaf("PackedPolicySize", "6") } else { String::new() };
    let result = [element("AssumedRoleUser", &user), element("Credentials", &credentials.concat()), packed];
    answered(&call.action, &(result.concat() + more))
}

fn caller_identity(caller: &AccessKey) -> String {
    let Identity { arn, id } = identity(&caller.principal);
    let result = [leaf("Arn", &arn), leaf("UserId", &id), leaf("Account", ACCOUNT)];
    answered("GetCallerIdentity", &result.concat())
}

/// How STS calls a principal.
struct Identity {
    arn: String,
    id: String,
}

fn identity(principal: &Principal) -> Identity {
    let session = |role: &str, session: &str| {
        let name = role.rsplit('/').next().unwrap_or(role);
        Identity {
            arn: format!("arn:aws:sts::{ACCOUNT}:assumed-role/{name}/{session}"),
            id: format!("{ROLE_ID}:{session}"),
        }
    };
    match principal {
        Principal::AssumedRole { role, session: name } => session(role, name),
        Principal::Node => session(Accounts::NODE_ROLE, Cloud::Aws.instance_id()),
        Principal::User(name) => {
            Identity { arn: format!("arn:aws:iam::{ACCOUNT}:user/{name}"), id: USER_ID.to_owned() }
        }
    }
}

/// The answer of an action that succeeded.
fn answered(action: &str, result: &str) -> String {
    let result = element(&format!("{action}Result"), result);
    let metadata = element("ResponseMetadata", &leaf("RequestId", &request_id()));
    document(&format!("{action}Response"), &(result + &metadata))
}

fn document(root: &str, content: &str) -> String {
    format!("<{root} xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\">\n{content}</{root}>\n")
}

/// An element of elements, on lines of their own.
fn element(name: &str, content: &str) -> String {
    format!("<{name}>\n{content}</{name}>\n")
}

/// An element of text.
fn leaf(name: &str, text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    format!("<{name}>{text}</{name}>\n")
}

/// The text of an answer's first element of this name, as it stands.
pub(crate) fn xml_text<'a>(xml: &'a str, element: &str) -> Option<&'a str> {
    let (_, rest) = xml.split_once(&format!("<{element}>"))?;
    Some(rest.split_once('<')?.0)
}

fn request_id() -> String {
    Uuid::new_v4().as_hyphenated().to_string()
}

const ACCOUNT: &str = Cloud::Aws.account();
const ROLE_ID: &str = "AROAQW12SANDBOX000001";
const USER_ID: &str = "AIDAQW12SANDBOX000001";
const VERSION: &str = "2011-06-15";
/// The longest session of a role that is assumed by a session of another one.
const CHAINED_MAX: Duration = Duration::from_secs(3600);

#[cfg(test)]
mod tests;
