//! Roles' ARNs: parsing, and completing a bare name with the base ARN.
//! Depends only on the parent's error; used through the parent.

use std::fmt;

use super::{ValueError, session::check_alphabet};

/// Role names have at most 64 characters in all clouds. IAM takes paths of up to 512 before them: the longest
/// of these are refused.
pub const MAX_BYTES: usize = 512;

/// How a cloud writes ARNs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArnStyle {
    /// `acs:ram::<account>:role/<name>` (RAM, "Terms").
    Acs,
    /// `arn:<partition>:iam::<12 digits>:role/<name>` (IAM user guide, "IAM identifiers").
    Aws,
}

impl ArnStyle {
    /// Whether a role or a pattern is written as an ARN of this style instead of as a name: by its prefix, as
    /// in the predecessors.
    pub fn is_arn(self, text: &str) -> bool {
        let prefix = self.prefix();
        text.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
    }

    /// The style that a text begins in.
    fn of(text: &str) -> Option<Self> {
        [Self::Acs, Self::Aws].into_iter().find(|style| style.is_arn(text))
    }

    fn prefix(self) -> &'static str {
        match self {
            Self::Acs => "acs:",
            Self::Aws => "arn:",
        }
    }

    /// What a role's name may hold besides letters and digits, and how to say it.
    fn name_marks(self) -> (&'static str, &'static str) {
        match self {
            Self::Acs => ("._-/", "letters, digits, '.', '_', '-' and '/'"),
            Self::Aws => ("+=,.@_-/", "letters, digits and any of +=,.@_-/"),
        }
    }

    fn not_arn(self) -> ValueError {
        match self {
            Self::Acs => ValueError::NotArn,
            Self::Aws => ValueError::NotIamArn,
        }
    }

    fn not_base_arn(self) -> ValueError {
        match self {
            Self::Acs => ValueError::NotBaseArn,
            Self::Aws => ValueError::NotIamBaseArn,
        }
    }
}

/// The parts of an ARN up to a mark that the name follows.
struct Parts<'a> {
    style: ArnStyle,
    /// Empty on Alibaba Cloud, which has none.
    partition: &'a str,
    account: &'a str,
    name: &'a str,
}

impl<'a> Parts<'a> {
    /// Takes an ARN apart at `mark`, and checks all that stands before it.
    fn of(arn: &'a str, mark: &str) -> Option<Self> {
        let style = ArnStyle::of(arn)?;
        let rest = arn.get(style.prefix().len()..)?;
        let (partition, rest) = match style {
            ArnStyle::Acs => ("", rest.strip_prefix("ram::")?),
            ArnStyle::Aws => rest.split_once(":iam::")?,
        };
        let (account, name) = rest.split_once(mark)?;
        let fits = match style {
            ArnStyle::Acs => !account.is_empty(),
            ArnStyle::Aws => account.len() == 12 && is_partition(partition),
        };
        let is_digits = account.bytes().all(|byte| byte.is_ascii_digit());
        (fits && is_digits).then_some(Self { style, partition, account, name })
    }
}

/// `aws`, or `aws-` and words.
fn is_partition(text: &str) -> bool {
    let mut words = text.split('-');
    let is_word = |word: &str| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_lowercase());
    text.len() <= 32 && words.next() == Some("aws") && words.all(is_word)
}

/// A role's ARN, as written (comparison is exact): `acs:ram::<account>:role/<name>` or
/// `arn:<partition>:iam::<account>:role/<name>`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RoleArn(Box<str>);

impl RoleArn {
    /// Parses an ARN of the style that its own prefix says, in any case. The name is one or more
    /// `/`-separated segments of `[A-Za-z0-9._-]`, and on AWS of `[A-Za-z0-9+=,.@_-]`: IAM takes other
    /// characters in paths, too, but no client could ask for such a role in a URL.
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
        let style = ArnStyle::of(text).unwrap_or(ArnStyle::Acs);
        let parts = Parts::of(text, ROLE).ok_or(style.not_arn())?;
        let (marks, legal) = style.name_marks();
        check_alphabet(parts.name, marks, legal)?;
        if parts.name.split('/').any(|segment| matches!(segment, "" | "." | "..")) {
            return Err(ValueError::Segment);
        }
        Ok(Self(text.into()))
    }

    /// The account id: decimal digits.
    pub fn account(&self) -> &str {
        Parts::of(&self.0, ROLE).map_or("", |parts| parts.account)
    }

    /// The base ARN of all roles in its account.
    pub fn of_account(&self) -> Option<BaseArn> {
        let Parts { style, partition, account, .. } = Parts::of(&self.0, ROLE)?;
        let base = match style {
            ArnStyle::Acs => format!("acs:ram::{account}:role/"),
            ArnStyle::Aws => format!("arn:{partition}:iam::{account}:role/"),
        };
        BaseArn::parse_in(style, &base).ok()
    }

    /// All after `role/`, a path included.
    pub fn name(&self) -> &str {
        Parts::of(&self.0, ROLE).map_or("", |parts| parts.name)
    }

    /// How it is written.
    pub fn style(&self) -> ArnStyle {
        ArnStyle::of(&self.0).unwrap_or(ArnStyle::Acs)
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

/// What completes a bare role name: `acs:ram::<account>:role/` or `arn:<partition>:iam::<account>:role/`,
/// with or without a path, always ending in `/`. Its style is the agent's cloud's: a role of another style is
/// no ARN to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseArn(Box<str>);

impl BaseArn {
    /// Parses a base ARN of Alibaba Cloud, as [`parse_in`](Self::parse_in).
    ///
    /// # Errors
    /// [`ValueError::NotBaseArn`].
    pub fn parse(text: &str) -> Result<Self, ValueError> {
        Self::parse_in(ArnStyle::Acs, text)
    }

    /// Parses what the predecessors accepted as `--base-role-arn` (row 1.9 of docs/predecessors.md): the
    /// account's `acs:ram::<digits>:role` or `arn:<partition>:iam::<12 digits>:role`, and then any of what
    /// role names hold. Adds a missing `/` at the end. No role can lie below some of these bases, such as
    /// `…:role-part`; then [`arn_for`](Self::arn_for) fails for every bare name.
    ///
    /// # Errors
    /// [`ValueError::NotBaseArn`] or [`ValueError::NotIamBaseArn`]; also for an ARN of another style, as it
    /// has no roles here.
    pub fn parse_in(style: ArnStyle, text: &str) -> Result<Self, ValueError> {
        let parts = Parts::of(text, ":role").filter(|parts| parts.style == style);
        // A base is written by an operator or found by the agent: its prefix is in lower case.
        let parts = parts.filter(|_| text.starts_with(style.prefix())).ok_or(style.not_base_arn())?;
        if check_alphabet(parts.name, style.name_marks().0, "").is_err() {
            return Err(style.not_base_arn());
        }
        Ok(Self(if text.ends_with('/') { text.into() } else { format!("{text}/").into() }))
    }

    /// The ARN of `role`: itself if it is one of this base's style (its prefix in upper or lower case),
    /// otherwise the name below this base, including the base's path.
    ///
    /// # Errors
    /// As [`RoleArn::parse`].
    pub fn arn_for(&self, role: &str) -> Result<RoleArn, ValueError> {
        if role.is_empty() || self.style().is_arn(role) {
            return RoleArn::parse(role);
        }
        RoleArn::parse(&[self.as_str(), role].concat())
    }

    /// The account id: decimal digits.
    pub fn account(&self) -> &str {
        Parts::of(&self.0, ROLE).map_or("", |parts| parts.account)
    }

    /// How it is written.
    pub fn style(&self) -> ArnStyle {
        ArnStyle::of(&self.0).unwrap_or(ArnStyle::Acs)
    }

    /// The base with its final `/`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The role's name without the base's path, or all of it when it lies elsewhere in this account. `None`
    /// in other accounts, and in another partition's account of the same number.
    pub fn relative_name<'r>(&self, role: &'r RoleArn) -> Option<&'r str> {
        let (own, other) = (Parts::of(&self.0, ROLE)?, Parts::of(&role.0, ROLE)?);
        let is_same =
            (own.style, own.partition, own.account) == (other.style, other.partition, other.account);
        is_same.then(|| other.name.strip_prefix(own.name).unwrap_or(other.name))
    }
}

impl fmt::Display for BaseArn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether a role or a pattern is written as an ARN of Alibaba Cloud instead of as a name, as
/// [`ArnStyle::is_arn`].
pub fn is_arn(text: &str) -> bool {
    ArnStyle::Acs.is_arn(text)
}

const ROLE: &str = ":role/";
