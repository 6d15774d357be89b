//! The Events that a failed request raises on the pod or its namespace. Pure; called by `connection`.

use super::error::RequestError;
use crate::{
    credentials::CredentialError,
    kubernetes::{About, Notice, Pod},
    policy::Denial,
    role::RoleError,
};

/// What the owners of `pod` should read about `error`. What a client writes does not appear, so that it cannot make Events at will.
pub(super) fn notices_of(error: &RequestError, pod: &Pod) -> Vec<Notice> {
    let on_pod = |reason, message: String| {
        let about = About::Pod(pod.namespace.clone(), pod.name.clone(), pod.uid.clone());
        Notice { about, reason, message }
    };
    match error {
        RequestError::Credentials(CredentialError::Issue { source, .. }) if !source.kind.is_transient() => {
            vec![on_pod(
                "AssumeRoleDenied",
                format!("the pod's role cannot be assumed: STS answers {}", source.code),
            )]
        }
        RequestError::Denied(denial @ Denial::MalformedAllowList { .. }) => vec![
            Notice {
                about: About::Namespace(pod.namespace.clone()),
                reason: "MalformedAllowList",
                message: denial.to_string(),
            },
            on_pod("RoleDenied", denial.to_string()),
        ],
        RequestError::Denied(denial @ Denial::OtherRole { .. }) => {
            vec![on_pod("RoleDenied", denial.external_message().to_owned())]
        }
        // Known in a moment.
        RequestError::Denied(Denial::NamespaceUnknown) => Vec::new(),
        RequestError::Denied(denial) => vec![on_pod("RoleDenied", denial.to_string())],
        RequestError::Role(error @ (RoleError::Malformed { .. } | RoleError::NoBaseArn { .. })) => {
            vec![on_pod("MalformedAnnotation", error.to_string())]
        }
        _ => Vec::new(),
    }
}
