//! Handshakes over a pipe, as the API server makes them: it trusts what its kubeconfig names, and nothing
//! else.

use std::{fs, os::unix::fs::PermissionsExt as _, sync::Mutex};

use jiff::ToSpan as _;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio_rustls::TlsConnector;

use super::*;
use crate::testing::SetClock;

const PREDECESSOR: (&str, &str) =
    (include_str!("tests/predecessor-cert.pem"), include_str!("tests/predecessor-key.pem"));

/// rustls looks at the machine's own clock.
fn clock() -> Arc<SetClock> {
    Arc::new(SetClock(Mutex::new(Timestamp::now())))
}

fn own(directory: &Path) -> Settings {
    let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
    Settings { certificate: Source::Own { directory: directory.to_owned(), names }, client_ca: None }
}

fn load(settings: Settings, clock: &Arc<SetClock>) -> Result<Arc<Tls>, TlsError> {
    Tls::load(settings, Arc::clone(clock) as Arc<dyn Clock>, &mut Registry::default())
}

/// A certificate of an authority in `directory`, as a server's or a client's files.
fn files_of(directory: &Path, name: &str) -> (PathBuf, PathBuf) {
    let now = Timestamp::now();
    let (authority, _) = Authority::open_or_create(directory, now).unwrap();
    let (certificate, key, _) = authority.certify(&[name.to_owned()], now).unwrap();
    let pem = |label: &str, der: &[u8]| {
        use base64::{Engine as _, engine::general_purpose::STANDARD};
        format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", STANDARD.encode(der))
    };
    let paths = (directory.join("tls.crt"), directory.join("tls.key"));
    fs::write(&paths.0, pem("CERTIFICATE", &certificate)).unwrap();
    fs::write(&paths.1, pem("PRIVATE KEY", key.secret_der())).unwrap();
    paths
}

/// The certificate that a client sees that trusts `ca` only.
async fn handshake(
    tls: &Tls,
    ca: &Path,
    name: &str,
    client: Option<&(PathBuf, PathBuf)>,
) -> io::Result<CertificateDer<'static>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let config = match client {
        Some((certificate, key)) => config
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_file(certificate).unwrap()],
                PrivateKeyDer::from_pem_file(key).unwrap(),
            )
            .unwrap(),
        None => config.with_no_client_auth(),
    };
    let (ours, theirs) = tokio::io::duplex(64 * 1024);
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let connector = TlsConnector::from(Arc::new(config));
    let (accepted, connected) = tokio::join!(tls.acceptor().accept(ours), connector.connect(name, theirs));
    let (_accepted, connected) = (accepted?, connected?);
    let shown = connected.get_ref().1.peer_certificates().unwrap();
    Ok(shown[0].clone().into_owned())
}

#[tokio::test]
async fn an_api_server_that_trusts_the_ca_trusts_it_after_every_restart() {
    let directory = tempfile::tempdir().unwrap();
    let (ca, clock) = (directory.path().join("cert.pem"), clock());

    let first = load(own(directory.path()), &clock).unwrap();
    let made = fs::read(&ca).unwrap();
    let shown = handshake(&first, &ca, "localhost", None).await.unwrap();
    let second = load(own(directory.path()), &clock).unwrap();

    assert_eq!(fs::read(&ca).unwrap(), made, "never made again");
    for name in ["localhost", "127.0.0.1"] {
        assert_ne!(handshake(&second, &ca, name, None).await.unwrap(), shown, "a leaf of its own");
    }
    assert!(handshake(&second, &ca, "elsewhere.example", None).await.is_err());
    let mode = |name| fs::metadata(directory.path().join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("key.pem"), mode("cert.pem")), (0o600, 0o644));
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2, "no leaf is written");
}

#[tokio::test]
async fn nobody_takes_another_authority_for_it() {
    let (directory, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let tls = load(own(directory.path()), &clock()).unwrap();
    load(own(other.path()), &clock()).unwrap();

    assert!(handshake(&tls, &directory.path().join("cert.pem"), "localhost", None).await.is_ok());
    assert!(handshake(&tls, &other.path().join("cert.pem"), "localhost", None).await.is_err());
}

#[tokio::test]
async fn goes_on_with_the_predecessors_certificate() {
    let directory = tempfile::tempdir().unwrap();
    let ca = directory.path().join("cert.pem");
    fs::write(&ca, PREDECESSOR.0).unwrap();
    fs::write(directory.path().join("key.pem"), PREDECESSOR.1).unwrap();

    let tls = load(own(directory.path()), &clock()).unwrap();

    handshake(&tls, &ca, "localhost", None).await.unwrap();
    assert_eq!(fs::read_to_string(&ca).unwrap(), PREDECESSOR.0);
}

#[tokio::test]
async fn its_own_certificate_is_exchanged_each_day_without_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let (ca, clock) = (directory.path().join("cert.pem"), clock());
    let tls = load(own(directory.path()), &clock).unwrap();
    let first = handshake(&tls, &ca, "localhost", None).await.unwrap();
    assert!(!tls.refresh().unwrap(), "it is fresh");

    let started = clock.now();
    *clock.0.lock().unwrap() = started + 25.hours();
    assert!(tls.is_valid());
    assert!(tls.refresh().unwrap());
    assert!(!tls.refresh().unwrap(), "once");
    assert_eq!(tls.current().until, started + (8 * 24 + 1).hours());
    *clock.0.lock().unwrap() = started + 51.hours();
    assert!(tls.refresh().unwrap());

    // The certificates of that time are not valid for a client of today, but the next one is.
    assert!(handshake(&tls, &ca, "localhost", None).await.is_err());
    *clock.0.lock().unwrap() = started;
    let again = load(own(directory.path()), &clock).unwrap();
    assert_ne!(handshake(&again, &ca, "localhost", None).await.unwrap(), first);
}

#[test]
fn half_an_authority_is_not_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let clock = clock();
    load(own(directory.path()), &clock).unwrap();
    let (certificate, key) = (directory.path().join("cert.pem"), directory.path().join("key.pem"));

    let saved = fs::read(&key).unwrap();
    fs::remove_file(&key).unwrap();
    assert!(matches!(load(own(directory.path()), &clock), Err(TlsError::Half { .. })));
    fs::write(&key, saved).unwrap();
    assert!(load(own(directory.path()), &clock).is_ok(), "restored");
    // As a process leaves it that ended in between: nobody knows the certificate yet.
    fs::remove_file(&certificate).unwrap();

    assert!(load(own(directory.path()), &clock).is_ok());
}

#[test]
fn refuses_what_is_no_authority_of_its_key() {
    let (directory, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let clock = clock();
    load(own(directory.path()), &clock).unwrap();
    let leaf = files_of(other.path(), "localhost");
    let key = directory.path().join("key.pem");
    let saved = fs::read(&key).unwrap();

    fs::copy(other.path().join("key.pem"), &key).unwrap();
    assert!(matches!(load(own(directory.path()), &clock), Err(TlsError::Authority(_))));
    fs::write(&key, "no key").unwrap();
    assert!(matches!(load(own(directory.path()), &clock), Err(TlsError::Pem { .. })));
    fs::write(&key, saved).unwrap();
    assert!(load(own(directory.path()), &clock).is_ok(), "the allowed twin");
    fs::copy(&leaf.0, directory.path().join("cert.pem")).unwrap();
    fs::copy(&leaf.1, &key).unwrap();

    assert!(matches!(load(own(directory.path()), &clock), Err(TlsError::Authority(_))));
}

#[test]
fn an_authority_that_has_expired_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let clock = clock();
    load(own(directory.path()), &clock).unwrap();
    let now = clock.now();

    *clock.0.lock().unwrap() = now + (101 * 365 * 24).hours();

    assert!(matches!(load(own(directory.path()), &clock), Err(TlsError::Expired { .. })));
}

/// As a machine leaves it whose clock was ahead when it made the authority.
#[test]
fn an_authority_that_is_not_valid_yet_is_named_at_the_start_and_when_the_clock_is_corrected() {
    let directory = tempfile::tempdir().unwrap();
    let clock = clock();
    let now = clock.now();
    *clock.0.lock().unwrap() = now + 48.hours();
    let tls = load(own(directory.path()), &clock).unwrap();
    assert!(tls.is_valid() && tls.refresh().is_ok(), "the allowed twin");

    *clock.0.lock().unwrap() = now;

    assert!(!tls.is_valid(), "the API server would not trust it");
    let error = tls.refresh().unwrap_err();
    assert!(matches!(error, TlsError::NotYetValid { .. }));
    assert!(error.to_string().contains("cert.pem is not valid yet: it is valid from "), "{error}");
    assert!(matches!(load(own(directory.path()), &clock), Err(TlsError::NotYetValid { .. })));
    assert!(matches!(check(&wanted_in(directory.path()), now), Err(TlsError::NotYetValid { .. })));
}

#[tokio::test]
async fn files_that_change_are_read_again_and_broken_ones_are_not_used() {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (certificate, key) = files_of(first.path(), "localhost");
    let next = files_of(second.path(), "localhost");
    let source = Source::Files { certificate: certificate.clone(), key: key.clone() };
    let tls = load(Settings { certificate: source, client_ca: None }, &clock()).unwrap();
    let ca = |directory: &tempfile::TempDir| directory.path().join("cert.pem");
    handshake(&tls, &ca(&first), "localhost", None).await.unwrap();
    assert!(!tls.refresh().unwrap());

    // In the middle of an exchange: the key is still the old one.
    fs::copy(&next.0, &certificate).unwrap();
    assert!(!tls.refresh().unwrap(), "one look is not enough");
    assert!(tls.refresh().is_err());
    handshake(&tls, &ca(&first), "localhost", None).await.unwrap();
    fs::copy(&next.1, &key).unwrap();
    assert!(!tls.refresh().unwrap(), "one look is not enough");
    handshake(&tls, &ca(&first), "localhost", None).await.unwrap();
    assert!(tls.refresh().unwrap());
    handshake(&tls, &ca(&second), "localhost", None).await.unwrap();
    fs::remove_file(&key).unwrap();
    assert!(matches!(tls.refresh(), Err(TlsError::Missing(_))));

    handshake(&tls, &ca(&second), "localhost", None).await.unwrap();
}

#[test]
fn does_not_start_without_a_valid_certificate() {
    let directory = tempfile::tempdir().unwrap();
    let (certificate, key) = files_of(directory.path(), "localhost");
    let clock = clock();
    let settings = |certificate: &Path, key: &Path| Settings {
        certificate: Source::Files { certificate: certificate.into(), key: key.into() },
        client_ca: None,
    };

    assert!(load(settings(&certificate, &key), &clock).is_ok(), "the allowed twin");
    assert!(matches!(load(settings(&key, &key), &clock), Err(TlsError::Pem { .. })));
    assert!(matches!(load(settings(&certificate, &certificate), &clock), Err(TlsError::Pem { .. })));
    let none = directory.path().join("none");
    assert!(matches!(load(settings(&none, &key), &clock), Err(TlsError::Missing(_))));
    let now = clock.now();
    *clock.0.lock().unwrap() = now + (8 * 24).hours();
    assert!(matches!(load(settings(&certificate, &key), &clock), Err(TlsError::Expired { .. })));
}

#[tokio::test]
async fn asks_for_a_client_certificate_when_it_is_told_to() {
    let directories = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let [server, api_server, stranger] = directories.each_ref().map(tempfile::TempDir::path);
    let known = client_files(api_server);
    let unknown = client_files(stranger);
    let settings = Settings { client_ca: Some(api_server.join("cert.pem")), ..own(server) };
    let tls = load(settings, &clock()).unwrap();
    let ca = server.join("cert.pem");

    assert!(handshake(&tls, &ca, "localhost", Some(&known)).await.is_ok());
    assert!(handshake(&tls, &ca, "localhost", None).await.is_err());
    assert!(handshake(&tls, &ca, "localhost", Some(&unknown)).await.is_err());
}

/// A client's certificate and key of an authority of its own, whose certificate is `cert.pem`.
fn client_files(directory: &Path) -> (PathBuf, PathBuf) {
    use rcgen::{
        BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    };
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "clients");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    fs::write(directory.join("cert.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
    let issuer = Issuer::new(params, key);
    let mut params = CertificateParams::new(vec!["apiserver".to_owned()]).unwrap();
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, &issuer).unwrap();
    let paths = (directory.join("client.crt"), directory.join("client.key"));
    fs::write(&paths.0, certificate.pem()).unwrap();
    fs::write(&paths.1, key.serialize_pem()).unwrap();
    paths
}

#[tokio::test(start_paused = true)]
async fn is_not_ready_while_its_certificate_is_not_valid() {
    let directory = tempfile::tempdir().unwrap();
    let (certificate, key) = files_of(directory.path(), "localhost");
    let clock = clock();
    let settings = Settings { certificate: Source::Files { certificate, key }, client_ca: None };
    let tls = load(settings, &clock).unwrap();
    let readiness = Readiness::default();
    let now = clock.now();
    let keeping = tokio::spawn(Arc::clone(&tls).keep(readiness.clone()));

    tokio::time::sleep(2 * REFRESH_EVERY).await;
    assert!(readiness.pending().is_empty());
    *clock.0.lock().unwrap() = now + (8 * 24).hours();
    tokio::time::sleep(2 * REFRESH_EVERY).await;
    assert_eq!(readiness.pending(), ["a valid TLS certificate"]);
    *clock.0.lock().unwrap() = now;
    tokio::time::sleep(2 * REFRESH_EVERY).await;

    assert!(readiness.pending().is_empty());
    assert!(!keeping.is_finished());
    keeping.abort();
}

fn wanted(directory: &Path) -> Init {
    Init {
        directory: directory.join("state"),
        kubeconfig: directory.join("etc/kubeconfig.yaml"),
        hostname: "localhost".into(),
        address: "127.0.0.1".parse().unwrap(),
        port: 21362,
        client: None,
    }
}

/// The same with the authority in `directory` itself.
fn wanted_in(directory: &Path) -> Init {
    Init { directory: directory.to_owned(), ..wanted(directory) }
}

#[test]
fn init_makes_everything_once_and_changes_nothing_afterwards() {
    let directory = tempfile::tempdir().unwrap();
    let (wanted, now) = (wanted(directory.path()), Timestamp::now());
    assert_eq!(check(&wanted, now).unwrap().len(), 1, "nothing is there yet");

    let first = init(&wanted, now).unwrap();
    let read = || {
        ["state/cert.pem", "state/key.pem", "etc/kubeconfig.yaml"]
            .map(|name| fs::read(directory.path().join(name)).unwrap())
    };
    let made = read();
    let second = init(&wanted, now).unwrap();

    assert_eq!(first, Report { made_authority: true, wrote_kubeconfig: true });
    assert_eq!(second, Report { made_authority: false, wrote_kubeconfig: false });
    assert_eq!(read(), made);
    assert_eq!(check(&wanted, now).unwrap(), []);
}

#[test]
fn check_names_what_the_api_server_would_do_wrong_and_init_mends_the_kubeconfig_alone() {
    let directory = tempfile::tempdir().unwrap();
    let (wanted, now) = (wanted(directory.path()), Timestamp::now());
    init(&wanted, now).unwrap();
    let moved = Init { port: 31362, ..wanted.clone() };
    let made = fs::read(wanted.directory.join("cert.pem")).unwrap();

    let findings = check(&moved, now).unwrap();
    let report = init(&moved, now).unwrap();

    assert_eq!(findings.len(), 1);
    assert!(findings[0].to_string().contains("kubeconfig.yaml: its server is https://localhost:21362/"));
    assert_eq!(report, Report { made_authority: false, wrote_kubeconfig: true });
    assert_eq!(check(&moved, now).unwrap(), []);
    assert_eq!(fs::read(wanted.directory.join("cert.pem")).unwrap(), made);
}

#[test]
fn the_server_has_its_name_and_its_address_unless_it_listens_on_all() {
    let of = |hostname: &str, address: &str| {
        let directory = Path::new("/nowhere");
        Init { hostname: hostname.into(), address: address.parse().unwrap(), ..wanted(directory) }.names()
    };

    assert_eq!(of("localhost", "127.0.0.1"), ["localhost", "127.0.0.1"]);
    assert_eq!(of("127.0.0.1", "127.0.0.1"), ["127.0.0.1"]);
    assert_eq!(of("auth.example", "0.0.0.0"), ["auth.example"]);
}
