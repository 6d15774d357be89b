//! Credentials that a program on the same machine hands out at a URI, as the SDKs' `credentials_uri` has it.
//! Source: alibabacloud-credentials, "Credentials URI". Depends on `wire`; called by the authenticator's
//! client.

use std::time::Duration;

use http::StatusCode;
use reqwest::redirect::Policy;
use secrecy::zeroize::Zeroizing;
use url::Url;

use crate::alibaba::wire::{BODY_LIMIT_BYTES, Issued, WireError, parse_node_credentials};

/// Where a program hands out credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CredentialsUri(Url);

/// Why a URI gave no credentials. Holds nothing of the URI, which may contain a secret.
#[derive(Debug, thiserror::Error)]
pub enum UriError {
    /// The answer is no credentials document.
    #[error("cannot read the answer of the credentials URI")]
    Document(#[source] WireError),
    /// No answer.
    #[error("cannot fetch credentials from the credentials URI")]
    Fetch(#[source] reqwest::Error),
    /// Another status than 200.
    #[error("the credentials URI answers {0}")]
    Status(StatusCode),
    /// It is not an `http://` or `https://` URL.
    #[error("the credentials URI is not an http:// or https:// URL")]
    Url,
}

impl CredentialsUri {
    /// Parses a URI. Which programs may be asked is for whoever configures it to decide.
    ///
    /// # Errors
    /// [`UriError::Url`].
    pub fn parse(text: &str) -> Result<Self, UriError> {
        let url = Url::parse(text).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
        url.filter(Url::has_host).map(Self).ok_or(UriError::Url)
    }

    /// Fetches credentials: one GET without a proxy, redirects not followed.
    ///
    /// # Errors
    /// See [`UriError`].
    ///
    /// # Panics
    /// When no process-wide rustls provider is installed, which is a bug of the program.
    pub async fn fetch(&self) -> Result<Issued, UriError> {
        let failed = |error: reqwest::Error| UriError::Fetch(error.without_url());
        let client = reqwest::Client::builder().no_proxy().redirect(Policy::none()).timeout(DEADLINE);
        // Without TLS no certificates need be there.
        let client = if self.0.scheme() == "https" { client } else { client.tls_certs_only([]) };
        let client = client.build().map_err(failed)?;
        let mut response = client.get(self.0.clone()).send().await.map_err(failed)?;
        if response.status() != StatusCode::OK {
            return Err(UriError::Status(response.status()));
        }
        let mut body = Zeroizing::new(Vec::with_capacity(BODY_LIMIT_BYTES));
        while let Some(chunk) = response.chunk().await.map_err(failed)? {
            if body.len() + chunk.len() > BODY_LIMIT_BYTES {
                return Err(UriError::Document(WireError::TooLong));
            }
            body.extend_from_slice(&chunk);
        }
        parse_node_credentials(&body).map_err(UriError::Document)
    }
}

/// Bounds the whole exchange. A program that has to ask STS first takes a second.
const DEADLINE: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Server, answer};

    const DOCUMENT: &str = r#"{"Code":"Success","AccessKeyId":"STS.id","AccessKeySecret":"hush",
        "SecurityToken":"tok","Expiration":"2026-11-21T22:30:00Z"}"#;

    async fn fetched(status: u16, body: &'static str) -> Result<Issued, UriError> {
        // Another test may have installed it.
        let _installed = rustls::crypto::ring::default_provider().install_default();
        let server = Server::start(move |_| answer(status, body)).await;
        let uri = CredentialsUri::parse(&format!("http://{}/credentials?for=me", server.address)).unwrap();
        let fetched = uri.fetch().await;
        assert_eq!(server.targets(), ["GET /credentials?for=me"]);
        fetched
    }

    #[tokio::test]
    async fn takes_a_successful_document_only() {
        assert_eq!(&*fetched(200, DOCUMENT).await.unwrap().access_key_id, "STS.id");
        assert!(matches!(fetched(403, DOCUMENT).await, Err(UriError::Status(StatusCode::FORBIDDEN))));
        let failed = fetched(200, r#"{"Code":"Failed"}"#).await;
        assert!(matches!(failed, Err(UriError::Document(WireError::Json))), "{failed:?}");
    }

    #[test]
    fn takes_http_urls_only() {
        for text in ["http://127.0.0.1:8080/x", "https://localhost/"] {
            assert!(CredentialsUri::parse(text).is_ok(), "{text}");
        }
        for text in ["", "127.0.0.1", "file:///etc/passwd", "ftp://host/", "http://"] {
            assert!(CredentialsUri::parse(text).is_err(), "{text}");
        }
    }
}
