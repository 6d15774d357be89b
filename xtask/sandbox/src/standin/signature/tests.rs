//! The published vectors: the official documents' and the SDKs' own tests.

use super::*;

fn params(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect()
}

fn headers(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect()
}

fn assume_role_v1() -> BTreeMap<String, String> {
    params(&[
        ("AccessKeyId", "STS.NTestAccessKeyId"),
        ("Action", "AssumeRole"),
        ("DurationSeconds", "3600"),
        ("Format", "JSON"),
        ("RoleArn", "acs:ram::1234567890123456:role/pod-role"),
        ("RoleSessionName", "default_web-0.k8s@n1"),
        ("SecurityToken", "CAIS+/tok=en~*"),
        ("SignatureMethod", "HMAC-SHA1"),
        ("SignatureNonce", "3ee8c1b8-83d3-44af-a94f-4e0ad82fd6cf"),
        ("SignatureVersion", "1.0"),
        ("Timestamp", "2026-11-21T21:30:00Z"),
        ("Version", "2015-04-01"),
    ])
}

#[test]
fn v1_matches_the_official_document() {
    let params = params(&[
        ("AccessKeyId", "testid"),
        ("Action", "DescribeRegions"),
        ("Format", "XML"),
        ("SignatureMethod", "HMAC-SHA1"),
        ("SignatureNonce", "3ee8c1b8-83d3-44af-a94f-4e0ad82fd6cf"),
        ("SignatureVersion", "1.0"),
        ("Timestamp", "2016-02-23T12:46:24Z"),
        ("Version", "2014-05-26"),
    ]);

    assert_eq!(v1_signature("testsecret", "GET", &params), "OLeaidS1JvxuMvnyHOwuJ+uX5qY=");
}

#[test]
fn v1_matches_the_sdk_test() {
    let params = params(&[("test", "ok")]);

    assert_eq!(v1_signature("accessKeySecret", "", &params), "jHx/oHoHNrbVfhncHEvPdHXZwHU=");
}

#[test]
fn v1_matches_a_token_with_every_awkward_character() {
    let params = assume_role_v1();

    assert_eq!(v1_signature("TestAccessKeySecret", "GET", &params), "CDYsQNFuBtQKKg5edswJqip0IWI=");
    assert_eq!(v1_signature("TestAccessKeySecret", "POST", &params), "yNSKR7QYxkcaswhzw5XO5cDwsdo=");
}

#[test]
fn v1_changes_with_any_parameter() {
    let mut params = assume_role_v1();
    params.insert("RoleArn".into(), "acs:ram::1234567890123456:role/other-role".into());

    assert_ne!(v1_signature("TestAccessKeySecret", "GET", &params), "CDYsQNFuBtQKKg5edswJqip0IWI=");
}

const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

#[test]
fn v3_matches_the_official_document() {
    let query = params(&[
        ("ImageId", "win2019_1809_x64_dtc_zh-cn_40G_alibase_20230811.vhd"),
        ("RegionId", "cn-shanghai"),
    ]);
    let headers = headers(&[
        ("host", "ecs.cn-shanghai.aliyuncs.com"),
        ("x-acs-action", "RunInstances"),
        ("x-acs-content-sha256", EMPTY),
        ("x-acs-date", "2023-10-26T10:22:32Z"),
        ("x-acs-signature-nonce", "3156853299f313e23d1673dc12e1703d"),
        ("x-acs-version", "2014-05-26"),
    ]);
    let request = V3Request { method: "POST", query: &query, headers: &headers, payload_hash: EMPTY };

    assert_eq!(
        hex_sha256(request.canonical().as_bytes()),
        "7ea06492da5221eba5297e897ce16e55f964061054b7695beedaac1145b1e259"
    );
    assert_eq!(
        v3_signature("YourAccessKeySecret", &request),
        "06563a9e1b43f5dfe96b81484da74bceab24a1d853912eee15083a6f0f3283c0"
    );
}

#[test]
fn v3_matches_the_sdk_test() {
    let query = params(&[("test", "ok"), ("empty", "")]);
    let headers = headers(&[("x-acs-test", "https"), ("x-acs-test", "http")]);
    let payload_hash = "55e12e91650d2fec56ec74e1d3e4ddbfce2ef3a65890c2a19ecf88a307e76a23";
    let request = V3Request { method: "", query: &query, headers: &headers, payload_hash };

    assert_eq!(request.signed_headers(), "x-acs-test");
    assert_eq!(
        v3_signature("secret", &request),
        "4ab59fffe3c5738ff8a2729f90cc04fe18b02a4b15b2102cbaf92f9ff3df2ea3"
    );
}

#[test]
fn v3_matches_an_assume_role_and_changes_with_any_header() {
    let query = params(&[
        ("DurationSeconds", "3600"),
        ("RoleArn", "acs:ram::1234567890123456:role/pod-role"),
        ("RoleSessionName", "default_web-0.k8s@n1"),
    ]);
    let mut headers = headers(&[
        ("host", "sts-vpc.cn-hangzhou.aliyuncs.com"),
        ("x-acs-accesskey-id", "STS.NTestAccessKeyId"),
        ("x-acs-action", "AssumeRole"),
        ("x-acs-content-sha256", EMPTY),
        ("x-acs-date", "2026-11-21T21:30:00Z"),
        ("x-acs-security-token", "CAIS+/tok=en~*"),
        ("x-acs-signature-nonce", "3ee8c1b8-83d3-44af-a94f-4e0ad82fd6cf"),
        ("x-acs-version", "2015-04-01"),
    ]);
    let expected = "73d5065cf540d45bf23618bf1c644814fb771c000f7df79ec8716e3c515d721f";
    let sign = |headers: &[(String, String)]| {
        v3_signature(
            "TestAccessKeySecret",
            &V3Request { method: "POST", query: &query, headers, payload_hash: EMPTY },
        )
    };

    assert_eq!(sign(&headers), expected);
    headers[4].1 = "2026-11-21T21:30:01Z".into();
    assert_ne!(sign(&headers), expected);
}
