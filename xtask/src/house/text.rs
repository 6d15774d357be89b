//! Rust source as lines: which belong to tests, and what of them is code, a string or a doc comment. Used by
//! the rules.

use super::Source;

impl Source {
    /// Whether the whole file is for tests.
    pub(super) fn is_test(&self) -> bool {
        let path = &self.path;
        path.contains("/tests/") || path.ends_with("tests.rs") || path.ends_with("/testing.rs")
    }

    /// The lines before the module of unit tests, with their numbers.
    pub(super) fn product_lines(&self) -> impl Iterator<Item = (usize, &str)> {
        let begins_tests = |pair: &[&str]| pair[0] == "#[cfg(test)]" && pair[1].starts_with("mod tests {");
        let lines: Vec<&str> = self.text.lines().collect();
        let end = lines.windows(2).position(begins_tests).unwrap_or(lines.len());
        lines.into_iter().take(end).enumerate().map(|(index, line)| (index + 1, line))
    }

    /// The string literals before the module of unit tests, with the line on which each begins. A literal of
    /// several lines is one line here; other escapes stay as they are.
    pub(super) fn literals(&self) -> Vec<(usize, String)> {
        let lines: Vec<&str> = self.product_lines().map(|(_, line)| line).collect();
        let text = lines.join("\n");
        let mut found = Vec::new();
        let (mut line, mut counted, mut at) = (1, 0, 0);
        while let Some(next) = text[at..].find(['"', '\'', '/']) {
            let start = at + next;
            let (before, rest) = text.split_at(start);
            line += text[counted..start].matches('\n').count();
            counted = start;
            let length = if rest.starts_with('"') {
                let (body, length) = literal(before, rest);
                found.push((line, body.replace("\\\n", " ")));
                length
            } else if rest.starts_with("//") {
                rest.find('\n').unwrap_or(rest.len())
            } else if rest.starts_with('\'') {
                character(rest)
            } else {
                1
            };
            at = start + length;
        }
        found
    }

    /// The doc comments before the module of unit tests, with the line on which each begins.
    pub(super) fn doc_comments(&self) -> Vec<(usize, String)> {
        let mut found: Vec<(usize, String)> = Vec::new();
        let mut continues = false;
        for (number, line) in self.product_lines() {
            let comment = line.trim_start().strip_prefix("///");
            if let Some(comment) = comment {
                match found.last_mut().filter(|_| continues) {
                    Some((_, text)) => text.push_str(comment),
                    None => found.push((number, comment.to_owned())),
                }
            }
            continues = comment.is_some();
        }
        found
    }
}

/// What is between the quotes of the string literal at the beginning of `rest`, and the literal's length.
fn literal<'a>(before: &str, rest: &'a str) -> (&'a str, usize) {
    let prefix = before.trim_end_matches('#');
    let body = &rest[1..];
    if prefix.ends_with('r') {
        let end = format!("\"{}", "#".repeat(before.len() - prefix.len()));
        let length = body.find(&end).unwrap_or(body.len());
        return (&body[..length], rest.len().min(1 + length + end.len()));
    }
    let mut is_escaped = false;
    let ends = |c: char| {
        let ends = c == '"' && !is_escaped;
        is_escaped = c == '\\' && !is_escaped;
        ends
    };
    let length = body.find(ends).unwrap_or(body.len());
    (&body[..length], rest.len().min(length + 2))
}

/// The length of the character literal at the beginning of `rest`; 1, if a lifetime begins there.
fn character(rest: &str) -> usize {
    let mut inner = rest[1..].chars();
    match inner.next() {
        // The escaped character may be a quote itself.
        Some('\\') => rest.char_indices().skip(3).find(|(_, c)| *c == '\'').map_or(1, |(at, _)| at + 1),
        Some(c) if inner.next() == Some('\'') => 2 + c.len_utf8(),
        _ => 1,
    }
}

/// What of a line is code: nothing of one that is a comment.
pub(super) fn code(line: &str) -> &str {
    let line = line.trim_start();
    if line.starts_with("//") { "" } else { line.split(" // ").next().unwrap_or(line) }
}

/// Whether `text` has `word` with nothing of a name before or after it.
pub(super) fn has_word(text: &str, word: &str) -> bool {
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(word)
        .any(|(at, _)| !text[..at].ends_with(is_name) && !text[at + word.len()..].starts_with(is_name))
}

#[cfg(test)]
mod tests {
    use super::super::source;

    #[test]
    fn literals_are_found_whatever_surrounds_them() {
        let text = r###"// "no" isn't code
fn f<'a>(c: char) -> &'a str {
    let quotes = ['"', '\'', '\\', '/'];
    let all = ("one \"1\" //", r"two\", r#"th"ree"#, b"four", "");
    "five \
     and"
}
#[cfg(test)]
mod tests {
    "no"
"###;
        let literals = source("a.rs", text).literals();

        let found: Vec<_> = literals.iter().map(|(line, text)| (*line, text.as_str())).collect();
        let on_line_4 = [r#"one \"1\" //"#, r"two\", r#"th"ree"#, "four", ""].map(|text| (4_usize, text));
        assert_eq!(found[..5], on_line_4);
        assert_eq!(found[5..], [(5_usize, "five       and")]);
    }

    #[test]
    fn lines_of_a_doc_comment_are_one_text() {
        let text =
            "/// One\n/// text.\nx: u8,\n    /// Another.\n// No.\n#[cfg(test)]\nmod tests {\n/// No.\n";

        let found = source("a.rs", text).doc_comments();

        assert_eq!(found, [(1, " One text.".to_owned()), (4, " Another.".to_owned())]);
    }
}
