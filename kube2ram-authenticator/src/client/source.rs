//! Where credentials come from, as far as it is configured, and what can be wrong with that. Pure. Called by
//! the modules that read configurations, and by `obtain`.

use std::{fmt, io, path::PathBuf, time::Duration};

use jiff::Timestamp;
use kube2ram_cloud::{
    BaseCredentials,
    alibaba::base::{CredentialsUri, OidcSettings, UriError},
    role::{ArnStyle, ExternalId, MAX_DURATION, MIN_DURATION, RoleArn, SessionName, ValueError},
};
use secrecy::{ExposeSecret as _, SecretString};

/// A source of credentials.
#[derive(Clone, Debug)]
pub(super) enum Source {
    /// A role, assumed with the credentials of another source.
    Assumed(Box<Assumed>),
    /// Keys, as they were configured. `until`: when they end, if they do.
    Keys { keys: BaseCredentials, until: Option<Timestamp> },
    /// The role attached to the machine, or, in a pod, the pod's. By name where that is configured.
    NodeRole { name: Option<Box<str>> },
    /// A role, by an OIDC token.
    Oidc(OidcSettings),
    /// A program that prints keys, of a profile.
    Process { profile: String, command: String },
    /// A program that answers at a URI.
    Uri(CredentialsUri),
}

/// What [`Source::Assumed`] takes.
#[derive(Clone, Debug)]
pub(super) struct Assumed {
    pub(super) base: Source,
    pub(super) role: RoleArn,
    pub(super) session: SessionName,
    pub(super) external_id: Option<ExternalId>,
    pub(super) duration: Duration,
}

/// What is wrong with a configuration. Holds no secret.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Profiles lead to each other in a circle.
    #[error("profile {profile:?} in {} leads back to itself by source_profile", path.display())]
    Cycle {
        /// The file.
        path: PathBuf,
        /// The profile.
        profile: String,
    },
    /// A file is not of its form.
    #[error("{} is not {form}", path.display())]
    Form {
        /// The file.
        path: PathBuf,
        /// What it should be.
        form: &'static str,
    },
    /// A key, a secret or a token is empty, or holds what no key has.
    #[error("{0} is no access key, secret or security token")]
    Key(&'static str),
    /// A part of several is missing.
    #[error("{present} is set, but {missing} is not")]
    Missing {
        /// What is there.
        present: String,
        /// What goes with it.
        missing: &'static str,
    },
    /// A profile is not there.
    #[error("{} has no profile {profile:?}", path.display())]
    NoProfile {
        /// The file.
        path: PathBuf,
        /// Its name.
        profile: String,
    },
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The user's session has ended.
    #[error(
        "the session of profile {profile:?} has ended: log in again, with `aliyun configure --mode {mode} --profile {profile}`"
    )]
    SignIn {
        /// The profile.
        profile: String,
        /// Its mode.
        mode: String,
    },
    /// A profile is of a mode that gives no credentials for this.
    #[error("profile {profile:?} is of the mode {mode:?}, which cannot be used here")]
    Unsupported {
        /// The profile.
        profile: String,
        /// Its mode.
        mode: String,
    },
    /// A URI is none.
    #[error("cannot use the credentials URI")]
    Uri(#[source] UriError),
    /// A value is not of its form.
    #[error("{0}")]
    Value(&'static str, #[source] ValueError),
}

impl Source {
    /// A role that `base` assumes. Without a `duration`, the one that every role allows.
    pub(super) fn assumed(
        base: Self,
        role: RoleArn,
        session: SessionName,
        external_id: Option<ExternalId>,
        duration: Option<Duration>,
    ) -> Self {
        let duration = duration.unwrap_or(HOUR).clamp(MIN_DURATION, MAX_DURATION);
        Self::Assumed(Box::new(Assumed { base, role, session, external_id, duration }))
    }
}

/// The identity of a source without its secrets: sources with the same text give the same credentials.
impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Assumed(assumed) => assumed.fmt(f),
            Self::Keys { keys, .. } => write!(f, "keys {:?}", keys.access_key_id),
            Self::NodeRole { name } => write!(f, "node role {name:?}"),
            Self::Oidc(OidcSettings { role, provider, token_file, session }) => {
                write!(f, "oidc {:?} {provider:?} {token_file:?} {:?}", role.as_str(), session.as_str())
            }
            Self::Process { profile, command } => write!(f, "process {profile:?} {command:?}"),
            // A URI may contain a secret, of which only a digest is kept.
            Self::Uri(uri) => write!(f, "uri {uri:?}"),
        }
    }
}

impl fmt::Display for Assumed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { base, role, session, external_id, duration } = self;
        let external_id = external_id.as_ref().map(ExternalId::as_str);
        write!(
            f,
            "role {:?} {:?} {external_id:?} {} by ({base})",
            role.as_str(),
            session.as_str(),
            duration.as_secs()
        )
    }
}

/// Keys that may stand in a token and in a header.
pub(super) fn keys(
    access_key_id: &str,
    access_key_secret: SecretString,
    security_token: Option<SecretString>,
) -> Result<BaseCredentials, SourceError> {
    let word = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
    if !word(access_key_id) || access_key_id.contains([',', '=', ';']) {
        return Err(SourceError::Key("access key id"));
    }
    if !word(access_key_secret.expose_secret()) {
        return Err(SourceError::Key("access key secret"));
    }
    if security_token.as_ref().is_some_and(|token| !word(token.expose_secret())) {
        return Err(SourceError::Key("security token"));
    }
    Ok(BaseCredentials { access_key_id: access_key_id.into(), access_key_secret, security_token })
}

/// A role's ARN of this cloud.
pub(super) fn role(text: &str) -> Result<RoleArn, SourceError> {
    let wrong = |error| SourceError::Value("the ARN of the role", error);
    let role = RoleArn::parse(text).map_err(wrong)?;
    if role.style() == ArnStyle::Acs { Ok(role) } else { Err(wrong(ValueError::NotArn)) }
}

/// A session's name; one of ours where none is configured.
pub(super) fn session(text: Option<&str>) -> Result<SessionName, SourceError> {
    let name = text.filter(|text| !text.is_empty()).unwrap_or(SESSION);
    SessionName::parse(name).map_err(|error| SourceError::Value("the name of the session", error))
}

/// An external id, if there is one.
pub(super) fn external_id(text: Option<&str>) -> Result<Option<ExternalId>, SourceError> {
    let wrong = |error| SourceError::Value("the external id", error);
    text.filter(|text| !text.is_empty()).map(ExternalId::parse).transpose().map_err(wrong)
}

const HOUR: Duration = Duration::from_hours(1);
const SESSION: &str = "kube2ram-authenticator";

#[cfg(test)]
mod tests {
    use super::*;

    fn of(id: &str, secret: &str, token: Option<&str>) -> Result<BaseCredentials, SourceError> {
        keys(id, secret.into(), token.map(Into::into))
    }

    #[test]
    fn takes_keys_that_a_token_can_carry() {
        assert!(of("LTAI5t", "secret", None).is_ok());
        assert!(of("STS.NT", "secret", Some("CAIS+/=")).is_ok());
        for (id, secret, token) in [
            ("", "secret", None),
            ("a b", "secret", None),
            ("a,Credential=b", "secret", None),
            ("id", "", None),
            ("id", "secret\n", None),
            ("id", "secret", Some("")),
            ("id", "secret", Some("é")),
        ] {
            assert!(matches!(of(id, secret, token), Err(SourceError::Key(_))), "{id} {secret} {token:?}");
        }
    }

    #[test]
    fn the_identity_of_a_source_differs_with_what_it_gives_and_holds_no_secret() {
        let keys = |id| Source::Keys { keys: of(id, "hush", Some("tok")).unwrap(), until: None };
        let arn = |name| role(&format!("acs:ram::1:role/{name}")).unwrap();
        let assumed = |base, name, session: &str, external: Option<&str>| {
            let (session, external) = (self::session(Some(session)).unwrap(), external_id(external).unwrap());
            Source::assumed(base, arn(name), session, external, None).to_string()
        };

        let texts = [
            keys("a").to_string(),
            keys("b").to_string(),
            assumed(keys("a"), "x", "one", None),
            assumed(keys("b"), "x", "one", None),
            assumed(keys("a"), "y", "one", None),
            assumed(keys("a"), "x", "two", None),
            assumed(keys("a"), "x", "one", Some("external")),
            assumed(Source::NodeRole { name: None }, "x", "one", None),
        ];

        let distinct: std::collections::BTreeSet<_> = texts.iter().collect();
        assert_eq!(distinct.len(), texts.len(), "{texts:?}");
        assert!(!texts.concat().contains("hush") && !texts.concat().contains("tok"));
        assert!(!format!("{:?}", keys("a")).contains("hush"));
    }

    #[test]
    fn takes_roles_of_this_cloud_only() {
        assert!(role("acs:ram::1:role/x").is_ok());
        assert!(role("arn:aws:iam::123456789012:role/x").is_err());
        assert!(role("x").is_err());
    }
}
