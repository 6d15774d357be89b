//! Tests that a document names exist: in each table with a column "proved by", every row names at least one,
//! or has `none` and the reason.

use std::{collections::HashSet, fs};

use pulldown_cmark::{Event, Tag, TagEnd};

use super::{Document, documents, files, repository};

const COLUMN: &str = "proved by";

/// A cell: its text, and what of it is code.
#[derive(Default)]
struct Cell {
    text: String,
    code: Vec<String>,
}

#[test]
fn every_test_that_a_document_names_exists() {
    let tests = tests();
    assert!(tests.len() > 400, "only {} tests were found", tests.len());
    let mut missing = Vec::new();
    let mut named = 0;
    for document in documents() {
        for cell in proofs(&document) {
            if cell.code.is_empty() && !cell.text.starts_with("none") {
                missing.push(format!("{}: a row without a test", document.path.display()));
            }
            for name in cell.code {
                named += 1;
                if !tests.contains(&name) {
                    missing.push(format!("{}: there is no test {name}", document.path.display()));
                }
            }
        }
    }

    assert!(missing.is_empty(), "{}", missing.join("\n"));
    assert!(named > 50, "only {named} names were found");
}

#[test]
fn only_the_column_of_that_name_is_read() {
    let text = "| way | proved by |\n|---|---|\n| `x` | `a_test`, `b_test` |\n| y | none: why |\n\n| `z` | w |\n|---|---|\n| `v` | u |\n";
    let document = Document { path: "x.md".into(), text: text.to_owned() };

    let cells = proofs(&document);

    assert_eq!(cells.len(), 2);
    assert_eq!(cells[0].code, ["a_test", "b_test"]);
    assert!(cells[1].text.starts_with("none"));
}

#[test]
fn tests_are_functions_and_rows_of_a_table() {
    let text = "#[test]\nfn one() {}\nrows! {\n    /// row_a: why\n    row_b: GET x => 200;\n    row_c: PUT y => 405;\n}\nrow_d: u8,\nfn two() {}";

    assert_eq!(tests_of(text), ["one", "row_b", "row_c"]);
}

/// The cells of that column, in all tables that have it.
fn proofs(document: &Document) -> Vec<Cell> {
    let mut proofs = Vec::new();
    let mut column = None;
    let mut row: Vec<Cell> = Vec::new();
    for event in document.events() {
        match event {
            Event::Start(Tag::TableHead | Tag::TableRow) => row.clear(),
            Event::Start(Tag::TableCell) => row.push(Cell::default()),
            Event::Text(text) => row.last_mut().into_iter().for_each(|cell| cell.text.push_str(&text)),
            Event::Code(code) => row.last_mut().into_iter().for_each(|cell| cell.code.push(code.to_string())),
            Event::End(TagEnd::TableHead) => column = row.iter().position(|cell| cell.text == COLUMN),
            Event::End(TagEnd::TableRow) => proofs.extend(column.map(|column| row.remove(column))),
            Event::End(TagEnd::Table) => {
                column = None;
                row.clear();
            }
            _ => {}
        }
    }
    proofs
}

/// The names of all functions that stand behind a test's attribute, and of the tests that a `rows!` makes.
fn tests() -> HashSet<String> {
    let mut names = HashSet::new();
    for path in files("rs") {
        let text = fs::read_to_string(repository().join(&path)).unwrap();
        names.extend(tests_of(&text));
    }
    names
}

fn tests_of(text: &str) -> Vec<String> {
    let mut names = Vec::new();
    let (mut is_test, mut is_in_rows) = (false, false);
    for line in text.lines().map(str::trim) {
        is_test |= line.starts_with("#[test]") || line.starts_with("#[tokio::test");
        if let Some((_, rest)) = line.split_once("fn ").filter(|_| is_test) {
            names.extend(rest.split(['(', '<']).next().map(str::to_owned));
            is_test = false;
        }
        is_in_rows = line == "rows! {" || (is_in_rows && line != "}");
        let row = line.split_once(": ").filter(|(name, _)| is_in_rows && name.starts_with("row_"));
        names.extend(row.map(|(name, _)| name.to_owned()));
    }
    names
}
