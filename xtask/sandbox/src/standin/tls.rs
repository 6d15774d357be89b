//! HTTPS before a stand-in: certificates of its own authority, and a listener that takes TLS off. Depends on
//! rustls and rcgen. Called by `container`, whose agent reaches everything as it would in a cluster.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::Result;
use rcgen::{BasicConstraints, Certificate, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::{ServerConfig, crypto::ring, pki_types::PrivatePkcs8KeyDer};
use tokio::{io::copy_bidirectional, net::TcpStream, task::JoinSet};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

/// Signs certificates, and is trusted by whoever is given its own.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// Takes TLS off connections and passes them on, until it is dropped.
#[derive(Debug)]
pub struct TlsFront {
    addr: SocketAddr,
    stop: CancellationToken,
}

impl Authority {
    /// Makes keys.
    ///
    /// # Errors
    /// When there is no randomness.
    pub fn new() -> Result<Self> {
        let mut params = CertificateParams::default();
        // Unlike those that it signs, which OpenSSL would else take for self-signed.
        params.distinguished_name.push(DnType::CommonName, "sandbox authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate()?;
        let pem = params.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(params, key), pem })
    }

    /// Its own certificate.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// Listens for TLS with a certificate for `names` (DNS names and IP addresses), and passes what is in it
    /// to `upstream`.
    ///
    /// # Errors
    /// When the thread or the certificate cannot be made.
    pub fn front(&self, listener: TcpListener, upstream: SocketAddr, names: &[&str]) -> Result<TlsFront> {
        let (certificate, key) = self.certify(names)?;
        let provider = Arc::new(ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
            )?;
        TlsFront::start(listener, upstream, TlsAcceptor::from(Arc::new(config)))
    }

    /// A certificate for `names`, and its key, as PEM files have them.
    ///
    /// # Errors
    /// When there is no randomness, or a name is none.
    pub fn certificate(&self, names: &[&str]) -> Result<(String, String)> {
        let (certificate, key) = self.certify(names)?;
        Ok((certificate.pem(), key.serialize_pem()))
    }

    fn certify(&self, names: &[&str]) -> Result<(Certificate, KeyPair)> {
        let names = names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let key = KeyPair::generate()?;
        Ok((CertificateParams::new(names)?.signed_by(&key, &self.issuer)?, key))
    }
}

impl TlsFront {
    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    fn start(listener: TcpListener, upstream: SocketAddr, acceptor: TlsAcceptor) -> Result<Self> {
        let addr = listener.local_addr()?;
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        thread::Builder::new().name("tls".into()).spawn(move || {
            // Its error is not reported: clients see that the port is closed.
            drop(runtime.block_on(stopped.run_until_cancelled_owned(accept(listener, upstream, acceptor))));
        })?;
        Ok(Self { addr, stop })
    }
}

impl Drop for TlsFront {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn accept(listener: TcpListener, upstream: SocketAddr, acceptor: TlsAcceptor) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let mut connections = JoinSet::new();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let acceptor = acceptor.clone();
                connections.spawn(async move { pass(stream, upstream, &acceptor).await });
                while connections.try_join_next().is_some() {}
            }
            // Out of file descriptors, or a client that has ended already: neither may spin.
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

async fn pass(stream: TcpStream, upstream: SocketAddr, acceptor: &TlsAcceptor) -> io::Result<()> {
    let mut client = acceptor.accept(stream).await?;
    let mut server = TcpStream::connect(upstream).await?;
    copy_bidirectional(&mut client, &mut server).await?;
    Ok(())
}
