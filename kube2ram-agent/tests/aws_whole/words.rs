//! Operators read of IAM roles and ARNs, and of no other cloud.

use kube2ram_sandbox::{node::PodSpec, standin::Role};

use crate::support::{LIST, Lab, eventually, pod, role_arn};

/// How words begin that belong to Alibaba Cloud.
const FOREIGN: [&str; 7] = ["100.100.100.200", "acs:", "ActionTrail", "Alibaba", "aliyun", "ECS", "RAM"];

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
    let told =
        |lab: &Lab, pod: &str| lab.api().events().iter().any(|event| event["regarding"]["name"] == pod);
    eventually((true, true), || (told(&lab, "stranger"), told(&lab, "typo")));

    for event in lab.api().events() {
        assert_of_this_cloud("an Event", &event.to_string());
    }
    for (pod, word) in
        [("orders", "arn:aws:iam::"), ("stranger", "AccessDenied"), ("plain", "iam.amazonaws.com/role")]
    {
        let output = lab.agent().unwrap().exec(&["explain", &format!("default/{pod}")]).unwrap();
        let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert!(text.contains(word), "{pod}: no {word} in {text}");
    }
    for pod in ["orders", "stranger", "plain", "typo", "arn"] {
        let output = lab.agent().unwrap().exec(&["explain", &format!("default/{pod}")]).unwrap();
        assert_of_this_cloud(pod, &String::from_utf8([output.stdout, output.stderr].concat()).unwrap());
    }
    let status = lab.agent().unwrap().exec(&["status"]).unwrap();
    assert_of_this_cloud("status", &String::from_utf8([status.stdout, status.stderr].concat()).unwrap());
    assert_of_this_cloud("the log", &lab.agent().unwrap().log());
}
