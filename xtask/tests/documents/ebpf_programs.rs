//! `docs/internals` describes every eBPF program and map, and no others.

use std::{collections::BTreeSet, fs};

use super::{Document, repository};

const PAGES: [&str; 2] = ["docs/internals/datapath.md", "docs/internals/boot.md"];

#[test]
fn every_program_and_map_is_described_and_no_other() {
    let source = fs::read_to_string(repository().join("kube2ram-common/src/names.rs")).unwrap();
    let pages = PAGES.map(|page| Document::open(page).text).concat();

    let (named, described) = (names(&source, '"'), names(&pages, '`'));

    assert!(named.len() > 20, "{named:?}");
    assert_eq!(named, described);
}

/// What stands between two such marks and is called like ours.
fn names(text: &str, mark: char) -> BTreeSet<&str> {
    let is_name = |name: &&str| {
        let rest = name.strip_prefix("k2r_").unwrap_or_default();
        !rest.is_empty() && rest.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
    };
    text.split(mark).filter(is_name).collect()
}
