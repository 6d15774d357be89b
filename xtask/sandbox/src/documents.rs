//! Parts of the documents that are written from the code: between `<!-- generated: … -->` and `<!-- end -->`,
//! and tables of metrics. For the tests of the agent and of the authenticator only. `cargo xtask docs` sets
//! the variable under which the tests write what they otherwise compare.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    path::{Path, PathBuf},
};

/// Under it, [`keep_current`] writes.
const UPDATE: &str = "UPDATE_DOCS";

/// A family of metrics.
#[derive(Clone, Debug, Default)]
pub struct Family {
    /// Its type.
    pub kind: String,
    /// What it means.
    pub help: String,
    /// By name, the values that labels have.
    pub labels: BTreeMap<String, BTreeSet<String>>,
}

/// Panics unless `text` equals the part `name` of a document, whose path is relative to the repository.
pub fn keep_current(document: &str, name: &str, text: &str) {
    let path = repository().join(document);
    let whole = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{document}: {error}"));
    let begin = format!("<!-- generated: {name} (cargo xtask docs) -->\n");
    let (before, rest) = whole.split_once(&begin).unwrap_or_else(|| panic!("{document} lacks {begin:?}"));
    let (part, after) =
        rest.split_once("<!-- end -->").unwrap_or_else(|| panic!("{document}: no end of {name}"));
    if part == text {
        return;
    }
    assert!(env::var_os(UPDATE).is_some(), "{document}: {name} differs from the code: run cargo xtask docs");
    fs::write(&path, format!("{before}{begin}{text}<!-- end -->{after}"))
        .unwrap_or_else(|error| panic!("{document}: {error}"));
}

/// Panics unless `text` equals a file, whose path is relative to the repository.
pub fn keep_file_current(file: &str, text: &str) {
    let path = repository().join(file);
    if fs::read_to_string(&path).ok().as_deref() == Some(text) {
        return;
    }
    assert!(env::var_os(UPDATE).is_some(), "{file} is not what it is made of: run cargo xtask docs");
    fs::write(&path, text).unwrap_or_else(|error| panic!("{file}: {error}"));
}

/// One row of a table.
pub fn row<'a>(cells: impl IntoIterator<Item = &'a str>) -> String {
    let cells: Vec<_> = cells.into_iter().map(|cell| cell.replace('|', "\\|")).collect();
    format!("| {} |\n", cells.join(" | "))
}

/// The families in Prometheus's text format, by name.
pub fn families(text: &str) -> BTreeMap<String, Family> {
    let mut families = BTreeMap::<String, Family>::new();
    let mut current = String::new();
    for line in text.lines() {
        if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) {
            current = name.to_owned();
            families.entry(current.clone()).or_default().help = help.to_owned();
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
        {
            families.entry(name.to_owned()).or_default().kind = kind.to_owned();
        } else if let Some((labels, _)) = line.split_once('{').and_then(|(_, rest)| rest.split_once('}')) {
            let family = families.entry(current.clone()).or_default();
            for (name, value) in labels.split("\",").filter_map(|label| label.split_once("=\"")) {
                let values = family.labels.entry(name.to_owned()).or_default();
                values.insert(value.trim_end_matches('"').to_owned());
            }
        }
    }
    families
}

/// The table of all families. Of labels in `open`, not all values are there from the beginning, or they
/// differ with the build: these are not listed.
pub fn metrics_table(families: &BTreeMap<String, Family>, open: &[&str]) -> String {
    let mut table = row(["metric", "type", "labels", "meaning"]) + &row(["---"; 4]);
    for (name, family) in families {
        let (name, labels) = (format!("`{name}`"), labels(family, open));
        table += &row([name.as_str(), &family.kind, &labels, &family.help]);
    }
    table
}

fn labels(family: &Family, open: &[&str]) -> String {
    let own = family.labels.iter().filter(|(name, _)| *name != "le");
    let described = own.map(|(name, values)| {
        // Values that the help lists are not repeated.
        let is_told = values.iter().any(|value| family.help.contains(value.as_str()));
        if is_told || open.contains(&name.as_str()) {
            return format!("`{name}`");
        }
        let values: Vec<_> = values.iter().map(String::as_str).collect();
        format!("`{name}`: {}", values.join(", "))
    });
    described.collect::<Vec<_>>().join("; ")
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}
