//! Pod → the role session it is entitled to by its annotations and the flags. Pure: no I/O, no clock, no logs.
//! Depends on `kubernetes` for [`Pod`](crate::kubernetes::Pod) only; called by `server`.

use std::time::Duration;

/// A RAM role's ARN, `acs:ram::<account>:role/<name>`, as written (comparison is exact).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RoleArn(Box<str>);

/// `RoleSessionName`: 2–64 characters of `[A-Za-z0-9.@_-]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SessionName(Box<str>);

/// `ExternalId`: 2–1224 characters of `[\w+=,.@:/-]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ExternalId(Box<str>);

/// `Policy`: a JSON document of 1–2048 characters that narrows the session.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SessionPolicy(Box<str>);

/// Everything that changes what AssumeRole answers: the key of the credential cache.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RoleSession {
    /// The role to assume.
    pub role: RoleArn,
    /// The external id, when the pod is annotated with one.
    pub external_id: Option<ExternalId>,
    /// The session policy, when the pod is annotated with one.
    pub policy: Option<SessionPolicy>,
    /// What ActionTrail shows.
    pub session_name: SessionName,
    /// `DurationSeconds`, 15 min – 12 h.
    pub duration: Duration,
}

// Stands in for the accessors that the `role` part brings.
macro_rules! text {
    ($($name:ident)*) => {$(
        impl $name {
            /// Takes any text.
            ///
            /// # Errors
            /// None.
            pub fn parse(text: &str) -> Result<Self, std::convert::Infallible> {
                Ok(Self(text.into()))
            }

            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
    )*};
}
text!(RoleArn SessionName ExternalId SessionPolicy);
