//! Parts of the documents that are written from the code: between `<!-- generated: … -->` and `<!-- end -->`.
//! For tests only. `cargo xtask docs` sets the variable under which the tests write what they otherwise
//! compare.

use std::{env, fs, path::Path};

/// Under it, [`keep_current`] writes.
const UPDATE: &str = "UPDATE_DOCS";

/// Panics unless `text` equals the part `name` of a document, whose path is relative to the repository.
pub(crate) fn keep_current(document: &str, name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(document);
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
pub(crate) fn keep_file_current(file: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file);
    if fs::read_to_string(&path).ok().as_deref() == Some(text) {
        return;
    }
    assert!(env::var_os(UPDATE).is_some(), "{file} is not what it is made of: run cargo xtask docs");
    fs::write(&path, text).unwrap_or_else(|error| panic!("{file}: {error}"));
}

/// One row of a table.
pub(crate) fn row<'a>(cells: impl IntoIterator<Item = &'a str>) -> String {
    let cells: Vec<_> = cells.into_iter().map(|cell| cell.replace('|', "\\|")).collect();
    format!("| {} |\n", cells.join(" | "))
}
