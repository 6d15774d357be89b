//! Who logs in, and what that becomes in Kubernetes: the values between `verify`, `mapping` and `webhook`.
//! Pure: no I/O, no clock, no logs. Depends on nothing of ours.

use kube2ram_cloud::alibaba::caller_identity::CallerIdentity;

/// A RAM user or role, as STS named it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The ARN as STS writes it: of an assumed role with its session.
    pub arn: Box<str>,
    /// The ARN that mappings name, in the case of STS: of the role itself instead of its session.
    pub canonical_arn: Box<str>,
    /// The account of the user or role: decimal digits.
    pub account_id: Box<str>,
    /// The id of the user or role, which a new one of the same name does not get.
    pub user_id: Box<str>,
    /// The name that the session of a role got from the client that assumed the role; `None` for users.
    pub session_name: Option<Box<str>>,
    /// The access key that signed.
    pub access_key_id: Box<str>,
}

/// A Kubernetes user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Its name, as RBAC sees it.
    pub username: Box<str>,
    /// Its groups.
    pub groups: Vec<Box<str>>,
}

/// What an identity is mapped to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mapped {
    /// A user.
    User(User),
    /// No mapping names the identity.
    Nobody,
    /// Mappings contradict each other, so that none counts; why, for the log.
    Conflict(Box<str>),
}

/// Maps identities to users. Called for each login, also for one whose identity was verified before, so that
/// a mapping that was removed counts no longer.
pub trait Map: Send + Sync {
    /// The user that `identity` is mapped to.
    fn map(&self, identity: &Identity) -> Mapped;

    /// Whether mappings were read. Until then nobody is mapped, which is no denial.
    fn is_loaded(&self) -> bool;
}

/// Why STS's answer names no identity. Holds nothing of the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The ARN is that of another account than the answer's.
    #[error("the ARN and the account id of STS's answer differ")]
    Account,
    /// The ARN is none of a user, a role, an assumed role or an account's root.
    #[error("the ARN in STS's answer is not that of a RAM user, a RAM role or an account")]
    Arn,
    /// The principal id is neither `<id>` nor `<id>:<session>`, or is longer than 256 bytes.
    #[error("the principal id in STS's answer is malformed")]
    PrincipalId,
}

impl Identity {
    /// The identity in STS's answer to the call that `access_key_id` signed.
    ///
    /// # Errors
    /// See [`IdentityError`].
    pub fn of_caller(caller: &CallerIdentity, access_key_id: &str) -> Result<Self, IdentityError> {
        let CallerIdentity { account_id, arn, principal_id, request_id: _ } = caller;
        let canonical_arn = canonical(arn)?;
        if account(arn) != Some(&**account_id) {
            return Err(IdentityError::Account);
        }
        let (user_id, session_name) = match principal_id.split_once(':') {
            None => (&**principal_id, None),
            Some((user_id, session)) => (user_id, Some(session)),
        };
        let is_malformed =
            !is_word(user_id) || session_name.is_some_and(|name| name.contains(':') || !is_word(name));
        if principal_id.len() > PRINCIPAL_ID_MAX_BYTES || is_malformed {
            return Err(IdentityError::PrincipalId);
        }
        Ok(Self {
            arn: arn.clone(),
            canonical_arn,
            account_id: account_id.clone(),
            user_id: user_id.into(),
            session_name: session_name.map(Into::into),
            access_key_id: access_key_id.into(),
        })
    }
}

/// The ARN that mappings name: `acs:ram::<account>:assumed-role/<role>/<session>` becomes
/// `acs:ram::<account>:role/<role>`, where the role may have a path. ARNs of users, roles and of an account's
/// root stay as they are.
///
/// # Errors
/// [`IdentityError::Arn`].
pub fn canonical(arn: &str) -> Result<Box<str>, IdentityError> {
    let (account, resource) = parts(arn).ok_or(IdentityError::Arn)?;
    let is_named = |name: &str| !name.is_empty() && name.split('/').all(|segment| !segment.is_empty());
    match resource.split_once('/') {
        None if resource == "root" => Ok(arn.into()),
        Some(("role" | "user", name)) if is_named(name) => Ok(arn.into()),
        Some(("assumed-role", name)) if is_named(name) => {
            let (role, _session) = name.rsplit_once('/').ok_or(IdentityError::Arn)?;
            Ok(format!("acs:ram::{account}:role/{role}").into())
        }
        _ => Err(IdentityError::Arn),
    }
}

fn account(arn: &str) -> Option<&str> {
    parts(arn).map(|(account, _)| account)
}

/// The account and the resource of an ARN of RAM.
fn parts(arn: &str) -> Option<(&str, &str)> {
    let (account, resource) = arn.strip_prefix("acs:ram::")?.split_once(':')?;
    let is_account = (1..=32).contains(&account.len()) && account.bytes().all(|byte| byte.is_ascii_digit());
    let is_resource = resource.len() <= ARN_MAX_BYTES && is_word(resource);
    (is_account && is_resource).then_some((account, resource))
}

/// Something, without blanks and characters that a log line or a header could be broken with.
fn is_word(text: &str) -> bool {
    !text.is_empty() && !text.chars().any(|c| c.is_control() || c.is_whitespace())
}

/// Of what follows the account in an ARN: longer than any of RAM, whose names have up to 64 characters.
pub(crate) const ARN_MAX_BYTES: usize = 512;
/// Longer than an id of some 20 digits, a colon and a session's name of up to 64 characters.
pub(crate) const PRINCIPAL_ID_MAX_BYTES: usize = 256;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn caller(arn: &str, principal_id: &str) -> CallerIdentity {
        CallerIdentity {
            account_id: "123456789012".into(),
            arn: arn.into(),
            principal_id: principal_id.into(),
            request_id: "r".into(),
        }
    }

    #[test]
    fn a_session_is_known_by_its_role_and_others_by_their_own_arn() {
        for (arn, expected) in [
            ("acs:ram::123456789012:user/Alice", "acs:ram::123456789012:user/Alice"),
            ("acs:ram::123456789012:role/Users", "acs:ram::123456789012:role/Users"),
            ("acs:ram::123456789012:root", "acs:ram::123456789012:root"),
            ("acs:ram::123456789012:assumed-role/Admin/Session", "acs:ram::123456789012:role/Admin"),
            ("acs:ram::123456789012:assumed-role/team/a/Admin/S", "acs:ram::123456789012:role/team/a/Admin"),
        ] {
            assert_eq!(canonical(arn).as_deref(), Ok(expected));
        }
    }

    #[test]
    fn takes_no_other_partition_service_or_resource() {
        for arn in [
            "",
            "arn",
            "NOT AN ARN",
            "arn:aws:iam::123456789012:role/Users",
            "acs:sts::123456789012:assumed-role/Admin/S",
            "acs:ram:cn-hangzhou:123456789012:user/Alice",
            "acs:ram::12345678901x:user/Alice",
            "acs:ram:::user/Alice",
            "acs:ram::123456789012:",
            "acs:ram::123456789012:root/x",
            "acs:ram::123456789012:user/",
            "acs:ram::123456789012:user",
            "acs:ram::123456789012:group/Admins",
            "acs:ram::123456789012:assumed-role/Admin",
            "acs:ram::123456789012:assumed-role//S",
            "acs:ram::123456789012:assumed-role/Admin/",
            "acs:ram::123456789012:user/Al ice",
            "acs:ram::123456789012:user/Alice\n",
        ] {
            assert_eq!(canonical(arn), Err(IdentityError::Arn), "{arn:?}");
        }
    }

    #[test]
    fn reads_the_identity_of_a_role_and_of_a_user() {
        let role = caller("acs:ram::123456789012:assumed-role/Alice/extra", "Alice:session-name");
        let role = Identity::of_caller(&role, "STS.key").unwrap();
        let user = caller("acs:ram::123456789012:user/alice", "2000001");
        let user = Identity::of_caller(&user, "key").unwrap();

        assert_eq!(&*role.canonical_arn, "acs:ram::123456789012:role/Alice");
        assert_eq!((&*role.user_id, role.session_name.as_deref()), ("Alice", Some("session-name")));
        assert_eq!(&*role.arn, "acs:ram::123456789012:assumed-role/Alice/extra");
        assert_eq!((&*user.user_id, user.session_name), ("2000001", None));
        assert_eq!((&*user.account_id, &*user.access_key_id), ("123456789012", "key"));
    }

    #[test]
    fn refuses_answers_that_contradict_themselves() {
        let alice = "acs:ram::123456789012:user/alice";
        for (arn, principal, error) in [
            (alice, "not:vailid:userid", IdentityError::PrincipalId),
            (alice, "", IdentityError::PrincipalId),
            (alice, ":session", IdentityError::PrincipalId),
            (alice, "id:", IdentityError::PrincipalId),
            ("acs:ram::123456789013:user/alice", "2000001", IdentityError::Account),
            ("arn", "2000001", IdentityError::Arn),
        ] {
            assert_eq!(Identity::of_caller(&caller(arn, principal), "key"), Err(error), "{arn} {principal}");
        }
    }

    /// Identities of anybody's account are remembered.
    #[test]
    fn refuses_texts_that_are_longer_than_any_of_ram() {
        let of = |resource: usize, principal: usize| {
            let arn = format!("acs:ram::123456789012:user/{}", "a".repeat(resource - "user/".len()));
            Identity::of_caller(&caller(&arn, &"1".repeat(principal)), "key").map(drop)
        };

        assert_eq!(of(ARN_MAX_BYTES, PRINCIPAL_ID_MAX_BYTES), Ok(()));
        assert_eq!(of(ARN_MAX_BYTES + 1, PRINCIPAL_ID_MAX_BYTES), Err(IdentityError::Arn));
        assert_eq!(of(ARN_MAX_BYTES, PRINCIPAL_ID_MAX_BYTES + 1), Err(IdentityError::PrincipalId));
    }

    proptest! {
        #[test]
        fn never_panics_and_keeps_the_account(arn in any::<String>(), rest in "[a-z/:-]{0,40}") {
            drop(canonical(&arn));
            if let Ok(canonical) = canonical(&format!("acs:ram::123456789012:{rest}")) {
                prop_assert!(canonical.starts_with("acs:ram::123456789012:"));
            }
        }

        #[test]
        fn no_session_name_changes_the_role(session in "[A-Za-z0-9.@_-]{2,64}") {
            let arn = format!("acs:ram::1:assumed-role/admin/{session}");
            prop_assert_eq!(&*canonical(&arn).unwrap(), "acs:ram::1:role/admin");
        }
    }
}
