//! The policies to paste are valid, grant no more than their page states, and equal the page's: those for RAM
//! and those for IAM.

use std::fs;

use serde_json::Value;

use super::{Document, files, repository};

/// The policies of one cloud.
struct Cloud {
    page: &'static str,
    /// Next to the page.
    directory: &'static str,
    version: &'static str,
    /// What they may allow. Nothing but to assume roles.
    actions: &'static [&'static str],
    /// How the role of a permission policy begins; the account follows.
    resource: &'static str,
    /// How a role that is trusted begins.
    role: &'static str,
    /// The key of a principal in the cloud.
    principal: &'static str,
    /// What a condition on a web identity compares: the last words of its keys.
    claims: &'static [&'static str],
}

const CLOUDS: [Cloud; 2] = [
    Cloud {
        page: "docs/ram-policies.md",
        directory: "docs/ram-policies",
        version: "1",
        actions: &["sts:AssumeRole"],
        resource: "acs:ram:*:",
        role: "acs:ram::",
        principal: "RAM",
        claims: &["aud", "iss", "sub"],
    },
    Cloud {
        page: "docs/aws/iam.md",
        directory: "docs/aws/iam-policies",
        version: "2012-10-17",
        actions: &[
            "sts:AssumeRole",
            "sts:AssumeRoleWithWebIdentity",
            "sts:SetSourceIdentity",
            "sts:TagSession",
        ],
        resource: "arn:aws:iam::",
        role: "arn:aws:iam::",
        principal: "AWS",
        // The issuer is a part of the keys.
        claims: &["aud", "sub"],
    },
];

/// Name, text and contents of each file.
fn policies(cloud: &Cloud) -> Vec<(String, String, Value)> {
    let of_page = files("json").into_iter().filter(|path| path.starts_with(cloud.directory));
    let policies: Vec<_> = of_page
        .map(|path| {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            let text = fs::read_to_string(repository().join(&path)).unwrap();
            let value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
            (name, text, value)
        })
        .collect();
    assert!(policies.len() >= 8, "where are the policies of {}?", cloud.page);
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

/// Whether all of it is an account's id.
fn is_account(text: &str) -> bool {
    text.len() >= 12 && text.bytes().all(|byte| byte.is_ascii_digit())
}

#[test]
fn every_policy_is_one_that_the_cloud_takes_and_allows_nothing_but_to_assume_roles() {
    for cloud in &CLOUDS {
        for (name, _, policy) in policies(cloud) {
            assert_eq!(policy["Version"], cloud.version, "{name}");
            for statement in statements(&policy) {
                assert_eq!(statement["Effect"], "Allow", "{name}");
                let actions = texts(&statement["Action"]);
                assert!(!actions.is_empty(), "{name}");
                assert!(actions.iter().all(|action| cloud.actions.contains(action)), "{name}: {actions:?}");
                let has = |key: &str| !statement[key].is_null();
                assert!(has("Resource") ^ has("Principal"), "{name}: what is allowed, or who is trusted");
            }
        }
    }
}

#[test]
fn what_the_node_may_assume_is_listed_and_no_wildcard_stands_for_all_roles() {
    for cloud in &CLOUDS {
        let mut seen = 0;
        for (name, _, policy) in policies(cloud).into_iter().filter(|(name, ..)| name.contains("-assume-")) {
            for resource in statements(&policy).iter().flat_map(|statement| texts(&statement["Resource"])) {
                let role = resource.strip_prefix(cloud.resource).and_then(|rest| rest.split_once(":role/"));
                let (account, role) = role.unwrap_or_else(|| panic!("{name}: {resource}"));

                assert!(is_account(account), "{name}: {resource}");
                assert!(!role.starts_with('*') && !role.is_empty(), "{name}: {resource}");
                seen += 1;
            }
        }
        assert!(seen > 0, "{}", cloud.page);
    }
}

#[test]
fn who_is_trusted_is_a_role_a_path_of_roles_a_service_account_or_the_service_of_pods() {
    for cloud in &CLOUDS {
        let mut seen = 0;
        for (name, _, policy) in policies(cloud).into_iter().filter(|(name, ..)| name.contains("-role-trust"))
        {
            for statement in statements(&policy) {
                assert_trusts(cloud, &name, statement);
                seen += 1;
            }
        }
        assert!(seen > 0, "{}", cloud.page);
    }
}

fn assert_trusts(cloud: &Cloud, name: &str, statement: &Value) {
    let (principal, condition) = (&statement["Principal"], &statement["Condition"]);
    let of = |key: &str| texts(&principal[key]);
    match (&of(cloud.principal)[..], &of("Federated")[..], &of("Service")[..]) {
        // The whole account, of which the condition leaves the roles in one path.
        ([account], [], []) if account.ends_with(":root") => {
            let roles = texts(&condition["ArnLike"]["aws:PrincipalArn"]);
            assert!(!roles.is_empty(), "{name}: {account}");
            for role in roles {
                let path = role.strip_prefix(cloud.role).and_then(|rest| rest.split_once(":role/"));
                let (account, path) = path.unwrap_or_else(|| panic!("{name}: {role}"));
                assert!(is_account(account) && path.find('*').is_some_and(|at| at > 1), "{name}: {role}");
            }
        }
        ([role], [], []) => {
            let is_role = role.starts_with(cloud.role) && role.contains(":role/") && !role.contains('*');
            assert!(is_role, "{name}: {role}");
        }
        ([], [provider], []) => {
            assert!(provider.contains(":oidc-provider/"), "{name}: {provider}");
            let compared = condition["StringEquals"].as_object().expect("a condition");
            for claim in cloud.claims {
                let is_compared = |(key, value): (&String, &Value)| {
                    key.rsplit(':').next() == Some(*claim) && !texts(value).is_empty()
                };
                assert!(compared.iter().any(is_compared), "{name}: {claim}");
            }
        }
        ([], [], [service]) => assert_eq!(*service, "pods.eks.amazonaws.com", "{name}"),
        other => panic!("{name}: {other:?}"),
    }
}

#[test]
fn the_page_shows_the_files_as_they_are() {
    for cloud in &CLOUDS {
        let page = Document::open(cloud.page).text;
        let directory = cloud.directory.rsplit('/').next().unwrap();
        for (name, text, _) in policies(cloud) {
            assert!(page.contains(&format!("```json\n{text}```")), "{} does not show {name}", cloud.page);
            assert!(page.contains(&format!("({directory}/{name})")), "{} does not link {name}", cloud.page);
        }
    }
}
