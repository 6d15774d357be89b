//! A namespace's allow-list: parsing its annotation, and matching a role's ARN.
//! Depends on `glob`, regex and its parser; called by the parent, and by `kubernetes` to tell owners of a
//! malformed list.

use regex::bytes::{RegexSet, RegexSetBuilder};
use regex_syntax::ParserBuilder;

use kube2ram_cloud::role::ArnStyle;
use kube2ram_service::glob;

/// All annotations of one object may have 256 KiB; no real list is near this limit.
pub(super) const MAX_TEXT_BYTES: usize = 64 * 1024;
const MAX_PATTERNS: usize = 1024;
/// The largest size of a list's compiled regular expressions, each for ARNs and for names: enough for 75
/// names of ten characters. With the engine's other tables, the [`MAX_TEXTS`](super::memo::MAX_TEXTS)
/// remembered lists were measured at 14 MiB at most.
const MAX_LIST_PROGRAM_BYTES: usize = 96 * 1024;
/// The additional memory of matching for each thread; with less the engine falls back to a slower algorithm.
const MAX_LIST_CACHE_BYTES: usize = 64 * 1024;

/// How the patterns of an allow-list are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PatternFormat {
    /// Only `*` is special, and matches any run of characters, `/` included.
    Glob,
    /// Regular expressions that must match as a whole.
    Regexp,
}

/// Returns what the owner of a namespace should correct in its allow-list. A list that is absent or empty on
/// purpose (`""`, `null`, `[]`) is not malformed: it allows nothing.
///
/// # Errors
/// What is wrong, as the rest of a sentence that names the annotation.
pub fn check_allow_list(text: &str, format: PatternFormat, style: ArnStyle) -> Result<(), String> {
    AllowList::parse(text, format, style).fault.map_or(Ok(()), Err)
}

/// A parsed allow-list. Whatever of it cannot be read allows nothing.
#[derive(Debug)]
pub(super) struct AllowList {
    /// Patterns that are ARNs of the cloud's style, for whole ARNs.
    arns: Patterns,
    /// The other patterns, for the part behind the base ARN. They never see the base, so none can match
    /// outside of it.
    names: Patterns,
    fault: Option<String>,
}

impl AllowList {
    /// Reads a list. `style` is that of the cloud's ARNs.
    pub(super) fn parse(text: &str, format: PatternFormat, style: ArnStyle) -> Self {
        let mut faults = Vec::new();
        let patterns = parse_json(text).unwrap_or_else(|reason| {
            faults.push(reason);
            Vec::new()
        });
        let (mut arns, mut names) = (Vec::new(), Vec::new());
        for (index, pattern) in patterns.into_iter().enumerate() {
            match check_pattern(&pattern, format) {
                Ok(()) if style.is_arn(&pattern) => arns.push(pattern),
                Ok(()) => names.push(pattern),
                Err(reason) => faults.push(format!("has a pattern (number {}) that {reason}", index + 1)),
            }
        }

        let mut patterns = |list| {
            Patterns::new(list, format).unwrap_or_else(|reason| {
                faults.push(reason);
                Patterns::Globs(Vec::new())
            })
        };
        let (arns, names) = (patterns(arns), patterns(names));
        Self { arns, names, fault: faults.into_iter().next() }
    }

    /// The pattern that allows `role`, as it was written, for people.
    pub(super) fn pattern_for(&self, role: &str, base: Option<&str>) -> Option<String> {
        let name = base.and_then(|base| role.strip_prefix(base));
        self.arns.first_match(role).or_else(|| self.names.first_match(name?))
    }

    /// Whether a pattern matches the whole `role`. Patterns that are no ARN are relative to `base`; without a
    /// known base they allow nothing.
    pub(super) fn allows(&self, role: &str, base: Option<&str>) -> bool {
        let name = base.and_then(|base| role.strip_prefix(base));
        self.arns.match_any(role) || name.is_some_and(|name| self.names.match_any(name))
    }

    /// The first thing that is wrong with the list.
    pub(super) fn fault(&self) -> Option<&str> {
        self.fault.as_deref()
    }
}

#[derive(Debug)]
enum Patterns {
    Globs(Vec<String>),
    Regexps(RegexSet),
}

impl Patterns {
    fn new(patterns: Vec<String>, format: PatternFormat) -> Result<Self, String> {
        match format {
            PatternFormat::Glob => Ok(Self::Globs(patterns)),
            PatternFormat::Regexp => {
                let set = RegexSetBuilder::new(patterns.iter().map(|pattern| anchored(pattern)))
                    .unicode(false)
                    .size_limit(MAX_LIST_PROGRAM_BYTES)
                    .dfa_size_limit(MAX_LIST_CACHE_BYTES)
                    .build();
                // Each was found legal before, so that only the size is left.
                set.map(Self::Regexps).map_err(|_size| "has too large regular expressions".to_owned())
            }
        }
    }

    fn first_match(&self, text: &str) -> Option<String> {
        match self {
            Self::Globs(patterns) => patterns.iter().find(|pattern| glob::matches(pattern, text)).cloned(),
            Self::Regexps(set) => {
                let first = set.matches(text.as_bytes()).into_iter().next()?;
                let anchored = set.patterns().get(first)?;
                Some(anchored.strip_prefix(ANCHORS.0)?.strip_suffix(ANCHORS.1)?.to_owned())
            }
        }
    }

    fn match_any(&self, text: &str) -> bool {
        match self {
            Self::Globs(patterns) => patterns.iter().any(|pattern| glob::matches(pattern, text)),
            Self::Regexps(set) => set.is_match(text.as_bytes()),
        }
    }
}

fn parse_json(text: &str) -> Result<Vec<String>, String> {
    if text.len() > MAX_TEXT_BYTES {
        return Err(format!("is longer than {MAX_TEXT_BYTES} bytes"));
    }
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    match serde_json::from_str::<Option<Vec<String>>>(text) {
        Ok(Some(patterns)) if patterns.len() > MAX_PATTERNS => {
            Err(format!("has more than {MAX_PATTERNS} patterns"))
        }
        Ok(patterns) => Ok(patterns.unwrap_or_default()),
        // The parser's own message may repeat the list at any length.
        Err(error) => {
            Err(format!("is not a JSON array of strings (line {}, column {})", error.line(), error.column()))
        }
    }
}

fn check_pattern(pattern: &str, format: PatternFormat) -> Result<(), &'static str> {
    match format {
        _ if pattern.is_empty() => Err("is empty"),
        PatternFormat::Glob => Ok(()),
        // It never matches in the predecessors either, which put the base ARN before it (row 3.36 of
        // docs/predecessors.md). Here the namespace also gets an Event.
        PatternFormat::Regexp if pattern.starts_with('^') => {
            Err("starts with ^, but patterns match as a whole anyway")
        }
        // By itself as well: `x)|(?:y` is legal only inside of our group, which it would close.
        PatternFormat::Regexp if is_regexp(pattern) && is_regexp(&anchored(pattern)) => Ok(()),
        PatternFormat::Regexp => Err("is not a regular expression"),
    }
}

const ANCHORS: (&str, &str) = ("^(?:", ")$");

/// ARNs are ASCII: without Unicode classes programs have a tenth of the size.
fn is_regexp(pattern: &str) -> bool {
    ParserBuilder::new().unicode(false).utf8(false).build().parse(pattern).is_ok()
}

fn anchored(pattern: &str) -> String {
    [ANCHORS.0, pattern, ANCHORS.1].concat()
}
