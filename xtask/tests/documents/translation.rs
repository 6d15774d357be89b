//! Each Chinese page has the headings, code, tables and links of its English page.
//! Depends on the rules for links and anchors in `links`.

use std::path::{Path, PathBuf};

use pulldown_cmark::{CodeBlockKind, Event, Tag, TagEnd};

use super::{
    Document, documents,
    links::{anchors, is_elsewhere, normal},
    repository,
};

/// Directories of pages that have Chinese versions, which are in `zh-CN` below them.
const DIRECTORIES: [&str; 2] = ["docs", "docs/authenticator"];

#[test]
fn each_translation_has_the_same_headings_code_tables_and_links() {
    for [english, chinese] in pairs() {
        let page = chinese.path.display();

        assert_eq!(levels(&english), levels(&chinese), "{page}: levels of headings");
        assert_eq!(blocks(&english), blocks(&chinese), "{page}: code blocks");
        assert_eq!(tables(&english), tables(&chinese), "{page}: columns and rows of each table");
        assert_eq!(code(&english), code(&chinese), "{page}: flags, keys, messages and the like");
        assert_eq!(links_in_chinese(&english), links(&chinese), "{page}: links");
    }
}

#[test]
fn each_page_and_its_translation_link_to_each_other_at_the_top() {
    for [english, chinese] in pairs() {
        assert_eq!(targets(&english).first(), Some(&Target::page(&chinese)), "{}", english.path.display());
        assert_eq!(targets(&chinese).first(), Some(&Target::page(&english)), "{}", chinese.path.display());
    }
}

#[test]
fn each_page_in_chinese_is_compared_with_an_english_one() {
    let pairs = pairs();

    let translated: Vec<_> = pairs.iter().map(|[_, chinese]| chinese.path.clone()).collect();
    let forgotten: Vec<_> = documents()
        .into_iter()
        .map(|document| document.path)
        .filter(|path| path.to_str().unwrap().contains("zh-CN"))
        .filter(|path| !translated.contains(path))
        .collect();

    assert!(forgotten.is_empty(), "no English page for {forgotten:?}");
    assert!(pairs.len() >= 8, "only {translated:?} were found");
}

#[test]
fn comments_and_drawings_may_differ_and_commands_may_not() {
    let blocks = |text: &str| blocks(&document(text));

    let command = blocks("```sh\nrun # why\n```\n");
    assert_eq!(command, blocks("```sh\nrun # 原因\n```\n"));
    assert_ne!(command, blocks("```sh\nrun --fast # why\n```\n"));
    assert_ne!(command, blocks("```console\nrun # why\n```\n"));
    let drawing = blocks("```mermaid\nflowchart LR\n    A[pod] --> B\n```\n");
    assert_eq!(drawing, blocks("```mermaid\nflowchart LR\n    A[容器组] --> B\n```\n"));
    assert_ne!(drawing, blocks("```mermaid\nflowchart LR\n```\n"));
}

#[test]
fn a_missing_row_or_column_is_noticed() {
    let tables = |text: &str| tables(&document(text));

    assert_eq!(tables("| a | b |\n|---|---|\n| c | d |\n"), [(2, 1)]);
    assert_eq!(tables("| a |\n|---|\n| b |\n| c |\n\nd\n\n| e |\n|---|\n| f |\n"), [(1, 2), (1, 1)]);
}

#[test]
fn a_link_leads_to_the_same_heading_of_the_translation() {
    let links = |path: &str, text: &str| {
        links_in_chinese(&Document { path: path.into(), text: format!("[中文](x.md)\n\n{text}") })
    };
    let target = |file: &str, anchor: &str| [Target { file: file.to_owned(), anchor: anchor.to_owned() }];

    assert_eq!(links("docs/a.md", "[x](install.md#remove)"), target("docs/zh-CN/install.md", "卸载"));
    assert_eq!(links("README.md", "[x](docs/install.md)"), target("docs/zh-CN/install.md", ""));
    assert_eq!(links("docs/a.md", "[x](nowhere.md#y)"), target("docs/nowhere.md", "y"));
    assert_eq!(
        links("docs/a.md", "[x](https://www.alibabacloud.com/help/en/ack#y)"),
        target("https://www.alibabacloud.com/help/zh/ack#y", "")
    );
}

fn document(text: &str) -> Document {
    Document { path: "x.md".into(), text: text.to_owned() }
}

/// Each page that has a Chinese version, with it.
fn pairs() -> Vec<[Document; 2]> {
    let pair = |english: Document| {
        let chinese = Document::open(translation(&english.path)?.to_str().unwrap());
        Some([english, chinese])
    };
    documents().into_iter().filter_map(pair).collect()
}

/// Where the Chinese version of a page is; `None` when there is none.
fn translation(english: &Path) -> Option<PathBuf> {
    let path = match english.parent()?.to_str()? {
        "" => PathBuf::from(format!("{}.zh-CN.md", english.to_str()?.strip_suffix(".md")?)),
        directory if DIRECTORIES.contains(&directory) => {
            Path::new(directory).join("zh-CN").join(english.file_name()?)
        }
        _ => return None,
    };
    repository().join(&path).is_file().then_some(path)
}

fn levels(document: &Document) -> Vec<usize> {
    document.headings().into_iter().map(|(level, _)| level).collect()
}

/// Language and comparable text of each code block.
fn blocks(document: &Document) -> Vec<(String, String)> {
    let mut blocks = Vec::new();
    let mut current: Option<(String, String)> = None;
    for event in document.events() {
        match (event, &mut current) {
            (Event::Start(Tag::CodeBlock(CodeBlockKind::Fenced(language))), _) => {
                current = Some((language.into_string(), String::new()));
            }
            (Event::Text(text), Some((_, block))) => block.push_str(&text),
            (Event::End(TagEnd::CodeBlock), _) => blocks.extend(current.take().map(comparable)),
            _ => {}
        }
    }
    blocks
}

/// Of a drawing the number of lines, because its words are translated; of other code all but the comments.
fn comparable((language, text): (String, String)) -> (String, String) {
    let text = if language == "mermaid" {
        format!("{} lines", text.lines().count())
    } else {
        let command = |line: &str| line.split(" # ").next().unwrap_or_default().trim_end().to_owned() + "\n";
        text.lines().map(command).collect()
    };
    (language, text)
}

/// Columns and rows of each table; the head is no row.
fn tables(document: &Document) -> Vec<(usize, usize)> {
    let mut tables: Vec<(usize, usize)> = Vec::new();
    for event in document.events() {
        match event {
            Event::Start(Tag::Table(columns)) => tables.push((columns.len(), 0)),
            Event::Start(Tag::TableRow) => tables.last_mut().unwrap().1 += 1,
            _ => {}
        }
    }
    tables
}

/// All code spans, sorted: a translation has them in another order.
fn code(document: &Document) -> Vec<String> {
    let code = |event| if let Event::Code(code) = event { Some(code.into_string()) } else { None };
    let mut code: Vec<_> = document.events().filter_map(code).collect();
    code.sort();
    code
}

/// Where a link leads.
#[derive(Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Target {
    /// Relative to the repository, or an address elsewhere as it is.
    file: String,
    /// The heading, empty for a whole file and for an address elsewhere.
    anchor: String,
}

impl Target {
    fn whole(file: &str) -> Self {
        Self { file: file.to_owned(), anchor: String::new() }
    }

    fn page(document: &Document) -> Self {
        Self::whole(document.path.to_str().unwrap())
    }
}

/// Where the links of a page lead, in their order.
fn targets(document: &Document) -> Vec<Target> {
    let directory = document.path.parent().unwrap_or(Path::new(""));
    let target = |link: String| {
        if is_elsewhere(&link) {
            return Target::whole(&link);
        }
        let (file, anchor) = link.split_once('#').unwrap_or((link.as_str(), ""));
        let path = if file.is_empty() {
            document.path.clone()
        } else {
            normal(&directory.join(file)).unwrap_or_else(|| panic!("{link} leads out of the repository"))
        };
        Target { file: path.to_str().unwrap().to_owned(), anchor: anchor.to_owned() }
    };
    document.links().into_iter().map(target).collect()
}

/// Sorted, without the first one, which leads to the page in the other language.
fn links(document: &Document) -> Vec<Target> {
    let mut links: Vec<_> = targets(document).into_iter().skip(1).collect();
    links.sort();
    links
}

/// The links that the Chinese version of this page must have.
fn links_in_chinese(english: &Document) -> Vec<Target> {
    let mut links: Vec<_> = targets(english).into_iter().skip(1).map(in_chinese).collect();
    links.sort();
    links
}

/// The same heading of the Chinese version, if the page has one; else the same target.
fn in_chinese(target: Target) -> Target {
    let Some(path) = translation(Path::new(&target.file)) else {
        let file = target.file.replace("alibabacloud.com/help/en/", "alibabacloud.com/help/zh/");
        return Target { file, ..target };
    };
    let (english, chinese) = (Document::open(&target.file), Document::open(path.to_str().unwrap()));
    let position = anchors(&english).into_iter().position(|anchor| anchor == target.anchor);
    let anchor = position.and_then(|position| anchors(&chinese).into_iter().nth(position));
    Target { anchor: anchor.unwrap_or_default(), ..Target::page(&chinese) }
}
