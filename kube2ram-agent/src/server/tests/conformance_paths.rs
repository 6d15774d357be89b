//! Section 4b of docs/predecessors.md: spellings that may confuse parsers of paths. Each is sent alone, with
//! HTTP/1.0, after a request that is passed on, and in one write with that request. None reaches the real
//! server, and none gets its answer.

use super::harness::*;

const ORDINARY: &str = "GET /latest/meta-data/instance-id HTTP/1.1\r\nHost: x\r\n\r\n";
const ORDINARY_HEAD: &str = "GET /latest/meta-data/instance-id HTTP/1.1\r\n";

/// Sends `target` in every way and checks the status of its answer, `0` being none or any refusal of the HTTP
/// parser.
async fn never_reaches_the_real_server(harness: Harness, target: &str, status: u16) {
    let request = format!("GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");

    let alone = harness.raw(&request).await;
    let old = harness.raw(format!("GET {target} HTTP/1.0\r\n\r\n")).await;
    assert!(harness.upstream_heads().is_empty(), "{target:?} passed: {:?}", harness.upstream_heads());
    let pipelined = harness.raw(format!("{ORDINARY}{request}")).await;
    let mut kept = harness.connect().await;
    tokio::io::AsyncWriteExt::write_all(&mut kept, ORDINARY.as_bytes()).await.unwrap();
    assert_eq!(read_response(&mut kept).await.body(), UPSTREAM_BODY);
    tokio::io::AsyncWriteExt::write_all(&mut kept, request.as_bytes()).await.unwrap();
    let second = read_to_end(&mut kept).await;

    let (first, rest) = pipelined.split_once(UPSTREAM_BODY).expect("the ordinary request is answered");
    assert!(first.starts_with("HTTP/1.1 200 "), "{pipelined}");
    for answer in [alone.as_str(), &old, rest, &second] {
        assert!(!answer.contains(UPSTREAM_BODY), "{target:?}: {answer}");
        let got: Option<u16> = answer.split(' ').nth(1).and_then(|word| word.parse().ok());
        assert!(
            if status == 0 { got.is_none_or(|got| got == 400) } else { got == Some(status) },
            "{target:?}: {answer}"
        );
    }
    let heads = harness.upstream_heads();
    assert_eq!(heads.len(), 2, "{heads:?}");
    assert!(heads.iter().all(|head| head.starts_with(ORDINARY_HEAD)), "{heads:?}");
}

/// The target as it is on AWS.
fn translated(target: &str) -> String {
    [("ram", "iam"), ("Ram", "Iam"), ("RAM", "IAM"), ("100.100.100.200", "169.254.169.254")]
        .into_iter()
        .fold(target.to_owned(), |target, (from, to)| target.replace(from, to))
}

/// Each on both clouds.
macro_rules! rows {
    ($($name:ident: $target:expr => $status:expr;)*) => {$(
        #[tokio::test]
        async fn $name() {
            never_reaches_the_real_server(Harness::start().await, $target, $status).await;
            let on_aws = Harness::start_on_aws(|_| {}).await;
            never_reaches_the_real_server(on_aws, &translated($target), $status).await;
        }
    )*};
}

macro_rules! rows_on_aws {
    ($($name:ident: $target:expr => $status:expr;)*) => {$(
        #[tokio::test]
        async fn $name() {
            never_reaches_the_real_server(Harness::start_on_aws(|_| {}).await, $target, $status).await;
        }
    )*};
}

rows! {
    row_4b_plain: "/latest/meta-data/ram/security-credentials/my-role" => 200;
    row_4b_other_role: "/latest/meta-data/ram/security-credentials/node" => 403;
    row_4b_backslash_before_directory: "/latest/meta-data/ram\\security-credentials/node" => 400;
    row_4b_backslash_behind_directory: "/latest/meta-data/ram/security-credentials\\node" => 400;
    row_4b_backslashes_only: "\\latest\\meta-data\\ram\\security-credentials\\node" => 0;
    row_4b_backslash_after_slash: "/latest/meta-data/ram/\\security-credentials/node" => 400;
    row_4b_backslashes_repeated: "/latest/meta-data/ram\\\\\\security-credentials\\\\node/" => 400;
    row_4b_upper_case_ram: "/latest/meta-data/RAM/security-credentials/my-role" => 200;
    row_4b_capital_ram: "/latest/meta-data/Ram/security-credentials/my-role" => 200;
    row_4b_mixed_case: "/LATEST/Meta-Data/ram/Security-Credentials/node" => 403;
    row_4b_path_parameter: "/latest/meta-data/ram/security-credentials;x/node" => 400;
    row_4b_escaped_letter: "/latest/meta-data/ram/%73ecurity-credentials/node" => 403;
    row_4b_escaped_twice: "/latest/meta-data/ram/%2573ecurity-credentials/node" => 400;
    row_4b_escaped_slashes: "/latest/meta-data/ram%2fsecurity-credentials%2fnode" => 400;
    row_4b_escaped_backslash: "/latest/meta-data/ram%5csecurity-credentials" => 400;
    row_4b_escaped_nul: "/latest/meta-data/ram/security-credentials%00" => 400;
    row_4b_raw_nul: "/latest/meta-data/ram/security-credentials\0" => 0;
    row_4b_dot_dot: "/latest/meta-data/x/../ram/security-credentials/node" => 400;
    row_4b_escaped_dot_dot: "/latest/meta-data/x/%2e%2E/ram/security-credentials/node" => 400;
    row_4b_dot: "/latest/./meta-data/ram/security-credentials/node" => 403;
    row_4b_empty_segments: "//latest/meta-data//ram//security-credentials//node" => 403;
    row_4b_query: "/latest/meta-data/ram/security-credentials/node?x" => 403;
    row_4b_bare_query: "/latest/meta-data/ram/security-credentials/?" => 200;
    row_4b_fragment: "/latest/meta-data/ram/security-credentials/node#" => 403;
    row_4b_fragment_with_path: "/latest/meta-data/ram#/security-credentials/node" => 200;
    row_4b_absolute_form: "http://100.100.100.200/latest/meta-data/ram/security-credentials/node" => 403;
    row_4b_absolute_form_elsewhere: "http://other/latest/meta-data/ram/security-credentials/node" => 400;
    row_4b_absolute_form_with_user: "http://100.100.100.200@other/latest/meta-data/ram/security-credentials/" => 400;
    row_4b_leading_tab: "\t/latest/meta-data/ram/security-credentials/node" => 0;
    row_4b_leading_space: " /latest/meta-data/ram/security-credentials/node" => 0;
    row_4b_space_inside: "/latest/meta-data/ram /security-credentials/node" => 0;
    row_4b_wide_slash: "/latest/meta-data/ram\u{ff0f}security-credentials/node" => 400;
    row_4b_wide_slash_before_a_name: "/latest/meta-data/ram/security-credentials/\u{ff0f}node" => 400;
    row_4b_overlong_slash: "/latest/meta-data/ram%c0%afsecurity-credentials/node" => 400;
    row_4b_suffix: "/latest/meta-data/ram.json" => 404;
    row_4b_trailing_dots: "/latest/meta-data/ram./security-credentials./node" => 404;
    row_4b_short_names: "/latest/META-D~1/RAM/SECURI~1/node" => 400;
    row_4b_path_in_query: "/latest/x?/../meta-data/ram/security-credentials/node" => 400;
    blank_between: "/latest/meta-data/+/ram/" => 404;
    dot_dot_with_a_parameter: "/latest/meta-data/x/..,1/ram/" => 404;
}

#[tokio::test]
async fn row_4b_whole_tree() {
    never_reaches_the_real_server(Harness::start().await, "/latest/meta-data/all", 403).await;
}

rows_on_aws! {
    merged_slashes: "//latest//meta-data///iam//security-credentials//node" => 403;
    authority_of_ipv6: "http://[fd00:ec2::254]/latest/meta-data/iam/security-credentials/node" => 403;
    extended_list: "/latest/meta-data/iam/security-credentials-extended/" => 404;
    extended_credentials: "/latest/meta-data/iam/security-credentials-extended/my-role" => 404;
    extended_elsewhere: "/latest/meta-data/security-credentials-extended/my-role" => 404;
    extended_escaped: "/latest/meta-data/iam/security-credentials%2Dextended/my-role" => 404;
    instance_identity: "/latest/meta-data/identity-credentials/ec2/security-credentials/ec2-instance" => 404;
    instance_merged: "/latest//meta-data//identity-credentials//ec2//security-credentials//ec2-instance" => 404;
    instance_case: "/latest/Meta-Data/Identity-Credentials/EC2/Security-Credentials/EC2-instance" => 404;
    instance_parameter: "/latest/meta-data/identity-credentials;x/ec2/info" => 400;
    instance_escaped_slash: "/latest/meta-data/identity-credentials%2fec2" => 400;
    instance_in_query: "/latest/meta-data?/identity-credentials/ec2" => 404;
    user_data: "/latest//user-data" => 403;
    ssh_keys: "/latest/meta-data/managed-ssh-keys/signer-key" => 403;
    signature: "/latest//dynamic//instance-identity//pkcs7" => 403;
    signature_in_query: "/latest/dynamic/instance-identity/document?/pkcs7" => 404;
}

#[tokio::test]
async fn row_4b_length_and_coding_together() {
    let harness = Harness::start().await;
    let smuggled = "GET /latest/meta-data/instance-id HTTP/1.1\r\nHost: x\r\n\r\n";
    let put = "PUT /latest/api/token HTTP/1.1\r\nHost: x\r\n";

    for framing in [
        "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        "Transfer-Encoding: \x0bchunked\r\n",
        "Content-Length: 0\r\nContent-Length: 60\r\n",
        "Content-Length: +0\r\n",
    ] {
        let answers = harness.raw(format!("{put}{framing}\r\n0\r\n\r\n{smuggled}")).await;
        assert!(answers.matches("HTTP/1.1 ").count() <= 1, "{framing:?}: {answers}");
    }
    assert!(harness.upstream_heads().iter().all(|head| !head.starts_with(ORDINARY_HEAD)));
    assert_eq!(harness.raw(format!("{ORDINARY}{ORDINARY}")).await.matches(UPSTREAM_BODY).count(), 2);
}
