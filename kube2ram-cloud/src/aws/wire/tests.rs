//! Documents as AWS's references print them, and what is none.

use proptest::prelude::*;
use secrecy::ExposeSecret as _;

use super::*;

/// STS API reference, AssumeRole, example; the token on one line, as STS writes it.
const ASSUME_ROLE: &str = r#"<AssumeRoleResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
  <AssumeRoleResult>
  <SourceIdentity>Alice</SourceIdentity>
    <AssumedRoleUser>
      <Arn>arn:aws:sts::123456789012:assumed-role/demo/TestAR</Arn>
      <AssumedRoleId>ARO123EXAMPLE123:TestAR</AssumedRoleId>
    </AssumedRoleUser>
    <Credentials>
      <AccessKeyId>ASIAIOSFODNN7EXAMPLE</AccessKeyId>
      <SecretAccessKey>wJalrXUtnFEMI/K7MDENG/bPxRfiCYzEXAMPLEKEY</SecretAccessKey>
      <SessionToken>
       AQoDYXdzEPT//////////wEXAMPLEtc764bNrC9SAPBSM22+scqKmlzm8FDrypNC9Yjc8fPOLn9FX9KSYvKTr4rvx3iSIlTJabIQwj2ICCR/oLxBA==
      </SessionToken>
      <Expiration>2019-11-09T13:34:41Z</Expiration>
    </Credentials>
    <PackedPolicySize>6</PackedPolicySize>
  </AssumeRoleResult>
  <ResponseMetadata>
    <RequestId>c6104cbe-af31-11e0-8154-cbc7ccf896c7</RequestId>
  </ResponseMetadata>
</AssumeRoleResponse>"#;

/// STS API reference, AssumeRoleWithWebIdentity, example.
const WEB_IDENTITY: &str = r#"<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
  <AssumeRoleWithWebIdentityResult>
    <SubjectFromWebIdentityToken>system:serviceaccount:kube-system:kube2ram</SubjectFromWebIdentityToken>
    <Audience>sts.amazonaws.com</Audience>
    <AssumedRoleUser>
      <Arn>arn:aws:sts::123456789012:assumed-role/kube2ram/node-1</Arn>
      <AssumedRoleId>AROACLKWSDQRAOEXAMPLE:node-1</AssumedRoleId>
    </AssumedRoleUser>
    <Credentials>
      <SessionToken>AQoDYXdzEE0a8ANXXXXXXXXNO1ewxE5TijQyp+IEXAMPLE</SessionToken>
      <SecretAccessKey>wJalrXUtnFEMI/K7MDENG/bPxRfiCYzEXAMPLEKEY</SecretAccessKey>
      <Expiration>2014-10-24T23:00:23Z</Expiration>
      <AccessKeyId>ASgeIAIOSFODNN7EXAMPLE</AccessKeyId>
    </Credentials>
    <Provider>arn:aws:iam::123456789012:oidc-provider/oidc.eks.eu-west-1.amazonaws.com/id/EXAMPLE</Provider>
  </AssumeRoleWithWebIdentityResult>
  <ResponseMetadata>
    <RequestId>ad4156e9-bce1-11e2-82e6-6b6efEXAMPLE</RequestId>
  </ResponseMetadata>
</AssumeRoleWithWebIdentityResponse>"#;

/// STS API, common errors; as STS writes them.
const ERROR: &str = r#"<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
  <Error>
    <Type>Sender</Type>
    <Code>AccessDenied</Code>
    <Message>User: arn:aws:sts::123456789012:assumed-role/node/i-0 is not authorized to perform: sts:AssumeRole on resource: arn:aws:iam::123456789012:role/app &quot;x&quot;</Message>
  </Error>
  <RequestId>4a7e1b8c-0000-1111-2222-333344445555</RequestId>
</ErrorResponse>
"#;

/// EC2 user guide, "Retrieve security credentials from instance metadata".
const NODE: &str = r#"{
  "Code" : "Success",
  "LastUpdated" : "2012-04-26T16:39:16Z",
  "Type" : "AWS-HMAC",
  "AccessKeyId" : "ASIAIOSFODNN7EXAMPLE",
  "SecretAccessKey" : "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
  "Token" : "token==",
  "Expiration" : "2017-05-17T15:09:54Z"
}"#;

#[test]
fn parses_the_documented_assume_role_answer() {
    let issued = parse_assume_role(ASSUME_ROLE.as_bytes()).unwrap();

    assert_eq!(&*issued.access_key_id, "ASIAIOSFODNN7EXAMPLE");
    assert_eq!(issued.access_key_secret.expose_secret(), "wJalrXUtnFEMI/K7MDENG/bPxRfiCYzEXAMPLEKEY");
    assert!(issued.security_token.expose_secret().starts_with("AQoDYXdzEPT"));
    assert!(issued.security_token.expose_secret().ends_with("oLxBA=="));
    assert_eq!(issued.expires_at.to_string(), "2019-11-09T13:34:41Z");
    assert_eq!(issued.request_id.as_deref(), Some("c6104cbe-af31-11e0-8154-cbc7ccf896c7"));
    let arn = "arn:aws:sts::123456789012:assumed-role/demo/TestAR";
    assert_eq!(issued.holder, Holder { session_arn: Some(arn.into()), subject: None });
    // The namespace and white space say nothing.
    let flat: String = ASSUME_ROLE.lines().map(str::trim).collect();
    let flat = flat.replace(r#" xmlns="https://sts.amazonaws.com/doc/2011-06-15/""#, "");
    assert_eq!(parse_assume_role(flat.as_bytes()).unwrap().expires_at, issued.expires_at);
}

#[test]
fn one_calls_answer_is_not_taken_for_another_calls() {
    let issued = parse_web_identity(WEB_IDENTITY.as_bytes()).unwrap();

    assert_eq!(&*issued.access_key_id, "ASgeIAIOSFODNN7EXAMPLE");
    assert_eq!(issued.security_token.expose_secret(), "AQoDYXdzEE0a8ANXXXXXXXXNO1ewxE5TijQyp+IEXAMPLE");
    assert_eq!(issued.request_id.as_deref(), Some("ad4156e9-bce1-11e2-82e6-6b6efEXAMPLE"));
    assert_eq!(issued.holder.subject.as_deref(), Some("system:serviceaccount:kube-system:kube2ram"));
    let arn = "arn:aws:sts::123456789012:assumed-role/kube2ram/node-1";
    assert_eq!(issued.holder.session_arn.as_deref(), Some(arn));
    for other in [
        parse_web_identity(ASSUME_ROLE.as_bytes()),
        parse_assume_role(WEB_IDENTITY.as_bytes()),
        parse_assume_role(ERROR.as_bytes()),
    ] {
        assert_eq!(other.unwrap_err(), WireError::Xml);
    }
}

#[test]
fn a_request_id_may_be_missing_and_a_subject_may_not_be_there_twice() {
    let without = WEB_IDENTITY.replace("RequestId", "Other").replace("SubjectFromWebIdentityToken", "Other");
    let issued = parse_web_identity(without.as_bytes()).unwrap();
    assert_eq!((issued.request_id, issued.holder.subject), (None, None));
    let strange = WEB_IDENTITY.replace("ad4156e9-bce1", "ad4156e9 bce1");
    assert_eq!(parse_web_identity(strange.as_bytes()).unwrap().request_id, None);

    let subject =
        "<SubjectFromWebIdentityToken>system:serviceaccount:a:b</SubjectFromWebIdentityToken><Audience>";
    let twice = WEB_IDENTITY.replace("<Audience>", subject);
    assert_eq!(parse_web_identity(twice.as_bytes()).unwrap_err(), WireError::Xml);
    let entity = WEB_IDENTITY.replace("kube-system:kube2ram", "&own;");
    assert_eq!(parse_web_identity(entity.as_bytes()).unwrap_err(), WireError::Xml);
}

#[test]
fn takes_no_document_with_a_part_missing_or_there_twice() {
    for name in ["AccessKeyId", "SecretAccessKey", "SessionToken", "Expiration"] {
        let renamed = ASSUME_ROLE.replace(name, "Other");
        assert_eq!(parse_assume_role(renamed.as_bytes()).unwrap_err(), WireError::Xml, "{name}");
    }
    let twice = ASSUME_ROLE.replace("<Expiration>", "<AccessKeyId>ASIA</AccessKeyId><Expiration>");
    assert_eq!(parse_assume_role(twice.as_bytes()).unwrap_err(), WireError::Xml);
    let entity = ASSUME_ROLE.replace("ASIAIOSFODNN7EXAMPLE", "ASIA&amp;");
    assert_eq!(parse_assume_role(entity.as_bytes()).unwrap_err(), WireError::Xml);
    let with_type = format!("<!DOCTYPE AssumeRoleResponse>{ASSUME_ROLE}");
    assert_eq!(parse_assume_role(with_type.as_bytes()).unwrap_err(), WireError::Xml);
}

#[test]
fn parses_the_documented_node_credentials_only_when_successful() {
    let issued = parse_node_credentials(NODE.as_bytes()).unwrap();
    assert_eq!(&*issued.access_key_id, "ASIAIOSFODNN7EXAMPLE");
    assert_eq!(issued.security_token.expose_secret(), "token==");
    assert_eq!(issued.expires_at.to_string(), "2017-05-17T15:09:54Z");

    let failed = NODE.replace("Success", "AssumeRoleUnauthorizedAccess");
    let bare = r#"{"Code":"InstanceProfileNotFound","LastUpdated":"2012-04-26T16:39:16Z","Message":"m"}"#;
    for text in [&*failed, bare] {
        assert_eq!(parse_node_credentials(text.as_bytes()).unwrap_err(), WireError::Unsuccessful);
    }
    for key in ["AccessKeyId", "SecretAccessKey", "\"Token\"", "Expiration", "Code"] {
        let without = NODE.replace(key, "\"Other\"").replace("\"\"Other\"\"", "\"Other\"");
        assert_eq!(parse_node_credentials(without.as_bytes()).unwrap_err(), WireError::Json, "{key}");
    }
}

#[test]
fn parses_the_instance_profile() {
    let info = r#"{"Code" : "Success", "LastUpdated" : "2026-11-28T10:00:00Z",
        "InstanceProfileArn" : "arn:aws:iam::123456789012:instance-profile/team/node", "InstanceProfileId" : "AIPA"}"#;

    let arn = parse_profile_arn(info.as_bytes()).unwrap();

    assert_eq!(arn, "arn:aws:iam::123456789012:instance-profile/team/node");
    let failed = info.replace("Success", "Failed");
    assert_eq!(parse_profile_arn(failed.as_bytes()).unwrap_err(), WireError::Unsuccessful);
    assert_eq!(parse_profile_arn(b"{\"Code\":\"Success\"}").unwrap_err(), WireError::Json);
}

#[test]
fn refuses_what_cannot_stand_in_a_header() {
    for (from, to, key) in [
        ("ASIAIOSFODNN7EXAMPLE", "", "AccessKeyId"),
        ("wJalrX", r"wJ\nalrX", "SecretAccessKey"),
        ("token==", "tokÏn", "Token"),
    ] {
        let body = NODE.replace(from, to);
        assert_eq!(parse_node_credentials(body.as_bytes()).unwrap_err(), WireError::Credential(key));
    }
    let broken = ASSUME_ROLE.replace("wEXAMPLE", "w\n       EXAMPLE");
    assert_eq!(parse_assume_role(broken.as_bytes()).unwrap_err(), WireError::Credential("SessionToken"));
}

#[test]
fn takes_no_other_form_of_time() {
    for text in [
        "2019-11-09T13:34:41.Z",
        "2019-11-09T13:34:41.0000000000Z",
        "2019-11-09T13:34:41.-1Z",
        "2019-11-09T13:34:41+00:00",
        "2019-11-09t13:34:41Z",
        "2019-11-09 13:34:41Z",
        "2019-13-09T13:34:41Z",
        "1573306481",
        "",
    ] {
        let body = ASSUME_ROLE.replace("2019-11-09T13:34:41Z", text);
        assert_eq!(parse_assume_role(body.as_bytes()).unwrap_err(), WireError::Time, "{text}");
    }
    let fraction = ASSUME_ROLE.replace("13:34:41Z", "13:34:41.999Z");
    let issued = parse_assume_role(fraction.as_bytes()).unwrap();
    assert_eq!(issued.expires_at.to_string(), "2019-11-09T13:34:41Z", "never later");
}

#[test]
fn refuses_a_body_over_the_limit_but_not_one_at_it() {
    for (text, parse) in [
        (ASSUME_ROLE, parse_assume_role as fn(&[u8]) -> Result<Issued, WireError>),
        (NODE, parse_node_credentials),
    ] {
        let padded = |length: usize| format!("{text}{}", " ".repeat(length - text.len()));

        assert!(parse(padded(BODY_LIMIT_BYTES).as_bytes()).is_ok());
        assert_eq!(parse(padded(BODY_LIMIT_BYTES + 1).as_bytes()).unwrap_err(), WireError::TooLong);
    }
}

#[test]
fn parses_errors_and_keeps_their_text_harmless() {
    let error = parse_error(ERROR.as_bytes()).unwrap();

    assert_eq!((&*error.code, &*error.request_id), ("AccessDenied", "4a7e1b8c-0000-1111-2222-333344445555"));
    assert!(error.message.starts_with("User: arn:aws:sts") && error.message.ends_with("\"x\""));
    let long = ERROR.replace("User: ", &format!("no&#10;{}", "x".repeat(300)));
    let error = parse_error(long.as_bytes()).unwrap();
    assert_eq!(error.message.chars().count(), 256);
    assert!(error.message.starts_with("no x"));
    for text in [
        "<html>502</html>",
        "<html><body>403 &nbsp;</body></html>",
        r#"{"Error":{"Code":"AccessDenied"}}"#,
        &ERROR.replace("AccessDenied", "Access Denied"),
        &ERROR.replace("AccessDenied", ""),
        "",
    ] {
        assert_eq!(parse_error(text.as_bytes()), None, "{text}");
    }
}

#[test]
fn debug_output_holds_no_secret() {
    let issued = parse_assume_role(ASSUME_ROLE.as_bytes()).unwrap();

    let text = format!("{issued:?}");

    assert!(text.contains("ASIAIOSFODNN7EXAMPLE"));
    assert!(!text.contains("wJalrX") && !text.contains("AQoDYX"), "{text}");
}

proptest! {
    #[test]
    fn never_panics(body in proptest::collection::vec(any::<u8>(), 0..512), text in ".{0,40}", at in 0..900_usize, byte in any::<u8>()) {
        let mut changed = ASSUME_ROLE.as_bytes().to_vec();
        let at = at % changed.len();
        changed[at] = byte;
        for body in [&body, &changed] {
            drop(parse_assume_role(body));
            drop(parse_web_identity(body));
            drop(parse_node_credentials(body));
            drop(parse_profile_arn(body));
            drop(parse_error(body));
        }
        let _ = time(&text);
    }

    #[test]
    fn times_round_trip(seconds in 0_i64..253_402_207_200) {
        let at = Timestamp::from_second(seconds).unwrap();
        prop_assert_eq!(time(&at.to_string()), Ok(at));
    }
}
