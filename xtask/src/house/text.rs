//! Rust source as lines: which belong to tests, and what of them is code. Used by the rules.

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
