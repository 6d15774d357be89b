//! Each page begins with when a reader needs it, and ends with where to go next.

use super::{Document, documents};

/// The ways in, and a list by version.
const OTHERS: [&str; 3] = ["CHANGELOG.md", "README.md", "README.zh-CN.md"];

#[test]
fn each_page_begins_with_when_it_is_needed_and_ends_with_where_to_go_next() {
    let pages: Vec<_> =
        documents().into_iter().filter(|page| !OTHERS.contains(&page.path.to_str().unwrap())).collect();
    let without = |frame: fn(&Document) -> bool| -> Vec<_> {
        pages.iter().filter(|page| !frame(page)).map(|page| page.path.display().to_string()).collect()
    };

    assert!(pages.len() > 40, "only {} pages were found", pages.len());
    assert_eq!(without(begins_with_its_purpose), [""; 0], "write \"Read this page to …\" below the title");
    assert_eq!(without(ends_with_the_next_page), [""; 0], "end with \"Next: \" and links");
}

#[test]
fn a_page_without_purpose_or_end_is_noticed() {
    let page = |path: &str, text: &str| Document { path: path.into(), text: text.to_owned() };
    let framed = page("docs/a.md", "# A\n\nRead this page to know A.\n\nA is B.\n\nNext: [b](b.md).\n");
    let listed = page("docs/a.md", "# A\n\nYou need this page to know A.\n\n## Next\n\n* [b](b.md)\n");
    let chinese = page("docs/zh-CN/a.md", "# 甲\n\n阅读本页。\n\n下一步：[乙](b.md)。\n");
    let bare = page("docs/a.md", "# A\n\nA is B.\n\nNext: [b](b.md).\n\n## More\n\nOn this page, more.\n");

    for page in [&framed, &listed, &chinese] {
        assert!(begins_with_its_purpose(page) && ends_with_the_next_page(page), "{}", page.text);
    }
    assert!(!begins_with_its_purpose(&bare) && !ends_with_the_next_page(&bare));
}

fn is_chinese(page: &Document) -> bool {
    page.path.components().any(|part| part.as_os_str() == "zh-CN")
}

fn begins_with_its_purpose(page: &Document) -> bool {
    // The title may be followed by the links between the languages.
    let mut paragraphs = page.text.split("\n\n").skip(1).take(2);
    let purpose = if is_chinese(page) { "阅读本页" } else { "this page" };
    paragraphs.any(|paragraph| paragraph.contains(purpose))
}

fn ends_with_the_next_page(page: &Document) -> bool {
    let last = page.text.trim_end().rsplit("\n\n").next().unwrap_or_default();
    let next = if is_chinese(page) { "下一步：" } else { "Next: " };
    last.starts_with(next) || page.headings().last().is_some_and(|(_, heading)| heading == "Next")
}
