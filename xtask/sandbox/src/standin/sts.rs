//! STS, 2015-04-01: AssumeRole and GetCallerIdentity behind both signatures, AssumeRoleWithOIDC behind a
//! token, with STS's own checks, answers and errors. Depends on the account and the signatures. Called over
//! HTTP by the agent, and by tests to set its mood and read its record.
//!
//! Sources: help.aliyun.com/document_detail/{28763,43767,48054,42775} and the generated STS SDK 1.2.0.

mod oidc;
mod request;

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashSet},
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::Result;
use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use serde_json::json;
use uuid::Uuid;

use self::{oidc::Unsigned, request::Signed};
use super::{
    account::{AccessKey, Accounts, Principal},
    server::{Bind, Body, Handler, Server, reply},
};
use crate::{clock::iso8601, locked};

/// How STS behaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StsMode {
    /// Every call fails with this status and code.
    Error(StatusCode, &'static str),
    /// It works.
    Ok,
    /// Connections are refused.
    Refuse,
    /// It works after this long.
    Slow(Duration),
    /// The account's 100 calls a second are used up.
    Throttle,
    /// 503.
    Unavailable,
}

/// One call, as STS understood it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Call {
    /// `AssumeRole`, …; empty when the request named none.
    pub action: String,
    /// Whose key signed it.
    pub access_key_id: String,
    /// The business parameters: `RoleArn`, `RoleSessionName`, `ExternalId`, `Policy`, `DurationSeconds`, ….
    pub params: BTreeMap<String, String>,
    /// `V1` or `V3`; empty for what is not signed.
    pub signature: &'static str,
    /// `OK`, or the error's code.
    pub outcome: String,
}

impl Call {
    /// A parameter's value.
    pub fn param(&self, name: &str) -> Option<&str> {
        self.params.get(name).map(String::as_str)
    }
}

/// The STS stand-in.
#[derive(Debug)]
pub struct Sts {
    server: Server<State>,
}

impl Sts {
    /// Starts serving an account.
    ///
    /// # Errors
    /// When the address cannot be listened on.
    pub fn start(bind: Bind, accounts: Arc<Accounts>) -> Result<Self> {
        let state = State {
            accounts,
            calls: Mutex::default(),
            lifetime: Mutex::default(),
            mode: Mutex::new(StsMode::Ok),
            refusals: Mutex::default(),
            nonces: Mutex::default(),
        };

        Ok(Self { server: Server::start(bind, Arc::new(state))? })
    }

    /// `http://address:port`, for `--sts-endpoint`.
    pub fn url(&self) -> String {
        format!("http://{}", self.server.addr)
    }

    /// Changes how STS behaves from the next request on.
    ///
    /// # Errors
    /// When it cannot listen again.
    pub fn set_mode(&self, mode: StsMode) -> Result<()> {
        let refuse = mode == StsMode::Refuse;
        *locked(&self.server.handler.mode) = mode;
        if refuse {
            self.server.down();
            return Ok(());
        }

        self.server.up()
    }

    /// Answers AssumeRole for one role, by ARN, with this status and code from now on; without a code, with a
    /// page as gateways send.
    pub fn refuse(&self, role_arn: &str, status: StatusCode, code: &str) {
        locked(&self.server.handler.refusals).insert(role_arn.into(), (status, code.into()));
    }

    /// Takes back what [`Self::refuse`] has set, for all roles.
    pub fn refuse_none(&self) {
        locked(&self.server.handler.refusals).clear();
    }

    /// Makes all that is issued from now on last this long, whatever is asked for; as the real one when
    /// `None`.
    pub fn set_lifetime(&self, lifetime: Option<Duration>) {
        *locked(&self.server.handler.lifetime) = lifetime;
    }

    /// Every call so far, failed ones too.
    pub fn calls(&self) -> Vec<Call> {
        locked(&self.server.handler.calls).clone()
    }

    /// The AssumeRole calls for a role, by ARN.
    pub fn assumed(&self, role_arn: &str) -> Vec<Call> {
        let mut calls = self.calls();
        calls.retain(|call| call.action == "AssumeRole" && call.param("RoleArn") == Some(role_arn));
        calls
    }
}

#[derive(Debug)]
struct State {
    accounts: Arc<Accounts>,
    calls: Mutex<Vec<Call>>,
    lifetime: Mutex<Option<Duration>>,
    mode: Mutex<StsMode>,
    refusals: Mutex<BTreeMap<String, (StatusCode, String)>>,
    nonces: Mutex<HashSet<String>>,
}

/// What the caller is told.
struct Failure {
    status: StatusCode,
    code: Cow<'static, str>,
    message: &'static str,
}

impl Failure {
    fn new(status: StatusCode, code: impl Into<Cow<'static, str>>, message: &'static str) -> Self {
        Self { status, code: code.into(), message }
    }

    fn bad(code: &'static str, message: &'static str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }
}

impl Handler for State {
    async fn answer(self: Arc<Self>, _peer: SocketAddr, request: Request<Bytes>) -> Response<Body> {
        let mode = locked(&self.mode).clone();
        if let StsMode::Slow(delay) = mode {
            tokio::time::sleep(delay).await;
        }

        let mut call = Call::default();
        let outcome = match mode {
            StsMode::Error(status, code) => Err(Failure::new(status, code, "As the test wants it.")),
            StsMode::Throttle => {
                Err(Failure::bad("Throttling.User", "Request was denied due to user flow control."))
            }
            StsMode::Unavailable => Err(Failure::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "ServiceUnavailable",
                "The request has failed due to a temporary failure of the server.",
            )),
            StsMode::Ok | StsMode::Refuse | StsMode::Slow(_) => Ok(()),
        };
        // What was asked is on record however the call ends.
        let outcome = match Unsigned::parse(&request, &mut call) {
            Some(unsigned) => outcome.and_then(|()| self.assume_role_with_oidc(&unsigned, &call)),
            None => {
                let signed = Signed::parse(&request, &mut call);
                outcome.and(signed).and_then(|signed| self.perform(&signed, &call))
            }
        };
        call.outcome = match &outcome {
            Ok(_) => "OK".into(),
            Err(failure) => failure.code.clone().into_owned(),
        };
        locked(&self.calls).push(call);

        self.response(outcome)
    }
}

impl State {
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
        if signed.nonce.is_empty() || !locked(&self.nonces).insert(signed.nonce.clone()) {
            return Err(Failure::bad("SignatureNonceUsed", "Specified signature nonce was used already."));
        }

        Ok(key)
    }

    fn assume_role(&self, caller: &AccessKey, call: &Call) -> Result<serde_json::Value, Failure> {
        let arn = call.param("RoleArn").unwrap_or_default();
        if let Some((status, code)) = locked(&self.refusals).get(arn) {
            return Err(Failure::new(*status, code.clone(), "As the test wants it."));
        }
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
        Ok(self.issue(arn, role_name, session, lifetime))
    }

    /// A role's session, as both actions answer.
    fn issue(&self, arn: &str, role_name: &str, session: &str, lifetime: Duration) -> serde_json::Value {
        let lifetime = locked(&self.lifetime).unwrap_or(lifetime);
        let principal = Principal::AssumedRole { role: role_name.into(), session: session.into() };
        let key = self.accounts.issue(principal, Some(lifetime));

        json!({
            "RequestId": request_id(),
            "AssumedRoleUser": { "Arn": format!("{arn}/{session}"), "AssumedRoleId": format!("{ROLE_ID}:{session}") },
            "Credentials": {
                "AccessKeyId": key.id,
                "AccessKeySecret": key.secret,
                "SecurityToken": key.security_token,
                "Expiration": key.expires.map(iso8601),
            },
        })
    }

    fn response(&self, outcome: Result<serde_json::Value, Failure>) -> Response<Body> {
        let (status, body, throttled) = match outcome {
            Ok(body) => (StatusCode::OK, body, false),
            Err(Failure { status, code, .. }) if code.is_empty() => {
                return reply(
                    status,
                    "text/html",
                    "<html><body>not STS's own words</body></html>".to_owned(),
                );
            }
            Err(Failure { status, code, message }) => {
                let body = json!({
                    "RequestId": request_id(),
                    "HostId": "sts.aliyuncs.com",
                    "Code": code,
                    "Message": message,
                    "Recommend": format!("https://api.aliyun.com/troubleshoot?q={code}&product=Sts"),
                });
                (status, body, code.starts_with("Throttling"))
            }
        };
        let mut response = reply(status, "application/json;charset=utf-8", body.to_string());
        let headers = response.headers_mut();
        // Clients correct their own clock by this header, so it must be this clock's.
        let date = self.accounts.clock().now().strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
        if let Ok(date) = HeaderValue::try_from(date) {
            headers.insert(header::DATE, date);
        }
        if throttled {
            let limit = HeaderValue::from_static("Limit:100,Remain:0,TimeLeft:1000,Reset:1000");
            headers.insert("x-ratelimit-user-api", limit.clone());
            headers.insert("x-ratelimit-user", limit);
        }

        response
    }
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
