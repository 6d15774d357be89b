//! ServiceAccounts: their objects, whom the API server takes the agent for, and what tests set and read of
//! both. Depends on `rights` and `tokens`. Called by the API server stand-in, and by tests.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use anyhow::Result;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{
    ApiServer, Kind, Refusal, Right, State, TokenCall, TokenRequestFault, json_reply, metadata_only,
    rights::{AGENT, Deed, impersonates, no_impersonation},
};
use crate::{
    clock::Clock,
    locked,
    standin::{oidc::OidcIssuer, server::Body},
};

/// All that concerns ServiceAccounts but the objects.
#[derive(Debug)]
pub(super) struct ServiceAccounts {
    /// The node that the agent's own token names.
    pub(super) agent_node: Mutex<Option<String>>,
    pub(super) calls: Mutex<Vec<TokenCall>>,
    pub(super) clock: Clock,
    pub(super) faults: Mutex<Faults>,
    /// Every token that it ever gave.
    pub(super) issued: Mutex<Vec<String>>,
    pub(super) issuer: OidcIssuer,
    /// `--service-account-max-token-expiration`.
    pub(super) max_expiration: Mutex<Option<Duration>>,
    pub(super) rights: Mutex<BTreeSet<Right>>,
}

/// What goes wrong, and how often.
#[derive(Debug, Default)]
pub(super) struct Faults {
    always: Option<TokenRequestFault>,
    next: VecDeque<TokenRequestFault>,
}

impl Faults {
    /// Of one request.
    pub(super) fn take(&mut self) -> Option<TokenRequestFault> {
        self.next.pop_front().or_else(|| self.always.clone())
    }
}

impl ServiceAccounts {
    /// The API server's own audience.
    pub(super) const AUDIENCE: &str = "https://kubernetes.default.svc";

    /// With the rights that `--token-requests-as=node` needs, and with that to read ServiceAccounts.
    pub(super) fn new(issuer: OidcIssuer) -> Self {
        let rights = Right::AS_NODE.into_iter().chain([Right::GetAccounts]).collect();
        Self {
            agent_node: Mutex::default(),
            calls: Mutex::default(),
            clock: Clock::default(),
            faults: Mutex::default(),
            issued: Mutex::default(),
            issuer,
            max_expiration: Mutex::default(),
            rights: Mutex::new(rights),
        }
    }
}

impl ApiServer {
    /// Creates a ServiceAccount, or replaces the annotations of one, which stays the same one.
    ///
    /// # Errors
    /// Never in practice.
    pub fn apply_service_account(
        &self,
        namespace: &str,
        name: &str,
        annotations: &[(&str, &str)],
    ) -> Result<()> {
        let known = self.server.handler.store.get(Kind::ServiceAccount, namespace, name);
        let uid = known.map_or_else(
            || Value::from(Uuid::new_v4().to_string()),
            |mut account| account["metadata"]["uid"].take(),
        );
        let annotations = annotations.iter().copied().collect::<BTreeMap<_, _>>();
        self.apply(json!({
            "apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": { "namespace": namespace, "name": name, "uid": uid, "annotations": annotations },
        }))
    }

    /// Creates a ServiceAccount unless there is one.
    ///
    /// # Errors
    /// Never in practice.
    pub fn ensure_service_account(&self, namespace: &str, name: &str) -> Result<()> {
        if self.server.handler.store.get(Kind::ServiceAccount, namespace, name).is_some() {
            return Ok(());
        }
        self.apply_service_account(namespace, name, &[])
    }

    /// Deletes a ServiceAccount. One that is created again under its name is another one.
    pub fn delete_service_account(&self, namespace: &str, name: &str) {
        self.server.handler.store.delete(Kind::ServiceAccount, namespace, name);
    }

    /// How often a ServiceAccount was read, refusals included.
    pub fn service_account_reads(&self, namespace: &str, name: &str) -> usize {
        let read = format!("GET /api/v1/namespaces/{namespace}/serviceaccounts/{name}");
        let is_it = |request: &&String| request.split('?').next() == Some(&*read);
        locked(&self.server.handler.requests).iter().filter(is_it).count()
    }

    /// Grants exactly these rights from now on. From the start they are [`Right::AS_NODE`] and
    /// [`Right::GetAccounts`].
    pub fn set_rights(&self, rights: &[Right]) {
        *locked(&self.accounts().rights) = rights.iter().copied().collect();
    }

    /// Sets the node that the agent's own token names; `None` for one that names none, as before
    /// Kubernetes 1.30.
    pub fn bind_agent(&self, node: Option<&str>) {
        *locked(&self.accounts().agent_node) = node.map(str::to_owned);
    }

    /// The issuer of the tokens.
    pub fn issuer(&self) -> &OidcIssuer {
        &self.accounts().issuer
    }

    /// The clock that tokens are dated by. STS goes by the account's.
    pub fn clock(&self) -> &Clock {
        &self.accounts().clock
    }

    /// Bounds the lifetime of tokens, as `--service-account-max-token-expiration` does.
    pub fn set_max_expiration(&self, limit: Option<Duration>) {
        *locked(&self.accounts().max_expiration) = limit;
    }

    /// Has each of the next requests for tokens fail in its way; those after them succeed.
    pub fn set_token_faults(&self, faults: &[TokenRequestFault]) {
        self.faults().next = faults.iter().cloned().collect();
    }

    /// Has all requests for tokens fail, or none any more.
    pub fn fail_tokens(&self, fault: Option<TokenRequestFault>) {
        *self.faults() = Faults { always: fault, next: VecDeque::new() };
    }

    /// The requests for tokens so far, failed ones too.
    pub fn token_requests(&self) -> Vec<TokenCall> {
        locked(&self.accounts().calls).clone()
    }

    /// Those for tokens of one ServiceAccount.
    pub fn token_requests_of(&self, namespace: &str, name: &str) -> Vec<TokenCall> {
        let mut calls = self.token_requests();
        calls.retain(|call| call.namespace == namespace && call.name == name);
        calls
    }

    /// Every token that was ever given.
    pub fn issued_tokens(&self) -> Vec<String> {
        locked(&self.accounts().issued).clone()
    }

    fn accounts(&self) -> &ServiceAccounts {
        &self.server.handler.service_accounts
    }

    fn faults(&self) -> MutexGuard<'_, Faults> {
        locked(&self.accounts().faults)
    }
}

impl State {
    /// Answers what concerns ServiceAccounts and their tokens, and refuses any other impersonation; `None`
    /// for the rest.
    pub(super) fn of_accounts(&self, request: &Request<Bytes>) -> Option<Result<Response<Body>, Refusal>> {
        let segments = request.uri().path().split('/').skip(1).collect::<Vec<_>>();
        match (request.method(), &segments[..]) {
            (&Method::GET, ["api", "v1", "namespaces", namespace, "serviceaccounts", name]) => {
                Some(self.service_account(namespace, name, request))
            }
            (&Method::POST, ["api", "v1", "namespaces", namespace, "serviceaccounts", name, "token"]) => {
                Some(self.token(namespace, name, request))
            }
            _ if impersonates(request.headers()) => Some(Err(no_impersonation(request.headers()))),
            (&Method::POST, ["apis", "authentication.k8s.io", "v1", "selfsubjectreviews"]) => {
                Some(Ok(json_reply(StatusCode::CREATED, &self.review())))
            }
            (&Method::GET, [".well-known", "openid-configuration"]) => {
                Some(Ok(json_reply(StatusCode::OK, &self.service_accounts.issuer.configuration())))
            }
            (&Method::GET, ["openid", "v1", "jwks"]) => {
                Some(Ok(json_reply(StatusCode::OK, &self.service_accounts.issuer.jwks())))
            }
            _ => None,
        }
    }

    fn service_account(
        &self,
        namespace: &str,
        name: &str,
        request: &Request<Bytes>,
    ) -> Result<Response<Body>, Refusal> {
        self.authorize(request.headers(), Deed::Get, namespace, name)?;
        self.object(Kind::ServiceAccount, namespace, name, metadata_only(request.headers()))
            .or(Err(Refusal::not_found("serviceaccounts", name)))
    }

    /// Whom the API server takes the agent for.
    fn review(&self) -> Value {
        let mut extra = json!({ "authentication.kubernetes.io/credential-id": ["JTI=sandbox"] });
        let node = locked(&self.service_accounts.agent_node).clone();
        if let Some(node) = node {
            extra["authentication.kubernetes.io/node-name"] = json!([node]);
        }
        let groups = ["system:serviceaccounts", "system:serviceaccounts:kube-system", "system:authenticated"];
        json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview",
            "metadata": { "creationTimestamp": null },
            "status": {
                "userInfo": { "extra": extra, "groups": groups, "uid": "account-kube2ram", "username": AGENT },
            },
        })
    }
}

#[cfg(test)]
mod tests;
