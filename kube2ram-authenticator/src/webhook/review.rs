//! TokenReview, in `authentication.k8s.io/v1` and `v1beta1`, as the API server sends it and reads it. Pure.
//! Depends on `identity`; called by the parent.
//!
//! Source: kubernetes `staging/src/k8s.io/api/authentication/{v1,v1beta1}/types.go`.

use std::collections::BTreeMap;

use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize, de::IgnoredAny};

use crate::identity::{Identity, User};

/// What is asked.
#[derive(Debug)]
pub(super) struct Review {
    pub(super) version: Version,
    token: SecretString,
}

/// A version of the API: an answer has that of its question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub(super) enum Version {
    #[serde(rename = "authentication.k8s.io/v1")]
    V1,
    #[serde(rename = "authentication.k8s.io/v1beta1")]
    V1Beta1,
}

#[derive(Clone, Copy, Deserialize, Serialize)]
enum Kind {
    TokenReview,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Asked {
    api_version: Version,
    #[serde(rename = "kind")]
    _kind: Kind,
    spec: Spec,
    /// With it, serde takes no array for an object.
    #[serde(flatten)]
    _other: BTreeMap<String, IgnoredAny>,
}

/// `audiences` are not looked at: an answer without `status.audiences` is for the API server itself, never
/// for another audience.
#[derive(Deserialize)]
struct Spec {
    token: SecretString,
    #[serde(flatten)]
    _other: BTreeMap<String, IgnoredAny>,
}

impl Review {
    /// `None` for everything else, also for another version.
    pub(super) fn parse(body: &[u8]) -> Option<Self> {
        let Asked { api_version: version, spec, .. } = serde_json::from_slice(body).ok()?;
        Some(Self { version, token: spec.token })
    }

    pub(super) fn token(&self) -> &str {
        self.token.expose_secret()
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Answered<'a> {
    api_version: Version,
    kind: Kind,
    status: Status<'a>,
}

#[derive(Serialize)]
struct Status<'a> {
    authenticated: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    user: Option<UserInfo<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
}

#[derive(Serialize)]
struct UserInfo<'a> {
    username: &'a str,
    uid: String,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    groups: &'a [Box<str>],
    extra: BTreeMap<&'static str, [&'a str; 1]>,
}

/// The answer that lets a user in. Its `uid` and the names in `extra` are those of the predecessor, on which
/// audit queries rely. `extended` adds the access key id and the principal id.
///
/// # Errors
/// serde_json's, which has no reason to fail here.
pub(super) fn granted(
    version: Version,
    user: &User,
    identity: &Identity,
    extended: bool,
) -> serde_json::Result<Vec<u8>> {
    let mut extra = BTreeMap::from([
        ("arn", [&*identity.arn]),
        ("canonicalArn", [&*identity.canonical_arn]),
        ("sessionName", [identity.session_name.as_deref().unwrap_or_default()]),
    ]);
    if extended {
        extra.insert("accessKeyId", [&*identity.access_key_id]);
        extra.insert("principalId", [&*identity.user_id]);
    }
    let uid = format!("ack-ram-authenticator:{}:{}", identity.account_id, identity.user_id);
    let user = UserInfo { username: &user.username, uid, groups: &user.groups, extra };
    let status = Status { authenticated: true, user: Some(user), error: None };
    serde_json::to_vec(&Answered { api_version: version, kind: Kind::TokenReview, status })
}

/// The answer that lets nobody in.
///
/// # Errors
/// As [`granted`].
pub(super) fn denied(version: Version, error: Option<&str>) -> serde_json::Result<Vec<u8>> {
    let status = Status { authenticated: false, user: None, error };
    serde_json::to_vec(&Answered { api_version: version, kind: Kind::TokenReview, status })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As the API server of Kubernetes 1.36 writes it.
    fn asked(version: &str) -> String {
        format!(
            r#"{{"kind":"TokenReview","apiVersion":"authentication.k8s.io/{version}",
            "metadata":{{"creationTimestamp":null}},"spec":{{"token":"a token","audiences":["https://api"]}},
            "status":{{"user":{{}}}}}}"#
        )
    }

    fn identity() -> Identity {
        Identity {
            arn: "acs:ram::1:assumed-role/Admin/alice".into(),
            canonical_arn: "acs:ram::1:role/Admin".into(),
            account_id: "1".into(),
            user_id: "30000".into(),
            session_name: Some("alice".into()),
            access_key_id: "STS.key".into(),
        }
    }

    #[test]
    fn reads_both_versions() {
        for (text, version) in [("v1", Version::V1), ("v1beta1", Version::V1Beta1)] {
            let review = Review::parse(asked(text).as_bytes()).unwrap();
            assert_eq!((review.version, review.token()), (version, "a token"));
            assert!(!format!("{review:?}").contains("a token"));
        }
    }

    #[test]
    fn reads_nothing_else() {
        let good = asked("v1");
        for bad in [
            String::new(),
            "{}".into(),
            "[]".into(),
            "null".into(),
            asked("v2"),
            good.replace("TokenReview", "SubjectAccessReview"),
            good.replace(r#""kind":"TokenReview","#, ""),
            good.replace("authentication.k8s.io/", ""),
            good.replace(r#""token":"a token","#, ""),
            good.replace(r#""a token""#, "1"),
            good.replace(r#""token":"a token""#, r#""token":"a token","token":"b""#),
            format!("{good}x"),
            r#"["authentication.k8s.io/v1","TokenReview",{"token":"a token"}]"#.into(),
            good.replace(r#"{"token":"a token","audiences":["https://api"]}"#, r#"["a token"]"#),
        ] {
            assert_ne!(bad, good);
            assert!(Review::parse(bad.as_bytes()).is_none(), "{bad}");
        }
    }

    #[test]
    fn grants_as_the_predecessor_with_the_questions_version() {
        let user = User { username: "admin:alice".into(), groups: vec!["a".into(), "b".into()] };

        let v1 = granted(Version::V1, &user, &identity(), false).unwrap();
        let beta = granted(Version::V1Beta1, &user, &identity(), true).unwrap();

        assert_eq!(
            String::from_utf8(v1).unwrap(),
            r#"{"apiVersion":"authentication.k8s.io/v1","kind":"TokenReview","status":{"authenticated":true,"user":{"username":"admin:alice","uid":"ack-ram-authenticator:1:30000","groups":["a","b"],"extra":{"arn":["acs:ram::1:assumed-role/Admin/alice"],"canonicalArn":["acs:ram::1:role/Admin"],"sessionName":["alice"]}}}}"#
        );
        assert_eq!(
            String::from_utf8(beta).unwrap(),
            r#"{"apiVersion":"authentication.k8s.io/v1beta1","kind":"TokenReview","status":{"authenticated":true,"user":{"username":"admin:alice","uid":"ack-ram-authenticator:1:30000","groups":["a","b"],"extra":{"accessKeyId":["STS.key"],"arn":["acs:ram::1:assumed-role/Admin/alice"],"canonicalArn":["acs:ram::1:role/Admin"],"principalId":["30000"],"sessionName":["alice"]}}}}"#
        );
    }

    #[test]
    fn a_user_without_groups_or_session_has_neither() {
        let user = User { username: "bob".into(), groups: Vec::new() };
        let identity = Identity { session_name: None, ..identity() };

        let text = String::from_utf8(granted(Version::V1, &user, &identity, false).unwrap()).unwrap();

        assert!(!text.contains("groups") && text.contains(r#""sessionName":[""]"#), "{text}");
    }

    #[test]
    fn denies_without_an_error_unless_one_is_given() {
        let text = |error| String::from_utf8(denied(Version::V1, error).unwrap()).unwrap();

        assert_eq!(
            text(None),
            r#"{"apiVersion":"authentication.k8s.io/v1","kind":"TokenReview","status":{"authenticated":false}}"#
        );
        assert_eq!(
            text(Some("[ack-ram-authenticator] invalid token")),
            r#"{"apiVersion":"authentication.k8s.io/v1","kind":"TokenReview","status":{"authenticated":false,"error":"[ack-ram-authenticator] invalid token"}}"#
        );
    }

    proptest! {
        #[test]
        fn never_panics(body in proptest::collection::vec(any::<u8>(), 0..512)) {
            drop(Review::parse(&body));
        }

        #[test]
        fn no_name_changes_the_decision(username in any::<String>(), group in any::<String>()) {
            let user = User { username: username.as_str().into(), groups: vec![group.as_str().into()] };

            let answer = granted(Version::V1, &user, &identity(), false).unwrap();

            let answer: serde_json::Value = serde_json::from_slice(&answer).unwrap();
            prop_assert_eq!(&answer["status"]["user"]["username"], &serde_json::json!(username));
            prop_assert_eq!(&answer["status"]["user"]["groups"], &serde_json::json!([group]));
        }
    }
}
