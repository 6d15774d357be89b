//! Answers of STS to GetCallerIdentity: an identity has nothing that is not in the answer. The judge reads
//! the answer by itself.

use kube2ram_authenticator::identity::Identity;
use kube2ram_cloud::alibaba::wire::parse_caller_identity;
use serde_json::Value;

/// Checks the body of an answer.
pub fn check(body: &[u8]) -> bool {
    let Ok(caller) = parse_caller_identity(body) else { return false };
    let Ok(identity) = Identity::of_caller(&caller, KEY) else { return false };
    let texts = [&identity.arn, &identity.account_id, &identity.user_id];
    let Ok(answer) = serde_json::from_slice::<Value>(body) else {
        // A value that nobody reads is not UTF-8, or a number out of range. The others are in the answer.
        assert!(texts.iter().all(|text| holds(body, text)));
        return true;
    };
    let said = |key: &str, place: usize| match &answer {
        Value::Array(values) => values[place].as_str(),
        object => object[key].as_str(),
    };
    // By the order of the fields, where the answer is an array, which STS never sends.
    let arn = said("Arn", 1).expect("an answer without an ARN was refused");
    let account = said("AccountId", 0).expect("an answer without an account was refused");
    let principal = said("PrincipalId", 2).expect("an answer without a principal was refused");

    assert_eq!((&*identity.arn, &*identity.account_id, &*identity.access_key_id), (arn, account, KEY));
    let session = identity.session_name.as_deref().map(|name| format!(":{name}")).unwrap_or_default();
    assert_eq!(format!("{}{session}", identity.user_id), principal);
    assert!(!identity.user_id.is_empty() && session != ":");
    assert_eq!(&*identity.canonical_arn, expected(arn, account));
    assert!(!identity.canonical_arn.contains(|c: char| c.is_control() || c.is_whitespace()));
    true
}

/// Whether a text is in the answer; JSON can write it with escapes, too.
fn holds(body: &[u8], text: &str) -> bool {
    body.contains(&b'\\') || body.windows(text.len()).any(|part| part == text.as_bytes())
}

/// What mappings call this ARN. Panics if it is none that may log in.
fn expected(arn: &str, account: &str) -> String {
    let parts: Vec<&str> = arn.splitn(5, ':').collect();
    let ["acs", "ram", "", of, resource] = parts[..] else { panic!("{arn}") };
    assert_eq!(of, account);
    assert!(!account.is_empty() && account.bytes().all(|byte| byte.is_ascii_digit()));
    let mut segments: Vec<&str> = resource.split('/').collect();
    assert!(segments.iter().all(|segment| !segment.is_empty()), "{arn}");
    match segments[0] {
        "root" => assert_eq!(segments.len(), 1),
        "role" | "user" => assert!(segments.len() >= 2),
        "assumed-role" => {
            segments[0] = "role";
            segments.pop();
            assert!(segments.len() >= 2);
        }
        other => panic!("{other}"),
    }
    format!("acs:ram::{account}:{}", segments.join("/"))
}

const KEY: &str = "STS.fuzz";
