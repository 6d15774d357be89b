//! Role session → [`Permit`] or [`Denial`]: the namespace rules and the requested role. Pure: no I/O, no
//! clock, no logs. Called by `server`. Only this module can make a [`Permit`], and `credentials` takes
//! nothing else.

use std::sync::Arc;

use crate::role::Roles;
use kube2ram_cloud::role::{ArnStyle, BaseArn, RoleArn, RoleSession};

mod allow_list;
mod memo;

pub use self::allow_list::{PatternFormat, check_allow_list};
use self::{allow_list::AllowList, memo::Memo};

/// How much of a client's text a [`Denial`] keeps, in characters.
const REQUESTED_MAX: usize = 128;

/// The proof that policy was asked: what `credentials` takes, and only `policy` can make.
#[derive(Debug, PartialEq, Eq)]
pub struct Permit(Arc<RoleSession>);

impl Permit {
    /// What is permitted.
    pub fn session(&self) -> &RoleSession {
        &self.0
    }

    /// What is permitted, by value.
    pub fn into_session(self) -> Arc<RoleSession> {
        self.0
    }
}

/// Why a pod may not have its role. `Display` is for logs; clients get
/// [`external_message`](Self::external_message).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denial {
    /// The namespace's allow-list cannot be read, in whole or in part, and what can be read of it does not
    /// allow the role.
    #[error("the namespace's allow-list does not allow {role}: it {reason}")]
    MalformedAllowList {
        /// The pod's role.
        role: RoleArn,
        /// What is wrong with the list.
        reason: String,
    },
    /// The namespace has no allow-list, or one that does not allow the role.
    #[error("the namespace does not allow {role}")]
    NamespaceForbids {
        /// The pod's role.
        role: RoleArn,
    },
    /// The namespace is not known (yet).
    #[error("the pod's namespace is not known")]
    NamespaceUnknown,
    /// The client asked for another role than its pod's.
    #[error("{requested:?} was requested, but the pod's role is {role}")]
    OtherRole {
        /// What was requested, cut to 128 characters.
        requested: String,
        /// The pod's role.
        role: RoleArn,
    },
}

impl Denial {
    /// The text for the client: one line that names no role and no other pod.
    pub fn external_message(&self) -> &'static str {
        match self {
            Self::MalformedAllowList { .. } | Self::NamespaceForbids { .. } => {
                "the pod's namespace does not allow the pod's role"
            }
            Self::NamespaceUnknown => "the pod's namespace is not known to the agent",
            Self::OtherRole { .. } => "the requested role is not the pod's role",
        }
    }
}

/// Which rule lets a pod have its role.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Every pod may use the default role.
    DefaultRole,
    /// A pattern of the namespace's allow-list.
    Pattern(String),
    /// Namespaces are not restricted.
    Unrestricted,
}

/// Decides whether a pod may have its role.
#[derive(Debug)]
pub struct Policy {
    arn_style: ArnStyle,
    base: Option<BaseArn>,
    default_role: Option<RoleArn>,
    restrictions: Option<PatternFormat>,
    allow_lists: Memo<AllowList>,
}

impl Policy {
    /// Makes it of the flags and of what was discovered (`roles`). `restrictions` is how namespaces'
    /// allow-lists are read; `None` lets every namespace have every role.
    pub fn new(restrictions: Option<PatternFormat>, roles: &Roles) -> Self {
        Self {
            arn_style: roles.arn_style(),
            base: roles.base().cloned(),
            default_role: roles.default_role().cloned(),
            restrictions,
            allow_lists: Memo::default(),
        }
    }

    /// Permits `session` unless the client asked for another role (`requested`, the decoded role in the
    /// credential route's path) or the namespace does not allow the role.
    ///
    /// `allow_list` is the result of [`Directory::allow_list`](crate::kubernetes::Directory::allow_list):
    /// `None` when the namespace is not known, `Some(None)` when it has no annotation; both deny where
    /// restrictions are on. The default role is exempt from restrictions, also when a pod is annotated with
    /// it, as in the predecessors: every pod could get it without an annotation. Rows 3.2 and 3.41 of
    /// docs/predecessors.md.
    ///
    /// # Errors
    /// The reason of the denial.
    pub fn permit(
        &self,
        session: impl Into<Arc<RoleSession>>,
        allow_list: Option<Option<&str>>,
        requested: Option<&str>,
    ) -> Result<Permit, Denial> {
        let session = session.into();
        if let Some(requested) = requested
            && !self.is_name_of(requested, &session.role)
        {
            let requested = requested.chars().take(REQUESTED_MAX).collect();
            return Err(Denial::OtherRole { requested, role: session.role.clone() });
        }
        if let Some(format) = self.restrictions
            && self.default_role.as_ref() != Some(&session.role)
        {
            self.check_namespace(&session.role, allow_list, format)?;
        }
        Ok(Permit(session))
    }

    /// Which rule permits `role`, for people: what [`Self::permit`] decides by.
    ///
    /// # Errors
    /// The reason of the denial.
    pub fn rule_for(&self, role: &RoleArn, allow_list: Option<Option<&str>>) -> Result<Rule, Denial> {
        let Some(format) = self.restrictions else { return Ok(Rule::Unrestricted) };
        if self.default_role.as_ref() == Some(role) {
            return Ok(Rule::DefaultRole);
        }
        self.check_namespace(role, allow_list, format)?;
        let list = AllowList::parse(allow_list.flatten().unwrap_or_default(), format, self.arn_style);
        let pattern = list.pattern_for(role.as_str(), self.base.as_ref().map(BaseArn::as_str));
        pattern.map(Rule::Pattern).ok_or_else(|| Denial::NamespaceForbids { role: role.clone() })
    }

    /// Whether `requested` in a client's path means `role`: its ARN, everything after `role/`, or the name
    /// below the base. Upper and lower case are equal, as in roles' names. Only an equal name counts: the Go
    /// kube2ram accepts any end of the ARN of the node's role (row 4.16 of docs/predecessors.md).
    fn is_name_of(&self, requested: &str, role: &RoleArn) -> bool {
        let requested = requested.strip_suffix('/').unwrap_or(requested);
        let is = |name: &str| name.eq_ignore_ascii_case(requested);
        is(role.name())
            || is(role.as_str())
            || self.base.as_ref().and_then(|base| base.relative_name(role)).is_some_and(is)
    }

    fn check_namespace(
        &self,
        role: &RoleArn,
        allow_list: Option<Option<&str>>,
        format: PatternFormat,
    ) -> Result<(), Denial> {
        let text = allow_list
            .ok_or(Denial::NamespaceUnknown)?
            .ok_or_else(|| Denial::NamespaceForbids { role: role.clone() })?;
        let list = self.allow_lists.of(text, || AllowList::parse(text, format, self.arn_style));

        match list.fault() {
            _ if list.allows(role.as_str(), self.base.as_ref().map(BaseArn::as_str)) => Ok(()),
            Some(fault) => Err(Denial::MalformedAllowList { role: role.clone(), reason: fault.to_owned() }),
            None => Err(Denial::NamespaceForbids { role: role.clone() }),
        }
    }
}

#[cfg(test)]
mod tests;
