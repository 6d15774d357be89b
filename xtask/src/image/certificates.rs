//! The certificates by which the agent knows STS: Mozilla's list, as the lock file pins it. This machine's
//! own could hold others, and would make an image that depends on where it was built. Pure; called by
//! `image`.

use base64::{Engine as _, engine::general_purpose::STANDARD};

/// Where rustls-native-certs looks without configuration (openssl-probe's first candidate).
pub(crate) const PATH: &str = "etc/ssl/certs/ca-certificates.crt";

/// As text (RFC 7468).
pub(crate) fn pem() -> String {
    const LINE: usize = 64;
    let mut text = String::new();
    for certificate in webpki_root_certs::TLS_SERVER_ROOT_CERTS {
        text.push_str("-----BEGIN CERTIFICATE-----\n");
        let encoded = STANDARD.encode(certificate);
        for start in (0..encoded.len()).step_by(LINE) {
            text.push_str(&encoded[start..encoded.len().min(start + LINE)]);
            text.push('\n');
        }
        text.push_str("-----END CERTIFICATE-----\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_certificate_comes_back_from_the_text() {
        let pem = pem();

        let certificates = pem.split_terminator("-----END CERTIFICATE-----\n").map(|one| {
            let body = one.strip_prefix("-----BEGIN CERTIFICATE-----\n").unwrap();
            assert!(body.lines().all(|line| line.len() <= 64));
            STANDARD.decode(body.replace('\n', "")).unwrap()
        });
        let expected = webpki_root_certs::TLS_SERVER_ROOT_CERTS.iter().map(|one| one.to_vec());
        assert!(expected.len() > 100);
        assert!(certificates.eq(expected));
    }
}
