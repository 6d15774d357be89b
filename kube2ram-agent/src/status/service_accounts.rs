//! Roles by ServiceAccount: the part of the status, and its problems. Pure; used through the parent.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{
    Problem, Status,
    problems::{RECENT, is_last_word, problem},
    text::ago,
};

/// Roles by ServiceAccount: their annotations, and their tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceAccounts {
    /// By whose right roles are assumed: `node`, or `service-account`.
    pub credentials_from: String,
    /// Whether their annotations are read.
    pub are_read: bool,
    /// When they could not be read last; absent once they could.
    pub read_failed_at: Option<Timestamp>,
    /// Why not.
    pub read_failure: Option<String>,
    /// As whom tokens are asked for: `node` or `agent`; absent where none are.
    pub token_requester: Option<String>,
    /// What the agent's own token is bound to: `this_node`, `other_node`, `no_node`, or `unknown`. The agent
    /// asks the API server only if it asks for tokens as its node.
    pub own_token: String,
    /// The other node, if it is bound to one.
    pub own_token_node: Option<String>,
    /// When the API server gave no token last; absent once it did.
    pub token_failed_at: Option<Timestamp>,
    /// Why not.
    pub token_failure: Option<String>,
    /// How many pods have their role from where.
    pub pods: BTreeMap<RoleFrom, usize>,
}

/// What gives a pod its role.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RoleFrom {
    /// No annotation: it has the default role.
    DefaultRole,
    /// An annotation of its own.
    Pod,
    /// An annotation of its ServiceAccount.
    ServiceAccount,
}

impl RoleFrom {
    /// For people.
    pub(super) fn as_text(self) -> &'static str {
        match self {
            Self::DefaultRole => "by default",
            Self::Pod => "by their own annotation",
            Self::ServiceAccount => "by their ServiceAccount",
        }
    }
}

/// Annotations that cannot be read: their pods are denied.
pub(super) fn annotations(status: &Status) -> Option<Problem> {
    let ServiceAccounts { read_failure, read_failed_at, token_requester, .. } = &status.service_accounts;
    let failure = read_failure.as_deref()?;
    let at = read_failed_at.map(|at| ago(status.at, at)).unwrap_or_default();
    let remedy = match token_requester.as_deref() {
        Some("node") => {
            "check that the API server is Kubernetes 1.36 or later, and that the agent's ClusterRole has impersonate:associated-node on nodes (API group authentication.k8s.io) and impersonate-on:associated-node:get on serviceaccounts; the log has the API server's answer"
        }
        _ => {
            "check the API server, and that the agent's service account may get serviceaccounts in all namespaces, which --service-account-roles and --credentials-from=service-account require"
        }
    };
    problem(
        "service_accounts",
        format!(
            "annotations of ServiceAccounts cannot be read ({at}): {failure}; pods whose ServiceAccount is not known get 503"
        ),
        remedy,
    )
}

/// Tokens that are not given, or not accepted.
pub(super) fn tokens(status: &Status) -> Option<Problem> {
    let of = &status.service_accounts;
    let is_node = of.token_requester.as_deref()? == "node";
    let as_agent =
        "give the agent --token-requests-as=agent, together with the admission policies that confine it";
    let part = "service_accounts";
    match &*of.own_token {
        "no_node" if is_node => {
            return problem(
                part,
                "the agent cannot ask for tokens of ServiceAccounts as its node, because its own token is bound to no node".to_owned(),
                &format!("constrained impersonation is in Kubernetes 1.36 and later: upgrade the cluster, or {as_agent}"),
            );
        }
        "other_node" => {
            let other = of.own_token_node.as_deref().unwrap_or("another node");
            return problem(
                part,
                format!(
                    "the agent's own token is bound to node {other}, and the agent runs as {}",
                    status.agent.node
                ),
                "correct --node, or the variable NODE_NAME, which is spec.nodeName of the agent's pod",
            );
        }
        _ => {}
    }
    if let (Some(failure), Some(at)) = (&of.token_failure, of.token_failed_at)
        && status.at.duration_since(at) < RECENT
    {
        let what = format!(
            "the API server gives no tokens of ServiceAccounts (last {}): {failure}; credentials in the cache are served",
            ago(status.at, at)
        );
        let remedy = if is_node {
            format!(
                "check the API server, which must be Kubernetes 1.36 or later. Check that the agent's ClusterRole has impersonate:associated-node on nodes (API group authentication.k8s.io) and impersonate-on:associated-node:create on serviceaccounts/token, and that the group system:nodes may request the audience (request-serviceaccounts-token-audience); on an older version, {as_agent}"
            )
        } else {
            "check the API server, that the agent's service account may create serviceaccounts/token in the pod's namespace, and what the admission policies answer".to_owned()
        };
        return problem(part, what, &remedy);
    }
    let refused = status.sts.last_failure.as_ref().filter(|failure| {
        failure.kind == "cluster_configuration" && is_last_word(status.sts.succeeded_at, failure.at)
    })?;
    let what = format!(
        "no pod gets new credentials, because of the cluster's configuration: {}: {} (last {})",
        refused.code,
        refused.message,
        ago(status.at, refused.at)
    );
    problem(part, what, &refused.remedy)
}
