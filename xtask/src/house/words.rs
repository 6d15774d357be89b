//! The words of documents, comments, names and texts for operators: one for each thing, and plain ones.

use super::{
    CRATES, Fault, Source,
    text::{code, has_word},
};

/// Words that the glossary replaces, in documents and in all sources, with what to write instead.
const REPLACED: [(&str, &str); 20] = [
    ("bequeath", "hand over"),
    ("bequeathed", "handed over"),
    ("estate", "handover state"),
    ("estates", "handover states"),
    ("farewell", "drain"),
    ("forward guard", "netfilter rules (--forward-guard is the flag)"),
    ("hearing", "API activity"),
    ("heir", "incoming agent, standby agent"),
    ("heirs", "incoming agent, standby agent"),
    ("hijack", "redirect"),
    ("hijacks", "redirects"),
    ("keeper", "refresh task"),
    ("keepers", "refresh tasks"),
    ("kernel half", "the eBPF programs"),
    ("meets itself", "arrives at its own listener"),
    ("service half", "kube2ram-service, or the module's name"),
    ("sighting", "pod update"),
    ("sightings", "pod updates"),
    ("successor", "incoming agent"),
    ("tenure", "refresh task"),
];

/// Words of the glossary that have an ordinary meaning, too. Sentences may have them. No type, module or
/// trait has such a name, in singular or plural.
const NAMES: [(&str, &str); 17] = [
    ("ancestor", "predecessor"),
    ("closing", "drain"),
    ("contact", "API activity"),
    ("front", "frontend, listener set"),
    ("gate", "connection limiter, rate limiter, STS scheduler"),
    ("helper", "the noun of what it does"),
    ("manager", "the noun of what it does"),
    ("mod interception", "self_test"),
    ("mod part", "the background tasks' own nouns"),
    ("place", "attachment point"),
    ("post", "handover"),
    ("mod quota", "rate_limiter, sts_scheduler"),
    ("saved", "checkpoint"),
    ("seat", "handover"),
    ("mod slot", "connection_limiter, rate_limiter"),
    ("turn", "STS scheduler"),
    ("util", "the noun of what it does"),
];
const DEFINES: [&str; 4] = ["enum", "mod", "struct", "trait"];

/// Words that make a sentence a riddle. A page has less than one in a thousand words. A text that operators
/// read from the program has none.
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
const PER_WORDS: usize = 1000;
/// Values of labels, with the explanation in a metric's help. They are no sentences.
const VALUES: [&str; 1] = ["gone: its cgroup was removed"];

/// Applies all lists.
pub(super) fn check(sources: &[Source]) -> Vec<Fault> {
    let mut faults = Vec::new();
    for source in sources {
        // This file lists the words.
        if source.path == "xtask/src/house/words.rs" {
            continue;
        }
        // The changelog quotes the past, and the predecessors' table quotes them.
        if !matches!(source.path.as_str(), "CHANGELOG.md" | "docs/predecessors.md") {
            faults.extend(replaced(source));
        }
        if source.path.ends_with(".md") {
            faults.extend(unclear_page(source));
        } else if !source.is_test() {
            faults.extend(names(source));
            if CRATES.iter().any(|krate| source.path.starts_with(krate)) {
                faults.extend(unclear_texts(source));
            }
        }
    }
    faults
}

fn replaced(source: &Source) -> Vec<Fault> {
    let mut faults = Vec::new();
    for (index, line) in source.text.lines().enumerate() {
        let text = line.to_lowercase();
        for (word, better) in REPLACED {
            // What agents of other versions send stays as it is.
            if has_word(&text, word) && !line.contains("#[serde(rename") {
                faults.push(Fault::new(&source.path, index + 1, format!("{word:?}: write {better}")));
            }
        }
    }
    faults
}

fn names(source: &Source) -> Vec<Fault> {
    let mut faults = Vec::new();
    for (number, line) in source.product_lines() {
        let words: Vec<&str> = code(line).split(|c: char| !c.is_alphanumeric() && c != '_').collect();
        for pair in words.windows(2).filter(|pair| DEFINES.contains(&pair[0])) {
            let name = pair[1].to_lowercase();
            let name = name.strip_suffix('s').unwrap_or(&name);
            let defined = format!("{} {name}", pair[0]);
            if let Some((_, better)) = NAMES.iter().find(|(word, _)| *word == name || *word == defined) {
                let advice = format!("nothing is called {:?}: write {better}", pair[1]);
                faults.push(Fault::new(&source.path, number, advice));
            }
        }
    }
    faults
}

fn unclear_page(page: &Source) -> Option<Fault> {
    let prose = prose(&page.text);
    let words = prose.split_whitespace().filter(|word| word.starts_with(char::is_alphabetic)).count();
    let found = unclear(&prose);
    let allowed = words.saturating_sub(1) / PER_WORDS;
    (found.len() > allowed).then(|| {
        let advice = format!(
            "{} of {words} words are unclear ({}), at most {allowed} may be: name who does what",
            found.len(),
            found.join(", ")
        );
        Fault::new(&page.path, 0, advice)
    })
}

/// String literals that are sentences: errors, log messages, help of metrics. And the help of flags, which is
/// in their doc comments.
fn unclear_texts(source: &Source) -> Vec<Fault> {
    let mut texts = source.literals();
    texts.retain(|(_, text)| text.trim().contains(' '));
    if source.path.contains("/src/args") {
        texts.extend(source.doc_comments());
    }
    let fault = |(line, text): (usize, String)| {
        let found = unclear(&prose(&without_arguments(&text)));
        (!found.is_empty()).then(|| {
            let advice = format!("operators read {}, which is unclear: name who does what", found.join(", "));
            Fault::new(&source.path, line, advice)
        })
    };
    texts.into_iter().filter_map(fault).collect()
}

/// Each unclear word in a text.
fn unclear(prose: &str) -> Vec<&'static str> {
    let prose = VALUES.iter().fold(prose.to_lowercase(), |prose, value| prose.replace(*value, "x"));
    UNCLEAR.iter().flat_map(|word| std::iter::repeat_n(*word, occurrences(&prose, word))).collect()
}

/// A format string without what is in braces.
fn without_arguments(text: &str) -> String {
    let mut parts = text.split('{');
    let mut kept = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        kept.push('x');
        kept.push_str(part.split_once('}').map_or(part, |(_, rest)| rest));
    }
    kept
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

    fn lines(path: &str, text: &str) -> Vec<usize> {
        check(&[source(path, text)]).iter().map(|fault| fault.line).collect()
    }

    #[test]
    fn a_replaced_word_is_named_with_a_better_one() {
        let faults = check(&[source("a.rs", "// The kernel half\nlet sightings2 = 1;\n")]);

        assert_eq!(faults, [Fault::new("a.rs", 1, "\"kernel half\": write the eBPF programs")]);
    }

    #[test]
    fn a_page_has_less_than_one_unclear_word_in_a_thousand_and_quotes_do_not_count() {
        let page = |text: &str| check(&[source("a.md", text)]).len();
        let quoted = "It `says` so.\n```\nsays says\n```\n[x](says.md) goes.";

        assert_eq!(page(quoted), 0);
        assert_eq!(page(&format!("{quoted} He says.")), 1);
        assert_eq!(page(&format!("{quoted} He says. {}", "word ".repeat(900))), 1);
        assert_eq!(page(&format!("{quoted} He says. {}", "word ".repeat(1000))), 0);
        assert_eq!(page(&format!("{quoted} He says and tells. {}", "word ".repeat(1000))), 1);
    }

    #[test]
    fn what_operators_read_of_a_program_has_no_unclear_word() {
        let text = "// It says so.\nlog(\"it \\\n  says so\");\nlog(\"{says}: it is {}\");\nlabel(\"gone\");\n\
            help(\"by result (gone: its cgroup was removed)\");\n/// It tells\nfn f() {}\n";

        assert_eq!(lines("kube2ram-agent/src/a.rs", text), [2]);
        assert_eq!(lines("kube2ram-authenticator/src/args/flags.rs", text), [2, 7]);
        assert!(lines("kube2ram-agent/src/a/tests.rs", text).is_empty());
        assert!(lines("xtask/src/a.rs", text).is_empty());
    }

    #[test]
    fn a_type_or_module_has_no_name_of_old_and_sentences_may_have_the_word() {
        let text = "/// A place in a struct.\npub(crate) struct Places<'a>(u8);\nmod place;\nlet place = Placed;\n\
            enum Interception {}\nmod interception;\nmod parted;\n";

        assert_eq!(lines("xtask/src/a.rs", text), [2, 3, 6]);
        assert!(lines("xtask/src/tests/a.rs", text).is_empty());
    }
}
