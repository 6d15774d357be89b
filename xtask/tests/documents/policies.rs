//! The RAM policies to paste are valid, grant no more than the page states, and equal the page's.

use std::fs;

use serde_json::Value;

use super::{Document, files, repository};

const PAGE: &str = "docs/ram-policies.md";
const DIRECTORY: &str = "docs/ram-policies";

fn policies() -> Vec<(String, String, Value)> {
    let of_page = files("json").into_iter().filter(|path| path.starts_with(DIRECTORY));
    let policies: Vec<_> = of_page
        .map(|path| {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            let text = fs::read_to_string(repository().join(&path)).unwrap();
            let value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
            (name, text, value)
        })
        .collect();
    assert!(policies.len() >= 4, "where are the policies?");
    policies
}

fn statements(policy: &Value) -> &Vec<Value> {
    policy["Statement"].as_array().filter(|statements| !statements.is_empty()).expect("statements")
}

/// One text, or a list of them.
fn texts(value: &Value) -> Vec<&str> {
    match value {
        Value::String(text) => vec![text],
        Value::Array(values) => values.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    }
}

#[test]
fn every_policy_is_one_that_ram_takes_and_allows_nothing_but_to_assume_roles() {
    for (name, _, policy) in policies() {
        assert_eq!(policy["Version"], "1", "{name}");
        for statement in statements(&policy) {
            assert_eq!(statement["Effect"], "Allow", "{name}");
            assert_eq!(texts(&statement["Action"]), ["sts:AssumeRole"], "{name}");
            let has = |key: &str| !statement[key].is_null();
            assert!(has("Resource") ^ has("Principal"), "{name}: what is allowed, or who is trusted");
        }
    }
}

#[test]
fn what_the_node_may_assume_is_listed_and_no_wildcard_stands_for_all_roles() {
    let mut seen = 0;
    for (name, _, policy) in policies().into_iter().filter(|(name, ..)| name.contains("-assume-")) {
        for resource in statements(&policy).iter().flat_map(|statement| texts(&statement["Resource"])) {
            let role = resource.strip_prefix("acs:ram:*:").and_then(|rest| rest.split_once(":role/"));
            let (account, role) = role.unwrap_or_else(|| panic!("{name}: {resource}"));

            assert!(
                account.len() >= 12 && account.bytes().all(|byte| byte.is_ascii_digit()),
                "{name}: {resource}"
            );
            assert!(!role.starts_with('*') && !role.is_empty(), "{name}: {resource}");
            seen += 1;
        }
    }
    assert!(seen > 0);
}

#[test]
fn who_is_trusted_is_one_role_or_one_service_account() {
    let mut seen = 0;
    for (name, _, policy) in policies().into_iter().filter(|(name, ..)| name.contains("-role-trust")) {
        for statement in statements(&policy) {
            let principal = &statement["Principal"];
            let is_role = |text: &str| text.starts_with("acs:ram::") && text.contains(":role/");
            let by_role = texts(&principal["RAM"]);
            let by_provider = texts(&principal["Federated"]);
            match (&by_role[..], &by_provider[..]) {
                ([role], []) => assert!(is_role(role) && !role.contains('*'), "{name}: {role}"),
                ([], [provider]) => {
                    assert!(provider.contains(":oidc-provider/"), "{name}: {provider}");
                    let equals = &statement["Condition"]["StringEquals"];
                    for key in ["oidc:aud", "oidc:iss", "oidc:sub"] {
                        assert!(!texts(&equals[key]).is_empty(), "{name}: {key}");
                    }
                }
                other => panic!("{name}: {other:?}"),
            }
            seen += 1;
        }
    }
    assert!(seen > 0);
}

#[test]
fn the_page_shows_the_files_as_they_are() {
    let page = Document::open(PAGE).text;
    for (name, text, _) in policies() {
        assert!(page.contains(&format!("```json\n{text}```")), "{PAGE} does not show {name}");
        assert!(page.contains(&format!("(ram-policies/{name})")), "{PAGE} does not link {name}");
    }
}
