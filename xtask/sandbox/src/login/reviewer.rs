//! An API server, as far as the authenticator's webhook can see: TokenReviews over TLS, on connections that
//! are kept. Depends on nothing. Called by `bench` and by the authenticator's tests.

use std::{fs, io, net::SocketAddr, path::Path, sync::Arc};

use anyhow::{Context as _, Result, ensure};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

/// Makes connections to a webhook. Trusts one CA alone, as the API server does.
pub struct Reviewer {
    webhook: SocketAddr,
    tls: TlsConnector,
}

/// A connection that is kept, as the API server keeps it, until the server ends it after many requests.
pub struct Connection {
    reviewer: Arc<Reviewer>,
    stream: TlsStream<TcpStream>,
}

impl Reviewer {
    /// Of a webhook, with the certificate of its CA.
    ///
    /// # Errors
    /// When the certificate cannot be read.
    pub fn trusting(ca: &Path, webhook: SocketAddr) -> Result<Self> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(&fs::read(ca)?)?)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self { webhook, tls: TlsConnector::from(Arc::new(config)) })
    }

    /// A new connection, if the server takes one.
    ///
    /// # Errors
    /// The kernel's, and those of TLS.
    pub async fn connect(&self) -> io::Result<TlsStream<TcpStream>> {
        let name = ServerName::try_from("localhost").map_err(io::Error::other)?;
        let stream = TcpStream::connect(self.webhook).await?;
        self.tls.connect(name, stream).await
    }
}

impl Connection {
    /// Opens one.
    ///
    /// # Errors
    /// As [`Reviewer::connect`].
    pub async fn open(reviewer: Arc<Reviewer>) -> io::Result<Self> {
        let stream = reviewer.connect().await?;
        Ok(Self { reviewer, stream })
    }

    /// The status and the text of the answer to a review of this token.
    ///
    /// # Errors
    /// When the server ends the connection before its answer is complete.
    pub async fn review(&mut self, token: &str) -> Result<(u16, String)> {
        self.stream.write_all(review(token, "keep-alive").as_bytes()).await?;
        let mut read = Vec::new();
        let answer = loop {
            let mut chunk = [0; 4096];
            let length = self.stream.read(&mut chunk).await?;
            ensure!(length > 0, "the server ended the connection after {:?}", String::from_utf8_lossy(&read));
            read.extend_from_slice(&chunk[..length]);
            let answer = str::from_utf8(&read)?;
            if is_complete(answer) {
                break answer.to_owned();
            }
        };
        if answer.to_ascii_lowercase().contains("\r\nconnection: close\r\n") {
            self.stream = self.reviewer.connect().await?;
        }
        let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
        Ok((status.with_context(|| format!("no status in {answer:?}"))?, answer))
    }
}

/// A request with a review of a token, and what is to become of the connection.
pub fn review(token: &str, connection: &str) -> String {
    let review = json!({
        "kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1", "spec": { "token": token },
    })
    .to_string();
    let length = review.len();
    format!(
        "POST /authenticate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\nConnection: {connection}\r\n\r\n{review}"
    )
}

/// Whether an answer has all of its body.
pub fn is_complete(answer: &str) -> bool {
    let Some((head, body)) = answer.split_once("\r\n\r\n") else { return false };
    let head = head.to_ascii_lowercase();
    let length = head.split("\r\n").find_map(|line| line.strip_prefix("content-length: "));
    let length = length.and_then(|length| length.parse::<usize>().ok());
    length.is_some_and(|length| body.len() >= length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_complete_with_its_whole_body() {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: x\r\nContent-Length: 3\r\n\r\n";

        assert!(is_complete(&format!("{head}abc")));
        for part in ["HTTP/1.1 200 OK\r\nContent-Le", head, &format!("{head}ab")] {
            assert!(!is_complete(part), "{part:?}");
        }
    }
}
