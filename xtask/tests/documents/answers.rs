//! What the agent answers and what the troubleshooting page explains are the same lines.

use std::fs;

use pulldown_cmark::{Event, Tag, TagEnd};

use super::{Document, repository};

const PAGE: &str = "docs/troubleshooting.md";
/// Where the lines are written, for all requests that fail.
const SOURCES: [(&str, &str); 2] = [
    ("kube2ram-agent/src/server/error.rs", "fn http(&self)"),
    ("kube2ram-agent/src/policy.rs", "fn external_message(&self)"),
];

#[test]
fn every_line_that_a_pod_may_read_is_explained_and_no_other() {
    let (answers, explained) = (answers(), explained());
    assert!(answers.len() > 20, "{answers:?}");

    let unexplained: Vec<_> = answers.iter().filter(|line| !explained.contains(line)).collect();
    assert!(unexplained.is_empty(), "{PAGE} lacks {unexplained:?}");
    let unheard: Vec<_> = explained.iter().filter(|line| !answers.contains(line)).collect();
    assert!(unheard.is_empty(), "{PAGE} explains {unheard:?}, which nobody answers");
}

/// The texts in those functions, with `…` for what is filled in.
fn answers() -> Vec<String> {
    let mut answers = Vec::new();
    for (path, function) in SOURCES {
        let source = fs::read_to_string(repository().join(path)).unwrap();
        let (_, rest) = source.split_once(function).unwrap_or_else(|| panic!("{path}: {function}"));
        let body = rest.split("\n    }\n").next().unwrap();
        for line in body.lines().filter(|line| !line.trim_start().starts_with("//")) {
            let text =
                line.split('"').nth(1).unwrap_or_default().replace("{key}", "…").replace("{header}", "…");
            if !text.is_empty() {
                answers.push(text);
            }
        }
    }
    answers.sort();
    answers.dedup();
    answers
}

/// The code in the first column of the first table.
fn explained() -> Vec<String> {
    let document = Document::open(PAGE);
    let mut explained = Vec::new();
    let mut cell = 0;
    for event in document.events() {
        match event {
            Event::Start(Tag::TableRow) => cell = 0,
            Event::Start(Tag::TableCell) => cell += 1,
            Event::Code(code) if cell == 1 => explained.push(code.to_string()),
            Event::End(TagEnd::Table) => break,
            _ => {}
        }
    }
    explained
}
