//! The server's own certificate authority: a key and a certificate in a directory, by the names that the
//! predecessor gives its own. That one's are taken as they are: an API server that trusts them goes on to.
//! Depends on `files`; called by the parent.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PublicKeyData as _, date_time_ymd,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject as _};
use secrecy::zeroize::Zeroizing;

use super::{FILE_LIMIT_BYTES, TlsError, certificates, is_valid_at, validity};
use crate::files::{self, Lock, Mode};

/// Signs the server's certificates.
pub(super) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
    path: PathBuf,
    /// From when and until when its certificate is valid.
    validity: (Timestamp, Timestamp),
}

/// Whether something was made or was there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Kept,
    Made,
}

impl Authority {
    /// The authority in `directory`, which must be valid. It is never replaced: the API server knows it.
    pub(super) fn open(directory: &Path, now: Timestamp) -> Result<Option<Self>, TlsError> {
        let (certificate_path, key_path) = paths(directory);
        match (read(&certificate_path)?, read(&key_path)?) {
            (Some(certificate), Some(key)) => {
                Self::load(&certificate_path, &certificate, &key_path, &key, now).map(Some)
            }
            (Some(_), None) => Err(TlsError::Half { present: certificate_path, missing: key_path }),
            // The key is written first: a process that made it has ended before it wrote the certificate.
            (None, _) => Ok(None),
        }
    }

    /// The authority in `directory`, or a new one there. Of processes that do this at once, one makes it.
    pub(super) fn open_or_create(directory: &Path, now: Timestamp) -> Result<(Self, Found), TlsError> {
        let failed = |what| move |source| TlsError::Io { what, path: directory.to_owned(), source };
        files::make_directory(directory).map_err(failed("create"))?;
        let _lock = Lock::take(directory).map_err(failed("lock"))?;
        if let Some(there) = Self::open(directory, now)? {
            return Ok((there, Found::Kept));
        }
        let (certificate_path, key_path) = paths(directory);
        let (key, certificate) = generate(now).map_err(TlsError::Certificate)?;
        let written = |path: &PathBuf| {
            let path = path.clone();
            move |source| TlsError::Io { what: "write", path, source }
        };
        files::replace(&key_path, key.as_bytes(), Mode::Secret).map_err(written(&key_path))?;
        files::replace(&certificate_path, certificate.as_bytes(), Mode::Public)
            .map_err(written(&certificate_path))?;
        let made = Self::load(&certificate_path, certificate.as_bytes(), &key_path, key.as_bytes(), now)?;
        Ok((made, Found::Made))
    }

    fn load(
        certificate_path: &Path,
        certificate: &[u8],
        key_path: &Path,
        key: &[u8],
        now: Timestamp,
    ) -> Result<Self, TlsError> {
        let not_ours = || TlsError::Authority(certificate_path.to_owned());
        let key = key_pair(key_path, key)?;
        let der = certificates(certificate_path, certificate)?.into_iter().next().ok_or_else(not_ours)?;
        let (_, parsed) = x509_parser::parse_x509_certificate(&der).or(Err(not_ours()))?;
        let is_of_key = *parsed.public_key().subject_public_key.data == *key.der_bytes();
        if !parsed.is_ca() || !is_of_key {
            return Err(not_ours());
        }
        let validity = validity(certificate_path, &der)?;
        let issuer = Issuer::from_ca_cert_der(&der, key).map_err(TlsError::Certificate)?;
        let pem = String::from_utf8(certificate.to_vec()).or(Err(not_ours()))?;
        let authority = Self { issuer, pem, path: certificate_path.to_owned(), validity };
        authority.check(now).map(|()| authority)
    }

    /// Whether its certificate is valid now: the API server compares it with its own clock, too.
    pub(super) fn check(&self, now: Timestamp) -> Result<(), TlsError> {
        is_valid_at(&self.path, self.validity, now)
    }

    /// Its certificate, for the API server.
    pub(super) fn pem(&self) -> &str {
        &self.pem
    }

    /// A new certificate and its key for a server of these names, and when it ends.
    pub(super) fn certify(
        &self,
        names: &[String],
        now: Timestamp,
    ) -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>, Timestamp), TlsError> {
        let until = now.checked_add(LEAF_LIFETIME).unwrap_or(Timestamp::MAX);
        let (certificate, key) = self.sign(names, now, until).map_err(TlsError::Certificate)?;
        Ok((certificate, key, until))
    }

    fn sign(
        &self,
        names: &[String],
        now: Timestamp,
        until: Timestamp,
    ) -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>), rcgen::Error> {
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name = named(LEAF_NAME);
        params.not_before = date_time_ymd(1970, 1, 1) + since_epoch(backdated(now));
        params.not_after = date_time_ymd(1970, 1, 1) + since_epoch(until);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok((certificate.der().clone(), PrivatePkcs8KeyDer::from(key.serialize_der()).into()))
    }
}

fn paths(directory: &Path) -> (PathBuf, PathBuf) {
    (directory.join("cert.pem"), directory.join("key.pem"))
}

fn read(path: &Path) -> Result<Option<Zeroizing<Vec<u8>>>, TlsError> {
    files::read(path, FILE_LIMIT_BYTES).map_err(|source| TlsError::Io {
        what: "read",
        path: path.to_owned(),
        source,
    })
}

/// A new key, and a certificate of an authority for it, as PEM files have them.
fn generate(now: Timestamp) -> Result<(Zeroizing<String>, String), rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = named(NAME);
    // The API server reads it at its start only, so its end is further away than any other.
    params.not_before = date_time_ymd(1970, 1, 1) + since_epoch(backdated(now));
    params.not_after = date_time_ymd(1970, 1, 1) + since_epoch(now.checked_add(LIFETIME).unwrap_or(now));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate()?;
    let certificate = params.self_signed(&key)?;
    Ok((Zeroizing::new(key.serialize_pem()), certificate.pem()))
}

/// Reads PKCS #8, and PKCS #1, which the predecessor writes.
fn key_pair(path: &Path, pem: &[u8]) -> Result<KeyPair, TlsError> {
    let failed = |source| TlsError::Pem { path: path.to_owned(), source };
    let key = match PrivateKeyDer::from_pem_slice(pem).map_err(failed)? {
        PrivateKeyDer::Pkcs1(key) => PrivateKeyDer::Pkcs8(pkcs8_of_rsa(key.secret_pkcs1_der()).into()),
        key => key,
    };
    KeyPair::try_from(&key).map_err(|source| TlsError::Key { path: path.to_owned(), source })
}

/// Wraps an RSA key (RFC 8017, A.1.2) as PrivateKeyInfo (RFC 5208, 5).
fn pkcs8_of_rsa(pkcs1: &[u8]) -> Vec<u8> {
    // INTEGER 0, and SEQUENCE { rsaEncryption, NULL }.
    const VERSION_AND_ALGORITHM: [u8; 18] = [
        0x02, 0x01, 0x00, 0x30, 0x0d, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01, 0x05,
        0x00,
    ];
    const SEQUENCE: u8 = 0x30;
    const OCTET_STRING: u8 = 0x04;

    let key = Zeroizing::new([header(OCTET_STRING, pkcs1.len()).as_slice(), pkcs1].concat());
    let length = VERSION_AND_ALGORITHM.len() + key.len();
    [header(SEQUENCE, length).as_slice(), &VERSION_AND_ALGORITHM, key.as_slice()].concat()
}

/// The tag and the length of a DER value, in the shortest form.
fn header(tag: u8, length: usize) -> Vec<u8> {
    match u8::try_from(length) {
        Ok(length @ ..0x80) => vec![tag, length],
        _ => {
            let bytes: Vec<u8> = length.to_be_bytes().into_iter().skip_while(|byte| *byte == 0).collect();
            // A length has eight bytes at most.
            let count = u8::try_from(bytes.len()).unwrap_or_default();
            [&[tag, 0x80 | count][..], bytes.as_slice()].concat()
        }
    }
}

fn named(name: &str) -> DistinguishedName {
    let mut distinguished_name = DistinguishedName::new();
    distinguished_name.push(DnType::CommonName, name);
    distinguished_name
}

/// rcgen makes its times of dates, to which a duration can be added.
fn since_epoch(at: Timestamp) -> Duration {
    Duration::from_secs(u64::try_from(at.as_second()).unwrap_or_default())
}

fn backdated(now: Timestamp) -> Timestamp {
    now.checked_sub(BACKDATED).unwrap_or(now)
}

/// The name of the authority.
const NAME: &str = "kube2ram-authenticator-ca";
/// The name of its certificates: another one, or they would seem to be self-signed.
const LEAF_NAME: &str = "kube2ram-authenticator";
const LIFETIME: SignedDuration = SignedDuration::from_hours(100 * 365 * 24);
const LEAF_LIFETIME: SignedDuration = SignedDuration::from_hours(7 * 24);
/// How far clocks may be apart.
const BACKDATED: SignedDuration = SignedDuration::from_hours(1);
