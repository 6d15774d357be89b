//! The ARNs of RAM users and roles, and the patterns that mappings name them by. Pure; used by the parent
//! and by the other parts of `mapping`.

use std::fmt;

use super::glob;

/// Longer ones are refused.
const MAX_BYTES: usize = 512;
const MAX_ACCOUNT_BYTES: usize = 32;

/// Why a text is no ARN of a user or role.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArnError {
    /// The account is not made of digits.
    #[error("the account {0:?} must be made of decimal digits")]
    Account(Box<str>),
    /// The account has a wildcard.
    #[error("the account must be written out: whoever owns another account can create any role in it")]
    AccountWildcard,
    /// It is no `acs:ram::<account>:…`.
    #[error("{0:?} is not acs:ram::<account>:user/<name> or acs:ram::<account>:role/<name>")]
    Form(Box<str>),
    /// It is empty, or longer than 512 bytes.
    #[error("it has {0} bytes, not 1 to 512")]
    Length(usize),
    /// A user's or role's name is empty, or has a character that names cannot have.
    #[error("the name {0:?} must be made of letters, digits and any of +=,.@_-, with / between its parts")]
    Name(Box<str>),
    /// A session's ARN has a wildcard.
    #[error("a session's ARN has no wildcards: write acs:ram::<account>:role/<name> instead")]
    SessionWildcard,
}

/// What an ARN is the ARN of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Role,
    Root,
    User,
}

/// The users and roles that a mapping is for: one, or with `*` and `?` any number in one account. In lower
/// case, and a session's ARN is its role's, both as in ack-ram-authenticator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    text: Box<str>,
    kind: Kind,
    /// The bytes before the first wildcard; `None` without one.
    literal: Option<usize>,
    /// Whether it was written as a session's ARN.
    is_session: bool,
}

impl Pattern {
    /// Parses the ARN of a mapping, in upper or lower case.
    ///
    /// # Errors
    /// What is wrong with it, for its author.
    pub fn parse(text: &str) -> Result<Self, ArnError> {
        if text.is_empty() || text.len() > MAX_BYTES {
            return Err(ArnError::Length(text.len()));
        }
        // Not Unicode's lower case, which makes a `k` of the Kelvin sign.
        let lower = text.to_ascii_lowercase();
        let not_arn = || ArnError::Form(text.into());
        let (account, resource) =
            lower.strip_prefix("acs:ram::").and_then(|rest| rest.split_once(':')).ok_or_else(not_arn)?;
        if account.contains(glob::WILDCARDS) {
            return Err(ArnError::AccountWildcard);
        }
        let is_account = (1..=MAX_ACCOUNT_BYTES).contains(&account.len())
            && account.bytes().all(|byte| byte.is_ascii_digit());
        if !is_account {
            return Err(ArnError::Account(account.into()));
        }
        let (kind, name, is_session) = match resource.split_once('/') {
            None if resource == "root" => (Kind::Root, None, false),
            Some(("user", name)) => (Kind::User, Some(name), false),
            Some(("role", name)) => (Kind::Role, Some(name), false),
            Some(("assumed-role", session)) if session.contains(glob::WILDCARDS) => {
                return Err(ArnError::SessionWildcard);
            }
            Some(("assumed-role", session)) => {
                (Kind::Role, Some(session.rsplit_once('/').ok_or_else(not_arn)?.0), true)
            }
            _ => return Err(not_arn()),
        };
        let text = match (kind, name) {
            (Kind::Role, Some(name)) => format!("acs:ram::{account}:role/{}", checked(name)?),
            (Kind::User, Some(name)) => format!("acs:ram::{account}:user/{}", checked(name)?),
            _ => format!("acs:ram::{account}:root"),
        };
        let literal = text.find(glob::WILDCARDS);
        Ok(Self { text: text.into(), kind, literal, is_session })
    }

    /// The pattern in lower case.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether it was written as a session's ARN.
    pub(super) fn is_session(&self) -> bool {
        self.is_session
    }

    /// What stands before the first wildcard; `None` without one.
    pub(super) fn literal_prefix(&self) -> Option<&str> {
        self.literal.and_then(|end| self.text.get(..end))
    }

    /// Whether it names the canonical ARN `subject`, which is in lower case.
    pub(super) fn matches(&self, subject: &str) -> bool {
        match self.literal {
            None => *self.text == *subject,
            Some(_) => glob::matches(&self.text, subject),
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A name, with or without wildcards and a path.
fn checked(name: &str) -> Result<&str, ArnError> {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"+=,.@_-*?".contains(&byte);
    let is_name = name.split('/').all(|part| !part.is_empty() && part.bytes().all(legal));
    if is_name { Ok(name) } else { Err(ArnError::Name(name.into())) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn canonical(text: &str) -> String {
        Pattern::parse(text).unwrap().to_string()
    }

    #[test]
    fn is_the_canonical_arn_in_lower_case() {
        for (text, expected) in [
            ("acs:ram::123456789012:user/Alice", "acs:ram::123456789012:user/alice"),
            ("acs:ram::123456789012:role/Users", "acs:ram::123456789012:role/users"),
            ("acs:ram::123456789012:role/path/Users", "acs:ram::123456789012:role/path/users"),
            ("acs:ram::123456789012:assumed-role/Admin/Session", "acs:ram::123456789012:role/admin"),
            ("acs:ram::123456789012:assumed-role/path/Admin/a@b.c", "acs:ram::123456789012:role/path/admin"),
            ("ACS:RAM::123456789012:ROOT", "acs:ram::123456789012:root"),
        ] {
            assert_eq!(canonical(text), expected);
        }
    }

    #[test]
    fn refuses_what_is_no_user_or_role_and_says_why() {
        let form = |text: &str| assert_eq!(Pattern::parse(text), Err(ArnError::Form(text.into())));
        for text in [
            "NOT AN ARN",
            "arn",
            "arn:aws:iam::123456789012:role/x",
            "acs:ecs::1:role/x",
            "acs:ram:cn-hangzhou:1:role/x",
            "acs:ram::1",
            "acs:ram::1:group/x",
            "acs:ram::1:*",
            "acs:ram::1:ro*/x",
            "acs:ram::1:rooted",
            "acs:ram::1:root/x",
            "acs:ram::1:role",
            "acs:ram::1:assumed-role/x",
        ] {
            form(text);
        }
        for name in ["", "a//b", "/a", "a/", "a b", "a:b", "ä", "\u{212a}", "a\0"] {
            let text = format!("acs:ram::1:role/{name}");
            assert_eq!(
                Pattern::parse(&text),
                Err(ArnError::Name(name.to_ascii_lowercase().into())),
                "{name}"
            );
        }
        assert!(Pattern::parse("acs:ram::1:role/a/b").is_ok(), "the allowed twin");
        assert_eq!(Pattern::parse("acs:ram::1x:role/a"), Err(ArnError::Account("1x".into())));
        assert_eq!(Pattern::parse("acs:ram:::role/a"), Err(ArnError::Account("".into())));
        assert_eq!(Pattern::parse(""), Err(ArnError::Length(0)));
        assert_eq!(Pattern::parse(&"a".repeat(513)), Err(ArnError::Length(513)));
    }

    #[test]
    fn another_account_is_never_included() {
        for account in ["*", "1*", "?", "1?3"] {
            let text = format!("acs:ram::{account}:role/admin");
            assert_eq!(Pattern::parse(&text), Err(ArnError::AccountWildcard), "{account}");
        }
        assert!(Pattern::parse("acs:ram::123:role/*").is_ok(), "the allowed twin");
    }

    #[test]
    fn a_pattern_of_sessions_is_refused_rather_than_never_matched() {
        for text in ["acs:ram::1:assumed-role/admin/*", "acs:ram::1:assumed-role/adm*/s"] {
            assert_eq!(Pattern::parse(text), Err(ArnError::SessionWildcard), "{text}");
        }
        assert!(Pattern::parse("acs:ram::1:assumed-role/admin/s").unwrap().is_session());
    }

    #[test]
    fn what_stands_before_the_first_wildcard_is_literal() {
        let prefix = |text| Pattern::parse(text).unwrap().literal_prefix().map(str::to_owned);

        assert_eq!(prefix("acs:ram::1:role/admin*").as_deref(), Some("acs:ram::1:role/admin"));
        assert_eq!(prefix("acs:ram::1:role/a?min*").as_deref(), Some("acs:ram::1:role/a"));
        assert_eq!(prefix("acs:ram::1:role/admin"), None);
    }

    proptest! {
        #[test]
        fn never_panics_and_is_canonical_once(text in "(acs:ram::)?[a-z0-9:/*?-]{0,40}|\\PC{0,40}") {
            if let Ok(pattern) = Pattern::parse(&text) {
                let again = Pattern::parse(pattern.as_str()).unwrap();

                prop_assert_eq!(again.as_str(), pattern.as_str());
                prop_assert!(pattern.literal.is_some() || pattern.matches(pattern.as_str()));
            }
        }
    }
}
