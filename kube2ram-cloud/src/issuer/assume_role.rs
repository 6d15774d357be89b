//! The right of the agent's own identity: a call is signed with base credentials. Depends on `base`; used by
//! each cloud's `sts`, through the parent.

use std::sync::Arc;

use async_trait::async_trait;

use super::Right;
use crate::{
    base::{Base, BaseCredentials, BaseError},
    credentials::{IssueError, IssueErrorKind},
    role::{Grant, RoleSession},
    sts::{refusal::ours, transport::Transport},
};

/// Roles that trust the agent's own identity.
pub(crate) struct AssumeRole(pub(crate) Base);

#[async_trait]
impl Right for AssumeRole {
    type Proof = Arc<BaseCredentials>;

    async fn proof(&self, session: &RoleSession, sts: &Transport) -> Result<Self::Proof, IssueError> {
        match session.grant {
            Grant::AssumeRole { .. } => self.0.current(sts).await.map_err(BaseError::into_issue_error),
            Grant::ServiceAccount(_) => Err(not_by_this_right()),
        }
    }

    async fn another(
        &self,
        _: &RoleSession,
        refused: &Self::Proof,
        _: &IssueError,
        sts: &Transport,
    ) -> Result<Option<Self::Proof>, IssueError> {
        self.0.refresh(refused, sts).await.map_err(BaseError::into_issue_error)
    }
}

/// The session is to be by another right. By this one, it would be another identity that holds it.
pub(super) fn not_by_this_right() -> IssueError {
    ours(IssueErrorKind::Unexpected, "Grant", "the role is to be assumed by another right", None)
}
