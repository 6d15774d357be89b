//! The metadata server's credentials document, as the agent writes it. Pure; called through the dialect.
//! One of the two places outside of request signing where secrets are exposed; the other is AWS's.

use bytes::Bytes;
use secrecy::{ExposeSecret, zeroize::Zeroizing};
use serde::Serialize;

use crate::{
    credentials::Credentials,
    wire::{document_capacity, write_time},
};

/// Keys and order as in Alibaba Cloud's document "Obtain a temporary authorization token". Every value is a
/// string: the C# SDK reads a `Dictionary<string, string>`.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Document<'a> {
    access_key_id: &'a str,
    access_key_secret: &'a str,
    expiration: &'a str,
    security_token: &'a str,
    last_updated: &'a str,
    code: &'static str,
}

/// Writes it.
///
/// # Errors
/// Those of the JSON writer, which none of these values can cause.
pub(super) fn write(credentials: &Credentials) -> serde_json::Result<Bytes> {
    let secret = credentials.access_key_secret.expose_secret();
    let token = credentials.security_token.expose_secret();
    // Zeroised when it is dropped; a vector that grows would leave copies behind.
    let capacity = document_capacity([&credentials.access_key_id, secret, token]);
    let mut document = Zeroizing::new(Vec::with_capacity(capacity));
    serde_json::to_writer(
        &mut *document,
        &Document {
            access_key_id: &credentials.access_key_id,
            access_key_secret: secret,
            expiration: &write_time(credentials.expires_at),
            security_token: token,
            last_updated: &write_time(credentials.issued_at),
            code: "Success",
        },
    )?;
    Ok(Bytes::from_owner(document))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn credentials() -> Credentials {
        Credentials {
            access_key_id: "STS.FAKE".into(),
            access_key_secret: "fake-secret".into(),
            security_token: "CAIS/fake+token==\"\\".into(),
            issued_at: "2026-01-02T03:04:05.678Z".parse().unwrap(),
            expires_at: "2026-01-02T12:04:05.999+08:00".parse().unwrap(),
            request_id: None,
            document: Default::default(),
        }
    }

    #[test]
    fn writes_six_strings_in_the_documented_order() {
        let document = write(&credentials()).unwrap();

        insta::assert_snapshot!(str::from_utf8(&document).unwrap(), @r#"{"AccessKeyId":"STS.FAKE","AccessKeySecret":"fake-secret","Expiration":"2026-01-02T04:04:05Z","SecurityToken":"CAIS/fake+token==\"\\","LastUpdated":"2026-01-02T03:04:05Z","Code":"Success"}"#);
    }

    #[test]
    fn writes_times_of_twenty_characters_in_utc() {
        let document: serde_json::Value = serde_json::from_slice(&write(&credentials()).unwrap()).unwrap();

        assert_eq!(document["LastUpdated"], "2026-01-02T03:04:05Z");
        assert_eq!(document["Expiration"], "2026-01-02T04:04:05Z");
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
