//! As much of the Kubernetes API as a node agent uses: LIST and WATCH of pods and namespaces (whole or
//! metadata only), GET, PATCH of nodes, Events, ServiceAccounts and their tokens. Depends on the server and
//! on the cluster's issuer. Called over HTTP by the agent, and by tests to change the cluster.
//!
//! Source: kubernetes.io/docs/reference/using-api/api-concepts.

mod accounts;
mod refusal;
mod rights;
mod store;
mod tokens;
mod watch;

use std::{
    collections::{BTreeMap, HashMap},
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
use serde_json::{Value, json};

use self::{
    accounts::ServiceAccounts,
    refusal::{Refusal, status_object},
    store::{Kind, Selector, Store},
};
pub use self::{
    rights::Right,
    tokens::{TokenCall, TokenRequestFault},
};
use super::{
    oidc::OidcIssuer,
    server::{Bind, Body, Handler, Server, reply},
};
use crate::locked;

/// A pod, as far as the agent reads it.
#[derive(Clone, Debug, Default)]
pub struct PodManifest {
    /// `metadata.annotations`.
    pub annotations: BTreeMap<String, String>,
    /// `spec.hostNetwork`.
    pub host_network: bool,
    /// `metadata.name`.
    pub name: String,
    /// `metadata.namespace`.
    pub namespace: String,
    /// `spec.nodeName`.
    pub node: String,
    /// `spec.serviceAccountName`.
    pub service_account: String,
    /// `metadata.uid`.
    pub uid: String,
}

impl PodManifest {
    /// The object as the API server stores it, a running pod.
    pub fn to_json(&self) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "namespace": self.namespace, "name": self.name, "uid": self.uid, "annotations": self.annotations,
                "creationTimestamp": "2026-11-21T00:00:00Z",
            },
            "spec": {
                "nodeName": self.node, "serviceAccountName": self.service_account, "hostNetwork": self.host_network,
                "containers": [{ "name": "app", "image": "app:1" }],
            },
            "status": { "phase": "Running" },
        })
    }
}

/// The API server stand-in.
#[derive(Debug)]
pub struct ApiServer {
    server: Server<State>,
}

impl ApiServer {
    /// Starts with an empty cluster.
    ///
    /// # Errors
    /// When the address cannot be listened on.
    pub fn start(bind: Bind) -> Result<Self> {
        Self::with_issuer(bind, OidcIssuer::new(ServiceAccounts::AUDIENCE)?)
    }

    /// The same with an issuer, which signs ServiceAccounts' tokens.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn with_issuer(bind: Bind, issuer: OidcIssuer) -> Result<Self> {
        let state = State {
            events: Mutex::default(),
            forbids_events: AtomicBool::default(),
            forbids_patches: AtomicBool::default(),
            interference: Mutex::default(),
            requests: Mutex::default(),
            service_accounts: ServiceAccounts::new(issuer),
            store: Arc::default(),
            token: Mutex::default(),
        };
        Ok(Self { server: Server::start(bind, Arc::new(state))? })
    }

    /// `http://address:port`, for `--api-server`.
    pub fn url(&self) -> String {
        format!("http://{}", self.server.addr)
    }

    /// Creates or replaces a Pod, Namespace, Node or ServiceAccount (JSON with `kind` and `metadata`), and
    /// notifies the watches.
    ///
    /// # Errors
    /// When the object's kind is none of these.
    pub fn apply(&self, object: Value) -> Result<()> {
        self.server.handler.store.apply(object)
    }

    /// Creates or replaces a namespace with these annotations.
    ///
    /// # Errors
    /// Never in practice.
    pub fn apply_namespace(&self, name: &str, annotations: &[(&str, &str)]) -> Result<()> {
        let annotations = annotations.iter().copied().collect::<HashMap<_, _>>();
        self.apply(json!({
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": { "name": name, "uid": format!("namespace-{name}"), "annotations": annotations },
            "status": { "phase": "Active" },
        }))
    }

    /// Deletes a pod.
    pub fn delete_pod(&self, namespace: &str, name: &str) {
        self.server.handler.store.delete(Kind::Pod, namespace, name);
    }

    /// Deletes a namespace.
    pub fn delete_namespace(&self, name: &str) {
        self.server.handler.store.delete(Kind::Namespace, "", name);
    }

    /// Refuses connections and cuts open watches.
    pub fn down(&self) {
        self.server.down();
    }

    /// Comes back on the same address.
    ///
    /// # Errors
    /// When it cannot listen again.
    pub fn up(&self) -> Result<()> {
        self.server.up()
    }

    /// Keeps what happens from now on from the watches (a LIST shows it), until [`Self::release_watches`].
    pub fn hold_watches(&self) {
        self.server.handler.store.hold(true);
    }

    /// Sends the watches what was held back.
    pub fn release_watches(&self) {
        self.server.handler.store.hold(false);
    }

    /// Makes every resource version so far too old: open watches end with 410, clients must list again.
    pub fn expire(&self) {
        self.server.handler.store.expire();
    }

    /// The Node object, as it is now.
    pub fn node(&self, name: &str) -> Option<Value> {
        self.server.handler.store.get(Kind::Node, "", name)
    }

    /// Changes a Node just before the next PATCH of it is looked at, as another controller might.
    pub fn interfere(&self, node: Value) {
        *locked(&self.server.handler.interference) = Some(node);
    }

    /// Refuses every PATCH of a node, or no longer: the role of the service account.
    pub fn forbid_patches(&self, forbid: bool) {
        self.server.handler.forbids_patches.store(forbid, Ordering::SeqCst);
    }

    /// Answers 401 from now on to whoever does not show this token.
    pub fn require_token(&self, token: &str) {
        *locked(&self.server.handler.token) = Some(format!("Bearer {token}"));
    }

    /// The Events, as they are now, in the order in which they were posted.
    pub fn events(&self) -> Vec<Value> {
        locked(&self.server.handler.events).clone()
    }

    /// Refuses every write of an Event, or no longer: the role of the service account.
    pub fn forbid_events(&self, forbid: bool) {
        self.server.handler.forbids_events.store(forbid, Ordering::SeqCst);
    }

    /// How often open watches that ask for bookmarks are sent one. As the real one, once a minute, until this
    /// is called.
    pub fn bookmark_every(&self, interval: Duration) {
        self.server.handler.store.bookmark_every(interval);
    }

    /// `METHOD target` of every request so far.
    pub fn requests(&self) -> Vec<String> {
        locked(&self.server.handler.requests).clone()
    }
}

#[derive(Debug)]
struct State {
    events: Mutex<Vec<Value>>,
    forbids_events: AtomicBool,
    forbids_patches: AtomicBool,
    interference: Mutex<Option<Value>>,
    requests: Mutex<Vec<String>>,
    service_accounts: ServiceAccounts,
    store: Arc<Store>,
    token: Mutex<Option<String>>,
}

impl Handler for State {
    async fn answer(self: Arc<Self>, _peer: SocketAddr, request: Request<Bytes>) -> Response<Body> {
        locked(&self.requests).push(format!("{} {}", request.method(), request.uri()));
        let outcome = self.authenticate(request.headers());
        let outcome = outcome.and_then(|()| match self.of_accounts(&request) {
            Some(outcome) => outcome,
            None => Ok(self.route(&request)?),
        });
        outcome.unwrap_or_else(Refusal::into_response)
    }
}

impl State {
    fn authenticate(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let shown = headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
        if locked(&self.token).as_deref().is_some_and(|token| shown != Some(token.as_bytes())) {
            return Err(StatusCode::UNAUTHORIZED.into());
        }
        Ok(())
    }

    fn route(&self, request: &Request<Bytes>) -> Result<Response<Body>, StatusCode> {
        let query = url::form_urlencoded::parse(request.uri().query().unwrap_or_default().as_bytes())
            .into_owned()
            .collect::<HashMap<_, _>>();
        let segments = request.uri().path().split('/').skip(1).collect::<Vec<_>>();
        let metadata_only = metadata_only(request.headers());

        match (request.method(), &segments[..]) {
            (&Method::GET, ["version"]) => Ok(json_reply(
                StatusCode::OK,
                &json!({ "major": "1", "minor": "34", "gitVersion": "v1.34.0" }),
            )),
            (&Method::GET, ["healthz" | "livez" | "readyz"]) => Ok(reply(StatusCode::OK, "text/plain", "ok")),
            (&Method::GET, ["api", "v1", plural]) => self.collection(plural, "", &query, metadata_only),
            (&Method::GET, ["api", "v1", plural @ ("namespaces" | "nodes"), name]) => {
                let kind = Kind::from_plural(plural).ok_or(StatusCode::NOT_FOUND)?;
                self.object(kind, "", name, metadata_only)
            }
            (&Method::PATCH, ["api", "v1", "nodes", name]) => self.patch_node(name, request),
            (&Method::GET, ["api", "v1", "namespaces", namespace, "pods"]) => {
                self.collection("pods", namespace, &query, metadata_only)
            }
            (&Method::GET, ["api", "v1", "namespaces", namespace, "pods", name]) => {
                self.object(Kind::Pod, namespace, name, metadata_only)
            }
            (
                method @ (&Method::POST | &Method::PATCH),
                ["apis", "events.k8s.io", "v1", "namespaces", _, "events", name @ ..],
            ) => {
                if self.forbids_events.load(Ordering::SeqCst) {
                    return Err(StatusCode::FORBIDDEN);
                }
                let body =
                    serde_json::from_slice::<Value>(request.body()).or(Err(StatusCode::BAD_REQUEST))?;
                match (method, name) {
                    (&Method::POST, []) => self.post_event(body),
                    (&Method::PATCH, [name]) => self.patch_event(name, &body),
                    _ => Err(StatusCode::NOT_FOUND),
                }
            }
            _ => Err(StatusCode::NOT_FOUND),
        }
    }

    fn post_event(&self, event: Value) -> Result<Response<Body>, StatusCode> {
        let mut events = locked(&self.events);
        if events.iter().any(|known| known["metadata"]["name"] == event["metadata"]["name"]) {
            return Err(StatusCode::CONFLICT);
        }
        events.push(event.clone());
        Ok(json_reply(StatusCode::CREATED, &event))
    }

    /// Only the series may change: pkg/apis/core/validation/events.go.
    fn patch_event(&self, name: &str, patch: &Value) -> Result<Response<Body>, StatusCode> {
        let mut events = locked(&self.events);
        let event = events.iter_mut().find(|event| event["metadata"]["name"] == name);
        let event = event.ok_or(StatusCode::NOT_FOUND)?;
        let fields = patch.as_object().ok_or(StatusCode::BAD_REQUEST)?;
        if fields.keys().any(|field| field != "series") || patch["series"]["count"].as_u64() < Some(2) {
            return Err(StatusCode::UNPROCESSABLE_ENTITY);
        }
        event["series"] = patch["series"].clone();
        Ok(json_reply(StatusCode::OK, event))
    }

    /// A merge patch; one that names a resource version holds for that version only.
    fn patch_node(&self, name: &str, request: &Request<Bytes>) -> Result<Response<Body>, StatusCode> {
        let content_type = request.headers().get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
        if content_type != Some(b"application/merge-patch+json") {
            return Err(StatusCode::UNSUPPORTED_MEDIA_TYPE);
        }
        if self.forbids_patches.load(Ordering::SeqCst) {
            return Err(StatusCode::FORBIDDEN);
        }
        let interference = locked(&self.interference).take();
        if let Some(node) = interference {
            self.store.apply(node).or(Err(StatusCode::INTERNAL_SERVER_ERROR))?;
        }
        let patch = serde_json::from_slice::<Value>(request.body()).or(Err(StatusCode::BAD_REQUEST))?;
        let patched = self.store.merge(Kind::Node, name, &patch)?;
        Ok(json_reply(StatusCode::OK, &patched))
    }

    fn collection(
        &self,
        plural: &str,
        namespace: &str,
        query: &HashMap<String, String>,
        metadata_only: bool,
    ) -> Result<Response<Body>, StatusCode> {
        let kind = Kind::from_plural(plural).ok_or(StatusCode::NOT_FOUND)?;
        let field_selector = query.get("fieldSelector").map_or("", String::as_str);
        let selector =
            Selector::parse(kind, namespace, field_selector, metadata_only).ok_or(StatusCode::BAD_REQUEST)?;
        if query.get("watch").is_some_and(|watch| watch == "true" || watch == "1") {
            return watch::answer(Arc::clone(&self.store), selector, query);
        }

        let (items, version) = self.store.list(&selector);
        let (list_kind, api_version) = match (metadata_only, kind) {
            (true, _) => ("PartialObjectMetadataList", "meta.k8s.io/v1"),
            (false, Kind::Namespace) => ("NamespaceList", "v1"),
            (false, Kind::Node) => ("NodeList", "v1"),
            (false, Kind::Pod) => ("PodList", "v1"),
            (false, Kind::ServiceAccount) => ("ServiceAccountList", "v1"),
        };
        let list = json!({
            "kind": list_kind, "apiVersion": api_version,
            "metadata": { "resourceVersion": version.to_string() }, "items": items,
        });
        Ok(json_reply(StatusCode::OK, &list))
    }

    fn object(
        &self,
        kind: Kind,
        namespace: &str,
        name: &str,
        metadata_only: bool,
    ) -> Result<Response<Body>, StatusCode> {
        let field_selector = format!("metadata.name={name}");
        let selector = Selector::parse(kind, namespace, &field_selector, metadata_only)
            .ok_or(StatusCode::BAD_REQUEST)?;
        let (objects, _) = self.store.list(&selector);
        let object = objects.first().ok_or(StatusCode::NOT_FOUND)?;

        Ok(json_reply(StatusCode::OK, object))
    }
}

fn metadata_only(headers: &HeaderMap) -> bool {
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok());
    accept.is_some_and(|accept| accept.contains("as=PartialObjectMetadata"))
}

fn json_reply(status: StatusCode, body: &Value) -> Response<Body> {
    reply(status, "application/json", body.to_string())
}

#[cfg(test)]
mod tests;
