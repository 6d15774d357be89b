//! Links within the repository lead somewhere, to a heading that exists where they name one.

use std::{collections::HashMap, path::Component, path::Path, path::PathBuf};

use super::{Document, documents, repository};

#[test]
fn every_link_within_the_repository_leads_somewhere() {
    let mut broken = Vec::new();
    let mut followed = 0;
    for document in documents() {
        for link in document.links().into_iter().filter(|link| !is_elsewhere(link)) {
            followed += 1;
            if let Err(why) = follow(&document, &link) {
                broken.push(format!("{}: {link} {why}", document.path.display()));
            }
        }
    }

    assert!(broken.is_empty(), "{}", broken.join("\n"));
    assert!(followed > 20, "only {followed} links were found");
}

#[test]
fn a_link_that_leads_nowhere_is_noticed() {
    let document = |text: &str| Document { path: "README.md".into(), text: text.to_owned() };
    let outcome = |text: &str| follow(&document(text), &document(text).links()[0]);

    assert_eq!(outcome("[x](ARCHITECTURE.md)"), Ok(()));
    assert_eq!(outcome("# A `b` (c), d\n\n[x](#a-b-c-d)"), Ok(()));
    assert_eq!(outcome("# Twice\n\n# Twice\n\n[x](#twice-1)"), Ok(()));
    assert!(outcome("[x](docs/nowhere.md)").is_err());
    assert!(outcome("[x](../README.md)").is_err(), "outside of the repository");
    assert!(outcome("# A\n\n[x](#b)").is_err());
}

pub(super) fn is_elsewhere(link: &str) -> bool {
    ["https://", "http://", "mailto:"].into_iter().any(|scheme| link.starts_with(scheme))
}

fn follow(from: &Document, link: &str) -> Result<(), String> {
    let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
    let target = if file.is_empty() {
        Document { path: from.path.clone(), text: from.text.clone() }
    } else {
        let directory = from.path.parent().unwrap_or(Path::new(""));
        let path = normal(&directory.join(file)).ok_or("leads out of the repository")?;
        if !repository().join(&path).exists() {
            return Err("does not exist".to_owned());
        }
        if anchor.is_empty() {
            return Ok(());
        }
        Document::open(path.to_str().unwrap())
    };
    if anchor.is_empty() || anchors(&target).contains(&anchor.to_owned()) {
        return Ok(());
    }
    Err(format!("names no heading of {}", target.path.display()))
}

/// Without `..`; `None` when it leads out of where it begins.
pub(super) fn normal(path: &Path) -> Option<PathBuf> {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::Normal(name) => normal.push(name),
            Component::ParentDir => normal.pop().then_some(())?,
            Component::Prefix(_) | Component::RootDir => return None,
        }
    }
    Some(normal)
}

/// As GitHub makes them: lower case, punctuation dropped, blanks to hyphens, numbered when they repeat.
pub(super) fn anchors(document: &Document) -> Vec<String> {
    let mut seen: HashMap<String, usize> = HashMap::new();
    let anchor = |(_, heading): (usize, String)| {
        let kept = heading.to_lowercase().replace(' ', "-");
        let slug: String = kept.chars().filter(|&c| c.is_alphanumeric() || c == '-' || c == '_').collect();
        let times = seen.entry(slug.clone()).and_modify(|times| *times += 1).or_default();
        if *times == 0 { slug } else { format!("{slug}-{times}") }
    };
    document.headings().into_iter().map(anchor).collect()
}
