//! The other parameters of AssumeRole, with the alphabets and lengths of its references (Alibaba Cloud's STS
//! API 2015-04-01, AWS's 2011-06-15). Depends on the parent's error and on the keys of `tags`; used through
//! the parent.

use std::{fmt, time::Duration};

use sha2::{Digest, Sha256};

use super::{TagKeys, ValueError};

/// The shortest session that STS issues.
pub const MIN_DURATION: Duration = Duration::from_secs(15 * 60);
/// The longest session that a role can be made to allow.
pub const MAX_DURATION: Duration = Duration::from_secs(12 * 60 * 60);

/// What one cloud's STS takes in a session's parameters, where the clouds differ.
#[derive(Clone, Copy, Debug)]
pub struct SessionRules {
    /// What a session name may hold besides letters and digits.
    pub name_marks: &'static str,
    /// The same, for people.
    pub name_legal: &'static str,
    /// Whether a session policy may hold a character as it stands. JSON can escape each of the others.
    pub policy: fn(char) -> bool,
    /// The keys of session tags; `None` where the agent sends none.
    pub tags: Option<TagKeys>,
    /// Whether the agent can send a source identity.
    pub has_source_identity: bool,
    /// The longest session that another role's credentials open (role chaining), whatever the role allows;
    /// `None` where there is no such limit.
    pub longest_chained: Option<Duration>,
}

impl SessionRules {
    /// Alibaba Cloud's (STS API 2015-04-01, AssumeRole).
    pub const ACS: Self = Self {
        name_marks: ".@_-",
        name_legal: "letters, digits, '.', '@', '_' and '-'",
        policy: |_| true,
        tags: None,
        has_source_identity: false,
        longest_chained: None,
    };
    /// AWS's (STS API 2011-06-15, AssumeRole).
    pub const AWS: Self = Self {
        name_marks: "_+=,.@-",
        name_legal: "letters, digits and any of _+=,.@-",
        policy: |c| matches!(c, '\t' | '\n' | '\r' | '\u{20}'..='\u{ff}'),
        tags: Some(TagKeys::EKS),
        has_source_identity: true,
        // IAM user guide, "IAM roles": role chaining.
        longest_chained: Some(Duration::from_hours(1)),
    };

    /// How long a session of `wanted` lasts at most, if that is shorter. `is_chained`: the agent signs with
    /// a role's credentials.
    pub fn limit(&self, wanted: Duration, is_chained: bool) -> Option<Duration> {
        self.longest_chained.filter(|longest| is_chained && wanted > *longest)
    }
}

/// The longest session name, in characters.
pub const SESSION_NAME_MAX: usize = 64;
const EXTERNAL_ID_MAX: usize = 1224;
/// It is ASCII.
pub const EXTERNAL_ID_MAX_BYTES: usize = EXTERNAL_ID_MAX;
const POLICY_MAX: usize = 2048;
/// In UTF-8.
pub const POLICY_MAX_BYTES: usize = 4 * POLICY_MAX;
/// Longer than any sensible value: `11hours 59minutes 59seconds`.
pub const DURATION_MAX_BYTES: usize = 128;

/// `RoleSessionName`: 2–64 characters of `[A-Za-z0-9.@_-]`; on AWS of `[A-Za-z0-9_+=,.@-]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SessionName(Box<str>);

impl SessionName {
    /// Parses a session name that every cloud takes: Alibaba Cloud's alphabet is the smaller one.
    ///
    /// # Errors
    /// What is wrong, for an Event.
    pub fn parse(text: &str) -> Result<Self, ValueError> {
        Self::parse_in(&SessionRules::ACS, text)
    }

    /// Parses a session name of one cloud.
    ///
    /// # Errors
    /// What is wrong, for an Event.
    pub fn parse_in(rules: &SessionRules, text: &str) -> Result<Self, ValueError> {
        check_length(text, 2, SESSION_NAME_MAX)?;
        check_alphabet(text, rules.name_marks, rules.name_legal)?;
        Ok(Self(text.into()))
    }

    /// Makes a session name of any text, one that every cloud takes. What is not legal as it stands gets
    /// legal characters, is cut, and ends in the first 8 hex digits of its SHA-256, so that different texts
    /// stay different.
    pub fn fit(text: &str) -> Self {
        Self::parse(text).unwrap_or_else(|_| {
            let hash = hex::encode(&Sha256::digest(text)[..4]);
            let legal = |c| if is_legal(c, SessionRules::ACS.name_marks) { c } else { '-' };
            let kept: String = text.chars().map(legal).take(SESSION_NAME_MAX - 1 - hash.len()).collect();
            Self(format!("{kept}-{hash}").into())
        })
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SessionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `SourceIdentity`: 2–64 characters of `[A-Za-z0-9.@_-]`, a part of what STS accepts. The cloud's trail of
/// actions shows it, policies compare it, and no later session of a chain can change it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SourceIdentity(SessionName);

impl SourceIdentity {
    /// Makes one of a text without `_`, as Kubernetes' names are. One that is not legal as it stands gets
    /// legal characters, is cut, and ends in `_` and half of its SHA-256: no other text makes the same one.
    pub fn fit(text: &str) -> Self {
        Self(SessionName::parse(text).unwrap_or_else(|_| {
            let hash = hex::encode(&Sha256::digest(text)[..16]);
            let legal = |c| if is_legal(c, SessionRules::ACS.name_marks) { c } else { '-' };
            let kept: String = text.chars().map(legal).take(SESSION_NAME_MAX - 1 - hash.len()).collect();
            SessionName(format!("{kept}_{hash}").into())
        }))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

/// `ExternalId`: 2–1224 characters of `[\w+=,.@:/-]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ExternalId(Box<str>);

impl ExternalId {
    /// Parses an external id.
    ///
    /// # Errors
    /// What is wrong, for an Event.
    pub fn parse(text: &str) -> Result<Self, ValueError> {
        check_length(text, 2, EXTERNAL_ID_MAX)?;
        check_alphabet(text, "_+=,.@:/-", "letters, digits and any of _+=,.@:/-")?;
        Ok(Self(text.into()))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// `Policy`: a JSON document of 1–2048 characters that narrows the session.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SessionPolicy(Box<str>);

impl SessionPolicy {
    /// Parses a session policy: any JSON object. What it means is for STS to judge.
    ///
    /// # Errors
    /// What is wrong, for an Event.
    pub fn parse(text: &str) -> Result<Self, ValueError> {
        Self::parse_in(&SessionRules::ACS, text)
    }

    /// Parses a session policy of one cloud.
    ///
    /// # Errors
    /// What is wrong, for an Event.
    pub fn parse_in(rules: &SessionRules, text: &str) -> Result<Self, ValueError> {
        check_length(text, 1, POLICY_MAX)?;
        if let Some(found) = text.chars().find(|&c| !(rules.policy)(c)) {
            return Err(ValueError::Character { found, legal: "characters up to U+00FF as they stand" });
        }
        match serde_json::from_str(text) {
            Ok(serde_json::Value::Object(_)) => Ok(Self(text.into())),
            _ => Err(ValueError::Json),
        }
    }

    /// The JSON text as it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Parses a session's duration: `15m`, `1h30m` or plain seconds, 15 min – 12 h.
pub fn parse_duration(text: &str) -> Result<Duration, ValueError> {
    text.parse()
        .ok()
        .map(Duration::from_secs)
        .or_else(|| humantime::parse_duration(text).ok())
        .filter(|duration| (MIN_DURATION..=MAX_DURATION).contains(duration))
        .ok_or(ValueError::Duration)
}

/// Fails on the first character that is neither an ASCII letter or digit nor among `marks`.
pub(super) fn check_alphabet(text: &str, marks: &str, legal: &'static str) -> Result<(), ValueError> {
    match text.chars().find(|&c| !is_legal(c, marks)) {
        Some(found) => Err(ValueError::Character { found, legal }),
        None => Ok(()),
    }
}

fn is_legal(c: char, marks: &str) -> bool {
    c.is_ascii_alphanumeric() || marks.contains(c)
}

/// Fails when there are fewer than `min` or more than `max` characters.
pub(super) fn check_length(text: &str, min: usize, max: usize) -> Result<(), ValueError> {
    let found = text.chars().count();
    if (min..=max).contains(&found) { Ok(()) } else { Err(ValueError::Length { found, min, max }) }
}
