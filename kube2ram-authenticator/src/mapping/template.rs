//! Usernames and groups with placeholders. What a placeholder stands for is put in once and never read
//! again. Pure; used by `entry`.

use crate::identity::Identity;

/// Session names have at most 64 characters (RAM documentation, AssumeRole).
const SESSION_NAME_MAX: usize = 64;
const BRACES: [&str; 2] = ["{{", "}}"];
/// The names of placeholders, in lower case.
const PLACEHOLDERS: [&str; 2] = ["accountid", "sessionname"];

/// Why a text is no template.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// A placeholder without all of its braces, which would be a part of the name.
    #[error(
        "{0:?} seems to be a placeholder, and is none: write {{{{AccountID}}}}, {{{{SessionName}}}} or \
         {{{{SessionNameRaw}}}}, with two braces on each side"
    )]
    Braces(Box<str>),
    /// A control character, which no name has.
    #[error("{0:?} has a control character")]
    Control(Box<str>),
    /// It is empty.
    #[error("it is empty")]
    Empty,
    /// It is longer than 512 bytes.
    #[error("it has {0} bytes, not up to 512")]
    Length(usize),
    /// A placeholder that does not exist, or does not end.
    #[error("{0:?} is not {{{{AccountID}}}}, {{{{SessionName}}}} or {{{{SessionNameRaw}}}}")]
    Placeholder(Box<str>),
}

/// A name with placeholders.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Template {
    text: Box<str>,
    parts: Vec<Part>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    AccountId,
    Literal(Box<str>),
    /// The session's name with `-` for `@`.
    SessionName,
    SessionNameRaw,
}

const MAX_BYTES: usize = 512;

impl Template {
    pub(super) fn parse(text: &str) -> Result<Self, TemplateError> {
        if text.is_empty() {
            return Err(TemplateError::Empty);
        }
        if text.len() > MAX_BYTES {
            return Err(TemplateError::Length(text.len()));
        }
        if text.contains(char::is_control) {
            return Err(TemplateError::Control(text.into()));
        }
        let [open, close] = BRACES;
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some((literal, placeholder)) = rest.split_once(open) {
            if !literal.is_empty() {
                parts.push(literal_part(literal)?);
            }
            let (name, after) = placeholder
                .split_once(close)
                .ok_or_else(|| TemplateError::Placeholder([open, placeholder].concat().into()))?;
            parts.push(match name {
                "AccountID" => Part::AccountId,
                "SessionName" => Part::SessionName,
                "SessionNameRaw" => Part::SessionNameRaw,
                other => return Err(TemplateError::Placeholder([open, other, close].concat().into())),
            });
            rest = after;
        }
        if !rest.is_empty() {
            parts.push(literal_part(rest)?);
        }
        Ok(Self { text: text.into(), parts })
    }

    /// As it was written.
    pub(super) fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether whoever assumes the role chooses a part of the name.
    pub(super) fn has_session(&self) -> bool {
        self.parts.iter().any(Part::is_session)
    }

    /// Whether whoever assumes the role chooses how the name begins.
    pub(super) fn begins_with_session(&self) -> bool {
        self.parts.first().is_some_and(Part::is_session)
    }

    /// The name of an identity; `None` if the identity lacks what a placeholder stands for, or has it in an
    /// unexpected form: a session's name could then be made to look like another part of the name.
    pub(super) fn fill(&self, identity: &Identity) -> Option<Box<str>> {
        let mut filled = String::with_capacity(self.text.len());
        for part in &self.parts {
            match part {
                Part::AccountId => filled.push_str(account_of(identity)?),
                Part::Literal(literal) => filled.push_str(literal),
                Part::SessionName => filled.push_str(&session_of(identity)?.replace('@', "-")),
                Part::SessionNameRaw => filled.push_str(session_of(identity)?),
            }
        }
        Some(filled.into())
    }
}

/// A text that stands for itself. `{SessionName}` would give all sessions of a role one name.
fn literal_part(text: &str) -> Result<Part, TemplateError> {
    let lower = text.to_ascii_lowercase();
    let is_mistake = text.contains(['{', '}']) && PLACEHOLDERS.into_iter().any(|name| lower.contains(name));
    if is_mistake { Err(TemplateError::Braces(text.into())) } else { Ok(Part::Literal(text.into())) }
}

impl Part {
    fn is_session(&self) -> bool {
        matches!(self, Self::SessionName | Self::SessionNameRaw)
    }
}

fn account_of(identity: &Identity) -> Option<&str> {
    let account = &*identity.account_id;
    (!account.is_empty() && account.bytes().all(|byte| byte.is_ascii_digit())).then_some(account)
}

/// RAM documentation, AssumeRole, `RoleSessionName`: letters, digits and `.@-_`.
fn session_of(identity: &Identity) -> Option<&str> {
    let session = identity.session_name.as_deref()?;
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b".@-_".contains(&byte);
    ((1..=SESSION_NAME_MAX).contains(&session.len()) && session.bytes().all(legal)).then_some(session)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mapping::testing::role;

    fn fill(template: &str, session: &str) -> Option<String> {
        Template::parse(template).unwrap().fill(&role("admin", session)).map(String::from)
    }

    #[test]
    fn placeholders_are_filled_as_in_ack_ram_authenticator() {
        for (template, expected) in [
            ("kubernetes-admin", "kubernetes-admin"),
            ("{{AccountID}}", "123456789012"),
            ("ram:{{AccountID}}:{{SessionName}}", "ram:123456789012:a-b.c"),
            ("{{SessionNameRaw}}{{SessionNameRaw}}!", "a@b.ca@b.c!"),
            ("}}{", "}}{"),
        ] {
            assert_eq!(fill(template, "a@b.c").as_deref(), Some(expected));
        }
    }

    #[test]
    fn what_was_filled_in_is_never_a_placeholder() {
        // No session has such a name. If STS sent one, it would be neither filled in nor read.
        assert_eq!(fill("ram:{{SessionNameRaw}}", "{{AccountID}}"), None);
        let nested = Template::parse("ram:{{{{SessionNameRaw}}");
        assert_eq!(nested, Err(TemplateError::Placeholder("{{{{SessionNameRaw}}".into())));
    }

    #[test]
    fn a_session_name_that_no_session_can_have_gives_nothing() {
        for session in ["", "system:masters", "a b", "a/b", "ä", "a\n", &"x".repeat(65)] {
            assert_eq!(fill("ram:{{SessionName}}", session), None, "{session:?}");
        }
        assert!(fill("ram:{{SessionName}}", &"x".repeat(64)).is_some(), "the allowed twin");
        assert!(fill("fixed", "system:masters").is_some(), "it is not used");
    }

    #[test]
    fn an_identity_without_a_session_gives_nothing() {
        let template = Template::parse("ram:{{SessionName}}").unwrap();
        let user = Identity { session_name: None, ..role("admin", "s") };

        assert_eq!(template.fill(&user), None);
        assert!(template.fill(&role("admin", "s")).is_some(), "the allowed twin");
    }

    #[test]
    fn a_placeholder_that_does_not_exist_is_refused() {
        for (text, named) in [
            ("system:node:{{ECSPrivateDNSName}}", "{{ECSPrivateDNSName}}"),
            ("{{ AccountID }}", "{{ AccountID }}"),
            ("{{accountid}}", "{{accountid}}"),
            ("{{}}", "{{}}"),
            ("a{{AccountID", "{{AccountID"),
        ] {
            assert_eq!(Template::parse(text), Err(TemplateError::Placeholder(named.into())));
        }
        assert_eq!(Template::parse(""), Err(TemplateError::Empty));
        assert_eq!(Template::parse("a\nb"), Err(TemplateError::Control("a\nb".into())));
        assert_eq!(Template::parse(&"x".repeat(513)), Err(TemplateError::Length(513)));
        assert_eq!(
            TemplateError::Placeholder("{{X}}".into()).to_string(),
            r#""{{X}}" is not {{AccountID}}, {{SessionName}} or {{SessionNameRaw}}"#
        );
    }

    #[test]
    fn a_placeholder_that_lacks_braces_is_refused() {
        for (text, named) in [
            ("ram:{SessionName}", "ram:{SessionName}"),
            ("ram:{{AccountID}}:{SessionName}}", ":{SessionName}}"),
            ("${sessionname}", "${sessionname}"),
            (r"\{\{SessionName\}\}", r"\{\{SessionName\}\}"),
            ("{ {AccountID} }-x", "{ {AccountID} }-x"),
        ] {
            assert_eq!(Template::parse(text), Err(TemplateError::Braces(named.into())));
        }
        for text in ["SessionName", "accountid:x", "}}{", "{x}", "{{SessionName}}"] {
            assert!(Template::parse(text).is_ok(), "the allowed twin: {text}");
        }
        assert!(
            TemplateError::Braces("{X}".into())
                .to_string()
                .ends_with("{{SessionNameRaw}}, with two braces on each side")
        );
    }

    proptest! {
        #[test]
        fn is_the_plain_replacement_where_nothing_is_put_together(
            parts in prop::collection::vec(
                prop_oneof![
                    Just("{{AccountID}}".to_owned()), Just("{{SessionName}}".to_owned()),
                    Just("{{SessionNameRaw}}".to_owned()), "[a-z:-]{1,5}",
                ],
                1..6,
            ),
            session in "[A-Za-z0-9.@_-]{1,64}",
        ) {
            let template = parts.concat();

            // The order and the method of ack-ram-authenticator.
            let expected = template
                .replace("{{AccountID}}", "123456789012")
                .replace("{{SessionName}}", &session.replace('@', "-"))
                .replace("{{SessionNameRaw}}", &session);

            prop_assert_eq!(fill(&template, &session), Some(expected));
        }

        #[test]
        fn never_panics(text in any::<String>(), session in any::<String>()) {
            if let Ok(template) = Template::parse(&text) {
                let _filled = template.fill(&role("admin", &session));
            }
        }
    }
}
