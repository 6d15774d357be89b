//! `kube2ram explain`: the steps of a pod's request, made by the same code that makes them for a request.
//! Called by the parent.

mod sts;

use std::borrow::Cow;

use jiff::Timestamp;

use super::{Operator, duration, pods::Identification, pods::presence_of};
use crate::{
    args::{Config, Source},
    kubernetes::{Cluster, Directory as _, Elsewhere, PodView, Presence},
    pod::Pod,
    policy::{Denial, Rule},
    role::RoleError,
    server::{Entitlements, NodeRole, RequestError},
    status::{Explanation, Outcome, SCHEMA, Stage, Step, Verdict},
};
use kube2ram_cloud::role::{RoleArn, RoleSession};
use kube2ram_service::telemetry::chain;

/// Takes the steps after the pod is known.
pub(super) struct Judge<'a> {
    pub(super) config: &'a Config,
    pub(super) cluster: &'a Cluster,
    /// Whether the agent signs with a role's credentials.
    pub(super) is_chained: bool,
    /// `None` before account and region are known.
    pub(super) entitlements: Option<&'a Entitlements>,
}

/// The result of the steps.
pub(super) struct Judged {
    pub(super) steps: Vec<Step>,
    pub(super) verdict: Verdict,
    pub(super) summary: String,
    pub(super) remedy: Option<String>,
    pub(super) role: Option<RoleArn>,
    /// When its credentials were issued, and when they expire.
    pub(super) held: Option<(Timestamp, Timestamp)>,
}

impl Operator {
    pub(super) async fn explain(&self, namespace: &str, name: &str) -> Explanation {
        let view = self.cluster.pod_views();
        // A deleted pod may have been created again under the same name.
        let same_name =
            view.iter().filter(|view| *view.pod.namespace == *namespace && *view.pod.name == *name);
        let found = same_name.min_by_key(|view| view.presence == Presence::Departed);
        let (steps, judged) = match found {
            Some(view) => {
                let cgroups = self.pod_cgroups().await;
                let identification = self.identification_of(view, &cgroups);
                (
                    vec![pod_step(view), identity_step(&view.pod, identification)],
                    self.judge().judge(&view.pod),
                )
            }
            None => (Vec::new(), self.not_here(namespace, name).await),
        };
        let Judged { steps: further, verdict, summary, remedy, .. } = judged;
        Explanation {
            schema: SCHEMA,
            at: self.now(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            steps: steps.into_iter().chain(further).collect(),
            verdict,
            summary,
            remedy,
        }
    }

    async fn not_here(&self, namespace: &str, name: &str) -> Judged {
        let this = &self.config.node;
        let (summary, remedy): (String, Cow<'static, str>) = match self.cluster.elsewhere(namespace, name).await {
            Elsewhere::Absent => ("there is no such pod in the cluster".into(), "check namespace and name: kubectl get pods -A".into()),
            Elsewhere::Ended(phase) => (format!("the pod has ended ({phase}): it gets no credentials any longer"), "none is needed: its containers do not run".into()),
            Elsewhere::Here => (format!("the API server has the pod on this node ({this}), but the agent has not received it yet"), "ask again in a moment; if the result stays the same, check the API server in kube2ram status".into()),
            Elsewhere::OnNode(node) => (format!("the pod is on node {node}, not on this one ({this})"), format!("ask the agent there: kubectl -n kube-system get pods -o wide --field-selector spec.nodeName={node}").into()),
            Elsewhere::Unanswered(why) => (format!("the pod is not known on this node ({this}), and the API server is not available: {why}; if the pod is here, it gets 503"), "check the API server in kube2ram status".into()),
            Elsewhere::Unscheduled => ("the pod is not scheduled to a node yet".into(), "kubectl describe pod shows what it waits for".into()),
        };
        let step = Step::new(Stage::Pod, Outcome::Failed, summary.clone(), &[("node", Some(this.clone()))]);
        Judged::stop(vec![step], Verdict::Unknown, summary, Some(remedy.into_owned()))
    }
}

fn pod_step(view: &PodView) -> Step {
    let PodView { pod, .. } = view;
    let says = match view.presence {
        Presence::Departed => {
            "is deleted from the API server, and keeps its role until its cgroup is removed"
        }
        Presence::Known => "is known from the API server",
        Presence::Restored => {
            "is known from the snapshot; the API server has not answered since the agent's restart"
        }
        Presence::Terminating => "is terminating, and keeps its role until it has ended",
    };
    let network = if pod.host_network { ", in the host's network" } else { "" };
    Step::new(
        Stage::Pod,
        Outcome::Passed,
        format!("{says}; UID {}, service account {}{network}", pod.uid, pod.service_account),
        &[("uid", Some(pod.uid.to_string())), ("presence", Some(presence_of(view).to_owned()))],
    )
}

fn identity_step(pod: &Pod, identification: Option<Identification>) -> Step {
    let Some(Identification { cgroup, named_after, listener }) = identification else {
        let says = "has no cgroup on this node: its containers do not run (yet, or any more)";
        return Step::new(Stage::Identity, Outcome::Waiting, says, &[]);
    };
    let after = if named_after == "uid" { "its UID" } else { "its config hash, as a static pod's is" };
    let cgroup = cgroup.display().to_string();
    let says = match (&listener, pod.host_network) {
        (Some(listener), _) => format!(
            "is recognised by its in-pod listener, {listener} in its network namespace, to which the connections of its cgroup are redirected: {cgroup}, named after {after}"
        ),
        (None, is_host_network) => {
            let why = if is_host_network {
                "because it shares the node's network"
            } else {
                "because its in-pod listener is not open (yet)"
            };
            format!(
                "is recognised by the cgroup of the calling task, below {cgroup}, named after {after}; its connections are redirected to the host listener, {why}"
            )
        }
    };
    let recognised_by = if listener.is_some() { "listener" } else { "task" };
    Step::new(
        Stage::Identity,
        Outcome::Passed,
        says,
        &[
            ("cgroup", Some(cgroup)),
            ("identified_by", Some(named_after.to_owned())),
            ("recognised_by", Some(recognised_by.to_owned())),
            ("listener", listener),
        ],
    )
}

impl Judged {
    fn stop(steps: Vec<Step>, verdict: Verdict, summary: impl Into<String>, remedy: Option<String>) -> Self {
        Self { steps, verdict, summary: summary.into(), remedy, role: None, held: None }
    }

    /// Ends with the answer to the pod.
    fn refused(mut self, error: &RequestError) -> Self {
        let (status, message) = error.told();
        self.steps.push(Step::new(
            Stage::Answer,
            Outcome::Failed,
            format!("the pod is answered {status}: {message}"),
            &[("status", Some(status.to_string())), ("message", Some(message.into_owned()))],
        ));
        self
    }
}

impl Judge<'_> {
    /// What a known pod gets, and why.
    pub(super) fn judge(&self, pod: &Pod) -> Judged {
        let Some(entitlements) = self.entitlements else {
            let says = "account and region are not known yet: the metadata server has not answered";
            let step = Step::new(Stage::Role, Outcome::Waiting, says, &[]);
            let remedy =
                "check the metadata server and the network path to it; kube2ram status shows what else is missing"
                    .to_owned();
            return Judged::stop(vec![step], Verdict::Unavailable, says, Some(remedy))
                .refused(&RequestError::Starting);
        };
        if NodeRole::of(pod, &entitlements.roles, self.config.host_network_pods).is_some() {
            return self.node_role(entitlements);
        }
        match entitlements.roles.session_for(pod) {
            Ok(session) => {
                let step = self.role_step(pod, &session, entitlements);
                let role = session.role.clone();
                let judged = self.judge_session(pod, session, step, entitlements);
                Judged { role: Some(role), ..judged }
            }
            Err(error) => self.without_role(pod, error, entitlements),
        }
    }

    fn node_role(&self, entitlements: &Entitlements) -> Judged {
        let says = "an unannotated hostNetwork pod, which keeps the node's role (--host-network-pods=pass)";
        let step = Step::new(Stage::Role, Outcome::Passed, says, &[]);
        let answer =
            Step::new(Stage::Answer, Outcome::Passed, "the real metadata server's answer is passed on", &[]);
        let summary = "it gets the node's own role, passed on from the real metadata server";
        let key = entitlements.roles.annotation_key();
        let remedy = format!(
            "to give the pod its own role, annotate it with {key}; to deny it the node's role, set --host-network-pods=deny"
        );
        Judged::stop(vec![step, answer], Verdict::NodeRole, summary, Some(remedy))
    }

    fn without_role(&self, pod: &Pod, error: RoleError, entitlements: &Entitlements) -> Judged {
        let key = entitlements.roles.annotation_key();
        let value = pod.annotations.get(key).map(ToString::to_string);
        let says = chain(&error);
        let step = Step::new(
            Stage::Role,
            Outcome::Failed,
            match &value {
                Some(value) => format!("annotation {key} is {value:?}: {says}"),
                None => says.clone(),
            },
            &[("annotation", Some(key.to_owned())), ("value", value)],
        );
        let (verdict, remedy) = match &error {
            RoleError::Malformed { key, .. } => (Verdict::Denied, format!("correct {key}")),
            RoleError::NoBaseArn { key } => (
                Verdict::Denied,
                format!(
                    "give the agent --auto-discover-base-arn or --base-role-arn, or write the role's ARN in {key}"
                ),
            ),
            RoleError::NoRole => {
                (Verdict::NoRole, no_role_remedy(pod, key, self.cluster.has_misplaced_role(&pod.namespace)))
            }
        };
        Judged::stop(vec![step], verdict, says, Some(remedy)).refused(&RequestError::Role(error))
    }

    fn role_step(&self, pod: &Pod, session: &RoleSession, entitlements: &Entitlements) -> Step {
        let roles = &entitlements.roles;
        let key = roles.annotation_key();
        let value = pod.annotations.get(key);
        let role = &session.role;
        let is_arn = value.is_some_and(|value| **value == *role.as_str());
        let base_flag = match &self.config.base_arn {
            Source::Given(_) => "--base-role-arn",
            Source::Discover | Source::Unset if matches!(self.config.default_role, Source::Discover) => {
                "--auto-discover-default-role"
            }
            Source::Discover | Source::Unset => "--auto-discover-base-arn",
        };
        let default_flag = match &self.config.default_role {
            Source::Discover => "--auto-discover-default-role",
            Source::Given(_) | Source::Unset => "--default-role",
        };
        let (says, completed_by) = match (value, is_arn) {
            (Some(value), true) => (format!("annotation {key} is the ARN {value}"), None),
            (Some(value), false) => {
                let base = roles.base().map(ToString::to_string).unwrap_or_default();
                (
                    format!("annotation {key} is {value:?}; {base} ({base_flag}) makes it {role}"),
                    Some(base_flag),
                )
            }
            (None, _) => (
                format!("no annotation {key}; the default role ({default_flag}) is {role}"),
                Some(default_flag),
            ),
        };
        let duration_key = &self.config.annotation_keys.duration;
        let annotation = pod.annotations.contains_key(duration_key).then_some(&**duration_key);
        let rules = &self.config.cloud.dialect().sessions;
        let says = match duration::remark(rules, session.duration, annotation, self.is_chained) {
            Some(limited) => format!("{says}; {limited}"),
            None => says,
        };
        Step::new(
            Stage::Role,
            Outcome::Passed,
            says,
            &[
                ("annotation", Some(key.to_owned())),
                ("value", value.map(ToString::to_string)),
                ("role", Some(role.to_string())),
                ("completed_by", completed_by.map(ToOwned::to_owned)),
                ("base_arn", roles.base().map(ToString::to_string)),
            ],
        )
    }

    fn judge_session(
        &self,
        pod: &Pod,
        session: RoleSession,
        role_step: Step,
        entitlements: &Entitlements,
    ) -> Judged {
        let allow_list = self.cluster.allow_list(&pod.namespace);
        let rule = entitlements.policy.rule_for(&session.role, allow_list.as_ref().map(Option::as_deref));
        let rule = match rule {
            Ok(rule) => self.rule_step(pod, &rule),
            Err(denial) => return self.denied(pod, denial, role_step),
        };
        let steps = vec![role_step, rule];
        match entitlements.credentials.state_of(&session) {
            Some(state) => sts::issued_or_not(steps, &session, state, self.config.cloud.dialect()),
            None => sts::not_requested(steps, &session),
        }
    }

    fn rule_step(&self, pod: &Pod, rule: &Rule) -> Step {
        let (says, name, pattern) = match rule {
            Rule::DefaultRole => ("every pod may use the default role".to_owned(), "default_role", None),
            Rule::Pattern(pattern) => {
                let key = &self.config.namespace_key;
                (format!("namespace {} allows it: {pattern:?} in its annotation {key}", pod.namespace), "pattern", Some(pattern.clone()))
            }
            Rule::Unrestricted => {
                ("namespaces are not restricted (no --namespace-restrictions): every pod may use every role that trusts the agent".to_owned(), "unrestricted", None)
            }
        };
        Step::new(
            Stage::Rule,
            Outcome::Passed,
            says,
            &[("rule", Some(name.to_owned())), ("pattern", pattern)],
        )
    }

    fn denied(&self, pod: &Pod, denial: Denial, role_step: Step) -> Judged {
        let key = &self.config.namespace_key;
        let (rule, remedy) = match &denial {
            Denial::MalformedAllowList { .. } => (
                "malformed_allow_list",
                format!("correct the annotation {key} of namespace {}", pod.namespace),
            ),
            Denial::NamespaceForbids { .. } | Denial::OtherRole { .. } => (
                "namespace_forbids",
                format!(
                    "if the pod should have it, add the role to the annotation {key} of namespace {}; else annotate the pod with another",
                    pod.namespace
                ),
            ),
            Denial::NamespaceUnknown => (
                "namespace_unknown",
                "check the API server in kube2ram status, and the log for the message that there is no room for this namespace's allow-list".to_owned(),
            ),
        };
        let says = denial.to_string();
        let step = Step::new(Stage::Rule, Outcome::Failed, says.clone(), &[("rule", Some(rule.to_owned()))]);
        Judged::stop(vec![role_step, step], Verdict::Denied, says, Some(remedy))
            .refused(&RequestError::Denied(denial))
    }
}

/// The agent may read no service accounts and no Deployments (ARCHITECTURE.md, "What it may do"), so the text
/// names all objects on which the annotation has no effect.
fn no_role_remedy(pod: &Pod, key: &str, is_namespace_annotated: bool) -> String {
    let Pod { namespace, service_account, .. } = pod;
    let found = if is_namespace_annotated {
        format!("namespace {namespace} has the annotation {key}, which has no effect there: ")
    } else {
        String::new()
    };
    format!(
        "{found}if the pod should have a role, annotate the pod itself with {key}, in a Deployment spec.template.metadata.annotations; \
         on its service account ({service_account}), its namespace or its Deployment the annotation has no effect"
    )
}
