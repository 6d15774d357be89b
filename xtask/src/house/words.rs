//! The words of documents and comments: one for each thing, and plain ones.

use super::{Fault, Source, text::has_word};

/// Words that the glossary replaces, in documents and in the agent's sources, with what to write instead.
const REPLACED: [(&str, &str); 11] = [
    ("bequeath", "hand over"),
    ("bequeathed", "handed over"),
    ("estate", "handover state"),
    ("farewell", "drain"),
    ("heir", "incoming agent, standby agent"),
    ("heirs", "incoming agent, standby agent"),
    ("kernel half", "the eBPF programs"),
    ("hijack", "redirect"),
    ("sighting", "pod update"),
    ("sightings", "pod updates"),
    ("tenure", "refresh task"),
];

/// Words that make a sentence a riddle. A page may have one in a thousand words.
const UNCLEAR: [&str; 13] = [
    "aloud",
    "anew",
    "beside",
    "gone",
    "hear",
    "hears",
    "in force",
    "made good",
    "maybe",
    "of its own",
    "say",
    "says",
    "tells",
];
/// Short pages may have one.
const PER_WORDS: usize = 1000;

/// Applies both lists.
pub(super) fn check(sources: &[Source]) -> Vec<Fault> {
    let mut faults = Vec::new();
    for source in sources {
        // The changelog quotes the past, the predecessors' table quotes them, and this file lists the words.
        if matches!(
            source.path.as_str(),
            "CHANGELOG.md" | "docs/predecessors.md" | "xtask/src/house/words.rs"
        ) {
            continue;
        }
        for (index, line) in source.text.lines().enumerate() {
            let text = line.to_lowercase();
            for (word, better) in REPLACED {
                // What agents of other versions send stays as it is.
                if has_word(&text, word) && !line.contains("#[serde(rename") {
                    faults.push(Fault::new(&source.path, index + 1, format!("{word:?}: write {better}")));
                }
            }
        }
        if source.path.ends_with(".md") {
            faults.extend(unclear(source));
        }
    }
    faults
}

fn unclear(page: &Source) -> Option<Fault> {
    let prose = prose(&page.text).to_lowercase();
    let words = prose.split_whitespace().filter(|word| word.starts_with(char::is_alphabetic)).count();
    let found: Vec<&str> =
        UNCLEAR.iter().flat_map(|word| std::iter::repeat_n(*word, occurrences(&prose, word))).collect();
    let allowed = (words / PER_WORDS).max(1);
    (found.len() > allowed).then(|| {
        let advice = format!(
            "{} of {words} words are unclear ({}), at most {allowed} may be: name who does what",
            found.len(),
            found.join(", ")
        );
        Fault::new(&page.path, 0, advice)
    })
}

fn occurrences(text: &str, word: &str) -> usize {
    text.match_indices(word).filter(|(at, _)| has_word(surrounded(text, *at, word.len()), word)).count()
}

/// The word with a character on each side.
fn surrounded(text: &str, at: usize, length: usize) -> &str {
    let start = text[..at].char_indices().next_back().map_or(0, |(start, _)| start);
    let end = text[at + length..].chars().next().map_or(text.len(), |c| at + length + c.len_utf8());
    &text[start..end]
}

/// A page without its code, its quotations in code spans, and what its links lead to.
fn prose(markdown: &str) -> String {
    let mut prose = String::new();
    let mut is_code = false;
    for line in markdown.lines() {
        if line.trim_start().starts_with("```") {
            is_code = !is_code;
        } else if !is_code {
            let mut in_span = false;
            let mut spans = line.split('`');
            for text in spans.by_ref() {
                prose.push_str(if in_span { "x" } else { text });
                in_span = !in_span;
            }
            prose.push('\n');
        }
    }
    // What a link leads to.
    let mut parts = prose.split("](");
    let mut kept = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        kept.push_str("] ");
        kept.push_str(part.split_once(')').map_or("", |(_, rest)| rest));
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::{super::source, *};

    #[test]
    fn a_replaced_word_is_named_with_a_better_one() {
        let faults = check(&[source("a.rs", "// The kernel half\nlet sightings2 = 1;\n")]);

        assert_eq!(faults, [Fault::new("a.rs", 1, "\"kernel half\": write the eBPF programs")]);
    }

    #[test]
    fn a_page_may_have_one_unclear_word_in_a_thousand_and_quotes_do_not_count() {
        let page = |text: &str| check(&[source("a.md", text)]).len();
        let quoted = "It `says` so.\n```\nsays says\n```\n[x](says.md) says.";

        assert_eq!(page(quoted), 0);
        assert_eq!(page(&format!("{quoted} He tells.")), 1);
        assert_eq!(page(&format!("{quoted} He tells. {}", "word ".repeat(2000))), 0);
    }
}
