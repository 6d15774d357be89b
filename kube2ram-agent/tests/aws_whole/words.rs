//! Operators read of IAM roles and ARNs, and of no other cloud.

use http::StatusCode;
use kube2ram_sandbox::{
    Cloud, CredentialsFrom,
    node::PodSpec,
    standin::{Role, StsMode},
};
use serde_json::Value;

use crate::support::{AGENT, LIST, Lab, eventually, pod, role_arn};

/// How words begin that belong to Alibaba Cloud.
const FOREIGN: [&str; 8] =
    ["100.100.100.200", "acs:", "ActionTrail", "Alibaba", "aliyun", "ECS", "oidc:sub", "RAM"];

fn assert_of_this_cloud(what: &str, text: &str) {
    // `KUBE2RAM_…` is the agent's own.
    let begins = |line: &str, word: &str| {
        line.match_indices(word).any(|(at, _)| !line[..at].ends_with(|c: char| c.is_alphanumeric()))
    };
    for word in FOREIGN {
        let line = text.lines().find(|line| begins(line, word));
        assert_eq!(line, None, "{what} speaks of {word}");
    }
}

/// Whether an Event is about a pod.
fn is_told(lab: &Lab, pod: &str) -> bool {
    lab.api().events().iter().any(|event| event["regarding"]["name"] == pod)
}

/// Whether an Event about a pod contains this text.
fn is_told_of(lab: &Lab, pod: &str, text: &str) -> bool {
    let is_it = |event: &Value| {
        event["regarding"]["name"] == pod && event["note"].as_str().is_some_and(|note| note.contains(text))
    };
    lab.api().events().iter().any(is_it)
}

/// What `explain` prints about a pod.
fn explanation(lab: &Lab, pod: &str) -> String {
    let output = lab.agent_if_any().unwrap().exec(&["explain", &format!("default/{pod}")]).unwrap();
    String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
}

/// All that an operator reads, with the explanations of these pods.
fn assert_all_of_this_cloud(lab: &mut Lab, pods: &[&str]) {
    for event in lab.api().events() {
        assert_of_this_cloud("an Event", &event.to_string());
    }
    let agent = lab.agent().unwrap();
    let pods = pods.iter().map(|pod| vec!["explain".to_owned(), format!("default/{pod}")]);
    for command in pods.chain([vec!["status".to_owned()]]) {
        let args: Vec<&str> = command.iter().map(String::as_str).collect();
        let output = agent.exec(&args).unwrap();
        let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert!(text.lines().count() > 1, "{command:?} shows nothing: {text}");
        assert_of_this_cloud(&command.join(" "), &text);
    }
    assert_of_this_cloud("the log", &agent.log());
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn log_events_explanations_and_status_speak_of_this_cloud_alone() {
    let pods = [
        pod("orders"),
        pod("stranger"),
        PodSpec::new("plain"),
        PodSpec::new("typo").role("two words"),
        PodSpec::new("arn").annotation("iam.amazonaws.com/role", "arn:aws:iam::1:role/x"),
    ];
    let mut lab = Lab::new("aws-words", &pods);
    let stranger = Role { trusts_node: false, ..Role::default() };
    lab.accounts().add_role(role_arn("stranger-role"), stranger);
    lab.start(&[]);
    for pod in ["orders", "stranger", "plain", "typo", "arn"] {
        drop(lab.ask_until_ready(pod, &format!("{LIST}{pod}-role")));
    }
    eventually((true, true), || (is_told(&lab, "stranger"), is_told(&lab, "typo")));

    for (pod, word) in
        [("orders", "arn:aws:iam::"), ("stranger", "AccessDenied"), ("plain", "iam.amazonaws.com/role")]
    {
        let text = explanation(&lab, pod);
        assert!(text.contains(word), "{pod}: no {word} in {text}");
    }
    assert_all_of_this_cloud(&mut lab, &["orders", "stranger", "plain", "typo", "arn"]);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_outage_of_sts_and_refused_keys_are_told_in_words_of_this_cloud_alone() {
    let refused_keys = StsMode::Error(StatusCode::FORBIDDEN, "InvalidClientTokenId");
    let no_answer = "STS does not answer the node";
    for (name, mode, told) in [
        ("down", StsMode::Refuse, no_answer),
        ("busy", StsMode::Unavailable, no_answer),
        ("keys", refused_keys, "the agent itself has no valid credentials"),
    ] {
        let mut lab = Lab::with_agent(&format!("aws-words-{name}"), &[pod("orders")], &[]);
        assert_eq!(lab.credentials("orders", "orders-role"), "orders-role", "{name}");
        lab.sts().set_mode(mode).unwrap();
        lab.add(&pod("late"));

        // The Event and the explanation are about the outage, or their words prove nothing.
        eventually((true, true), || {
            drop(lab.ask("late", &format!("{LIST}late-role")));
            (is_told_of(&lab, "late", told), explanation(&lab, "late").contains(told))
        });

        assert_all_of_this_cloud(&mut lab, &["orders", "late"]);
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn roles_by_service_account_are_told_in_words_of_this_cloud_alone() {
    let mut lab = Lab::new("aws-words-accounts", &[]);
    lab.accounts().deny_node();
    // The second trusts nobody, and the third's pod has what no exchange takes.
    lab.add_role_of_account("orders-role", "default", "orders");
    for name in ["stranger", "tenant"] {
        lab.accounts()
            .add_role(role_arn(&format!("{name}-role")), Role { trusts_node: false, ..Role::default() });
    }
    for name in ["orders", "stranger", "tenant"] {
        let (key, role) = (Cloud::Aws.annotation("role"), format!("{name}-role"));
        lab.api().apply_service_account("default", name, &[(key.as_str(), role.as_str())]).unwrap();
        let pod = PodSpec::new(name).service_account(name);
        let external_id = Cloud::Aws.annotation("external-id");
        lab.add_pod(&if name == "tenant" { pod.annotation(&external_id, "tenant:7") } else { pod }).unwrap();
    }
    let mut flags = CredentialsFrom::ServiceAccount.flags(Cloud::Aws);
    flags.push("--auto-discover-base-arn".to_owned());
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    lab.add_agent(AGENT.as_ref(), &flags).unwrap().start().unwrap();

    assert_eq!(lab.credentials("orders", "orders-role"), "orders-role");
    eventually((true, true), || {
        for name in ["stranger", "tenant"] {
            drop(lab.ask(name, &format!("{LIST}{name}-role")));
        }
        (is_told(&lab, "stranger"), is_told(&lab, "tenant"))
    });

    let told = |word: &str| lab.api().events().iter().any(|event| event.to_string().contains(word));
    assert!(told("(<provider>:sub)") && told("AssumeRoleWithWebIdentity"), "{:?}", lab.api().events());
    assert_all_of_this_cloud(&mut lab, &["orders", "stranger", "tenant"]);
}
