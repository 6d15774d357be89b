//! An impostor of STS, without a certificate that the system trusts.

use std::{
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::mpsc,
    thread,
};

use rustls::{
    ServerConfig, ServerConnection, StreamOwned,
    pki_types::{CertificateDer, PrivatePkcs8KeyDer},
};

use super::*;

/// Self-signed, for 127.0.0.1, as DER; until 2126.
const CERTIFICATE: &str = "\
    3082016930820110a00302010202140c0bf2bd74ca0192b203f09d602696bbcab38446300a06082a8648ce3d04030230133111300f0603\
    5504030c08696d706f73746f723020170d3236313132323130313830335a180f32313236313032393130313830335a30133111300f0603\
    5504030c08696d706f73746f723059301306072a8648ce3d020106082a8648ce3d03010703420004d4962c49f86833be30a53196c55ce1\
    b472005958b8861e43405fec0755435ea746d8bf89fac28ee1edaa60cc702304ff4558b3e631b7c06361768eb89d0b862fa340303e300c\
    0603551d130101ff04023000300f0603551d110408300687047f000001301d0603551d0e041604149f95461b5e73fdf60c1b052a63c91d\
    623098cb29300a06082a8648ce3d04030203470030440220564cfa83422619586dc7814d52b62e26738819fed4720769adfbdf177d9b4d\
    820220646f594fc9aa9f53a450503c2b99f761aef02a07324627a0fcd16a8482b3c93a\
";
/// Its key, as PKCS #8. It opens nothing.
const KEY: &str = "\
    308187020100301306072a8648ce3d020106082a8648ce3d030107046d306b02010104205e63dadd93ae5988742378cebd8040cf86575d\
    d187ebdaac55420de4bdbf6e08a14403420004d4962c49f86833be30a53196c55ce1b472005958b8861e43405fec0755435ea746d8bf89\
    fac28ee1edaa60cc702304ff4558b3e631b7c06361768eb89d0b862f\
";

#[tokio::test]
async fn who_poses_as_sts_sees_no_request() {
    let (address, seen) = impostor();
    let url = format!("https://{address}");
    let issuer = issuer_of(vec![Endpoint::parse(&url).unwrap()], static_base(), &SetClock::at(NOW));
    let root = reqwest::Certificate::from_der(&hex::decode(CERTIFICATE).unwrap()).unwrap();
    let believer = reqwest::Client::builder().no_proxy().tls_certs_only([root]).build().unwrap();

    let error = issuer.issue(&session(3600)).await.unwrap_err();
    let answer = believer.get(url).send().await.unwrap();

    assert_eq!((error.kind, &*error.code), (IssueErrorKind::Unavailable, "Connect"));
    assert_eq!(answer.status(), 200, "who trusts it is served");
    let mut refused = 0;
    let request = loop {
        match seen.recv_timeout(Duration::from_secs(5)).unwrap() {
            Ok(request) => break request,
            Err(_alert) => refused += 1,
        }
    };
    assert!(refused > 0 && request.starts_with("GET / "), "{refused} were refused before {request}");
}

/// Where it listens, and what it read of each connection, decrypted.
fn impostor() -> (SocketAddr, mpsc::Receiver<io::Result<String>>) {
    let _installed = rustls::crypto::ring::default_provider().install_default();
    let certificate = CertificateDer::from(hex::decode(CERTIFICATE).unwrap());
    let key = PrivatePkcs8KeyDer::from(hex::decode(KEY).unwrap());
    let config =
        ServerConfig::builder().with_no_client_auth().with_single_cert(vec![certificate], key.into());
    let config = Arc::new(config.unwrap());
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let (tell, seen) = mpsc::channel();
    thread::spawn(move || {
        for connection in listener.incoming() {
            if tell.send(serve(connection.unwrap(), &config)).is_err() {
                break;
            }
        }
    });
    (address, seen)
}

fn serve(connection: TcpStream, config: &Arc<ServerConfig>) -> io::Result<String> {
    let tls = ServerConnection::new(Arc::clone(config)).map_err(io::Error::other)?;
    let mut stream = StreamOwned::new(tls, connection);
    let mut head = [0; 4096];
    let length = stream.read(&mut head)?;
    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")?;
    stream.flush()?;
    Ok(String::from_utf8_lossy(&head[..length]).into_owned())
}
