//! The server's certificates. Either they are signed by the server's own authority: the authority's
//! certificate is made once and kept, because the API server reads it at its start only; the server's
//! certificate is replaced each day and never written. Or they are read from files that another program
//! replaces. Both are exchanged while connections are served. The home of rcgen and of x509-parser; depends
//! on `files`; called by `serve`, and by the command `init`.

mod authority;
mod init;
mod kubeconfig;

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use prometheus_client::{metrics::gauge::Gauge, registry::Registry};
use rustls::{
    RootCertStore, ServerConfig,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem, pem::PemObject as _},
    server::{VerifierBuilderError, WebPkiClientVerifier},
};
use secrecy::zeroize::Zeroizing;
use sha2::{Digest as _, Sha256};
use tokio_rustls::TlsAcceptor;
use tracing::{info, warn};

use self::authority::Authority;
pub use self::{
    init::{Finding, Init, Report, check, init},
    kubeconfig::ClientFiles,
};
use crate::files;
use kube2ram_service::{
    admin::{Pending, Readiness},
    clock::Clock,
    telemetry::chain,
};

/// What the server shows, and what it asks for.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Its certificate.
    pub certificate: Source,
    /// A file with the certificates of authorities. With it, only clients with a certificate of one of them
    /// are served: the API server, by its kubeconfig.
    pub client_ca: Option<PathBuf>,
}

/// Where the server's certificate comes from.
#[derive(Clone, Debug)]
pub enum Source {
    /// A chain and its key, as PEM files.
    Files {
        /// The server's own certificate first.
        certificate: PathBuf,
        /// PKCS #8, PKCS #1 or SEC 1.
        key: PathBuf,
    },
    /// The authority in a directory, which is made if it is not there.
    Own {
        /// Where `cert.pem` and `key.pem` are: the authority's.
        directory: PathBuf,
        /// Host names and addresses of the server.
        names: Vec<String>,
    },
}

/// Why there is no certificate to serve with.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The certificate of the authority is that of no authority, or of another key.
    #[error("{} is not a CA certificate of the key next to it: restore it, or run init in another directory", .0.display())]
    Authority(PathBuf),
    /// A certificate could not be made or used.
    #[error("cannot make a certificate")]
    Certificate(#[source] rcgen::Error),
    /// No client could be verified.
    #[error("cannot verify clients by {}", path.display())]
    ClientCa {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: VerifierBuilderError,
    },
    /// A certificate and its key cannot be served.
    #[error("cannot serve with the certificate")]
    Config(#[source] rustls::Error),
    /// The certificate has expired.
    #[error("{what} has expired: it was valid until {until}, and the clock of this machine shows {now}")]
    Expired {
        /// Which.
        what: String,
        /// Until when.
        until: Timestamp,
        /// Now.
        now: Timestamp,
    },
    /// Only one of two files is there.
    #[error("{} is there, but {} is not: restore it, or remove both and have the API server read the new CA", present.display(), missing.display())]
    Half {
        /// What is there.
        present: PathBuf,
        /// What is not.
        missing: PathBuf,
    },
    /// A file operation failed.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The authority's key is none that can sign.
    #[error("cannot sign with the key in {}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: rcgen::Error,
    },
    /// A file is missing.
    #[error("{} does not exist", .0.display())]
    Missing(PathBuf),
    /// The certificate was made by a clock that was ahead, or this machine's clock is behind.
    #[error(
        "{what} is not valid yet: it is valid from {from}, and the clock of this machine shows {now}. Correct \
         the clock that is wrong; a certificate that was made while the clock was ahead must be made again"
    )]
    NotYetValid {
        /// Which.
        what: String,
        /// From when.
        from: Timestamp,
        /// Now.
        now: Timestamp,
    },
    /// A file is not PEM, or holds nothing that was looked for.
    #[error("cannot read {}", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: pem::Error,
    },
    /// A certificate is malformed.
    #[error("{} holds no X.509 certificate", .0.display())]
    X509(PathBuf),
}

/// The certificate in use, exchanged when its source changes or its time comes.
pub struct Tls {
    settings: Settings,
    clock: Arc<dyn Clock>,
    provider: Arc<CryptoProvider>,
    authority: Option<Authority>,
    current: RwLock<Current>,
    /// The digest of the files at the last look.
    seen: Mutex<[u8; 32]>,
    expiry: Gauge,
}

#[derive(Clone)]
struct Current {
    config: Arc<ServerConfig>,
    /// It is valid from here,
    from: Timestamp,
    /// to here.
    until: Timestamp,
    /// When another one is made; `None` where files decide.
    renew_at: Option<Timestamp>,
    /// Of the files that it was made of.
    made_of: [u8; 32],
}

/// The content of the files that are read again and again; empty where there is none.
#[derive(Default)]
struct Inputs {
    chain: Zeroizing<Vec<u8>>,
    key: Zeroizing<Vec<u8>>,
    client_ca: Zeroizing<Vec<u8>>,
}

impl Tls {
    /// Loads what is there, and makes what is not.
    ///
    /// # Errors
    /// See [`TlsError`].
    pub fn load(
        settings: Settings,
        clock: Arc<dyn Clock>,
        registry: &mut Registry,
    ) -> Result<Arc<Self>, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let authority = match &settings.certificate {
            Source::Files { .. } => None,
            Source::Own { directory, .. } => Some(Authority::open_or_create(directory, clock.now())?.0),
        };
        let inputs = Inputs::read(&settings)?;
        let current = make(&settings, &provider, authority.as_ref(), inputs, clock.now())?;
        let expiry = Gauge::default();
        registry.register(
            "tls_certificate_expiry_timestamp_seconds",
            "When the server's certificate expires",
            expiry.clone(),
        );
        expiry.set(current.until.as_second());
        let (seen, current) = (Mutex::new(current.made_of), RwLock::new(current));
        Ok(Arc::new(Self { settings, clock, provider, authority, current, seen, expiry }))
    }

    /// Accepts TLS with what is current now.
    pub fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.current().config)
    }

    /// Whether clients can take the certificate for valid, and that of the server's own authority, too.
    pub fn is_valid(&self) -> bool {
        let (now, current) = (self.clock.now(), self.current());
        let is_trusted = self.authority.as_ref().is_none_or(|authority| authority.check(now).is_ok());
        is_trusted && current.from <= now && now < current.until
    }

    /// Makes or reads another certificate when it is time, or when two calls in a row have found the same
    /// change of a file: its writer may be in the middle of it. Returns whether it did. What is broken leaves
    /// the current one in use.
    ///
    /// # Errors
    /// See [`TlsError`].
    pub fn refresh(&self) -> Result<bool, TlsError> {
        let now = self.clock.now();
        // The clock may have been corrected since the start.
        self.authority.as_ref().map_or(Ok(()), |authority| authority.check(now))?;
        let inputs = Inputs::read(&self.settings)?;
        let (current, digest) = (self.current(), inputs.digest());
        let before =
            std::mem::replace(&mut *self.seen.lock().unwrap_or_else(PoisonError::into_inner), digest);
        // Made while this machine's clock was ahead, it is not valid yet.
        let is_due = current.renew_at.is_some_and(|renew_at| renew_at <= now || now < current.from);
        let is_changed = digest != current.made_of;
        if (!is_due && !is_changed) || (is_changed && digest != before) {
            return Ok(false);
        }
        let next = make(&self.settings, &self.provider, self.authority.as_ref(), inputs, now)?;
        self.expiry.set(next.until.as_second());
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = next;
        Ok(true)
    }

    /// Refreshes for ever. The server is not ready while its certificate is not valid.
    pub async fn keep(self: Arc<Self>, readiness: Readiness) {
        let mut invalid: Option<Pending> = None;
        let mut said = String::new();
        loop {
            let this = Arc::clone(&self);
            match tokio::task::spawn_blocking(move || this.refresh()).await {
                Ok(Ok(true)) => info!("the server's certificate was exchanged"),
                Ok(Ok(false)) => said.clear(),
                Ok(Err(error)) => {
                    let error = chain(&error);
                    if error != said {
                        warn!(error, "cannot exchange the server's certificate; the last one stays in use");
                        said = error;
                    }
                }
                // A panic, which is logged, or the end of the runtime.
                Err(_) => {}
            }
            invalid = match (self.is_valid(), invalid) {
                (true, Some(invalid)) => {
                    invalid.ready();
                    None
                }
                (false, None) => Some(readiness.wait_for("a valid TLS certificate")),
                (_, invalid) => invalid,
            };
            tokio::time::sleep(REFRESH_EVERY).await;
        }
    }

    fn current(&self) -> Current {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Inputs {
    fn read(settings: &Settings) -> Result<Self, TlsError> {
        let mut inputs = Self::default();
        if let Source::Files { certificate, key } = &settings.certificate {
            inputs.chain = read(certificate)?;
            inputs.key = read(key)?;
        }
        if let Some(client_ca) = &settings.client_ca {
            inputs.client_ca = read(client_ca)?;
        }
        Ok(inputs)
    }

    fn digest(&self) -> [u8; 32] {
        let mut digest = Sha256::new();
        for input in [&self.chain, &self.key, &self.client_ca] {
            // The digest of each, so that no byte moves from one file to the next unnoticed.
            digest.update(Sha256::digest(input.as_slice()));
        }
        digest.finalize().into()
    }
}

fn make(
    settings: &Settings,
    provider: &Arc<CryptoProvider>,
    authority: Option<&Authority>,
    inputs: Inputs,
    now: Timestamp,
) -> Result<Current, TlsError> {
    let made_of = inputs.digest();
    let builder = ServerConfig::builder_with_provider(Arc::clone(provider))
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Config)?;
    let builder = match &settings.client_ca {
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for certificate in certificates(path, &inputs.client_ca)? {
                roots.add(certificate).map_err(TlsError::Config)?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider));
            let verifier = verifier.build();
            let failed = |source| TlsError::ClientCa { path: path.clone(), source };
            builder.with_client_cert_verifier(verifier.map_err(failed)?)
        }
        None => builder.with_no_client_auth(),
    };
    let (chain, key, until, renew_at) = match (&settings.certificate, authority) {
        (Source::Own { names, .. }, Some(authority)) => {
            let (certificate, key, until) = authority.certify(names, now)?;
            let renew_at = now.checked_add(RENEW_AFTER).unwrap_or(now);
            (vec![certificate], key, until, Some(renew_at))
        }
        (Source::Own { directory, .. }, None) => return Err(TlsError::Missing(directory.clone())),
        (Source::Files { certificate, key }, _) => {
            let chain = certificates(certificate, &inputs.chain)?;
            let failed = |source| TlsError::Pem { path: key.clone(), source };
            let key = PrivateKeyDer::from_pem_slice(&inputs.key).map_err(failed)?;
            let first = chain.first().ok_or_else(|| TlsError::X509(certificate.clone()))?;
            let until = valid_until(certificate, first, now)?;
            (chain, key, until, None)
        }
    };
    let first = chain.first().ok_or_else(|| TlsError::X509(PathBuf::new()))?;
    let (from, _) = validity(Path::new(""), first)?;
    let mut config = builder.with_single_cert(chain, key).map_err(TlsError::Config)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Current { config: Arc::new(config), from, until, renew_at, made_of })
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |source| TlsError::Pem { path: path.to_owned(), source };
    let found: Vec<_> = CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(failed)?;
    if found.is_empty() { Err(failed(pem::Error::NoItemsFound)) } else { Ok(found) }
}

fn validity(path: &Path, der: &[u8]) -> Result<(Timestamp, Timestamp), TlsError> {
    let malformed = || TlsError::X509(path.to_owned());
    let (_, certificate) = x509_parser::parse_x509_certificate(der).or(Err(malformed()))?;
    let validity = certificate.validity();
    let time = |seconds| Timestamp::from_second(seconds).unwrap_or(Timestamp::MAX);
    Ok((time(validity.not_before.timestamp()), time(validity.not_after.timestamp())))
}

/// The end of a certificate that is valid now.
fn valid_until(path: &Path, der: &[u8], now: Timestamp) -> Result<Timestamp, TlsError> {
    let validity = validity(path, der)?;
    is_valid_at(path, validity, now).map(|()| validity.1)
}

fn is_valid_at(path: &Path, (from, until): (Timestamp, Timestamp), now: Timestamp) -> Result<(), TlsError> {
    let what = || path.display().to_string();
    if now < from {
        return Err(TlsError::NotYetValid { what: what(), from, now });
    }
    if now < until { Ok(()) } else { Err(TlsError::Expired { what: what(), until, now }) }
}

fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, TlsError> {
    let failed = |source| TlsError::Io { what: "read", path: path.to_owned(), source };
    files::read(path, FILE_LIMIT_BYTES).map_err(failed)?.ok_or_else(|| TlsError::Missing(path.to_owned()))
}

/// Longer than any chain.
const FILE_LIMIT_BYTES: usize = 256 * 1024;
/// How often files and dates are looked at.
const REFRESH_EVERY: Duration = Duration::from_secs(10);
/// A certificate of the own authority is replaced long before its end: it costs nothing.
const RENEW_AFTER: SignedDuration = SignedDuration::from_hours(24);

#[cfg(test)]
mod tests;
