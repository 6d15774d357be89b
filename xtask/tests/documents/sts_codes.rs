//! The codes of AWS's STS that the agent tells apart, and those that the page on IAM explains, are the same.

use std::{collections::BTreeSet, fs};

use pulldown_cmark::{Event, Tag, TagEnd};

use super::{Document, repository};

const PAGE: &str = "docs/aws/iam.md";
/// How the head of the page's table begins.
const HEAD: &str = "status and code";
const SOURCE: &str = "kube2ram-cloud/src/aws/refusal.rs";

#[test]
fn every_code_of_sts_that_the_agent_knows_is_explained_and_no_other() {
    let source = fs::read_to_string(repository().join(SOURCE)).unwrap();
    let (known, explained) = (known(&source), explained(&Document::open(PAGE)));

    assert!(known.len() > 15, "{known:?}");
    assert_eq!(known, explained);
}

/// Texts of one capitalised word, in the code before its tests.
fn known(source: &str) -> BTreeSet<String> {
    let code = source.split("#[cfg(test)]").next().unwrap();
    let is_code = |text: &&str| {
        text.len() > 3
            && text.starts_with(|c: char| c.is_ascii_uppercase())
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric())
    };
    code.split('"').filter(is_code).map(str::to_owned).collect()
}

/// The code in the first column of that table.
fn explained(document: &Document) -> BTreeSet<String> {
    let mut explained = BTreeSet::new();
    let (mut head, mut is_head, mut cell) = (String::new(), false, 0);
    for event in document.events() {
        match event {
            Event::Start(Tag::TableHead) => {
                head.clear();
                is_head = true;
            }
            Event::End(TagEnd::TableHead) => is_head = false,
            Event::Start(Tag::TableRow) => cell = 0,
            Event::Start(Tag::TableCell) => cell += 1,
            Event::Text(text) if is_head => head.push_str(&text),
            Event::Code(code) if cell == 1 && head.starts_with(HEAD) => {
                explained.insert(code.to_string());
            }
            _ => {}
        }
    }
    explained
}
