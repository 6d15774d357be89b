//! AssumeRoleWithOIDC: the token of the agent's service account for credentials of the agent's own role, so
//! that the node's needs no right. Source: STS API 2015-04-01, "AssumeRoleWithOIDC". Depends on `transport`,
//! `refusal`, `wire`; called by `renewal`.

use std::{
    fs::OpenOptions,
    io::{self, Read as _},
    os::unix::fs::OpenOptionsExt as _,
    path::PathBuf,
};

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE};
use rustix::fs::OFlags;
use secrecy::{ExposeSecret as _, SecretString, zeroize::Zeroizing};

use crate::{
    alibaba::{
        refusal::{self, Refusal, Remedy},
        sign::canonical_query,
        transport::{Transport, read},
        wire::{Issued, parse_assume_role},
    },
    credentials::{IssueError, IssueErrorKind},
    role::{RoleArn, SessionName},
};

/// The role, its provider and the token's path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OidcSettings {
    /// The agent's own role.
    pub role: RoleArn,
    /// `acs:ram::<account>:oidc-provider/<name>`: the cluster, as RAM knows it.
    pub provider: Box<str>,
    /// Where the kubelet keeps the token, and replaces it before it ends.
    pub token_file: PathBuf,
    /// What ActionTrail shows.
    pub session: SessionName,
}

/// Why the token brought no credentials. Holds nothing of the token.
#[derive(Debug, thiserror::Error)]
pub enum OidcError {
    /// The file cannot be read.
    #[error(
        "cannot read the token at {path}: mount a serviceAccountToken of audience sts.aliyuncs.com there, or correct ALIBABA_CLOUD_OIDC_TOKEN_FILE"
    )]
    Read {
        /// The file.
        path: PathBuf,
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

/// Exchanges tokens for credentials.
pub(super) struct Oidc(OidcSettings);

impl Oidc {
    pub(super) fn new(settings: OidcSettings) -> Self {
        Self(settings)
    }

    pub(super) fn settings(&self) -> &OidcSettings {
        &self.0
    }

    /// Reads the token, and asks STS. An hour's credentials, which every role allows.
    pub(super) async fn exchange(&self, sts: &Transport) -> Result<Issued, OidcError> {
        let token = self.token()?;
        let form = self.0.form(&token);
        let refusal = match call(&form, sts).await {
            Ok(issued) => return Ok(issued),
            Err(refusal) => refusal,
        };
        let is_worth_another = match refusal.remedy() {
            Some(Remedy::FreshNonce) => true,
            Some(Remedy::ServerTime) => sts.adopt_time(refusal.server_time),
            Some(Remedy::FreshBase | Remedy::ShorterSession) | None => false,
        };
        let outcome = if is_worth_another { call(&form, sts).await } else { Err(refusal) };
        outcome.map_err(|Refusal { mut error, .. }| {
            // STS's message is not used: it may repeat parts of the token.
            let beginning: String = token.expose_secret().chars().take(BEGINNING).collect();
            if error.message.contains(&beginning) {
                error.message = "withheld, because it repeats the token".into();
            }
            OidcError::Sts { remedy: remedy(&error), source: Box::new(error) }
        })
    }

    /// The token as it is now.
    fn token(&self) -> Result<SecretString, OidcError> {
        let path = &self.0.token_file;
        let bytes = read_token(path).map_err(|source| OidcError::Read { path: path.clone(), source })?;
        let text = bytes.and_then(|bytes| {
            let text = std::str::from_utf8(&bytes).ok()?.trim_end();
            let fits = (MIN_TOKEN_LENGTH..=MAX_TOKEN_LENGTH).contains(&text.len());
            // base64url, and the dots of a JWS in its compact form (RFC 7515, 7.1).
            let legal = |c: u8| c.is_ascii_alphanumeric() || b"._-".contains(&c);
            (fits && text.bytes().all(legal)).then(|| SecretString::from(text))
        });
        text.ok_or_else(|| OidcError::Token { path: path.clone() })
    }
}

impl OidcSettings {
    /// The body of the call, in memory that is zeroised.
    fn form(&self, token: &SecretString) -> Bytes {
        let others = canonical_query(&[
            ("DurationSeconds", "3600"),
            ("OIDCProviderArn", &self.provider),
            ("RoleArn", self.role.as_str()),
            ("RoleSessionName", self.session.as_str()),
        ]);
        // Nothing in it takes encoding. `concat` allocates once: what grows leaves copies behind.
        let form = [others.as_str(), "&OIDCToken=", token.expose_secret()].concat();
        Bytes::from_owner(Zeroizing::new(form.into_bytes()))
    }
}

async fn call(form: &Bytes, sts: &Transport) -> Result<Issued, Refusal> {
    let query = query(sts.now(), &uuid::Uuid::new_v4().to_string());
    let response = sts.send(|client, endpoint| {
        let mut url = endpoint.url().clone();
        url.set_query(Some(&query));
        let request = client.post(url).header(ACCEPT, "application/json");
        Ok(request.header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(form.clone()))
    });
    let body = read(response.await?).await?;
    let issued = parse_assume_role(&body)
        .map_err(|error| refusal::nonsense("answer not understood", Some(error.into())))?;
    if issued.expires_at <= sts.now() {
        return Err(refusal::nonsense("credentials that have already expired", None));
    }
    Ok(issued)
}

/// The public parameters. The call is not signed: the token authenticates the caller.
fn query(now: jiff::Timestamp, nonce: &str) -> String {
    let now = now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    canonical_query(&[
        ("Action", "AssumeRoleWithOIDC"),
        // The default is XML.
        ("Format", "JSON"),
        ("SignatureNonce", nonce),
        ("Timestamp", &now),
        ("Version", "2015-04-01"),
    ])
}

/// `None` when it is too long, or no regular file. A projected volume is a tmpfs, so that this takes
/// microseconds.
fn read_token(path: &PathBuf) -> io::Result<Option<Zeroizing<Vec<u8>>>> {
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

/// Which side of the trust is to be mended. Codes: RAM, "FAQ about OIDC-based SSO".
fn remedy(error: &IssueError) -> &'static str {
    match &*error.code {
        "AuthenticationFail.OIDCToken.Expired" => {
            "the token has expired: see that the kubelet renews it, and the node's clock"
        }
        "AuthenticationFail.OIDCToken.AudienceNotMatch" => {
            "give the mounted token an audience that the OIDC provider lists as client id: sts.aliyuncs.com"
        }
        code if code.starts_with("AuthenticationFail.OIDCToken") => {
            "the provider does not vouch for the token: see that ALIBABA_CLOUD_OIDC_PROVIDER_ARN is this cluster's"
        }
        "EntityNotExist.Role" => "create the role that ALIBABA_CLOUD_ROLE_ARN names, or correct the variable",
        code if code.starts_with("EntityNotExist") => {
            "enable RRSA for the cluster, or correct ALIBABA_CLOUD_OIDC_PROVIDER_ARN"
        }
        _ if matches!(error.kind, IssueErrorKind::Throttled | IssueErrorKind::Unavailable) => {
            error.kind.remedy()
        }
        _ => {
            "have the trust policy of the role in ALIBABA_CLOUD_ROLE_ARN name the provider, the audience and the agent's service account"
        }
    }
}

/// What the API takes.
const MIN_TOKEN_LENGTH: usize = 4;
const MAX_TOKEN_LENGTH: usize = 20_000;
/// With a few line ends.
const FILE_LIMIT_BYTES: usize = MAX_TOKEN_LENGTH + 16;
/// The first characters of a token; no other text begins with them.
const BEGINNING: usize = 16;

#[cfg(test)]
mod tests;
