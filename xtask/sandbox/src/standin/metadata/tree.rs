//! Paths, the items that never change, and the listings that follow from them.
//! Pure. Called by the metadata stand-in.

use percent_encoding::percent_decode_str;

/// An item's value, or the names in a directory, a line each, without a newline at the end. Case counts for
/// nothing, as the real servers forgive it in places.
pub(super) fn lookup(items: &[(&str, &str)], path: &[&str]) -> Option<String> {
    let path = path.join("/");
    if let Some((_, value)) = items.iter().find(|(name, _)| name.eq_ignore_ascii_case(&path)) {
        return Some((*value).to_owned());
    }

    let prefix = if path.is_empty() { path } else { path + "/" };
    let mut names = items
        .iter()
        .filter_map(|(name, _)| {
            let (start, rest) = name.split_at_checked(prefix.len())?;
            start.eq_ignore_ascii_case(&prefix).then_some(rest)
        })
        .map(|rest| rest.split_inclusive('/').next().unwrap_or_default())
        .collect::<Vec<_>>();
    names.dedup();
    (!names.is_empty()).then(|| names.join("\n"))
}

/// A path's segments, decoded, without empty ones, `.` and `..`: like the real server, this one forgives
/// everything, so that what an agent lets through by mistake is seen to leak.
pub(super) fn normalise(path: &str) -> Vec<String> {
    let mut segments = Vec::new();
    for segment in percent_decode_str(path).decode_utf8_lossy().split('/') {
        match segment {
            "" | "." => {}
            ".." => drop(segments.pop()),
            _ => segments.push(segment.to_owned()),
        }
    }
    segments
}
