//! How long files and lines of comments are.

use super::{Fault, Source};

/// Prose wraps here: rustfmt wraps code, but no comments.
const COMMENT_COLUMNS: usize = 110;
/// Without the tests in it.
const FILE_LINES: usize = 450;
/// Longer ones, with the reason.
const LONG: [(&str, &str); 3] = [
    (
        "kube2ram-agent/src/app/service.rs",
        "puts all parts of the agent together, in the order of their start",
    ),
    ("kube2ram-agent/src/args/flags.rs", "one declaration for each flag, whose text is the help"),
    (
        "kube2ram-ebpf/src/context.rs",
        "all raw access to the kernel's context, which is unsafe, stands in one file",
    ),
];

/// No comment is wider than prose wraps.
pub(super) fn comments(sources: &[Source]) -> Vec<Fault> {
    let mut faults = Vec::new();
    for source in sources.iter().filter(|source| source.path.ends_with(".rs")) {
        for (index, line) in source.text.lines().enumerate() {
            // One word, such as an address, cannot be wrapped.
            let words = line.split_whitespace().filter(|word| !word.starts_with("//")).count();
            if line.trim_start().starts_with("//") && line.chars().count() > COMMENT_COLUMNS && words > 1 {
                let advice = format!("wrap the comment at {COMMENT_COLUMNS} columns");
                faults.push(Fault::new(&source.path, index + 1, advice));
            }
        }
    }
    faults
}

/// No source is longer than can be read at once, but those that say why.
pub(super) fn files(sources: &[Source]) -> Vec<Fault> {
    let mut faults = Vec::new();
    for source in sources.iter().filter(|source| source.path.ends_with(".rs") && !source.is_test()) {
        let lines = source.product_lines().count();
        let is_listed = LONG.iter().any(|(path, _)| *path == source.path);
        if lines > FILE_LINES && !is_listed {
            let advice = format!(
                "{lines} lines without its tests: split it, or list it in xtask/src/house/size.rs with the reason (over {FILE_LINES})"
            );
            faults.push(Fault::new(&source.path, 0, advice));
        }
        if lines <= FILE_LINES && is_listed {
            faults.push(Fault::new(
                &source.path,
                0,
                "is short again: take it off the list in xtask/src/house/size.rs",
            ));
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::{super::source, *};

    #[test]
    fn a_wide_comment_is_named_and_a_long_address_is_not() {
        let (wide, address) =
            (format!("    // {} x", "a".repeat(104)), format!("    /// https://{}", "a".repeat(120)));
        let text = format!("let code = 1;\n{wide}\n{address}\n// {}\n", "a".repeat(107));

        let faults = comments(&[source("a.rs", &text), source("a.md", &text)]);

        assert_eq!(faults.iter().map(|fault| fault.line).collect::<Vec<_>>(), [2]);
    }

    #[test]
    fn a_long_file_is_named_without_its_tests() {
        let tests = "#[cfg(test)]\nmod tests {\n";
        let text = |lines| format!("{}{tests}{}", "x\n".repeat(lines), "y\n".repeat(500));

        let named = |path: &str, lines| files(&[source(path, &text(lines))]).len();

        assert_eq!((named("a.rs", FILE_LINES), named("a.rs", FILE_LINES + 1)), (0, 1));
        assert_eq!((named(LONG[0].0, FILE_LINES), named(LONG[0].0, FILE_LINES + 1)), (1, 0));
    }
}
