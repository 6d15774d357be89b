//! The metadata server's credentials document, as the agent writes it. Pure; called through the dialect.
//! One of the two places outside of request signing where secrets are exposed; the other is Alibaba Cloud's.

use std::io::Write as _;

use bytes::Bytes;
use secrecy::{ExposeSecret as _, zeroize::Zeroizing};

use crate::{
    credentials::Credentials,
    wire::{document_capacity, write_time},
};

/// Writes it: keys, order and white space as in the EC2 user guide, "Retrieve security credentials from
/// instance metadata". SDKs take any JSON, but scripts cut the document at its lines.
///
/// # Errors
/// Those of the JSON writer, which none of these values can cause.
pub(super) fn write(credentials: &Credentials) -> serde_json::Result<Bytes> {
    let secret = credentials.access_key_secret.expose_secret();
    let token = credentials.security_token.expose_secret();
    let pairs = [
        ("Code", "Success"),
        ("LastUpdated", &write_time(credentials.issued_at)),
        ("Type", "AWS-HMAC"),
        ("AccessKeyId", &credentials.access_key_id),
        ("SecretAccessKey", secret),
        ("Token", token),
        ("Expiration", &write_time(credentials.expires_at)),
    ];
    // Zeroised when it is dropped; a vector that grows would leave copies behind.
    let capacity = document_capacity([&credentials.access_key_id, secret, token]);
    let mut document = Zeroizing::new(Vec::with_capacity(capacity));
    for (number, (key, value)) in pairs.into_iter().enumerate() {
        let before = if number == 0 { "{" } else { "," };
        write!(document, "{before}\n  \"{key}\" : ").map_err(serde_json::Error::io)?;
        serde_json::to_writer(&mut *document, value)?;
    }
    document.extend_from_slice(b"\n}");
    Ok(Bytes::from_owner(document))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aws::wire::parse_node_credentials;

    fn credentials() -> Credentials {
        Credentials {
            access_key_id: "ASIAFAKE".into(),
            access_key_secret: "fake-secret".into(),
            security_token: "IQoJ/fake+token==\"\\".into(),
            issued_at: "2026-01-02T03:04:05.678Z".parse().unwrap(),
            expires_at: "2026-01-02T12:04:05.999+08:00".parse().unwrap(),
            request_id: None,
            document: Default::default(),
        }
    }

    #[test]
    fn writes_seven_strings_as_the_real_server() {
        let document = write(&credentials()).unwrap();

        insta::assert_snapshot!(str::from_utf8(&document).unwrap(), @r#"
        {
          "Code" : "Success",
          "LastUpdated" : "2026-01-02T03:04:05Z",
          "Type" : "AWS-HMAC",
          "AccessKeyId" : "ASIAFAKE",
          "SecretAccessKey" : "fake-secret",
          "Token" : "IQoJ/fake+token==\"\\",
          "Expiration" : "2026-01-02T04:04:05Z"
        }
        "#);
        assert!(document.starts_with(b"{\n") && document.ends_with(b"\n}"), "no newline after the last line");
    }

    #[test]
    fn reads_back_as_it_was_written() {
        let issued = parse_node_credentials(&write(&credentials()).unwrap()).unwrap();

        assert_eq!(&*issued.access_key_id, "ASIAFAKE");
        assert_eq!(issued.access_key_secret.expose_secret(), "fake-secret");
        assert_eq!(issued.security_token.expose_secret(), "IQoJ/fake+token==\"\\");
        assert_eq!(issued.expires_at.to_string(), "2026-01-02T04:04:05Z");
    }

    #[test]
    fn has_room_for_values_of_any_length_with_an_escape_in_each_place() {
        for length in [1, 4096, 65_536] {
            let value = "\"".repeat(length);
            let credentials = Credentials {
                access_key_id: value.as_str().into(),
                access_key_secret: value.as_str().into(),
                security_token: value.as_str().into(),
                ..credentials()
            };

            let length = write(&credentials).unwrap().len();
            assert!(length <= document_capacity([&value; 3]), "{length}");
        }
    }
}
