//! An independent, deliberately generous reader of request targets: which items could *some* server take a
//! target for? It shares nothing with the agent's parser, and errs on one side only: what it calls harmless
//! is harmless to every server that we know of.

mod fold;
mod tree;

use std::collections::HashSet;

pub use self::tree::Tree;

/// Whether some server could take `target`, path and query, for an item at or below one of `items`.
pub fn could_mean(target: &[u8], items: &[&[&str]]) -> bool {
    views(target).iter().any(|view| {
        let text = fold::text(view);
        // A server may ignore a query or a fragment, or treat it as a path.
        ["/", "/?", "/?#"].iter().any(|separators| {
            let segments: Vec<&str> = text.split(|c| separators.contains(c)).collect();
            [resolved(&segments), kept(&segments)]
                .iter()
                .any(|path| items.iter().any(|item| contains(path, item)))
        })
    })
}

/// The target as it is and as it becomes by decoding again and again, in any order of the ways to decode.
fn views(target: &[u8]) -> Vec<Vec<u8>> {
    let mut seen = HashSet::from([target.to_vec()]);
    let mut views = vec![target.to_vec()];
    let mut next = 0;
    while next < views.len() && views.len() < MAX_VIEWS {
        let view = &views[next];
        let decoded = [
            fold::percent_decoded(view),
            fold::overlong_decoded(view),
            fold::without_eighth_bit(view),
            fold::plus_decoded(view),
        ];
        for view in decoded {
            if seen.insert(view.clone()) {
                views.push(view);
            }
        }
        next += 1;
    }
    views
}

/// Whether `target` as it stands is one of `listed` below its version, or a list of versions or directories.
/// What ends in a slash in `listed` is a directory with all that is in it.
pub fn is_listed(target: &str, listed: &[&str]) -> bool {
    let path = target.split('?').next().unwrap_or_default();
    let below: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).skip(1).collect();
    let below = below.join("/");
    below.is_empty()
        || listed.iter().any(|item| match item.strip_suffix('/') {
            Some(directory) => below == directory || below.starts_with(*item),
            None => below == *item,
        })
}

/// Dot segments applied.
fn resolved<'t>(segments: &[&'t str]) -> Vec<&'t str> {
    let mut path = Vec::new();
    for segment in segments {
        match bare_dots(segment) {
            Some("..") => drop(path.pop()),
            Some(_) => {}
            None => path.push(*segment),
        }
    }
    path
}

/// Dot segments dropped.
fn kept<'t>(segments: &[&'t str]) -> Vec<&'t str> {
    segments.iter().filter(|segment| bare_dots(segment).is_none()).copied().collect()
}

/// The dots, or nothing, that a segment is to a server which drops blanks, parameters and streams: `..;x` is
/// `..` to Tomcat, and `...` is nothing to Windows. `None` when it is a name.
fn bare_dots(segment: &str) -> Option<&str> {
    let is_end = |c: char| c.is_whitespace() || ";,:?#\0".contains(c);
    let bare = segment.trim_start().split(is_end).next().unwrap_or_default();
    bare.bytes().all(|byte| byte == b'.').then_some(bare)
}

fn contains(path: &[&str], item: &[&str]) -> bool {
    path.windows(item.len()).any(|window| window.iter().zip(item).all(|(segment, name)| is(segment, name)))
}

/// Whether a segment is this name to a server which drops parameters (`;` in most, `,` in RFC 3986), suffixes
/// (`.json` in Spring), the dots and blanks that Windows does not store, streams (`::$DATA`), or knows short
/// names (`SECURI~1`). A name that ends in `*` is all that begin so.
fn is(segment: &str, name: &str) -> bool {
    let (name, is_whole) = name.strip_suffix('*').map_or((name, true), |start| (start, false));
    let segment = segment.trim_start_matches(|c: char| c.is_whitespace() || c == '.');
    let is_name_char = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    let end = segment.find(|c| !is_name_char(c)).unwrap_or(segment.len());
    let (bare, rest) = segment.split_at(end);
    // A decoded escape ends the name or continues it: the decoded view shows which.
    let bare = if fold::starts_with_escape(rest) { segment } else { bare };
    let short = segment.split_once('~').is_some_and(|(start, number)| {
        start.len() >= 2 && name.starts_with(start) && number.starts_with(|c: char| c.is_ascii_digit())
    });
    bare == name || (!is_whole && bare.starts_with(name)) || short
}

/// More than legitimate input has; bounds the time for hostile input.
const MAX_VIEWS: usize = 64;

#[cfg(test)]
mod tests;
