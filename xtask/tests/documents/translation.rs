//! The Chinese README says what the English one does, as far as a program can tell: headings, commands, tables and links.

use pulldown_cmark::{CodeBlockKind, Event, Tag, TagEnd};

use super::Document;

#[test]
fn the_translation_has_the_same_headings_commands_tables_and_links() {
    let [english, chinese] = ["README.md", "README.zh-CN.md"].map(Document::open);

    assert_eq!(levels(&english), levels(&chinese), "levels of headings");
    assert_eq!(blocks(&english), blocks(&chinese), "code blocks, but for what is drawn");
    assert_eq!(rows(&english), rows(&chinese), "rows of each table");
    assert_eq!(links(&english), links(&chinese), "links");
    assert_eq!(code(&english), code(&chinese), "flags, keys, paths and the like");
}

fn levels(document: &Document) -> Vec<usize> {
    document.headings().into_iter().map(|(level, _)| level).collect()
}

/// Language and text of each block, without comments; of what is drawn, the language alone.
fn blocks(document: &Document) -> Vec<(String, String)> {
    let mut blocks = Vec::new();
    let mut current = None;
    for event in document.events() {
        match (event, &mut current) {
            (Event::Start(Tag::CodeBlock(CodeBlockKind::Fenced(language))), _) => {
                current = Some((language.into_string(), String::new()));
            }
            (Event::Text(text), Some((language, block))) if language != "text" => {
                let command =
                    |line: &str| line.split(" # ").next().unwrap_or_default().trim_end().to_owned() + "\n";
                block.extend(text.lines().map(command));
            }
            (Event::End(TagEnd::CodeBlock), _) => blocks.extend(current.take()),
            _ => {}
        }
    }
    blocks
}

fn rows(document: &Document) -> Vec<usize> {
    let mut tables = Vec::new();
    for event in document.events() {
        match event {
            Event::Start(Tag::Table(_)) => tables.push(0),
            Event::Start(Tag::TableRow) => *tables.last_mut().unwrap() += 1,
            _ => {}
        }
    }
    tables
}

/// What stands as code in the text.
fn code(document: &Document) -> Vec<String> {
    let code = |event| if let Event::Code(code) = event { Some(code.into_string()) } else { None };
    let mut code: Vec<_> = document.events().filter_map(code).collect();
    code.sort();
    code
}

/// Without the headings that they name, and the links from one README to the other.
fn links(document: &Document) -> Vec<String> {
    let file = |link: String| link.split('#').next().unwrap_or_default().to_owned();
    let mut links: Vec<_> =
        document.links().into_iter().map(file).filter(|link| !link.starts_with("README")).collect();
    links.sort();
    links
}
