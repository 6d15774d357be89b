//! What the answers of all clouds' servers have in common: credentials, errors, times, the longest body. Pure
//! and total: any text in, a value or a [`WireError`] out. Each cloud's `wire` reads the form that its
//! servers write.

use jiff::Timestamp;
use secrecy::{ExposeSecret as _, SecretString};

/// Why a body could not be parsed. Contains nothing of the body, which may hold secrets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A credential is empty, or contains characters that an HTTP header may not have.
    #[error("malformed credential in {0}")]
    Credential(&'static str),
    /// The document is not JSON, or a required key is missing or not a string.
    #[error("not the expected JSON document")]
    Json,
    /// The body is longer than [`BODY_LIMIT_BYTES`].
    #[error("body too long")]
    TooLong,
    /// The document's `Code` is not `Success`.
    #[error("the document reports no success")]
    Unsuccessful,
    /// A time is not exactly `YYYY-MM-DDThh:mm:ssZ`.
    #[error("malformed time")]
    Time,
    /// The document is not XML of the plain kind that STS writes, or a required element is missing or there
    /// twice.
    #[error("not the expected XML document")]
    Xml,
}

/// Temporary credentials as STS or the metadata server hands them out.
#[derive(Clone, Debug)]
pub struct Issued {
    /// `AccessKeyId`.
    pub access_key_id: Box<str>,
    /// `AccessKeySecret`; on AWS `SecretAccessKey`.
    pub access_key_secret: SecretString,
    /// `SecurityToken`; on AWS `SessionToken` or `Token`.
    pub security_token: SecretString,
    /// `Expiration`.
    pub expires_at: Timestamp,
    /// STS's `RequestId`: at most 64 characters of `[A-Za-z0-9._-]`. `None` from a metadata server, which has
    /// none, and when it is missing or no such word.
    pub request_id: Option<Box<str>>,
    /// For whom they are, as far as STS says so.
    pub holder: Holder,
}

/// Whose credentials STS issued, in its own words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holder {
    /// The ARN of the session: `AssumedRoleUser.Arn`.
    pub session_arn: Option<Box<str>>,
    /// The token's subject, after an exchange: `OIDCTokenInfo.Subject`; on AWS `SubjectFromWebIdentityToken`.
    pub subject: Option<Box<str>>,
}

impl Issued {
    /// Checks that each value may become a header value, of the agent or of pods' SDKs. `keys` are the names
    /// of the three, for errors.
    ///
    /// # Errors
    /// [`WireError::Credential`].
    pub(crate) fn try_new(
        keys: [&'static str; 3],
        access_key_id: &str,
        access_key_secret: SecretString,
        security_token: SecretString,
        expires_at: Timestamp,
    ) -> Result<Self, WireError> {
        let word = |text: &str| !text.is_empty() && text.bytes().all(|c| c.is_ascii_graphic());
        let values = [access_key_id, access_key_secret.expose_secret(), security_token.expose_secret()];
        if let Some((key, _)) = keys.into_iter().zip(values).find(|(_, value)| !word(value)) {
            return Err(WireError::Credential(key));
        }
        let (access_key_id, holder) = (access_key_id.into(), Holder::default());
        Ok(Self { access_key_id, access_key_secret, security_token, expires_at, request_id: None, holder })
    }

    /// Adds what STS says besides.
    pub(crate) fn of_sts(self, request_id: Option<String>, holder: Holder) -> Self {
        let request_id = request_id.filter(|id| is_word(id)).map(Into::into);
        Self { request_id, holder, ..self }
    }
}

/// STS's error document; every field is empty when it is missing or no string.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ErrorDocument {
    /// `Code`, at most 64 characters of `[A-Za-z0-9._-]`.
    pub code: String,
    /// `Message`, cut to 256 characters, control characters replaced.
    pub message: String,
    /// `RequestId`, as `code`.
    pub request_id: String,
}

impl ErrorDocument {
    /// `None` without a usable `code`: then the answer is not from STS.
    pub(crate) fn of(code: String, message: &str, request_id: Option<String>) -> Option<Self> {
        is_word(&code).then(|| Self {
            code,
            message: message.chars().take(256).map(|c| if c.is_control() { ' ' } else { c }).collect(),
            request_id: request_id.filter(|id| is_word(id)).unwrap_or_default(),
        })
    }
}

/// A code or an id of STS, which may stand in logs, labels and files.
fn is_word(text: &str) -> bool {
    let legal = |c: u8| c.is_ascii_alphanumeric() || b"._-".contains(&c);
    (1..=64).contains(&text.len()) && text.bytes().all(legal)
}

/// Exactly `YYYY-MM-DDThh:mm:ssZ`: the format that the servers are documented to send, and the only one that
/// strict SDKs accept from the agent.
pub(crate) fn parse_time(text: &str) -> Result<Timestamp, WireError> {
    let shape = "dddd-dd-ddTdd:dd:ddZ";
    let fits = text.len() == shape.len()
        && text.bytes().zip(shape.bytes()).all(|(c, s)| if s == b'd' { c.is_ascii_digit() } else { c == s });
    if !fits {
        return Err(WireError::Time);
    }
    text.parse().or(Err(WireError::Time))
}

/// 20 characters, UTC, whole seconds: the Java, Python and Node SDKs of Alibaba Cloud parse nothing else, and
/// AWS writes nothing else.
pub(crate) fn write_time(at: Timestamp) -> String {
    // Any second of a time is a time.
    Timestamp::from_second(at.as_second()).unwrap_or(at).to_string()
}

/// Room for a credentials document of these values. Escapes can double a value, as [`Issued`] takes graphic
/// characters only; the keys and the times take less than the rest.
pub(crate) fn document_capacity(values: [&str; 3]) -> usize {
    512 + values.iter().map(|value| 2 * value.len()).sum::<usize>()
}

/// The longest body that is read from STS or, for the agent's own needs, from the metadata server.
pub const BODY_LIMIT_BYTES: usize = 64 * 1024;
