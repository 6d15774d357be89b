//! Roles' ARNs: parsing, and completing a bare name with the base ARN.
//! Depends only on the parent's error; used through the parent.

use std::fmt;

use super::{ValueError, session::check_alphabet};

/// No role of a real account comes near: RAM role names have at most 64 characters.
pub const MAX_BYTES: usize = 512;

/// A RAM role's ARN, `acs:ram::<account>:role/<name>`, as written (comparison is exact).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RoleArn(Box<str>);

impl RoleArn {
    /// Parses an ARN. `acs` may be in any case; the name is one or more `/`-separated segments of
    /// `[A-Za-z0-9._-]`.
    ///
    /// # Errors
    /// What is wrong, for an Event.
    pub fn parse(text: &str) -> Result<Self, ValueError> {
        if text.is_empty() {
            return Err(ValueError::Empty);
        }
        if text.len() > MAX_BYTES {
            return Err(ValueError::Length { found: text.chars().count(), min: 1, max: MAX_BYTES });
        }
        let (account, name) = split(text).ok_or(ValueError::NotArn)?;
        if account.is_empty() || !account.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(ValueError::NotArn);
        }
        check_alphabet(name, "._-/", "letters, digits, '.', '_', '-' and '/'")?;
        if name.split('/').any(|segment| matches!(segment, "" | "." | "..")) {
            return Err(ValueError::Segment);
        }
        Ok(Self(text.into()))
    }

    /// The account id: decimal digits.
    pub fn account(&self) -> &str {
        split(&self.0).map_or("", |(account, _)| account)
    }

    /// All after `role/`, a path included.
    pub fn name(&self) -> &str {
        split(&self.0).map_or("", |(_, name)| name)
    }

    /// The ARN as it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RoleArn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What completes a bare role name: `acs:ram::<account>:role/` with or without a path, always ending in `/`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseArn(Box<str>);

impl BaseArn {
    /// Parses what the predecessors accepted as `--base-role-arn` (row 1.9 of docs/predecessors.md):
    /// `acs:ram::<digits>:role` and then any of `[A-Za-z0-9_./-]`. Adds a missing `/` at the end. No role can
    /// lie below some of these bases, such as `…:role-part`; then [`arn_for`](Self::arn_for) fails for every
    /// bare name.
    ///
    /// # Errors
    /// [`ValueError::NotBaseArn`].
    pub fn parse(text: &str) -> Result<Self, ValueError> {
        let rest = text.strip_prefix("acs:ram::").ok_or(ValueError::NotBaseArn)?;
        let (account, path) = rest.split_once(":role").ok_or(ValueError::NotBaseArn)?;
        let digits = !account.is_empty() && account.bytes().all(|byte| byte.is_ascii_digit());
        if !digits || check_alphabet(path, "._-/", "").is_err() {
            return Err(ValueError::NotBaseArn);
        }
        Ok(Self(if text.ends_with('/') { text.into() } else { format!("{text}/").into() }))
    }

    /// The ARN of `role`: itself if it is one (`acs:` in upper or lower case), otherwise the name below this
    /// base, including the base's path.
    ///
    /// # Errors
    /// As [`RoleArn::parse`].
    pub fn arn_for(&self, role: &str) -> Result<RoleArn, ValueError> {
        if role.is_empty() || is_arn(role) {
            return RoleArn::parse(role);
        }
        RoleArn::parse(&[self.as_str(), role].concat())
    }

    /// The account id: decimal digits.
    pub fn account(&self) -> &str {
        split(&self.0).map_or("", |(account, _)| account)
    }

    /// The base with its final `/`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The role's name without the base's path, or the whole name when its path differs. `None` in other
    /// accounts.
    pub fn relative_name<'r>(&self, role: &'r RoleArn) -> Option<&'r str> {
        let (account, path) = split(&self.0)?;
        let name = role.name();
        (role.account() == account).then(|| name.strip_prefix(path).unwrap_or(name))
    }
}

impl fmt::Display for BaseArn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether a role or a pattern is written as an ARN instead of a name: by its prefix, as in the predecessors.
pub fn is_arn(text: &str) -> bool {
    text.get(..4).is_some_and(|prefix| prefix.eq_ignore_ascii_case("acs:"))
}

/// Account and name.
fn split(arn: &str) -> Option<(&str, &str)> {
    let rest = arn.get(4..).filter(|_| is_arn(arn))?;
    rest.strip_prefix("ram::")?.split_once(":role/")
}
