//! Pod → the role session it is entitled to by its annotations, those of its ServiceAccount, and the flags.
//! Pure: no I/O, no clock, no logs. Called by `server`, and by `policy` and `args` for the types.

use std::time::Duration;

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
mod credentials_from;
mod setting;

use self::setting::Found;
pub use self::{
    attribution::{Attribution, AttributionError, SessionTags},
    credentials_from::CredentialsFrom,
    setting::{Setting, account_of},
};

/// The annotations that are read. `kubernetes` keeps these and drops the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnnotationKeys {
    /// The role: a name, a path and name, or an ARN.
    pub role: Box<str>,
    /// The role of a ServiceAccount without an annotation of the key above. `None` where annotations of
    /// ServiceAccounts are not read at all.
    pub account_role: Option<Box<str>>,
    /// The [`ExternalId`]; of a pod only.
    pub external_id: Box<str>,
    /// The [`SessionPolicy`].
    pub policy: Box<str>,
    /// The session's duration: `15m`, `1h30m`, or seconds.
    pub duration: Box<str>,
    /// The [`SessionName`], instead of `<namespace>.<service account>`.
    pub session_name: Box<str>,
}

impl AnnotationKeys {
    /// Lists all keys of a pod's annotations.
    pub fn all(&self) -> [&str; 5] {
        self.bounded().map(|(key, _)| key)
    }

    /// All keys of a ServiceAccount's annotations, and how many bytes the longest legal value of each has;
    /// `None` where they are not read.
    pub fn account_bounded(&self) -> Option<[(&str, usize); 5]> {
        Some([
            (&*self.role, ARN_MAX_BYTES),
            (self.account_role.as_deref()?, ARN_MAX_BYTES),
            (&*self.policy, POLICY_MAX_BYTES),
            (&*self.duration, DURATION_MAX_BYTES),
            (&*self.session_name, SESSION_NAME_MAX),
        ])
    }

    /// All keys of a pod's annotations, and how many bytes the longest legal value of each has.
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
    /// The annotations of the pod's ServiceAccount count, and are not known (yet).
    #[error("the annotations of the pod's ServiceAccount are not known")]
    AccountUnknown,
    /// An annotation (or `--default-role`) has an unusable value. It is never ignored: the pod is denied.
    #[error("the value of {key} {reason}")]
    Malformed {
        /// The annotation, or the flag.
        key: Setting,
        /// What is wrong.
        reason: ValueError,
    },
    /// The role is a bare name, and no base ARN is known.
    #[error("the value of {key} is a bare role name, and the agent knows no base ARN to complete it with")]
    NoBaseArn {
        /// The annotation, or the flag.
        key: Setting,
    },
    /// The pod is a static pod, and its ServiceAccount is to be what its role trusts.
    #[error("a static pod has no ServiceAccount, and the agent assumes roles by ServiceAccounts")]
    NoServiceAccount,
    /// The pod is annotated with an external id, and its ServiceAccount is to be what its role trusts.
    #[error(
        "the annotation {key} has no place in --credentials-from=service-account: an external id cannot be sent with a ServiceAccount's token. Remove the annotation, and have the role's trust policy name the ServiceAccount in its condition on the token's subject ({subject_key})"
    )]
    NoExternalId {
        /// The annotation's key.
        key: Box<str>,
        /// That of the condition ([`Dialect::subject_key`]).
        subject_key: &'static str,
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
    credentials_from: CredentialsFrom,
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
        credentials_from: CredentialsFrom,
    ) -> Result<Self, RoleError> {
        let resolved = |text| resolve(Found::in_flag("--default-role", text), base.as_ref(), dialect.arns);
        let default_role = default_role.map(resolved).transpose()?;
        Ok(Self { dialect, keys, base, default_role, default_duration, attribution, credentials_from })
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

    /// Whether annotations of ServiceAccounts count.
    pub fn reads_accounts(&self) -> bool {
        self.keys.account_role.is_some()
    }

    /// The annotation that gives `pod` its role, usable or not, and its value. `None`: the default role
    /// counts.
    pub fn role_annotation<'p>(&'p self, pod: &'p Pod) -> Option<(Setting, &'p str)> {
        self.role_of(pod).map(|found| (found.setting(), found.text))
    }

    /// The annotation that gives the session of `pod` its duration.
    pub fn duration_annotation(&self, pod: &Pod) -> Option<Setting> {
        self.annotation(pod, &self.keys.duration).map(Found::setting)
    }

    /// Whether `pod` or its ServiceAccount is annotated with a role, usable or not. While the annotations of
    /// its ServiceAccount count and are not known, it is: it must not be taken for a pod without a role.
    pub fn is_asked_for_by(&self, pod: &Pod) -> bool {
        self.awaits_account(pod) || self.role_of(pod).is_some()
    }

    /// Returns the role session that `pod` is entitled to by its annotations, and by those of its
    /// ServiceAccount where it has none itself. An annotation that cannot be used is an error, an empty one
    /// too: it never means the default, nor the ServiceAccount's.
    ///
    /// # Errors
    /// Every error must end in a denial. The text is fit for an Event on the pod.
    pub fn session_for(&self, pod: &Pod) -> Result<RoleSession, RoleError> {
        if self.awaits_account(pod) {
            return Err(RoleError::AccountUnknown);
        }
        let Self { keys, dialect: Dialect { arns, sessions: rules, .. }, .. } = self;
        let role = match self.role_of(pod) {
            Some(found) => resolve(found, self.base.as_ref(), *arns)?,
            None => self.default_role.clone().ok_or(RoleError::NoRole)?,
        };
        let workload = [&*pod.namespace, &*pod.service_account].join(".");
        let session_name = self.annotation(pod, &keys.session_name);
        let session_name = parsed(session_name, |text| SessionName::parse_in(rules, text))?
            .unwrap_or_else(|| SessionName::fit(&workload));
        let policy = self.annotation(pod, &keys.policy);
        let duration = self.annotation(pod, &keys.duration);

        Ok(RoleSession {
            role,
            grant: self.grant_for(pod)?,
            policy: parsed(policy, |text| SessionPolicy::parse_in(rules, text))?,
            session_name,
            duration: parsed(duration, parse_duration)?.unwrap_or(self.default_duration),
            tags: self.attribution.tags_of(pod)?,
            source_identity: self.attribution.source_identity_of(&workload),
        })
    }

    fn grant_for(&self, pod: &Pod) -> Result<Grant, RoleError> {
        let external_id = Found::on_pod(pod, &self.keys.external_id);
        match (self.credentials_from, external_id) {
            (CredentialsFrom::Node, external_id) => {
                Ok(Grant::AssumeRole { external_id: parsed(external_id, ExternalId::parse)? })
            }
            (CredentialsFrom::ServiceAccount, Some(found)) => {
                let subject_key = self.dialect.subject_key;
                Err(RoleError::NoExternalId { key: found.key.into(), subject_key })
            }
            // The name in its object is not its own, and the token would be bound to a pod of somebody else.
            (CredentialsFrom::ServiceAccount, None) if pod.is_mirror => Err(RoleError::NoServiceAccount),
            (CredentialsFrom::ServiceAccount, None) => Ok(Grant::ServiceAccount(account_of(pod))),
        }
    }

    /// The pod's own annotation first, then those of its ServiceAccount.
    fn role_of<'p>(&'p self, pod: &'p Pod) -> Option<Found<'p>> {
        let alias = || Found::on_account(pod, self.keys.account_role.as_deref()?);
        self.annotation(pod, &self.keys.role).or_else(alias)
    }

    /// The pod's own annotation, or its ServiceAccount's.
    fn annotation<'p>(&self, pod: &'p Pod, key: &'p str) -> Option<Found<'p>> {
        // A snapshot may hold annotations that were read with other flags.
        let of_account = || Found::on_account(pod, key).filter(|_| self.reads_accounts());
        Found::on_pod(pod, key).or_else(of_account)
    }

    fn awaits_account(&self, pod: &Pod) -> bool {
        self.reads_accounts() && pod.account_annotations.is_none()
    }

    /// The name by which the list route calls `role`, and by which SDKs ask back: without the base ARN when
    /// the role lies below it, all after `role/` elsewhere in its account, the full ARN in another account or
    /// when no base ARN is known.
    pub fn wire_name<'r>(&self, role: &'r RoleArn) -> &'r str {
        self.base.as_ref().and_then(|base| base.relative_name(role)).unwrap_or(role.as_str())
    }
}

/// An ARN is used as it is; any other value is a name below the base.
fn resolve(found: Found<'_>, base: Option<&BaseArn>, style: ArnStyle) -> Result<RoleArn, RoleError> {
    let text = found.text;
    let arn = match base {
        Some(base) => base.arn_for(text),
        None if text.is_empty() || style.is_arn(text) => RoleArn::parse(text),
        None => return Err(RoleError::NoBaseArn { key: found.setting() }),
    };
    arn.map_err(|reason| RoleError::Malformed { key: found.setting(), reason })
}

fn parsed<T>(
    found: Option<Found<'_>>,
    parse: impl Fn(&str) -> Result<T, ValueError>,
) -> Result<Option<T>, RoleError> {
    let value = |found: Found<'_>| {
        parse(found.text).map_err(|reason| RoleError::Malformed { key: found.setting(), reason })
    };
    found.map(value).transpose()
}

#[cfg(test)]
mod tests;
