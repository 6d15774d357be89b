//! The ECS metadata server: its tree, the node role's credentials and hardened mode, as a real instance
//! answers. Depends on the account. Called over HTTP by agents and pods, and by tests to set its mood and
//! read what reached it.
//!
//! Sources: "Instance metadata" and its FAQ, help.aliyun.com/document_detail/{49122,108460}; cloud-init's
//! DataSourceAliYun.

mod tree;

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Result;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use jiff::Timestamp;
use serde_json::json;
use uuid::Uuid;

use super::{
    account::{AccessKey, Accounts, Principal},
    server::{Bind, Body, Handler, Server, reply},
};
use crate::{clock::iso8601, locked};

/// How the server behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetadataMode {
    /// Connections are refused.
    Down,
    /// It answers after this long.
    Slow(Duration),
    /// It works.
    Up,
}

/// `HttpTokens` of ModifyInstanceMetadataOptions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tokens {
    /// A request without a token is answered.
    Optional,
    /// Hardened mode: it is refused.
    Required,
}

/// One request, as it arrived.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Who connected.
    pub peer: SocketAddr,
    /// The method.
    pub method: Method,
    /// The request target, not normalised.
    pub target: String,
    /// All headers.
    pub headers: HeaderMap,
}

/// The metadata stand-in.
#[derive(Debug)]
pub struct Metadata {
    server: Server<State>,
}

impl Metadata {
    /// Its instance id.
    pub const INSTANCE_ID: &str = tree::INSTANCE_ID;
    /// Its region.
    pub const REGION: &str = tree::REGION;

    /// Starts serving an instance whose role can assume the account's roles.
    ///
    /// # Errors
    /// When the address cannot be listened on.
    pub fn start(bind: Bind, accounts: Arc<Accounts>) -> Result<Self> {
        let node_key = Mutex::new(accounts.issue(Principal::Node, Some(LIFETIME)));
        let state = State {
            accounts,
            mode: Mutex::new(MetadataMode::Up),
            node_key,
            renews: AtomicBool::new(true),
            seen: Mutex::default(),
            tokens: Mutex::new(Tokens::Optional),
            valid_tokens: Mutex::default(),
        };

        Ok(Self { server: Server::start(bind, Arc::new(state))? })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.server.addr
    }

    /// Changes how the server behaves from the next request on.
    ///
    /// # Errors
    /// When it cannot listen again.
    pub fn set_mode(&self, mode: MetadataMode) -> Result<()> {
        *locked(&self.server.handler.mode) = mode;
        if mode == MetadataMode::Down {
            self.server.down();
            return Ok(());
        }

        self.server.up()
    }

    /// Turns hardened mode on or off.
    pub fn set_tokens(&self, tokens: Tokens) {
        *locked(&self.server.handler.tokens) = tokens;
    }

    /// Forgets every token, as after a reboot of the real server: clients see 401.
    pub fn forget_tokens(&self) {
        locked(&self.server.handler.valid_tokens).clear();
    }

    /// Gives the node's role new credentials; the old ones stay valid until they end, as on a real instance.
    pub fn rotate(&self) {
        let state = &self.server.handler;
        *locked(&state.node_key) = state.accounts.issue(Principal::Node, Some(LIFETIME));
        state.renews.store(true, Ordering::SeqCst);
    }

    /// Ends all credentials of the node's role, and gives it none that are valid until [`Self::rotate`].
    pub fn expire(&self) {
        let state = &self.server.handler;
        state.renews.store(false, Ordering::SeqCst);
        *locked(&state.node_key) = state.accounts.issue(Principal::Node, Some(Duration::ZERO));
        state.accounts.expire(&Principal::Node);
    }

    /// Every request so far.
    pub fn seen(&self) -> Vec<Seen> {
        locked(&self.server.handler.seen).clone()
    }
}

/// How long the node role's credentials last.
const LIFETIME: Duration = Duration::from_secs(6 * 3600);
/// The real server replaces them this long before their end.
const RENEW_BEFORE: Duration = Duration::from_secs(30 * 60);

#[derive(Debug)]
struct State {
    accounts: Arc<Accounts>,
    mode: Mutex<MetadataMode>,
    node_key: Mutex<AccessKey>,
    /// Whether the node role's credentials are replaced before their end.
    renews: AtomicBool,
    seen: Mutex<Vec<Seen>>,
    tokens: Mutex<Tokens>,
    valid_tokens: Mutex<HashMap<String, Timestamp>>,
}

impl Handler for State {
    async fn answer(self: Arc<Self>, peer: SocketAddr, request: Request<Bytes>) -> Response<Body> {
        locked(&self.seen).push(Seen {
            peer,
            method: request.method().clone(),
            target: request.uri().to_string(),
            headers: request.headers().clone(),
        });
        let mode = *locked(&self.mode);
        if let MetadataMode::Slow(delay) = mode {
            tokio::time::sleep(delay).await;
        }

        let mut response = self.route(&request).unwrap_or_else(error_page);
        response.headers_mut().insert(header::SERVER, HeaderValue::from_static("ECSws"));
        response
    }
}

impl State {
    fn route(&self, request: &Request<Bytes>) -> Result<Response<Body>, StatusCode> {
        let path = tree::normalise(request.uri().path());
        let segments = path.iter().map(String::as_str).collect::<Vec<_>>();
        if let ["latest" | "2016-01-01", "api", "token"] = segments[..] {
            return self.token(request);
        }
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return Err(StatusCode::METHOD_NOT_ALLOWED);
        }
        self.check_token(request.headers())?;

        match segments[..] {
            [] => Ok(text("2016-01-01\nlatest")),
            ["latest" | "2016-01-01", ref rest @ ..] => self.item(rest),
            _ => Err(StatusCode::NOT_FOUND),
        }
    }

    fn item(&self, path: &[&str]) -> Result<Response<Body>, StatusCode> {
        match path {
            ["meta-data", ram, "security-credentials", role] if ram.eq_ignore_ascii_case("ram") => {
                if *role != Accounts::NODE_ROLE {
                    return Err(StatusCode::NOT_FOUND);
                }
                Ok(reply(StatusCode::OK, "application/json", self.credentials()))
            }
            // Whether the real one includes the credentials is not documented: this one does, so that a test
            // sees it leak.
            ["meta-data", "all"] => {
                let all = format!("{{\"ram\": {{\"security-credentials\": {}}}}}", self.credentials());
                Ok(reply(StatusCode::OK, "application/json", all))
            }
            ["dynamic", "instance-identity", "document"] => {
                let document = json!({
                    "account-id": "", "owner-account-id": Accounts::UID, "instance-id": tree::INSTANCE_ID,
                    "mac": tree::MAC, "region-id": tree::REGION, "serial-number": tree::SERIAL_NUMBER,
                    "zone-id": tree::ZONE, "instance-type": tree::INSTANCE_TYPE, "image-id": tree::IMAGE_ID,
                    "private-ipv4": tree::PRIVATE_IPV4,
                });
                Ok(reply(StatusCode::OK, "application/json", document.to_string()))
            }
            _ => tree::lookup(path).map(text).ok_or(StatusCode::NOT_FOUND),
        }
    }

    /// The document in the real server's order and spacing.
    fn credentials(&self) -> String {
        let now = self.accounts.clock().now();
        let mut key = locked(&self.node_key);
        let is_due = |end: Timestamp| end.saturating_sub(RENEW_BEFORE).is_ok_and(|renew| renew <= now);
        if self.renews.load(Ordering::SeqCst) && key.expires.is_none_or(is_due) {
            *key = self.accounts.issue(Principal::Node, Some(LIFETIME));
        }
        format!(
            "{{\n  \"AccessKeyId\" : \"{}\",\n  \"AccessKeySecret\" : \"{}\",\n  \"Expiration\" : \"{}\",\n  \
             \"SecurityToken\" : \"{}\",\n  \"LastUpdated\" : \"{}\",\n  \"Code\" : \"Success\"\n}}",
            key.id,
            key.secret,
            key.expires.map(iso8601).unwrap_or_default(),
            key.security_token.as_deref().unwrap_or_default(),
            iso8601(key.issued),
        )
    }

    fn token(&self, request: &Request<Bytes>) -> Result<Response<Body>, StatusCode> {
        if request.method() != Method::PUT {
            return Err(StatusCode::METHOD_NOT_ALLOWED);
        }
        // The guard against server-side request forgery through a proxy.
        if request.headers().contains_key("x-forwarded-for") {
            return Err(StatusCode::FORBIDDEN);
        }
        let seconds = request
            .headers()
            .get("x-aliyun-ecs-metadata-token-ttl-seconds")
            .and_then(|ttl| ttl.to_str().ok()?.parse::<u64>().ok())
            .filter(|ttl| (1..=21_600).contains(ttl))
            .ok_or(StatusCode::BAD_REQUEST)?;
        let token = format!("SandboxToken{}==", Uuid::new_v4().simple());
        let end = self.accounts.clock().now().saturating_add(Duration::from_secs(seconds));
        locked(&self.valid_tokens).insert(token.clone(), end.unwrap_or(Timestamp::MAX));

        Ok(text(token))
    }

    fn check_token(&self, headers: &HeaderMap) -> Result<(), StatusCode> {
        match headers.get("x-aliyun-ecs-metadata-token") {
            Some(token) => {
                let token = token.to_str().unwrap_or_default();
                let end = locked(&self.valid_tokens).get(token).copied();
                if end.is_some_and(|end| self.accounts.clock().now() < end) {
                    Ok(())
                } else {
                    Err(StatusCode::UNAUTHORIZED)
                }
            }
            None if *locked(&self.tokens) == Tokens::Required => Err(StatusCode::FORBIDDEN),
            None => Ok(()),
        }
    }
}

fn text(body: impl Into<Bytes>) -> Response<Body> {
    reply(StatusCode::OK, "text/plain", body)
}

fn error_page(status: StatusCode) -> Response<Body> {
    let reason = match status {
        StatusCode::BAD_REQUEST => "Missing or Invalid Parameters",
        _ => status.canonical_reason().unwrap_or_default(),
    };
    let title = format!("{} - {reason}", status.as_u16());
    let page = format!(
        "<?xml version=\"1.0\" encoding=\"iso-8859-1\"?>\n\
         <!DOCTYPE html PUBLIC \"-//W3C//DTD XHTML 1.0 Transitional//EN\" \
         \"http://www.w3.org/TR/xhtml1/DTD/xhtml1-transitional.dtd\">\n\
         <html xmlns=\"http://www.w3.org/1999/xhtml\" xml:lang=\"en\" lang=\"en\">\n \
         <head>\n  <title>{title}</title>\n </head>\n <body>\n  <h1>{title}</h1>\n </body>\n</html>\n"
    );
    reply(status, "text/html", page)
}

#[cfg(test)]
mod tests;
