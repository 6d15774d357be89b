//! `kube2ram explain`: the steps of a pod's request, made by the same code that makes them for a request.
//! Called by the parent.

mod sts;

use std::borrow::Cow;

use jiff::Timestamp;

use super::{Operator, duration, pods::Identification, pods::presence_of};
use crate::{
    args::{Config, CredentialsFrom, Source},
    kubernetes::{Cluster, Directory as _, Elsewhere, PodView, Presence},
    pod::Pod,
    policy::{Denial, Rule},
    role::{RoleError, Roles, Setting, account_of},
    server::{Entitlements, NodeRole, RequestError},
    status::{Explanation, Outcome, RoleFrom, SCHEMA, Stage, Step, Verdict},
};
use kube2ram_cloud::role::{RoleArn, RoleSession, ServiceAccount};
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
    /// What gives it the role, and the annotation that does so.
    pub(super) role_from: Option<RoleFrom>,
    pub(super) role_annotation: Option<String>,
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
        format!("{says}; UID {}, {}{network}", pod.uid, account_of(pod).subject()),
        &[
            ("uid", Some(pod.uid.to_string())),
            ("presence", Some(presence_of(view).to_owned())),
            ("service_account", Some(pod.service_account.to_string())),
        ],
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
        let summary = summary.into();
        Self {
            steps,
            verdict,
            summary,
            remedy,
            role: None,
            role_from: None,
            role_annotation: None,
            held: None,
        }
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
                let role = Some(session.role.clone());
                let judged = self.judge_session(pod, session, step, entitlements);
                let source = entitlements.roles.role_annotation(pod).map(|(setting, _)| setting);
                let role_from = Some(role_from(source.as_ref()));
                let role_annotation = source.map(|setting| setting.key().to_owned());
                Judged { role, role_from, role_annotation, ..judged }
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
        let roles = &entitlements.roles;
        let found = roles.role_annotation(pod);
        let says = chain(&error);
        let step = Step::new(
            Stage::Role,
            Outcome::Failed,
            match &found {
                Some((setting, value)) => format!("annotation {setting} is {value:?}: {says}"),
                None => says.clone(),
            },
            &annotation_facts(found.as_ref(), roles),
        );
        let (verdict, remedy) = match &error {
            RoleError::AccountUnknown => (
                Verdict::Unavailable,
                "check the ServiceAccounts in kube2ram status: the agent waits for what the API server answers"
                    .to_owned(),
            ),
            RoleError::Malformed { key, .. } => (Verdict::Denied, format!("correct {key}")),
            RoleError::NoBaseArn { key } => (
                Verdict::Denied,
                format!(
                    "give the agent --auto-discover-base-arn or --base-role-arn, or write the role's ARN in {key}"
                ),
            ),
            RoleError::NoServiceAccount => (
                Verdict::NoRole,
                "make it a pod of a DaemonSet, or run the agent with --credentials-from=node".to_owned(),
            ),
            RoleError::NoExternalId { key, .. } => (
                Verdict::Denied,
                format!(
                    "remove {key} from the pod; have the role's trust policy name {} in its condition on the token's subject",
                    account_of(pod).subject()
                ),
            ),
            RoleError::NoRole => {
                let is_namespace_annotated = self.cluster.has_misplaced_role(&pod.namespace);
                (Verdict::NoRole, no_role_remedy(pod, roles, is_namespace_annotated))
            }
        };
        Judged::stop(vec![step], verdict, says, Some(remedy)).refused(&RequestError::Role(error))
    }

    fn role_step(&self, pod: &Pod, session: &RoleSession, entitlements: &Entitlements) -> Step {
        let roles = &entitlements.roles;
        let found = roles.role_annotation(pod);
        let role = &session.role;
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
        let (says, completed_by) = match &found {
            Some((setting, value)) if *value == role.as_str() => {
                (format!("annotation {setting} is the ARN {value}"), None)
            }
            Some((setting, value)) => {
                let base = roles.base().map(ToString::to_string).unwrap_or_default();
                (
                    format!("annotation {setting} is {value:?}; {base} ({base_flag}) makes it {role}"),
                    Some(base_flag),
                )
            }
            None => {
                let key = roles.annotation_key();
                (
                    format!("no annotation {key}; the default role ({default_flag}) is {role}"),
                    Some(default_flag),
                )
            }
        };
        let duration = roles.duration_annotation(pod);
        let rules = &self.config.cloud.dialect().sessions;
        let says = match duration::remark(rules, session.duration, duration.as_ref(), self.is_chained) {
            Some(limited) => format!("{says}; {limited}"),
            None => says,
        };
        let mut facts = annotation_facts(found.as_ref(), roles);
        facts.extend([
            ("role", Some(role.to_string())),
            ("completed_by", completed_by.map(ToOwned::to_owned)),
            ("base_arn", roles.base().map(ToString::to_string)),
        ]);
        Step::new(Stage::Role, Outcome::Passed, says, &facts)
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
                (
                    format!("namespace {} allows it: {pattern:?} in its annotation {key}", pod.namespace),
                    "pattern",
                    Some(pattern.clone()),
                )
            }
            Rule::Unrestricted => {
                let trusts = match self.config.credentials_from {
                    CredentialsFrom::Node => "the agent",
                    CredentialsFrom::ServiceAccount => "its ServiceAccount",
                };
                (
                    format!(
                        "namespaces are not restricted (no --namespace-restrictions): every pod may use every role that trusts {trusts}"
                    ),
                    "unrestricted",
                    None,
                )
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

/// What gives a pod its role, by the annotation that does so.
fn role_from(annotation: Option<&Setting>) -> RoleFrom {
    match annotation {
        None => RoleFrom::DefaultRole,
        Some(setting) if setting.account().is_some() => RoleFrom::ServiceAccount,
        Some(_) => RoleFrom::Pod,
    }
}

/// About the annotation that gives the role, or would.
fn annotation_facts(found: Option<&(Setting, &str)>, roles: &Roles) -> Vec<(&'static str, Option<String>)> {
    let setting = found.map(|(setting, _)| setting);
    let account = setting.and_then(Setting::account);
    vec![
        ("annotation", Some(setting.map_or(roles.annotation_key(), Setting::key).to_owned())),
        ("value", found.map(|(_, value)| (*value).to_owned())),
        ("annotation_of", account.map(ServiceAccount::subject)),
    ]
}

/// The agent may read no Deployments, and ServiceAccounts only where their annotations count
/// (ARCHITECTURE.md, "What it may do"), so the text names all objects on which the annotation has no effect.
fn no_role_remedy(pod: &Pod, roles: &Roles, is_namespace_annotated: bool) -> String {
    let (Pod { namespace, service_account, .. }, key) = (pod, roles.annotation_key());
    let found = if is_namespace_annotated {
        format!("namespace {namespace} has the annotation {key}, which has no effect there: ")
    } else {
        String::new()
    };
    let (account, without_effect) = if roles.reads_accounts() {
        (format!("; or annotate its service account ({service_account})"), String::new())
    } else {
        (String::new(), format!("its service account ({service_account}), "))
    };
    format!(
        "{found}if the pod should have a role, annotate the pod itself with {key}, in a Deployment spec.template.metadata.annotations{account}; \
         on {without_effect}its namespace or its Deployment the annotation has no effect"
    )
}
