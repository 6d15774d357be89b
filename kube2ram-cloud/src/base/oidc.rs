//! The token of the agent's service account for credentials of the agent's own role, so that the node's needs
//! no right. What is the same in all clouds: reading the token, one retry, and errors that repeat nothing of
//! it. Each cloud's `base` has the [`Exchange`]. Depends on `sts`; called by `renewal`.

use std::{
    fs::OpenOptions,
    io::{self, Read as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;
use rustix::fs::OFlags;
use secrecy::{ExposeSecret as _, SecretString, zeroize::Zeroizing};

use super::{BaseError, BaseSource, Origin};
use crate::{
    credentials::IssueError,
    endpoint::Endpoint,
    role::RoleArn,
    sts::{
        refusal::{self, Refusal, Remedy, Table},
        transport::Transport,
    },
    wire::{Issued, WireError},
};

/// Why the token brought no credentials. Holds nothing of the token.
#[derive(Debug, thiserror::Error)]
pub enum OidcError {
    /// The file cannot be read.
    #[error(
        "cannot read the token at {path}: mount a serviceAccountToken of audience {audience} there, or correct {variable}"
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// Whom the token is to be for.
        audience: &'static str,
        /// The environment variable that names the file.
        variable: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// STS gave none.
    #[error("{remedy}")]
    Sts {
        /// What to do.
        remedy: &'static str,
        /// What it said.
        #[source]
        source: Box<IssueError>,
    },
    /// The file holds something else.
    #[error(
        "{path} holds no OIDC token: it must be a regular file of up to 20000 letters, digits and any of ._-"
    )]
    Token {
        /// The file.
        path: PathBuf,
    },
}

/// Where the kubelet keeps the token, and replaces it before it ends.
pub(crate) struct TokenFile<'a> {
    pub(crate) path: &'a Path,
    pub(crate) audience: &'static str,
    /// The environment variable that names the file.
    pub(crate) variable: &'static str,
}

/// What a cloud's STS is sent for a token, and how its answers are read. The call is not signed: the token
/// authenticates the caller.
pub(crate) trait Exchange: Send + Sync + 'static {
    /// The agent's own role.
    fn role(&self) -> &RoleArn;

    fn token_file(&self) -> TokenFile<'_>;

    /// The body of the call, in memory that is zeroised.
    fn form(&self, token: &SecretString) -> Bytes;

    fn request(
        &self,
        client: &reqwest::Client,
        endpoint: &Endpoint,
        form: &Bytes,
        now: Timestamp,
    ) -> reqwest::RequestBuilder;

    /// Reads the answer.
    fn read(&self, body: &[u8]) -> Result<Issued, WireError>;

    /// The table of errors.
    fn refusals(&self) -> &Table;

    /// What to do about an error.
    fn advice(&self, error: &IssueError) -> &'static str;
}

/// The body of a call: its other parameters, encoded, and the token, in which nothing takes encoding.
/// `concat` allocates once: what grows leaves copies behind.
pub(crate) fn form_with_token(others: &str, parameter: &str, token: &SecretString) -> Bytes {
    let form = [others, "&", parameter, "=", token.expose_secret()].concat();
    Bytes::from_owner(Zeroizing::new(form.into_bytes()))
}

/// STS's message may repeat parts of the token: then it is not used.
pub(crate) fn withhold(error: &mut IssueError, token: &SecretString) {
    let is_repeated = |part: &str| error.message.contains(part.get(..BEGINNING).unwrap_or(part));
    // Header, claims and signature.
    if token.expose_secret().split('.').filter(|part| !part.is_empty()).any(is_repeated) {
        error.message = "withheld, because it repeats the token".into();
    }
}

/// Whether a text may be a token: base64url, and the dots of a JWS in its compact form (RFC 7515, 7.1).
pub(crate) fn is_token(text: &str) -> bool {
    let legal = |c: u8| c.is_ascii_alphanumeric() || b"._-".contains(&c);
    (MIN_TOKEN_LENGTH..=MAX_TOKEN_LENGTH).contains(&text.len()) && text.bytes().all(legal)
}

/// Exchanges tokens for credentials.
pub(crate) struct Oidc<E>(pub(crate) E);

#[async_trait]
impl<E: Exchange> Origin for Oidc<E> {
    fn source(&self) -> BaseSource {
        BaseSource::Oidc
    }

    fn role(&self) -> Option<&RoleArn> {
        Some(self.0.role())
    }

    async fn ask(&self, sts: &Transport) -> Result<(Box<str>, Issued), BaseError> {
        let issued = self.exchange(sts).await.map_err(BaseError::Oidc)?;
        Ok((self.0.role().name().into(), issued))
    }
}

impl<E: Exchange> Oidc<E> {
    /// Reads the token, and asks STS. An hour's credentials, which every role allows.
    async fn exchange(&self, sts: &Transport) -> Result<Issued, OidcError> {
        let mut token = self.0.token_file().read()?;
        let mut form = self.0.form(&token);
        let refusal = match self.call(&form, sts).await {
            Ok(issued) => return Ok(issued),
            Err(refusal) => refusal,
        };
        let is_worth_another = match refusal.remedy() {
            // The kubelet may have replaced the token since it was read.
            Some(Remedy::FreshBase) => match self.0.token_file().read() {
                Ok(newer) if newer.expose_secret() != token.expose_secret() => {
                    form = self.0.form(&newer);
                    token = newer;
                    true
                }
                Ok(_) | Err(_) => false,
            },
            Some(Remedy::FreshNonce) => true,
            Some(Remedy::NextEndpoint) => sts.leave(refusal.endpoint),
            Some(Remedy::ServerTime) => sts.adopt_time(refusal.server_time),
            Some(Remedy::OneHour | Remedy::ShorterSession) | None => false,
        };
        let outcome = if is_worth_another { self.call(&form, sts).await } else { Err(refusal) };
        outcome.map_err(|Refusal { mut error, .. }| {
            withhold(&mut error, &token);
            OidcError::Sts { remedy: self.0.advice(&error), source: Box::new(error) }
        })
    }

    async fn call(&self, form: &Bytes, sts: &Transport) -> Result<Issued, Refusal> {
        let response = sts.send(0, |client, endpoint| Ok(self.0.request(client, endpoint, form, sts.now())));
        let body = sts.read(response.await?, self.0.refusals()).await?;
        let issued = self.0.read(&body);
        let issued =
            issued.map_err(|error| refusal::nonsense("answer not understood", Some(error.into())))?;
        if issued.expires_at <= sts.now() {
            return Err(refusal::nonsense("credentials that have already expired", None));
        }
        Ok(issued)
    }
}

impl TokenFile<'_> {
    /// The token as it is now.
    fn read(&self) -> Result<SecretString, OidcError> {
        let Self { path, audience, variable } = *self;
        let bytes = read_token(path).map_err(|source| OidcError::Read {
            path: path.to_owned(),
            audience,
            variable,
            source,
        })?;
        let text = bytes.and_then(|bytes| {
            let text = std::str::from_utf8(&bytes).ok()?.trim_end();
            is_token(text).then(|| SecretString::from(text))
        });
        text.ok_or_else(|| OidcError::Token { path: path.to_owned() })
    }
}

/// `None` when it is too long, or no regular file. A projected volume is a tmpfs, so that this takes
/// microseconds.
fn read_token(path: &Path) -> io::Result<Option<Zeroizing<Vec<u8>>>> {
    // A FIFO would have the agent wait for a writer.
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        return Ok(None);
    }
    let mut bytes = Zeroizing::new(Vec::with_capacity(FILE_LIMIT_BYTES + 1));
    let limit = u64::try_from(FILE_LIMIT_BYTES + 1).unwrap_or(u64::MAX);
    file.take(limit).read_to_end(&mut bytes)?;
    Ok((bytes.len() <= FILE_LIMIT_BYTES).then_some(bytes))
}

/// What both APIs take.
const MIN_TOKEN_LENGTH: usize = 4;
const MAX_TOKEN_LENGTH: usize = 20_000;
/// With a few line ends.
const FILE_LIMIT_BYTES: usize = MAX_TOKEN_LENGTH + 16;
/// The first characters of a token's part; no other text has them.
const BEGINNING: usize = 16;
