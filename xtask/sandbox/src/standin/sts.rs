//! STS of a cloud: what it is asked, its mood, and its record. Each cloud has its own protocol, checks,
//! answers and errors. Depends on the account. Called over HTTP by the agent, and by tests to set its mood
//! and read its record.

mod alibaba;
mod aws;

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

pub(crate) use self::aws::xml_text;
use super::{
    account::Accounts,
    server::{Bind, Body, Handler, Server, reply},
};
use crate::{Cloud, locked};

/// How STS behaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StsMode {
    /// Every call fails with this status and code, such as `RegionDisabledException`.
    Error(StatusCode, &'static str),
    /// It works.
    Ok,
    /// Connections are refused.
    Refuse,
    /// It works after this long.
    Slow(Duration),
    /// The account's calls of this second are used up.
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
    /// `V1` or `V3`, on AWS `V4`; empty for what is not signed.
    pub signature: &'static str,
    /// `OK`, or the error's code.
    pub outcome: String,
    /// Whose token was exchanged, if it was a valid one; else empty.
    pub subject: String,
}

impl Call {
    /// A parameter's value.
    pub fn param(&self, name: &str) -> Option<&str> {
        self.params.get(name).map(String::as_str)
    }

    /// The session's tags on AWS, by key; `Tags.member.1.Key` and so on.
    pub fn tags(&self) -> BTreeMap<&str, &str> {
        let keys = self.params.iter().filter_map(|(name, key)| Some((name.strip_suffix(".Key")?, key)));
        let pairs = keys
            .map(|(member, key)| (key.as_str(), self.param(&format!("{member}.Value")).unwrap_or_default()));
        pairs.collect()
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

    /// Answers calls for sessions of one role, by ARN, with this status and code from now on; without a code,
    /// with a page as gateways send.
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

    /// The calls for sessions of a role, by ARN: AssumeRole, and the exchanges of tokens.
    pub fn assumed(&self, role_arn: &str) -> Vec<Call> {
        let mut calls = self.calls();
        calls.retain(|call| call.action.starts_with("AssumeRole") && call.param("RoleArn") == Some(role_arn));
        calls
    }

    /// How many calls of an action there were, failed ones too.
    pub fn count(&self, action: &str) -> usize {
        locked(&self.server.handler.calls).iter().filter(|call| call.action == action).count()
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
    /// Empty for a page that is none of STS's answers.
    code: Cow<'static, str>,
    message: Cow<'static, str>,
}

impl Failure {
    fn new(
        status: StatusCode,
        code: impl Into<Cow<'static, str>>,
        message: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self { status, code: code.into(), message: message.into() }
    }

    fn bad(code: &'static str, message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }
}

impl Handler for State {
    async fn answer(self: Arc<Self>, _peer: SocketAddr, request: Request<Bytes>) -> Response<Body> {
        let mode = locked(&self.mode).clone();
        if let StsMode::Slow(delay) = mode {
            tokio::time::sleep(delay).await;
        }

        let cloud = self.accounts.cloud();
        let mut call = Call::default();
        // What was asked is on record however the call ends.
        let outcome = match cloud {
            Cloud::Alibaba => self.alibaba(&request, mode.failure(cloud), &mut call),
            Cloud::Aws => aws::answer(&self, &request, mode.failure(cloud), &mut call),
        };
        call.outcome = match &outcome {
            Ok(_) => "OK".into(),
            Err(failure) => failure.code.clone().into_owned(),
        };
        locked(&self.calls).push(call);

        let mut response = match (outcome, cloud) {
            (Err(failure), _) if failure.code.is_empty() => {
                let page = "<html><body>not STS's own words</body></html>";
                return reply(failure.status, "text/html", page);
            }
            (outcome, Cloud::Alibaba) => alibaba::response(outcome),
            (outcome, Cloud::Aws) => aws::response(outcome),
        };
        // Clients correct their own clock by this header, so it must be this clock's.
        let date = self.accounts.clock().now().strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
        if let Ok(date) = HeaderValue::try_from(date) {
            response.headers_mut().insert(header::DATE, date);
        }
        response
    }
}

impl StsMode {
    /// What every call fails with.
    fn failure(&self, cloud: Cloud) -> Result<(), Failure> {
        match (self, cloud) {
            (Self::Error(status, code), _) => Err(Failure::new(*status, *code, "As the test wants it.")),
            (Self::Throttle, Cloud::Alibaba) => {
                Err(Failure::bad("Throttling.User", "Request was denied due to user flow control."))
            }
            (Self::Throttle, Cloud::Aws) => Err(Failure::bad("Throttling", "Rate exceeded")),
            (Self::Unavailable, _) => Err(Failure::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "ServiceUnavailable",
                "The request has failed due to a temporary failure of the server.",
            )),
            (Self::Ok | Self::Refuse | Self::Slow(_), _) => Ok(()),
        }
    }
}

impl State {
    /// What [`Sts::refuse`] has set for a role.
    fn refusal(&self, role_arn: &str) -> Result<(), Failure> {
        let refusal = locked(&self.refusals).get(role_arn).cloned();
        refusal.map_or(Ok(()), |(status, code)| Err(Failure::new(status, code, "As the test wants it.")))
    }
}
