//! The metadata server of a cloud: its tree, the node role's credentials and session tokens, as a real
//! instance answers. What differs between clouds is a table of each. Depends on the account. Called over HTTP
//! by agents and pods, and by tests to set its mood and read what reached it.

mod alibaba;
mod aws;
mod tree;

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    time::Duration,
};

use anyhow::Result;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use jiff::Timestamp;
use uuid::Uuid;

use super::{
    account::{AccessKey, Accounts, Principal},
    server::{Bind, Body, Handler, HopLimit, Server, reply},
};
use crate::{Cloud, locked};

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

/// `HttpTokens` of ModifyInstanceMetadataOptions, which both clouds have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tokens {
    /// A request without a token is answered.
    Optional,
    /// It is refused: Alibaba Cloud's hardened mode.
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
    /// Starts serving an instance whose role can assume the account's roles.
    ///
    /// # Errors
    /// When the address cannot be listened on.
    pub fn start(bind: Bind, accounts: Arc<Accounts>) -> Result<Self> {
        let node_key = Mutex::new(accounts.issue(Principal::Node, Some(LIFETIME)));
        let service = match accounts.cloud() {
            Cloud::Alibaba => &alibaba::SERVICE,
            Cloud::Aws => &aws::SERVICE,
        };
        let state = State {
            accounts,
            has_profile: AtomicBool::new(true),
            hop_limit: AtomicU8::new(HOP_LIMIT),
            mode: Mutex::new(MetadataMode::Up),
            node_key,
            renews: AtomicBool::new(true),
            service,
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

    /// Attaches or detaches the instance profile, by which an instance of AWS has a role.
    pub fn set_profile(&self, is_attached: bool) {
        self.server.handler.has_profile.store(is_attached, Ordering::SeqCst);
    }

    /// `HttpPutResponseHopLimit`: how many hops the answer with a token makes. With 1, only the node's own
    /// network namespace gets it.
    pub fn set_hop_limit(&self, hops: u8) {
        self.server.handler.hop_limit.store(hops, Ordering::SeqCst);
    }

    /// Whether a request without a token is answered.
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
/// The longest that can be set: without an agent, pods get everything.
const HOP_LIMIT: u8 = 64;

/// What differs between clouds.
#[derive(Debug)]
struct Service {
    /// The header `Server`.
    server: &'static str,
    /// The first segments of paths.
    versions: &'static [&'static str],
    /// The one path that issues tokens, where no other spelling does.
    token_path: Option<&'static str>,
    /// Whether the answer with a token repeats how long it lasts.
    echoes_ttl: bool,
    /// The status of a request without a token, where tokens are required.
    missing_token: StatusCode,
    /// How long before their end the node role's credentials are replaced.
    renew_before: Duration,
    /// The items that never change.
    items: &'static [(&'static str, &'static str)],
    /// The document of credentials.
    document: fn(&AccessKey) -> String,
    /// The items that are made for each request, by their path below the version.
    item: fn(&State, &[&str]) -> Option<ItemAnswer>,
}

/// An item, or the status of what keeps it.
type ItemAnswer = Result<Response<Body>, StatusCode>;

#[derive(Debug)]
struct State {
    accounts: Arc<Accounts>,
    has_profile: AtomicBool,
    hop_limit: AtomicU8,
    mode: Mutex<MetadataMode>,
    node_key: Mutex<AccessKey>,
    /// Whether the node role's credentials are replaced before their end.
    renews: AtomicBool,
    service: &'static Service,
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
        response.headers_mut().insert(header::SERVER, HeaderValue::from_static(self.service.server));
        response
    }
}

impl State {
    fn route(&self, request: &Request<Bytes>) -> Result<Response<Body>, StatusCode> {
        let path = tree::normalise(request.uri().path());
        let segments = path.iter().map(String::as_str).collect::<Vec<_>>();
        let versions = self.service.versions;
        if let [version, "api", "token"] = segments[..]
            && versions.contains(&version)
        {
            return self.token(request);
        }
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return Err(StatusCode::METHOD_NOT_ALLOWED);
        }
        self.check_token(request.headers())?;

        match segments[..] {
            [] => Ok(text(versions.join("\n"))),
            [version, ref path @ ..] if versions.contains(&version) => self.item(path),
            _ => Err(StatusCode::NOT_FOUND),
        }
    }

    fn item(&self, path: &[&str]) -> Result<Response<Body>, StatusCode> {
        let constant = || tree::lookup(self.service.items, path).map(text).ok_or(StatusCode::NOT_FOUND);
        (self.service.item)(self, path).unwrap_or_else(constant)
    }

    fn has_profile(&self) -> bool {
        self.has_profile.load(Ordering::SeqCst)
    }

    /// The document of the node role's credentials.
    fn credentials(&self) -> String {
        let now = self.accounts.clock().now();
        let mut key = locked(&self.node_key);
        let is_due =
            |end: Timestamp| end.saturating_sub(self.service.renew_before).is_ok_and(|renew| renew <= now);
        if self.renews.load(Ordering::SeqCst) && key.expires.is_none_or(is_due) {
            *key = self.accounts.issue(Principal::Node, Some(LIFETIME));
        }
        (self.service.document)(&key)
    }

    fn token(&self, request: &Request<Bytes>) -> Result<Response<Body>, StatusCode> {
        if request.method() != Method::PUT {
            return Err(StatusCode::METHOD_NOT_ALLOWED);
        }
        let is_spelt = self.service.token_path.is_none_or(|path| path == request.uri().path());
        // The guard against server-side request forgery through a proxy.
        if !is_spelt || request.headers().contains_key("x-forwarded-for") {
            return Err(StatusCode::FORBIDDEN);
        }
        let ttl_header = self.accounts.cloud().token_ttl_header();
        let seconds = request
            .headers()
            .get(ttl_header)
            .and_then(|ttl| ttl.to_str().ok()?.parse::<u64>().ok())
            .filter(|ttl| (1..=21_600).contains(ttl))
            .ok_or(StatusCode::BAD_REQUEST)?;
        let token = format!("SandboxToken{}==", Uuid::new_v4().simple());
        let end = self.accounts.clock().now().saturating_add(Duration::from_secs(seconds));
        locked(&self.valid_tokens).insert(token.clone(), end.unwrap_or(Timestamp::MAX));

        let mut response = text(token);
        if self.service.echoes_ttl {
            response.headers_mut().insert(ttl_header, HeaderValue::from(seconds));
        }
        response.extensions_mut().insert(HopLimit(self.hop_limit.load(Ordering::SeqCst)));
        Ok(response)
    }

    fn check_token(&self, headers: &HeaderMap) -> Result<(), StatusCode> {
        match headers.get(self.accounts.cloud().token_header()) {
            Some(token) => {
                let token = token.to_str().unwrap_or_default();
                let end = locked(&self.valid_tokens).get(token).copied();
                if end.is_some_and(|end| self.accounts.clock().now() < end) {
                    Ok(())
                } else {
                    Err(StatusCode::UNAUTHORIZED)
                }
            }
            None if *locked(&self.tokens) == Tokens::Required => Err(self.service.missing_token),
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
