//! Who asks, and what the cluster's rules allow: RBAC, constrained impersonation of a node (KEP-5284), and
//! the Node authorizer. Depends on the store. Called by `accounts` and `tokens`.
//!
//! Sources: kubernetes 1.36.3, apiserver's `pkg/endpoints/filters/impersonation` and
//! `plugin/pkg/auth/authorizer/node`.

use http::HeaderMap;
use serde_json::Value;

use super::{Kind, Refusal, Selector, State};
use crate::locked;

/// A rule of the cluster, as the agent's manifests grant them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Right {
    /// The agent's own: `create serviceaccounts/token`.
    CreateTokens,
    /// `impersonate-on:associated-node:create` on `serviceaccounts/token`.
    CreateTokensAsNode,
    /// The agent's own: `get serviceaccounts`.
    GetAccounts,
    /// `impersonate-on:associated-node:get` on `serviceaccounts`.
    GetAccountsAsNode,
    /// `impersonate:associated-node` on `nodes`, and a server that knows it.
    ImpersonateNode,
    /// Of all nodes: `request-serviceaccounts-token-audience` on the cloud's audience.
    RequestAudience,
}

impl Right {
    /// What `--token-requests-as=node` needs.
    pub const AS_NODE: [Self; 4] =
        [Self::CreateTokensAsNode, Self::GetAccountsAsNode, Self::ImpersonateNode, Self::RequestAudience];
    /// What `--token-requests-as=agent` needs.
    pub const AS_AGENT: [Self; 2] = [Self::CreateTokens, Self::GetAccounts];
}

/// As whom a request acts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Actor {
    /// The agent itself.
    Agent,
    /// A node, which the agent impersonates.
    Node(String),
}

/// What the agent's requests do with a ServiceAccount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Deed {
    CreateToken,
    Get,
}

/// The agent's ServiceAccount. Its requests carry no token here, and are taken for its own.
pub(super) const AGENT: &str = "system:serviceaccount:kube-system:kube2ram";
const NODE_PREFIX: &str = "system:node:";
const IMPERSONATE_PREFIX: &str = "impersonate-";

/// Whom a request asks to be taken for, if it does.
pub(super) fn impersonated(headers: &HeaderMap) -> Option<String> {
    let value = headers.get("impersonate-user")?;
    Some(String::from_utf8_lossy(value.as_bytes()).into_owned())
}

/// Whether a request has any header of impersonation.
pub(super) fn impersonates(headers: &HeaderMap) -> bool {
    headers.keys().any(|name| name.as_str().starts_with(IMPERSONATE_PREFIX))
}

/// The answer to an impersonation without the right to it.
pub(super) fn no_impersonation(headers: &HeaderMap) -> Refusal {
    let user = impersonated(headers).unwrap_or_default();
    Refusal::forbidden(format!(
        "users {user:?} is forbidden: User {AGENT:?} cannot impersonate resource \"users\" in API group \"\" at \
         the cluster scope"
    ))
    .about("users", &user)
}

impl State {
    pub(super) fn may(&self, right: Right) -> bool {
        locked(&self.service_accounts.rights).contains(&right)
    }

    /// As whom a request acts. The mode of impersonation is for requests with a user's name alone, by a
    /// ServiceAccount whose token names that node.
    fn actor(&self, headers: &HeaderMap, deed: Deed) -> Result<Actor, Refusal> {
        if !impersonates(headers) {
            return Ok(Actor::Agent);
        }
        let names = headers.keys().filter(|name| name.as_str().starts_with(IMPERSONATE_PREFIX)).count();
        let user = impersonated(headers).unwrap_or_default();
        let node = user.strip_prefix(NODE_PREFIX).unwrap_or_default();
        let is_own = locked(&self.service_accounts.agent_node).as_deref() == Some(node);
        let on_node = match deed {
            Deed::CreateToken => Right::CreateTokensAsNode,
            Deed::Get => Right::GetAccountsAsNode,
        };
        if names == 1 && is_own && self.may(Right::ImpersonateNode) && self.may(on_node) {
            Ok(Actor::Node(node.to_owned()))
        } else {
            Err(no_impersonation(headers))
        }
    }

    /// As whom a request may do something with a ServiceAccount.
    pub(super) fn authorize(
        &self,
        headers: &HeaderMap,
        deed: Deed,
        namespace: &str,
        name: &str,
    ) -> Result<Actor, Refusal> {
        let actor = self.actor(headers, deed)?;
        let (user, is_allowed, why) = match &actor {
            Actor::Agent => {
                let right = if deed == Deed::CreateToken { Right::CreateTokens } else { Right::GetAccounts };
                (AGENT.to_owned(), self.may(right), String::new())
            }
            Actor::Node(node) => (
                format!("{NODE_PREFIX}{node}"),
                self.is_related(node, namespace, name),
                format!(": no relationship found between node '{node}' and this object"),
            ),
        };
        if is_allowed {
            return Ok(actor);
        }
        let (verb, resource) = match deed {
            Deed::CreateToken => ("create", "serviceaccounts/token"),
            Deed::Get => ("get", "serviceaccounts"),
        };
        Err(Refusal::forbidden(format!(
            "serviceaccounts {name:?} is forbidden: User {user:?} cannot {verb} resource {resource:?} in API \
             group \"\" in the namespace {namespace:?}{why}"
        ))
        .about("serviceaccounts", name))
    }

    /// Whether a pod of the node uses the ServiceAccount. A mirror of a static pod uses none.
    fn is_related(&self, node: &str, namespace: &str, name: &str) -> bool {
        let selected = format!("spec.nodeName={node}");
        let Some(selector) = Selector::parse(Kind::Pod, namespace, &selected, false) else { return false };
        let (pods, _) = self.store.list(&selector);
        pods.iter().any(|pod| {
            pod["spec"]["serviceAccountName"] == name
                && pod["metadata"]["annotations"]["kubernetes.io/config.mirror"] == Value::Null
        })
    }
}
