//! The documents hold together: links, translations, the tests and rows they name, the policies to paste.
//! What of them comes from the agent's code is tested there: `kube2ram-agent/src/args/tests/reference.rs`.

#![expect(clippy::expect_used, clippy::unwrap_used, reason = "a failed step fails the test")]

mod answers;
mod ebpf_programs;
mod frame;
mod links;
mod policies;
mod predecessors;
mod proofs;
mod sts_codes;
mod translation;

use std::{
    fs,
    path::{Path, PathBuf},
};

use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};

/// One Markdown file.
struct Document {
    /// Relative to the repository.
    path: PathBuf,
    text: String,
}

impl Document {
    fn open(path: &str) -> Self {
        let text =
            fs::read_to_string(repository().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
        Self { path: path.into(), text }
    }

    fn events(&self) -> impl Iterator<Item = Event<'_>> {
        Parser::new_ext(&self.text, Options::ENABLE_TABLES)
    }

    /// Level and text of each heading.
    fn headings(&self) -> Vec<(usize, String)> {
        let mut headings = Vec::new();
        let mut current = None;
        for event in self.events() {
            match (event, &mut current) {
                (Event::Start(Tag::Heading { level, .. }), _) => {
                    current = Some((level as usize, String::new()))
                }
                (Event::Text(text) | Event::Code(text), Some((_, heading))) => heading.push_str(&text),
                (Event::End(TagEnd::Heading(_)), _) => headings.extend(current.take()),
                _ => {}
            }
        }
        headings
    }

    /// Where links and images lead.
    fn links(&self) -> Vec<String> {
        let target = |event| match event {
            Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                Some(dest_url.into_string())
            }
            _ => None,
        };
        self.events().filter_map(target).collect()
    }
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// All Markdown files of the repository.
fn documents() -> Vec<Document> {
    let documents: Vec<_> = files("md").iter().map(|path| Document::open(path.to_str().unwrap())).collect();
    assert!(documents.len() > 5, "where are the documents?");
    documents
}

/// The repository's files whose names end so, relative to it; not those of builds.
fn files(extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut directories = vec![PathBuf::new()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(repository().join(&directory)).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            let path = directory.join(&name);
            let is_ours = !name.starts_with('.') && name != "target" && name != "node_modules";
            if entry.file_type().unwrap().is_dir() && is_ours {
                directories.push(path);
            } else if path.extension().is_some_and(|found| found == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}
