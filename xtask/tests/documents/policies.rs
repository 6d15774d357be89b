//! The policies to paste are valid, grant no more than their page states, and equal the page's: those for RAM
//! and those for IAM.

use std::fs;

use serde_json::Value;

use super::{Document, files, repository};

/// How the names of policies begin that only take away.
const DENYING: &str = "node-deny-";
/// How the subject of a ServiceAccount's token begins; namespace and name follow.
const SUBJECT: &str = "system:serviceaccount:";

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
fn every_policy_is_one_that_the_cloud_takes_and_allows_or_denies_nothing_but_to_assume_roles() {
    for cloud in &CLOUDS {
        for (name, _, policy) in policies(cloud) {
            assert_eq!(policy["Version"], cloud.version, "{name}");
            let effect = if name.starts_with(DENYING) { "Deny" } else { "Allow" };
            for statement in statements(&policy) {
                assert_eq!(statement["Effect"], effect, "{name}");
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
            assert_compares_claims(cloud, name, condition);
        }
        ([], [], [service]) => assert_eq!(*service, "pods.eks.amazonaws.com", "{name}"),
        other => panic!("{name}: {other:?}"),
    }
}

/// Each claim is compared. A pattern may stand for names of ServiceAccounts, and never for namespaces: users
/// who may create a namespace would choose who is trusted.
fn assert_compares_claims(cloud: &Cloud, name: &str, condition: &Value) {
    let mut operators = condition.as_object().expect("a condition").keys();
    assert!(operators.all(|key| key == "StringEquals" || key == "StringLike"), "{name}: {condition}");
    for claim in cloud.claims.iter().filter(|claim| **claim != "sub") {
        assert_eq!(compared(condition, "StringEquals", claim).len(), 1, "{name}: {claim}");
    }

    let exact = compared(condition, "StringEquals", "sub");
    let patterns = compared(condition, "StringLike", "sub");
    assert!(exact.is_empty() != patterns.is_empty(), "{name}: {condition}");
    // It would be compared as it stands.
    assert!(exact.iter().all(|subject| !subject.contains('*')), "{name}: {exact:?}");
    for subject in exact.iter().chain(&patterns) {
        let account = subject.strip_prefix(SUBJECT).and_then(|rest| rest.split_once(':'));
        let (namespace, account) = account.unwrap_or_else(|| panic!("{name}: {subject}"));
        assert!(!namespace.is_empty() && !namespace.contains(['*', '?']), "{name}: {subject}");
        assert!(!account.is_empty(), "{name}: {subject}");
    }
}

/// What an operator of a condition compares with a claim. The issuer may be a part of the key.
fn compared<'a>(condition: &'a Value, operator: &str, claim: &str) -> Vec<&'a str> {
    let keys = condition[operator].as_object().into_iter().flatten();
    let of_claim = keys.filter(|(key, _)| key.rsplit(':').next() == Some(claim));
    of_claim.flat_map(|(_, value)| texts(value)).collect()
}

/// Whether a token with these claims meets the condition, as both clouds judge.
fn is_trusted(condition: &Value, claims: [(&str, &str); 3]) -> bool {
    let meets = |operator: &str, is_met: fn(&str, &str) -> bool| {
        claims.iter().all(|(claim, value)| {
            let wanted = compared(condition, operator, claim);
            wanted.is_empty() || wanted.iter().any(|wanted| is_met(wanted, value))
        })
    };
    meets("StringEquals", |wanted, value| wanted == value) && meets("StringLike", matches)
}

/// `*` stands for any characters.
fn matches(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((start, rest)) => text.strip_prefix(start).is_some_and(|text| {
            text.char_indices().any(|(at, _)| matches(rest, &text[at..])) || matches(rest, "")
        }),
    }
}

#[test]
fn a_service_account_is_trusted_by_its_cluster_namespace_and_name_alone() {
    for (cloud, audience) in CLOUDS.iter().zip(["sts.aliyuncs.com", "sts.amazonaws.com"]) {
        let policies = policies(cloud);
        for (file, sibling) in
            [("pod-role-trust-service-account.json", false), ("pod-role-trust-namespace.json", true)]
        {
            let found = policies.iter().find(|(name, ..)| name == file);
            let (_, _, policy) = found.unwrap_or_else(|| panic!("{}: {file}", cloud.page));
            let [statement] = &statements(policy)[..] else { panic!("{file}: more than one statement") };
            let condition = &statement["Condition"];
            // On AWS the issuer is the provider's, by the key.
            let issuer = compared(condition, "StringEquals", "iss").first().copied().unwrap_or("i");
            let is_trusted = |audience: &str, issuer: &str, account: &str| {
                let subject = format!("{SUBJECT}{account}");
                is_trusted(condition, [("aud", audience), ("iss", issuer), ("sub", subject.as_str())])
            };

            assert!(is_trusted(audience, issuer, "shop:orders"), "{file}");
            assert_eq!(is_trusted(audience, issuer, "shop:billing"), sibling, "{file}");
            for account in ["shop2:orders", "sho:orders", "other:orders", "x:shop:orders", "shop"] {
                assert!(!is_trusted(audience, issuer, account), "{file}: {account}");
            }
            assert!(!is_trusted("https://kubernetes.default.svc", issuer, "shop:orders"), "{file}");
            let elsewhere = is_trusted(audience, "https://issuer.example.com", "shop:orders");
            assert_eq!(elsewhere, !cloud.claims.contains(&"iss"), "{file}");
        }
    }
}

#[test]
fn a_pattern_is_judged_as_the_clouds_do() {
    assert!(matches("a:*", "a:") && matches("a:*", "a:b:c") && matches("*b*", "abc") && matches("x", "x"));
    assert!(!matches("a:*", "a") && !matches("a:*", "ab:c") && !matches("*b", "bc") && !matches("x", "xy"));
}

#[test]
fn where_service_accounts_are_trusted_the_node_can_be_denied_every_role() {
    for cloud in &CLOUDS {
        let denying: Vec<_> =
            policies(cloud).into_iter().filter(|(name, ..)| name.starts_with(DENYING)).collect();
        let [(name, _, policy)] = &denying[..] else { panic!("{}: {denying:?}", cloud.page) };
        let [statement] = &statements(policy)[..] else { panic!("{name}: more than one statement") };

        assert_eq!(texts(&statement["Action"]), ["sts:AssumeRole"], "{name}");
        assert_eq!(texts(&statement["Resource"]), ["*"], "{name}");
        assert!(statement["Condition"].is_null(), "{name}: a condition leaves roles open");
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
