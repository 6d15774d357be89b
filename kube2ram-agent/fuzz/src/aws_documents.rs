//! Answers of AWS's STS and metadata server: a value that is valid in headers, ARNs and host names, or an
//! error. What is read of XML is what a reader of its tags alone finds there.

use kube2ram_cloud::aws::{
    endpoint::{EndpointOptions, Partition, Region, sts_endpoints},
    metadata::base_of_profile,
    wire::{
        Issued, parse_assume_role, parse_error, parse_node_credentials, parse_profile_arn, parse_web_identity,
    },
};

use super::documents::{check_error, check_issued};

/// What the names of STS's hosts end in (AWS's `partitions.json`).
const SUFFIXES: [&str; 14] = [
    "amazonaws.com",
    "api.aws",
    "amazonaws.com.cn",
    "api.amazonwebservices.com.cn",
    "c2s.ic.gov",
    "api.aws.ic.gov",
    "sc2s.sgov.gov",
    "api.aws.scloud",
    "cloud.adc-e.uk",
    "api.cloud-aws.adc-e.uk",
    "csp.hci.ic.gov",
    "api.aws.hci.ic.gov",
    "amazonaws.eu",
    "api.amazonwebservices.eu",
];

/// Checks one document in all its readings.
pub fn check(body: &[u8]) {
    let (assumed, exchanged) = (parse_assume_role(body).ok(), parse_web_identity(body).ok());
    let (node, error) = (parse_node_credentials(body).ok(), parse_error(body));
    let readings = [assumed.is_some(), exchanged.is_some(), node.is_some(), error.is_some()];
    assert!(readings.into_iter().filter(|is_one| *is_one).count() <= 1, "{}", body.escape_ascii());

    if let Some(issued) = &assumed {
        check_xml(body, issued, ["AssumeRoleResponse", "AssumeRoleResult"]);
    }
    if let Some(issued) = &exchanged {
        check_xml(body, issued, ["AssumeRoleWithWebIdentityResponse", "AssumeRoleWithWebIdentityResult"]);
    }
    if let Some(issued) = &node {
        check_issued(issued);
    }
    if let Some(error) = &error {
        check_error(error);
        let code = only(plain_xml(body), &["ErrorResponse", "Error", "Code"]);
        assert!(code.is_some_and(|code| code == error.code || code.contains('&')), "{}", body.escape_ascii());
    }
    if let Ok(profile) = parse_profile_arn(body) {
        check_profile(&profile);
    }
    if let Ok(text) = str::from_utf8(body) {
        check_profile(text);
        check_region(text);
        check_message(text);
    }
}

fn check_xml(body: &[u8], issued: &Issued, [response, result]: [&str; 2]) {
    check_issued(issued);
    let xml = plain_xml(body);
    let credential = |name| only(xml, &[response, result, "Credentials", name]);
    assert_eq!(credential("AccessKeyId"), Some(&*issued.access_key_id), "{xml}");
    for secret in ["SecretAccessKey", "SessionToken"] {
        let is_word = |text: &str| !text.is_empty() && text.bytes().all(|c| c.is_ascii_graphic());
        assert!(credential(secret).is_some_and(is_word), "{xml}");
    }
    let holder = &issued.holder;
    for (path, said) in [
        (vec![response, result, "AssumedRoleUser", "Arn"], &holder.session_arn),
        (vec![response, result, "SubjectFromWebIdentityToken"], &holder.subject),
    ] {
        let written = only(xml, &path);
        let is_written =
            |said: &str| written.is_some_and(|written| written == said.trim() || written.contains('&'));
        assert!(said.as_deref().is_none_or(is_written), "{xml}");
    }
    // To the minute: a leap second is cut off.
    let expires_at = issued.expires_at.strftime("%Y-%m-%dT%H:%M:").to_string();
    assert!(credential("Expiration").is_some_and(|text| text.starts_with(&expires_at)), "{xml}");
}

/// Text without anything that declares, includes or comments.
fn plain_xml(body: &[u8]) -> &str {
    let xml = str::from_utf8(body).expect("XML is UTF-8");
    let declarations = usize::from(xml.trim_start().starts_with("<?xml "));
    assert!(!xml.contains("<!") && xml.matches("<?").count() == declarations, "{xml}");
    xml
}

/// The text of the only element at this path, by the tags alone.
fn only<'x>(xml: &'x str, path: &[&str]) -> Option<&'x str> {
    let (mut open, mut found) = (Vec::new(), Vec::new());
    for piece in xml.split('<').skip(1).filter(|piece| !piece.starts_with('?')) {
        let (tag, text) = piece.split_once('>').unwrap_or((piece, ""));
        let is_end = |c: char| c.is_whitespace() || c == '/';
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name.trim_end()), "{xml}");
            continue;
        }
        open.push(tag.split(is_end).next().unwrap_or_default());
        if open == path {
            found.push(text.trim());
        }
        if tag.ends_with('/') {
            open.pop();
        }
    }
    if let [text] = found.as_slice() { Some(*text) } else { None }
}

/// The account of an instance profile is one, and the profile's own.
fn check_profile(profile: &str) {
    let Some(base) = base_of_profile(profile) else { return };
    let parts: Vec<&str> = base.as_str().split(':').collect();
    let ["arn", partition, "iam", "", account, "role/"] = parts.as_slice() else {
        panic!("{profile:?} has the base {base}")
    };
    let is_partition = |text: &str| {
        text.strip_prefix("aws").is_some_and(|rest| {
            (rest.is_empty() || rest.starts_with('-'))
                && rest.bytes().all(|c| c.is_ascii_lowercase() || c == b'-')
        })
    };
    let is_account = account.len() == 12 && account.bytes().all(|c| c.is_ascii_digit());
    assert!(is_partition(partition) && is_account, "{profile:?} has the base {base}");
    let own = format!("arn:{partition}:iam::{account}:instance-profile/");
    assert!(profile.starts_with(&own), "{profile:?} has the base {base}");
}

/// No region leads to another host than STS's.
fn check_region(text: &str) {
    let Ok(region) = Region::parse(text) else { return };
    let Some(partition) = Partition::of_region(&region) else { return };
    let both = [false, true];
    for (dual_stack, fips) in both.into_iter().flat_map(|dual_stack| both.map(|fips| (dual_stack, fips))) {
        for global in both {
            let options = EndpointOptions { dual_stack, fips, global };
            for endpoint in sts_endpoints(&region, partition, options).unwrap_or_default() {
                let name = |suffix: &str| endpoint.host().strip_suffix(suffix)?.strip_suffix('.');
                let is_sts = SUFFIXES.iter().filter_map(|suffix| name(suffix)).any(|name| {
                    name == "sts" || name == format!("sts.{text}") || name == format!("sts-fips.{text}")
                });
                assert!(endpoint.is_https() && is_sts, "{text:?} leads to {}", endpoint.host());
            }
        }
    }
}

/// A message is a text: whatever somebody gets into it, such as a session's name, changes nothing else.
fn check_message(message: &str) {
    if message.len() > MESSAGE_MAX {
        return;
    }
    let escaped = message.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let answer = format!(
        "<ErrorResponse><Error><Code>AccessDenied</Code><Message>{escaped}</Message></Error></ErrorResponse>"
    );
    let error = parse_error(answer.as_bytes()).expect("an error of STS");
    check_error(&error);
    let printable = |c: char| if c.is_control() { ' ' } else { c };
    let kept: String = message.trim_ascii().chars().take(256).map(printable).collect();
    assert_eq!((&*error.code, &*error.message, &*error.request_id), ("AccessDenied", &*kept, ""));
}

/// Escaped it is still shorter than what is read of STS.
const MESSAGE_MAX: usize = 8192;
