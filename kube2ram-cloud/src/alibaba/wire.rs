//! What Alibaba Cloud sends: STS answers, STS errors, the metadata server's credentials document. Pure and
//! total: any bytes in, a value or a [`WireError`] out. Sources: STS API 2015-04-01 (AssumeRole,
//! GetCallerIdentity), ECS "Instance RAM roles". Called by `sts`, `caller_identity`, `metadata`.

use secrecy::SecretString;
use serde::Deserialize;

use crate::wire::parse_time;
pub use crate::wire::{BODY_LIMIT_BYTES, ErrorDocument, Holder, Issued, WireError};

/// Parses the answer of AssumeRole, and of AssumeRoleWithOIDC, which says more of the token.
///
/// # Errors
/// See [`WireError`].
pub fn parse_assume_role(body: &[u8]) -> Result<Issued, WireError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Document {
        request_id: Option<String>,
        assumed_role_user: Option<User>,
        #[serde(rename = "OIDCTokenInfo")]
        token_info: Option<TokenInfo>,
        credentials: Credential,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct User {
        arn: Option<Box<str>>,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct TokenInfo {
        subject: Option<Box<str>>,
    }

    let Document { request_id, assumed_role_user, token_info, credentials } = parse(body)?;
    let holder = Holder {
        session_arn: assumed_role_user.and_then(|user| user.arn),
        subject: token_info.and_then(|info| info.subject),
    };
    Ok(credentials.issued()?.of_sts(request_id, holder))
}

/// Parses the metadata server's `ram/security-credentials/<role>`.
///
/// # Errors
/// See [`WireError`].
pub fn parse_node_credentials(body: &[u8]) -> Result<Issued, WireError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Document {
        code: String,
        #[serde(flatten)]
        credential: Credential,
    }

    let document = parse::<Document>(body)?;
    if document.code != "Success" {
        return Err(WireError::Unsuccessful);
    }
    document.credential.issued()
}

/// Who signed a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallerIdentity {
    /// `AccountId`.
    pub account_id: Box<str>,
    /// `Arn`: of a user, of an assumed role with its session, or of the account's root.
    pub arn: Box<str>,
    /// `PrincipalId`: the id of the user, or that of the role, `:` and the session's name.
    pub principal_id: Box<str>,
    /// `RequestId`; empty when it is missing.
    pub request_id: Box<str>,
}

/// Parses the answer of GetCallerIdentity.
///
/// # Errors
/// See [`WireError`].
pub fn parse_caller_identity(body: &[u8]) -> Result<CallerIdentity, WireError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Document {
        account_id: Box<str>,
        arn: Box<str>,
        principal_id: Box<str>,
        #[serde(default)]
        request_id: Box<str>,
    }

    let Document { account_id, arn, principal_id, request_id } = parse(body)?;
    Ok(CallerIdentity { account_id, arn, principal_id, request_id })
}

/// Parses an error of STS; `None` without a usable `Code`: then the answer is not from STS.
pub fn parse_error(body: &[u8]) -> Option<ErrorDocument> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Document {
        code: String,
        #[serde(default)]
        message: Option<String>,
        #[serde(default)]
        request_id: Option<String>,
    }

    let Document { code, message, request_id } = parse(body).ok()?;
    ErrorDocument::of(code, &message.unwrap_or_default(), request_id)
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Credential {
    access_key_id: String,
    // Zeroised from here on, also when the document turns out to be malformed.
    access_key_secret: SecretString,
    security_token: SecretString,
    expiration: String,
}

impl Credential {
    fn issued(self) -> Result<Issued, WireError> {
        let keys = ["AccessKeyId", "AccessKeySecret", "SecurityToken"];
        let Self { access_key_id, access_key_secret, security_token, expiration } = self;
        let expires_at = parse_time(&expiration)?;
        Issued::try_new(keys, &access_key_id, access_key_secret, security_token, expires_at)
    }
}

fn parse<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, WireError> {
    if body.len() > BODY_LIMIT_BYTES {
        return Err(WireError::TooLong);
    }
    // serde_json's error quotes values, which may be secret.
    serde_json::from_slice(body).or(Err(WireError::Json))
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use proptest::prelude::*;
    use secrecy::ExposeSecret as _;

    use super::*;

    const ASSUME_ROLE: &str = r#"{"RequestId":"6894B13B-6D71-4EF5-88FA-F32781734A7F",
        "AssumedRoleUser":{"Arn":"acs:ram::123456789012:role/adminrole/alice","AssumedRoleId":"344584339364951:alice"},
        "Credentials":{"AccessKeyId":"STS.L4aBSCSJVMuKg5U1","AccessKeySecret":"wyLTSm",
        "SecurityToken":"CAISng+/=","Expiration":"2015-04-09T11:52:19Z"}}"#;

    const NODE: &str = r#"{ "AccessKeyId" : "STS.6YSE", "AccessKeySecret" : "ajXjDU",
        "Expiration" : "2017-11-01T05:20:01Z", "SecurityToken" : "CAISng",
        "LastUpdated" : "2017-10-31T23:20:01Z", "Code" : "Success" }"#;

    #[test]
    fn parses_the_documented_assume_role_answer() {
        let issued = parse_assume_role(ASSUME_ROLE.as_bytes()).unwrap();

        assert_eq!(&*issued.access_key_id, "STS.L4aBSCSJVMuKg5U1");
        assert_eq!(issued.access_key_secret.expose_secret(), "wyLTSm");
        assert_eq!(issued.security_token.expose_secret(), "CAISng+/=");
        assert_eq!(issued.expires_at.to_string(), "2015-04-09T11:52:19Z");
        assert_eq!(issued.request_id.as_deref(), Some("6894B13B-6D71-4EF5-88FA-F32781734A7F"));
        let arn = "acs:ram::123456789012:role/adminrole/alice";
        assert_eq!(issued.holder, Holder { session_arn: Some(arn.into()), subject: None });
    }

    #[test]
    fn parses_for_whom_a_token_was_exchanged() {
        let info = r#""OIDCTokenInfo":{"Subject":"system:serviceaccount:shop:web","ClientIds":"sts.aliyuncs.com",
            "Issuer":"https://oidc.example.com/c0","IssuanceTime":"t","VerificationInfo":"Success"},"Credentials""#;
        let body = ASSUME_ROLE.replace("\"Credentials\"", info);

        let issued = parse_assume_role(body.as_bytes()).unwrap();

        assert_eq!(issued.holder.subject.as_deref(), Some("system:serviceaccount:shop:web"));
        // What is no text is no subject that could be compared.
        let other = body.replace("\"system:serviceaccount:shop:web\"", "7");
        assert_eq!(parse_assume_role(other.as_bytes()).unwrap_err(), WireError::Json);
    }

    #[test]
    fn credentials_without_a_request_id_are_as_good_and_a_strange_one_is_left_out() {
        for id in ["\"\"", "\"a b\"", "\"a\\nb\"", "null", &format!("\"{}\"", "x".repeat(65))] {
            let body = ASSUME_ROLE.replace("\"6894B13B-6D71-4EF5-88FA-F32781734A7F\"", id);
            assert_eq!(parse_assume_role(body.as_bytes()).unwrap().request_id, None, "{id}");
        }
        let none = ASSUME_ROLE.replace("RequestId", "Other");
        assert_eq!(parse_assume_role(none.as_bytes()).unwrap().request_id, None);
        assert_eq!(parse_node_credentials(NODE.as_bytes()).unwrap().request_id, None);
    }

    #[test]
    fn parses_the_documented_node_credentials_only_when_successful() {
        let failed = NODE.replace("Success", "Failed");

        assert_eq!(&*parse_node_credentials(NODE.as_bytes()).unwrap().access_key_id, "STS.6YSE");
        assert_eq!(parse_node_credentials(failed.as_bytes()).unwrap_err(), WireError::Unsuccessful);
    }

    #[test]
    fn parses_who_called_and_nothing_less() {
        let body = r#"{"IdentityType":"AssumedRoleUser","AccountId":"196813200012****","RequestId":"2C9BE469",
            "PrincipalId":"216959339000****:alice","RoleId":"216959339000****",
            "Arn":"acs:ram::196813200012****:assumed-role/testrole/alice"}"#;

        let caller = parse_caller_identity(body.as_bytes()).unwrap();

        assert_eq!(&*caller.arn, "acs:ram::196813200012****:assumed-role/testrole/alice");
        assert_eq!(&*caller.principal_id, "216959339000****:alice");
        assert_eq!((&*caller.account_id, &*caller.request_id), ("196813200012****", "2C9BE469"));
        for key in ["AccountId", "PrincipalId", "Arn"] {
            let less = body.replace(&format!("\"{key}\""), "\"Other\"");
            assert_eq!(parse_caller_identity(less.as_bytes()), Err(WireError::Json), "{key}");
        }
        assert_eq!(parse_caller_identity(b"xxxx"), Err(WireError::Json));
    }

    #[test]
    fn refuses_what_cannot_stand_in_a_header() {
        for (from, to, key) in [
            ("STS.6YSE", "", "AccessKeyId"),
            ("ajXjDU", r"aj\nXjDU", "AccessKeySecret"),
            ("CAISng", "CAÏSng", "SecurityToken"),
        ] {
            let body = NODE.replace(from, to);
            assert_eq!(parse_node_credentials(body.as_bytes()).unwrap_err(), WireError::Credential(key));
        }
    }

    #[test]
    fn takes_no_other_form_of_time() {
        for time in [
            "2015-04-09T11:52:19.0Z",
            "2015-04-09T11:52:19+00:00",
            "2015-04-09t11:52:19Z",
            "2015-04-09 11:52:19Z",
            "2015-13-09T11:52:19Z",
            "2015-04-09T11:52Z",
            "",
        ] {
            let body = ASSUME_ROLE.replace("2015-04-09T11:52:19Z", time);
            assert_eq!(parse_assume_role(body.as_bytes()).unwrap_err(), WireError::Time, "{time}");
        }
    }

    #[test]
    fn refuses_a_body_over_the_limit_but_not_one_at_it() {
        let padded = |length: usize| format!("{ASSUME_ROLE}{}", " ".repeat(length - ASSUME_ROLE.len()));

        assert!(parse_assume_role(padded(BODY_LIMIT_BYTES).as_bytes()).is_ok());
        assert_eq!(
            parse_assume_role(padded(BODY_LIMIT_BYTES + 1).as_bytes()).unwrap_err(),
            WireError::TooLong
        );
    }

    #[test]
    fn parses_errors_and_keeps_their_text_harmless() {
        let body = format!(
            r#"{{"RequestId":"A-1","HostId":"sts.aliyuncs.com","Code":"NoPermission","Message":"no\n{}","Recommend":""}}"#,
            "x".repeat(300)
        );

        let error = parse_error(body.as_bytes()).unwrap();

        assert_eq!((error.code.as_str(), error.request_id.as_str()), ("NoPermission", "A-1"));
        assert_eq!(error.message.chars().count(), 256);
        assert!(error.message.starts_with("no x"));
        assert_eq!(parse_error(br#"{"Code":"<html>"}"#), None);
        assert_eq!(parse_error(b"<html>502</html>"), None);
    }

    #[test]
    fn debug_output_holds_no_secret() {
        let issued = parse_assume_role(ASSUME_ROLE.as_bytes()).unwrap();

        let text = format!("{issued:?}");

        assert!(text.contains("STS.L4aBSCSJVMuKg5U1"));
        assert!(!text.contains("wyLTSm") && !text.contains("CAISng"), "{text}");
    }

    proptest! {
        #[test]
        fn never_panics(body in proptest::collection::vec(any::<u8>(), 0..512), time in ".{0,24}") {
            drop(parse_assume_role(&body));
            drop(parse_node_credentials(&body));
            drop(parse_error(&body));
            drop(parse_caller_identity(&body));
            let _ = parse_time(&time);
        }

        #[test]
        fn times_round_trip(seconds in 0_i64..253_402_207_200) {
            let time = Timestamp::from_second(seconds).unwrap();
            prop_assert_eq!(parse_time(&time.to_string()), Ok(time));
        }
    }
}
