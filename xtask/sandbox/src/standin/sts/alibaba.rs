//! Alibaba Cloud's STS, 2015-04-01: AssumeRole and GetCallerIdentity behind both signatures,
//! AssumeRoleWithOIDC behind a token, with STS's own checks, answers and errors. Depends on the parent, the
//! account and the signatures; called by the parent.
//!
//! Sources: help.aliyun.com/document_detail/{28763,43767,48054,42775} and the generated STS SDK 1.2.0.

mod oidc;
mod request;

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode};
use serde_json::json;
use uuid::Uuid;

use self::{oidc::Unsigned, request::Signed};
use super::{Call, Failure, State};
use crate::{
    clock::iso8601,
    locked,
    standin::{
        account::{AccessKey, Accounts, Principal},
        server::{Body, reply},
    },
};

impl State {
    /// Answers a call, unless the stand-in is to fail; notes in `call` what it asks in any case.
    pub(super) fn alibaba(
        &self,
        request: &Request<Bytes>,
        mood: Result<(), Failure>,
        call: &mut Call,
    ) -> Result<String, Failure> {
        let answer = match Unsigned::parse(request, call) {
            Some(unsigned) => mood.and_then(|()| self.assume_role_with_oidc(&unsigned, call)),
            None => {
                let signed = Signed::parse(request, call);
                mood.and(signed).and_then(|signed| self.perform(&signed, call))
            }
        };
        Ok(answer?.to_string())
    }

    fn perform(&self, signed: &Signed, call: &Call) -> Result<serde_json::Value, Failure> {
        let caller = self.authenticate(signed, call)?;
        if signed.version != "2015-04-01" {
            return Err(Failure::bad("InvalidVersion", "Specified parameter Version is not valid."));
        }
        if !signed.wants_json {
            return Err(Failure::bad("UnsupportedFormat", "This stand-in answers in JSON only."));
        }
        match call.action.as_str() {
            "AssumeRole" => self.assume_role(&caller, call),
            "GetCallerIdentity" => Ok(caller_identity(&caller)),
            _ => Err(Failure::new(
                StatusCode::NOT_FOUND,
                "InvalidAction.NotFound",
                "The specified action is not found.",
            )),
        }
    }

    fn authenticate(&self, signed: &Signed, call: &Call) -> Result<AccessKey, Failure> {
        let now = self.accounts.clock().now();
        let key = self.accounts.key(&call.access_key_id).ok_or_else(|| {
            Failure::bad("InvalidAccessKeyId.NotFound", "Specified access key is not found.")
        })?;
        match (&key.security_token, &signed.security_token) {
            (Some(_), None) => {
                return Err(Failure::bad("MissingSecurityToken", "SecurityToken is mandatory for this key."));
            }
            (expected, given) if expected != given => {
                return Err(Failure::bad(
                    "InvalidSecurityToken.MismatchWithAccessKey",
                    "Specified SecurityToken mismatch with the AccessKey.",
                ));
            }
            _ => {}
        }
        if key.expires.is_some_and(|expires| expires <= now) {
            return Err(Failure::bad("InvalidSecurityToken.Expired", "Specified SecurityToken is expired."));
        }
        let sent = signed.timestamp().ok_or_else(|| {
            Failure::bad(
                "InvalidTimeStamp.Format",
                "Specified time stamp or date value is not well formatted.",
            )
        })?;
        if sent.duration_since(now).unsigned_abs() > CLOCK_WINDOW {
            return Err(Failure::bad(
                "InvalidTimeStamp.Expired",
                "Specified time stamp or date value is expired.",
            ));
        }
        if !signed.verify(&key.secret) {
            return Err(Failure::bad(
                "SignatureDoesNotMatch",
                "Specified signature is not matched with our calculation.",
            ));
        }
        if !signed.is_presigned()
            && (signed.nonce.is_empty() || !locked(&self.nonces).insert(signed.nonce.clone()))
        {
            return Err(Failure::bad("SignatureNonceUsed", "Specified signature nonce was used already."));
        }

        Ok(key)
    }

    fn assume_role(&self, caller: &AccessKey, call: &Call) -> Result<serde_json::Value, Failure> {
        let arn = call.param("RoleArn").unwrap_or_default();
        self.refusal(arn)?;
        let role_name = request::role_name(arn)?;
        let session = request::session_name(call)?;
        request::check_policy(call)?;
        let role = self.accounts.role(arn).ok_or_else(no_such_role)?;
        let may_assume = self.accounts.may_assume(&caller.principal);
        let external_id_fits =
            role.external_id.is_none() || role.external_id.as_deref() == call.param("ExternalId");
        if !may_assume || !role.trusts_node || !external_id_fits {
            return Err(Failure::new(
                StatusCode::FORBIDDEN,
                "NoPermission",
                "No permission perform sts:AssumeRole on this Role. Maybe you are not authorized to perform \
                 sts:AssumeRole or the specified role does not trust you",
            ));
        }
        let lifetime = request::duration(call, role.max_session)?;
        Ok(self.issue(&format!("{arn}/{session}"), role_name, session, lifetime))
    }

    /// A role's session, as both actions answer, for a user whose ARN each of them writes in its own way.
    fn issue(&self, user: &str, role_name: &str, session: &str, lifetime: Duration) -> serde_json::Value {
        let lifetime = locked(&self.lifetime).unwrap_or(lifetime);
        let principal = Principal::AssumedRole { role: role_name.into(), session: session.into() };
        let key = self.accounts.issue(principal, Some(lifetime));

        json!({
            "RequestId": request_id(),
            "AssumedRoleUser": { "Arn": user, "AssumedRoleId": format!("{ROLE_ID}:{session}") },
            "Credentials": {
                "AccessKeyId": key.id,
                "AccessKeySecret": key.secret,
                "SecurityToken": key.security_token,
                "Expiration": key.expires.map(iso8601),
            },
        })
    }
}

/// In JSON; an error with the header by which clients know how long to wait.
pub(super) fn response(outcome: Result<String, Failure>) -> Response<Body> {
    let (status, body, throttled) = match outcome {
        Ok(body) => (StatusCode::OK, body, false),
        Err(Failure { status, code, message }) => {
            let body = json!({
                "RequestId": request_id(),
                "HostId": "sts.aliyuncs.com",
                "Code": code,
                "Message": message,
                "Recommend": format!("https://api.aliyun.com/troubleshoot?q={code}&product=Sts"),
            });
            (status, body.to_string(), code.starts_with("Throttling"))
        }
    };
    let mut response = reply(status, "application/json;charset=utf-8", body);
    if throttled {
        let headers = response.headers_mut();
        let limit = HeaderValue::from_static("Limit:100,Remain:0,TimeLeft:1000,Reset:1000");
        headers.insert("x-ratelimit-user-api", limit.clone());
        headers.insert("x-ratelimit-user", limit);
    }
    response
}

fn no_such_role() -> Failure {
    Failure::new(StatusCode::NOT_FOUND, "EntityNotExist.Role", "The specified Role not exists.")
}

fn caller_identity(caller: &AccessKey) -> serde_json::Value {
    let uid = Accounts::UID;
    let (role, session) = match &caller.principal {
        Principal::AssumedRole { role, session } => (role.as_str(), session.as_str()),
        Principal::Node => (Accounts::NODE_ROLE, "i-sandbox"),
        Principal::User(name) => {
            return json!({
                "AccountId": uid, "Arn": format!("acs:ram::{uid}:user/{name}"), "IdentityType": "RAMUser",
                "PrincipalId": "200000000000000000", "UserId": "200000000000000000", "RequestId": request_id(),
            });
        }
    };

    json!({
        "AccountId": uid,
        "Arn": format!("acs:ram::{uid}:assumed-role/{role}/{session}"),
        "IdentityType": "AssumedRoleUser",
        "PrincipalId": format!("{ROLE_ID}:{session}"),
        "RoleId": ROLE_ID,
        "RequestId": request_id(),
    })
}

fn request_id() -> String {
    Uuid::new_v4().as_hyphenated().to_string().to_uppercase()
}

const ROLE_ID: &str = "300000000000000001";

/// How far a client's clock may be off.
const CLOCK_WINDOW: Duration = Duration::from_secs(15 * 60);

#[cfg(test)]
mod tests;
