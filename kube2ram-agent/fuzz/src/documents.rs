//! Answers of Alibaba Cloud's STS and metadata server: a value that is valid in headers and in pods'
//! documents, or an error.

use kube2ram_cloud::alibaba::wire::{
    ErrorDocument, Issued, parse_assume_role, parse_error, parse_node_credentials,
};

/// Checks one document in all its readings.
pub fn check(body: &[u8]) {
    for issued in [parse_assume_role(body), parse_node_credentials(body)].into_iter().flatten() {
        check_issued(&issued);
    }
    if let Some(error) = parse_error(body) {
        check_error(&error);
    }
}

/// On every cloud.
pub(super) fn check_issued(Issued { access_key_id, expires_at, request_id, .. }: &Issued) {
    let is_word = |id: &str| (1..=64).contains(&id.len()) && id.bytes().all(|c| c.is_ascii_graphic());
    assert!(request_id.as_deref().is_none_or(is_word), "{request_id:?}");
    assert!(!access_key_id.is_empty() && access_key_id.bytes().all(|c| c.is_ascii_graphic()));
    // Of 20 characters, as the SDKs read it.
    assert_eq!(expires_at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string().len(), 20);
    assert_eq!(expires_at.subsec_nanosecond(), 0);
}

/// On every cloud.
pub(super) fn check_error(ErrorDocument { code, message, request_id }: &ErrorDocument) {
    for word in [code, request_id] {
        assert!(word.len() <= 64 && word.bytes().all(|c| c.is_ascii_graphic()), "{word:?}");
    }
    assert!(!code.is_empty());
    assert!(message.chars().count() <= 256 && !message.contains(char::is_control));
}
