//! docs/predecessors.md has each row whose number a test's name, a test's table or a comment uses, once.

use std::{collections::BTreeSet, fs};

use pulldown_cmark::{Event, Tag, TagEnd};

use super::{Document, documents, files, repository};

const PAGE: &str = "docs/predecessors.md";

#[test]
fn every_row_that_is_referred_to_exists_and_its_page_is_named() {
    let rows = rows(&Document::open(PAGE));
    let mut wrong = Vec::new();
    let mut used = BTreeSet::new();
    for path in files("rs") {
        let text = fs::read_to_string(repository().join(&path)).unwrap();
        let mut numbers = referred_to(&text);
        if text.contains(PAGE) {
            numbers.extend(labels(&text));
        } else if !numbers.is_empty() {
            wrong.push(format!("{}: refers to {numbers:?} and does not name {PAGE}", path.display()));
        }
        used.extend(numbers);
    }
    used.extend(documents().iter().flat_map(|document| referred_to(&document.text)));

    // "3.25" stands for 3.25a and 3.25b.
    let exists = |number: &str| rows.iter().any(|row| row == number || *row == format!("{number}a"));
    let missing: Vec<_> = used.iter().filter(|number| !exists(number)).collect();
    assert!(missing.is_empty(), "{PAGE} lacks the rows {missing:?}");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(used.len() > 80, "only {used:?} were found");
}

#[test]
fn no_row_has_the_number_of_another() {
    let rows = rows(&Document::open(PAGE));

    let distinct: BTreeSet<_> = rows.iter().collect();

    assert!(rows.len() > 100, "{rows:?}");
    assert_eq!(distinct.len(), rows.len(), "{rows:?}");
}

#[test]
fn numbers_are_found_in_names_in_prose_and_in_labels() {
    let numbers = |text: &str| referred_to(text).into_iter().collect::<Vec<_>>();

    assert_eq!(numbers("fn row_4_16b_own_account()"), ["4.16b"]);
    assert_eq!(numbers("row_4_19_and_4_20_nothing: row_4b_plain, row_5_keys"), ["4.19", "4.20", "4b", "5"]);
    assert_eq!(numbers("`passes_rows_3_26_to_3_32`, `fails_row_1_7`"), ["1.7", "3.26", "3.32"]);
    assert_eq!(numbers("/// Rows 4.12 and\n/// 4.13: row 3.39b."), ["3.39b", "4.12", "4.13"]);
    assert_eq!(numbers("three in a row, row by row; throw 4.1; rows[4.2]; a row of 4.3"), [""; 0]);
    assert_eq!(labels("  (\"4.2 bare ?\", x),\n\"2.7\",\n(\"1.2.3\", y),\n(\"x 4.1\")").len(), 2);
}

/// The numbers in the first column of the tables that call it "row", and those of sections.
fn rows(document: &Document) -> Vec<String> {
    let section = |heading: &str| parsed(heading.split(' ').next()?.trim_end_matches('.'));
    let mut rows: Vec<_> = document.headings().iter().filter_map(|(_, heading)| section(heading)).collect();
    let (mut cells, mut is_numbered) = (Vec::new(), false);
    for event in document.events() {
        match event {
            Event::Start(Tag::TableHead | Tag::TableRow) => cells.clear(),
            Event::Start(Tag::TableCell) => cells.push(String::new()),
            Event::Text(text) => cells.last_mut().into_iter().for_each(|cell| cell.push_str(&text)),
            Event::End(TagEnd::TableHead) => is_numbered = cells.first().is_some_and(|cell| cell == "row"),
            Event::End(TagEnd::TableRow) if is_numbered => {
                rows.extend(cells[0].split(", ").map(|word| parsed(word).expect(word)));
            }
            _ => {}
        }
    }
    rows
}

/// The numbers behind "row" or "rows", in names (`rows_3_1_to_3_25`) and in prose ("Rows 3.1 and 3.2").
fn referred_to(text: &str) -> BTreeSet<String> {
    let names = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let words: Vec<_> = text.split_whitespace().filter(|word| !word.starts_with("//")).collect();
    let in_prose = words.iter().enumerate().flat_map(|(at, word)| {
        let word = word.trim_start_matches(|c: char| !c.is_alphanumeric());
        let is_row = ["row", "rows"].iter().any(|row| word.eq_ignore_ascii_case(row));
        if is_row { numbers_of_prose(&words[at + 1..]) } else { Vec::new() }
    });
    names.flat_map(numbers_of_name).chain(in_prose).collect()
}

/// `row_4_19_and_4_20_nothing` has 4.19 and 4.20, `row_4b_plain` has 4b.
fn numbers_of_name(name: &str) -> Vec<String> {
    let parts = name.split('_').skip_while(|part| !matches!(*part, "row" | "rows")).skip(1);
    let mut parts = parts.peekable();
    let mut numbers = Vec::new();
    while let Some(part) = parts.next() {
        match parsed(part) {
            Some(section) => {
                let row = parts.peek().and_then(|next| parsed(&format!("{section}.{next}")));
                if row.is_some() {
                    parts.next();
                }
                numbers.push(row.unwrap_or(section));
            }
            None if matches!(part, "and" | "to") => {}
            None => break,
        }
    }
    numbers
}

/// The numbers with which `words` begin, with "and" and "to" between them.
fn numbers_of_prose(words: &[&str]) -> Vec<String> {
    let mut numbers = Vec::new();
    for word in words.iter().map(|word| word.trim_matches(|c: char| !c.is_ascii_alphanumeric())) {
        match parsed(word).filter(|number| number.contains('.')) {
            Some(number) => numbers.push(number),
            None if matches!(word, "and" | "to") => {}
            None => break,
        }
    }
    numbers
}

/// The numbers that begin a test case: the text at the start of a line.
fn labels(text: &str) -> Vec<String> {
    let label = |line: &str| {
        let text = line.trim_start().trim_start_matches('(').strip_prefix('"')?;
        parsed(text.split(['"', ' ']).next()?).filter(|number| number.contains('.'))
    };
    text.lines().filter_map(label).collect()
}

/// A section (`4`, `4b`) or a row (`4.16b`): digits, with one letter behind them at most.
fn parsed(word: &str) -> Option<String> {
    let is_number = |part: &str| {
        let digits = part.trim_end_matches(['a', 'b', 'c']);
        let is_digits = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        is_digits && part.len() - digits.len() <= 1
    };
    (word.split('.').count() <= 2 && word.split('.').all(is_number)).then(|| word.to_owned())
}
