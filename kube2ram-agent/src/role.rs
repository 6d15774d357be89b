//! Pod → the role session it is entitled to by its annotations and the flags. Pure: no I/O, no clock, no
//! logs. Called by `server`, and by `policy` and `args` for the types.

use std::{collections::BTreeMap, time::Duration};

use crate::pod::Pod;
use kube2ram_cloud::{
    dialect::Dialect,
    role::{
        ARN_MAX_BYTES, ArnStyle, BaseArn, DURATION_MAX_BYTES, EXTERNAL_ID_MAX_BYTES, ExternalId, Grant,
        POLICY_MAX_BYTES, RoleArn, RoleSession, SESSION_NAME_MAX, SessionName, SessionPolicy, ValueError,
        parse_duration,
    },
};

mod attribution;

pub use self::attribution::{Attribution, AttributionError, SessionTags};

/// The pod annotations that are read. `kubernetes` keeps these and drops the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnnotationKeys {
    /// The role: a name, a path and name, or an ARN.
    pub role: Box<str>,
    /// The [`ExternalId`].
    pub external_id: Box<str>,
    /// The [`SessionPolicy`].
    pub policy: Box<str>,
    /// The session's duration: `15m`, `1h30m`, or seconds.
    pub duration: Box<str>,
    /// The [`SessionName`], instead of `<namespace>.<service account>`.
    pub session_name: Box<str>,
}

impl AnnotationKeys {
    /// Lists all keys.
    pub fn all(&self) -> [&str; 5] {
        self.bounded().map(|(key, _)| key)
    }

    /// All keys, and how many bytes the longest legal value of each has.
    pub fn bounded(&self) -> [(&str, usize); 5] {
        [
            (&self.role, ARN_MAX_BYTES),
            (&self.external_id, EXTERNAL_ID_MAX_BYTES),
            (&self.policy, POLICY_MAX_BYTES),
            (&self.duration, DURATION_MAX_BYTES),
            (&self.session_name, SESSION_NAME_MAX),
        ]
    }
}

/// Why a pod has no role session.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RoleError {
    /// An annotation (or `--default-role`) has an unusable value. It is never ignored: the pod is denied.
    #[error("the value of {key} {reason}")]
    Malformed {
        /// The annotation's key, or the flag.
        key: Box<str>,
        /// What is wrong.
        reason: ValueError,
    },
    /// The role is a bare name, and no base ARN is known.
    #[error("the value of {key} is a bare role name, and the agent knows no base ARN to complete it with")]
    NoBaseArn {
        /// The annotation's key, or the flag.
        key: Box<str>,
    },
    /// There is neither an annotation nor a default role.
    #[error("the pod is annotated with no role, and there is no default role")]
    NoRole,
}

/// Tells each pod's role session.
#[derive(Clone, Debug)]
pub struct Roles {
    dialect: &'static Dialect,
    keys: AnnotationKeys,
    base: Option<BaseArn>,
    default_role: Option<RoleArn>,
    default_duration: Duration,
    attribution: Attribution,
}

impl Roles {
    /// Makes it of the flags and of what was discovered. Values are read as the cloud of `dialect` has them,
    /// whose style `base` has, too. `default_role` is a name, a path and name, or an ARN.
    ///
    /// # Errors
    /// [`RoleError::Malformed`] or [`RoleError::NoBaseArn`] about `--default-role`.
    pub fn try_new(
        dialect: &'static Dialect,
        keys: AnnotationKeys,
        base: Option<BaseArn>,
        default_role: Option<&str>,
        default_duration: Duration,
        attribution: Attribution,
    ) -> Result<Self, RoleError> {
        let resolved = |text| resolve("--default-role", text, base.as_ref(), dialect.arns);
        let default_role = default_role.map(resolved).transpose()?;
        Ok(Self { dialect, keys, base, default_role, default_duration, attribution })
    }

    /// How the cloud writes ARNs.
    pub fn arn_style(&self) -> ArnStyle {
        self.dialect.arns
    }

    /// The base ARN, when one is known.
    pub fn base(&self) -> Option<&BaseArn> {
        self.base.as_ref()
    }

    /// The role of pods without annotation, when there is one.
    pub fn default_role(&self) -> Option<&RoleArn> {
        self.default_role.as_ref()
    }

    /// The key of the role annotation.
    pub fn annotation_key(&self) -> &str {
        &self.keys.role
    }

    /// Whether `pod` is annotated with a role, usable or not.
    pub fn is_asked_for_by(&self, pod: &Pod) -> bool {
        pod.annotations.contains_key(&self.keys.role)
    }

    /// Returns the role session that `pod` is entitled to by its annotations. An annotation that cannot be
    /// used is an error, an empty one too: it never means the default.
    ///
    /// # Errors
    /// Every error must end in a denial. The text is fit for an Event on the pod.
    pub fn session_for(&self, pod: &Pod) -> Result<RoleSession, RoleError> {
        let Self { keys, dialect: Dialect { arns, sessions: rules, .. }, .. } = self;
        let annotations = &pod.annotations;
        let role = match annotations.get(&keys.role) {
            Some(text) => resolve(&keys.role, text, self.base.as_ref(), *arns)?,
            None => self.default_role.clone().ok_or(RoleError::NoRole)?,
        };
        let workload = [&*pod.namespace, &*pod.service_account].join(".");
        let session_name =
            parsed(annotations, &keys.session_name, |text| SessionName::parse_in(rules, text))?
                .unwrap_or_else(|| SessionName::fit(&workload));

        Ok(RoleSession {
            role,
            grant: Grant::AssumeRole {
                external_id: parsed(annotations, &keys.external_id, ExternalId::parse)?,
            },
            policy: parsed(annotations, &keys.policy, |text| SessionPolicy::parse_in(rules, text))?,
            session_name,
            duration: parsed(annotations, &keys.duration, parse_duration)?.unwrap_or(self.default_duration),
            tags: self.attribution.tags_of(pod)?,
            source_identity: self.attribution.source_identity_of(&workload),
        })
    }

    /// The name by which the list route calls `role`, and by which SDKs ask back: without the base ARN when
    /// the role lies below it, all after `role/` elsewhere in its account, the full ARN in another account or
    /// when no base ARN is known.
    pub fn wire_name<'r>(&self, role: &'r RoleArn) -> &'r str {
        self.base.as_ref().and_then(|base| base.relative_name(role)).unwrap_or(role.as_str())
    }
}

/// An ARN is used as it is; any other value is a name below the base.
fn resolve(key: &str, text: &str, base: Option<&BaseArn>, style: ArnStyle) -> Result<RoleArn, RoleError> {
    let arn = match base {
        Some(base) => base.arn_for(text),
        None if text.is_empty() || style.is_arn(text) => RoleArn::parse(text),
        None => return Err(RoleError::NoBaseArn { key: key.into() }),
    };
    arn.map_err(|reason| RoleError::Malformed { key: key.into(), reason })
}

fn parsed<T>(
    annotations: &BTreeMap<Box<str>, Box<str>>,
    key: &str,
    parse: impl Fn(&str) -> Result<T, ValueError>,
) -> Result<Option<T>, RoleError> {
    let malformed = |reason| RoleError::Malformed { key: key.into(), reason };
    annotations.get(key).map(|text| parse(text)).transpose().map_err(malformed)
}

#[cfg(test)]
mod tests;
