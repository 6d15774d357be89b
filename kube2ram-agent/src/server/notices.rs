//! The Events that a failed request raises on the pod, its namespace or the node. Pure; called by
//! `connection`.

use super::{Config, error::RequestError};
use crate::{
    credentials::CredentialError,
    kubernetes::{About, CODES_OF_API_SERVER, Notice},
    pod::Pod,
    policy::Denial,
    role::RoleError,
};
use kube2ram_cloud::{credentials::IssueErrorKind, role::RoleSession};

/// That a pod without role asks for one, while its namespace carries the annotation `key`, which would give
/// it one.
pub(super) fn misplaced(pod: &Pod, key: &str) -> Notice {
    Notice {
        about: About::Pod(pod.namespace.clone(), pod.name.clone(), pod.uid.clone()),
        reason: "MisplacedAnnotation",
        message: format!(
            "the pod has no role: the annotation {key} is on its namespace {}, where it has no effect; put it on the pod (in a Deployment, spec.template.metadata.annotations)",
            pod.namespace
        ),
    }
}

/// What the owners of `pod` should read about `error`, and do. What a client writes does not appear, so that
/// it cannot make Events at will. `session` is the pod's own.
pub(super) fn notices_of(
    error: &RequestError,
    pod: &Pod,
    session: Option<&RoleSession>,
    config: &Config,
) -> Vec<Notice> {
    let allow_list = &config.allow_list_annotation;
    let on_pod = |reason, message: String| {
        let about = About::Pod(pod.namespace.clone(), pod.name.clone(), pod.uid.clone());
        Notice { about, reason, message }
    };
    let role = session.map_or("the pod's role", |session| session.role.as_str());
    let advice = |kind| match session {
        Some(session) => config.dialect.advice_by(&session.grant, kind),
        None => (config.dialect.advice)(kind),
    };
    match error {
        // The same for all pods, and no fault of theirs. What the API server refused is said by `kubernetes`.
        RequestError::Credentials(CredentialError::Issue { source, .. })
            if source.kind == IssueErrorKind::ClusterConfiguration =>
        {
            let advice = advice(source.kind);
            let message =
                format!("ServiceAccounts' tokens bring pods no credentials ({}): {advice}", source.code);
            let notice = Notice { about: About::Node, reason: "ClusterConfigurationBroken", message };
            if CODES_OF_API_SERVER.contains(&&*source.code) { Vec::new() } else { vec![notice] }
        }
        RequestError::Credentials(CredentialError::Issue { source, .. }) => {
            let (kind, code) = (source.kind, &source.code);
            let (reason, what) = match kind.is_transient() {
                true => ("CredentialsUnavailable", "there are no credentials yet for"),
                false => ("AssumeRoleDenied", "STS does not let the agent assume"),
            };
            vec![on_pod(reason, format!("{what} {role} ({code}): {}", advice(kind)))]
        }
        RequestError::Denied(denial @ Denial::MalformedAllowList { .. }) => {
            let message =
                format!("{denial}; correct the annotation {allow_list} of namespace {}", pod.namespace);
            let about = About::Namespace(pod.namespace.clone());
            vec![
                Notice { about, reason: "MalformedAllowList", message: message.clone() },
                on_pod("RoleDenied", message),
            ]
        }
        RequestError::Denied(denial @ Denial::NamespaceForbids { .. }) => {
            let remedy = format!(
                "annotate the pod with a role that it does allow, or add this one to the annotation {allow_list} of namespace {}",
                pod.namespace
            );
            vec![on_pod("RoleDenied", format!("{denial}: {remedy}"))]
        }
        // Known in a moment.
        RequestError::Denied(Denial::NamespaceUnknown) => Vec::new(),
        RequestError::Denied(denial @ Denial::OtherRole { .. }) => {
            let what = denial.external_message();
            let remedy = "have the client ask for the role that security-credentials/ lists, as SDKs do, or annotate the pod with the role that it needs";
            vec![on_pod("RoleDenied", format!("{what}, {role}: {remedy}"))]
        }
        RequestError::Role(error @ RoleError::Malformed { .. }) => {
            vec![on_pod("MalformedAnnotation", format!("{error}: the pod is denied until it is corrected"))]
        }
        RequestError::Role(error @ RoleError::NoExternalId { .. }) => {
            vec![on_pod("MalformedAnnotation", error.to_string())]
        }
        RequestError::Role(error @ RoleError::NoBaseArn { .. }) => {
            let remedy =
                "write the role's ARN, or start the agent with --auto-discover-base-arn or --base-role-arn";
            vec![on_pod("MalformedAnnotation", format!("{error}: {remedy}"))]
        }
        _ => Vec::new(),
    }
}
