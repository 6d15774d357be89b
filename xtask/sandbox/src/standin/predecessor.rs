//! An iptables predecessor (kube2iam, the Go kube2ram): recognises a pod by its address, and gives
//! credentials to whoever reaches its port. It keeps connections as long as the client does, as Go's server.
//! Depends on the account. Called over HTTP by pods, and by tests that replace it.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::Result;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use serde_json::json;

use super::{
    account::{Accounts, Principal},
    server::{Bind, Body, Handler, Server, reply},
};
use crate::{Cloud, clock::iso8601};

/// The predecessor's agent.
#[derive(Debug)]
pub struct Predecessor {
    server: Server<State>,
}

impl Predecessor {
    /// Starts serving pods by their addresses.
    ///
    /// # Errors
    /// When the address cannot be listened on.
    pub fn start(bind: Bind, accounts: Arc<Accounts>, roles: BTreeMap<IpAddr, String>) -> Result<Self> {
        let state = State { accounts, roles, served: AtomicUsize::new(0) };
        Ok(Self { server: Server::start(bind, Arc::new(state))? })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.server.addr
    }

    /// Ends it, and with it every connection.
    pub fn stop(&self) {
        self.server.down();
    }

    /// Starts it again.
    ///
    /// # Errors
    /// When it cannot listen again.
    pub fn restart(&self) -> Result<()> {
        self.server.up()
    }

    /// How many requests it has answered.
    pub fn served(&self) -> usize {
        self.server.handler.served.load(Ordering::Relaxed)
    }
}

/// What the predecessors ask STS for by default.
const LIFETIME: Duration = Duration::from_secs(30 * 60);

#[derive(Debug)]
struct State {
    accounts: Arc<Accounts>,
    roles: BTreeMap<IpAddr, String>,
    served: AtomicUsize,
}

impl Handler for State {
    async fn answer(self: Arc<Self>, peer: SocketAddr, request: Request<Bytes>) -> Response<Body> {
        self.served.fetch_add(1, Ordering::Relaxed);
        let path = request.uri().path();
        if path == "/healthz" {
            let health = json!({ "hostIP": "10.0.0.42", "instanceId": "i-sandbox" });
            return reply(StatusCode::OK, "application/json", format!("{health}\n"));
        }
        let Some(role) = self.roles.get(&peer.ip()) else {
            return reply(
                StatusCode::NOT_FOUND,
                "text/plain",
                format!("pod with specificed IP not found {}\n", peer.ip()),
            );
        };
        match path.strip_prefix(self.accounts.cloud().list()) {
            Some("") => reply(StatusCode::OK, "text/plain; charset=utf-8", role.clone()),
            Some(asked) if asked == role => {
                reply(StatusCode::OK, "text/plain; charset=utf-8", self.credentials(role))
            }
            Some(asked) => reply(StatusCode::FORBIDDEN, "text/plain", format!("Invalid role {asked}\n")),
            None => reply(StatusCode::NOT_FOUND, "text/plain", ""),
        }
    }
}

impl State {
    fn credentials(&self, role: &str) -> String {
        let principal = Principal::AssumedRole { role: role.to_owned(), session: "predecessor".to_owned() };
        let key = self.accounts.issue(principal, Some(LIFETIME));
        let (secret, token) = match self.accounts.cloud() {
            Cloud::Alibaba => ("AccessKeySecret", "SecurityToken"),
            Cloud::Aws => ("SecretAccessKey", "Token"),
        };
        let document = json!({
            "Code": "Success",
            "LastUpdated": iso8601(key.issued),
            "AccessKeyId": key.id,
            secret: key.secret,
            token: key.security_token,
            "Expiration": key.expires.map(iso8601),
        });
        format!("{document}\n")
    }
}
