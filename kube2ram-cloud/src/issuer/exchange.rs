//! The right of a ServiceAccount: a token of it, for one exchange (AssumeRoleWithOIDC on Alibaba Cloud,
//! AssumeRoleWithWebIdentity on AWS). The agent's own identity has no part in it, so no call is signed.
//! Depends on [`TokenSource`]; used by each cloud's `exchange`, through the parent.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use jiff::{SignedDuration, Timestamp};
use secrecy::{ExposeSecret as _, SecretString};

use super::{Right, assume_role::not_by_this_right, skew::Skew};
use crate::{
    base::{is_token, withhold},
    credentials::{AccountToken, IssueError, IssueErrorKind, TokenSource},
    role::{Grant, RoleArn, RoleSession, ServiceAccount},
    sts::{refusal::ours, transport::Transport},
    wire::Issued,
};

/// Roles that trust a ServiceAccount of the cluster.
pub(crate) struct TokenExchange {
    tokens: Arc<dyn TokenSource>,
    /// Whom the tokens are for.
    audience: &'static str,
    /// STS's codes for a token that has expired.
    expired: &'static [&'static str],
    skew: Skew,
}

/// A token of the session's ServiceAccount. It is requested when an exchange begins, and dropped with it.
pub(crate) struct ProvenAccount {
    /// base64url and dots.
    pub(crate) token: SecretString,
    /// By the API server's clock.
    expires_at: Timestamp,
    /// For how long it was requested.
    lifetime: Duration,
}

impl TokenExchange {
    pub(crate) fn new(
        tokens: Arc<dyn TokenSource>,
        audience: &'static str,
        expired: &'static [&'static str],
    ) -> Self {
        Self { tokens, audience, expired, skew: Skew::default() }
    }

    async fn token(&self, session: &RoleSession, lifetime: Duration) -> Result<ProvenAccount, IssueError> {
        let account = account_of(session)?;
        let granted = self.tokens.token(account, self.audience, lifetime).await?;
        let AccountToken { token, expires_at } = granted;
        // It becomes part of a form as it stands.
        if !is_token(token.expose_secret()) {
            let message = "the API server's answer holds no token";
            return Err(ours(IssueErrorKind::Token, "Token", message, None));
        }
        Ok(ProvenAccount { token, expires_at, lifetime })
    }
}

#[async_trait]
impl Right for TokenExchange {
    type Proof = ProvenAccount;

    async fn proof(&self, session: &RoleSession, _: &Transport) -> Result<Self::Proof, IssueError> {
        self.token(session, TOKEN_LIFETIME).await
    }

    async fn another(
        &self,
        session: &RoleSession,
        _: &Self::Proof,
        error: &IssueError,
        _: &Transport,
    ) -> Result<Option<Self::Proof>, IssueError> {
        let has_expired = self.expired.contains(&&*error.code);
        let lifetime = if has_expired { LONGER_TOKEN_LIFETIME } else { TOKEN_LIFETIME };
        self.token(session, lifetime).await.map(Some)
    }

    fn answered(&self, proof: &Self::Proof, date: Timestamp) {
        self.skew.note(proof.ahead_seconds(date));
    }

    fn check(&self, session: &RoleSession, issued: &Issued) -> Result<(), &'static str> {
        let account = account_of(session).or(Err("an answer to another call"))?;
        let holder = &issued.holder;
        if holder.subject.as_deref().is_some_and(|subject| subject != account.subject()) {
            return Err("credentials for another ServiceAccount");
        }
        if holder.session_arn.as_deref().is_some_and(|arn| !is_session_of(&session.role, arn)) {
            return Err("credentials of another role");
        }
        Ok(())
    }

    fn withhold(&self, proof: &Self::Proof, error: &mut IssueError) {
        withhold(error, &proof.token);
    }
}

impl ProvenAccount {
    /// How far the API server's clock is ahead of that of STS, which answered at `date`. The token was made
    /// within the last seconds: if more or less than its lifetime is left, the clocks differ.
    fn ahead_seconds(&self, date: Timestamp) -> i64 {
        let requested = SignedDuration::try_from(self.lifetime).unwrap_or(SignedDuration::MAX);
        self.expires_at.duration_since(date).saturating_sub(requested).as_secs()
    }
}

/// The account, when the session has nothing that an exchange cannot carry: it must not be left out silently.
fn account_of(session: &RoleSession) -> Result<&ServiceAccount, IssueError> {
    match &session.grant {
        Grant::ServiceAccount(account) if session.tags.is_empty() && session.source_identity.is_none() => {
            Ok(account)
        }
        Grant::AssumeRole { .. } | Grant::ServiceAccount(_) => Err(not_by_this_right()),
    }
}

/// Whether an ARN `…:<account>:assumed-role/<role>/<session>` is that of a session of `role`. Examples of
/// Alibaba Cloud's have `role/` in place of `assumed-role/`. STS leaves out a role's path, and may write the
/// role's name as it was created: names that differ in case only are one role's.
fn is_session_of(role: &RoleArn, arn: &str) -> bool {
    let mut parts = arn.rsplitn(3, ':');
    let (Some(resource), Some(account)) = (parts.next(), parts.next()) else { return false };
    let Some((kind, rest)) = resource.split_once('/') else { return false };
    let Some((name, _session)) = rest.rsplit_once('/') else { return false };
    let without_path = role.name().rsplit('/').next().unwrap_or_default();
    matches!(kind, "assumed-role" | "role")
        && account == role.account()
        && [role.name(), without_path].iter().any(|own| own.eq_ignore_ascii_case(name))
}

/// The shortest that the API server gives. STS reads a token once, right after it was made; the session's
/// duration does not depend on it.
const TOKEN_LIFETIME: Duration = Duration::from_mins(10);
/// Once STS has called a token expired: its clock is ahead of the API server's.
const LONGER_TOKEN_LIFETIME: Duration = Duration::from_hours(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_token_seems_to_live_longer_or_shorter_is_a_difference_of_clocks() {
        let made: Timestamp = "2026-11-28T10:00:00Z".parse().unwrap();
        let token = ProvenAccount {
            token: "eyJ.e30.c2ln".into(),
            expires_at: made + TOKEN_LIFETIME,
            lifetime: TOKEN_LIFETIME,
        };

        for (date, ahead) in [
            ("2026-11-28T10:00:00Z", 0),
            ("2026-11-28T10:00:02Z", -2),
            ("2026-11-28T10:20:00Z", -1200),
            ("2026-11-28T09:58:00Z", 120),
        ] {
            assert_eq!(token.ahead_seconds(date.parse().unwrap()), ahead, "{date}");
        }
        assert!(token.ahead_seconds(Timestamp::MIN) > 0 && token.ahead_seconds(Timestamp::MAX) < 0);
    }

    #[test]
    fn no_part_of_a_token_is_repeated() {
        let parts = ["eyJhbGciOiJSUzI1NiJ9", "eyJzdWIiOiJzeXN0ZW0ifQ", "c2lnbmF0dXJlX29mX2l0"];
        let token = SecretString::from(parts.join("."));
        let said = |text: &str| {
            let mut error = ours(IssueErrorKind::Denied, "Code", text, None);
            withhold(&mut error, &token);
            error.message
        };

        for part in parts {
            for repeated in [part, &part[..16]] {
                assert_eq!(
                    &*said(&format!("cannot read '{repeated}'")),
                    "withheld, because it repeats the token"
                );
            }
        }
        assert_eq!(&*said("This JsonWebToken is expired."), "This JsonWebToken is expired.");
        let granted = AccountToken { token: token.clone(), expires_at: Timestamp::UNIX_EPOCH };
        assert!(parts.iter().all(|part| !format!("{granted:?}").contains(part)));
    }

    #[test]
    fn a_session_is_of_the_role_that_its_arn_names() {
        let alibaba = RoleArn::parse("acs:ram::1234567890123456:role/pod-role").unwrap();
        let aws = RoleArn::parse("arn:aws:iam::123456789012:role/team/app").unwrap();

        for (role, arn) in [
            (&alibaba, "acs:ram::1234567890123456:assumed-role/pod-role/shop.web"),
            (&alibaba, "acs:ram::1234567890123456:role/pod-role/shop.web"),
            (&alibaba, "acs:ram::1234567890123456:assumed-role/Pod-Role/shop.web"),
            (&aws, "arn:aws:sts::123456789012:assumed-role/app/shop.web"),
        ] {
            assert!(is_session_of(role, arn), "{arn}");
        }
        for (role, arn) in [
            (&alibaba, "acs:ram::1234567890123456:assumed-role/pod-role2/shop.web"),
            (&alibaba, "acs:ram::1234567890123456:assumed-role/other/pod-role"),
            (&alibaba, "acs:ram::1234567890123457:assumed-role/pod-role/shop.web"),
            (&alibaba, "acs:ram::1234567890123456:user/pod-role/shop.web"),
            (&alibaba, "acs:ram::1234567890123456:assumed-role/pod-role"),
            (&alibaba, "pod-role"),
            (&alibaba, ""),
            (&aws, "arn:aws:sts::123456789012:assumed-role/team/shop.web"),
            (&aws, "arn:aws:sts::210987654321:assumed-role/app/shop.web"),
        ] {
            assert!(!is_session_of(role, arn), "{arn}");
        }
    }
}
