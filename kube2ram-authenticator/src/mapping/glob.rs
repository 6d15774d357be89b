//! Globs over ARNs: `*` is any run of characters and `?` is one, and neither is ever `/`. Pure; used by
//! `arn` and `index`.

/// The characters that are special.
pub(super) const WILDCARDS: [char; 2] = ['*', '?'];

/// Whether `subject` matches `pattern` as a whole.
///
/// Each run of literal characters is searched for once, from the left, so no pattern makes this slow. That is
/// right although a star ends at `/`: a run with a `/` has one possible place, and for a run without one the
/// first place leaves the most room.
pub(super) fn matches(pattern: &str, subject: &str) -> bool {
    let (pattern, subject) = (pattern.as_bytes(), subject.as_bytes());
    let (mut at, mut from) = (0, 0);
    // The place in the pattern after the last star, and where in the subject that star ends.
    let mut star = None;
    while let Some(&byte) = subject.get(from) {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at + 1, from));
                at += 1;
            }
            Some(&token) if fits(token, byte) => {
                at += 1;
                from += 1;
            }
            _ => match star {
                Some((after, end)) if subject.get(end) != Some(&b'/') => {
                    star = Some((after, end + 1));
                    (at, from) = (after, end + 1);
                }
                _ => return false,
            },
        }
    }
    pattern.get(at..).is_some_and(|rest| rest.iter().all(|token| *token == b'*'))
}

/// Whether a subject exists that both patterns match.
pub(super) fn intersect(one: &str, other: &str) -> bool {
    let (one, other) = (one.as_bytes(), other.as_bytes());
    // `below[j]` is the answer for the rests after the next byte of `one` and after `j` bytes of `other`.
    let mut below: Vec<bool> = Vec::new();
    for i in (0..=one.len()).rev() {
        let mut row = vec![false; other.len() + 1];
        for j in (0..=other.len()).rev() {
            let skip_one = || below.get(j).copied().unwrap_or_default();
            let skip_both = || below.get(j + 1).copied().unwrap_or_default();
            let skip_other = row.get(j + 1).copied().unwrap_or_default();
            row[j] = match (one.get(i), other.get(j)) {
                (None, None) => true,
                // A star is nothing, or takes what the other pattern has next.
                (Some(b'*'), next) => skip_one() || (skip_other && next != Some(&b'/')),
                (next, Some(b'*')) => skip_other || (skip_one() && next != Some(&b'/')),
                (Some(a), Some(b)) => (fits(*a, *b) || fits(*b, *a)) && skip_both(),
                _ => false,
            };
        }
        below = row;
    }
    below.first().copied().unwrap_or_default()
}

/// Whether a token that is no star stands for a byte.
fn fits(token: u8, byte: u8) -> bool {
    if token == b'?' { byte != b'/' } else { token == byte }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn matches_a_whole_arn_and_never_across_a_slash() {
        let admin = |name: &str| matches("acs:ram::1:role/admin*", &format!("acs:ram::1:role/{name}"));

        for name in ["admin", "admin-x", "administration-readonly"] {
            assert!(admin(name), "{name}");
        }
        for name in ["admi", "xadmin", "admin/x", "admi/anything", ""] {
            assert!(!admin(name), "{name}");
        }
        assert!(matches("acs:ram::1:role/*-admin", "acs:ram::1:role/x-admin"));
        assert!(matches("acs:ram::1:role/*/ad?in", "acs:ram::1:role/team/admin"));
        assert!(!matches("acs:ram::1:role/?", "acs:ram::1:role/"));
    }

    #[test]
    fn no_character_but_two_is_special() {
        assert!(matches("a.c+[x]", "a.c+[x]"));
        for subject in ["abc+[x]", "a.cc[x]", "a.c+x", "a.c+[x]y"] {
            assert!(!matches("a.c+[x]", subject), "{subject}");
        }
    }

    #[test]
    fn a_row_of_stars_does_no_harm() {
        let stars = "*".repeat(100_000);

        assert!(matches(&stars, "role"));
        assert!(matches(&format!("{stars}e"), "role"));
        assert!(!matches(&format!("{stars}x"), "role"));
        assert!(!matches(&format!("{}b", "*a".repeat(200)), &"a".repeat(400)));
    }

    #[test]
    fn patterns_intersect_if_something_matches_both() {
        for (one, other) in [("a*", "*b"), ("a?c", "ab*"), ("*/x", "y/*"), ("a", "a"), ("*", "*")] {
            assert!(intersect(one, other) && intersect(other, one), "{one} {other}");
        }
        for (one, other) in [("a*", "b*"), ("a?", "a"), ("*", "a/b"), ("a", "b"), ("?", "/")] {
            assert!(!intersect(one, other) && !intersect(other, one), "{one} {other}");
        }
    }

    /// The literal definition: exponential, but obviously correct.
    fn by_definition(pattern: &[u8], subject: &[u8]) -> bool {
        match pattern {
            [] => subject.is_empty(),
            [b'*', rest @ ..] => {
                by_definition(rest, subject)
                    || subject.first().is_some_and(|byte| *byte != b'/')
                        && by_definition(pattern, &subject[1..])
            }
            [b'?', rest @ ..] => {
                subject.first().is_some_and(|byte| *byte != b'/') && by_definition(rest, &subject[1..])
            }
            [token, rest @ ..] => subject.first() == Some(token) && by_definition(rest, &subject[1..]),
        }
    }

    /// Every text of a small alphabet up to a length.
    fn all(length: usize) -> Vec<String> {
        let mut all = vec![String::new()];
        for _ in 0..length {
            let longer: Vec<String> =
                all.iter().flat_map(|text| ["a", "b", "/"].map(|c| format!("{text}{c}"))).collect();
            all.extend(longer);
            all.sort_unstable();
            all.dedup();
        }
        all
    }

    proptest! {
        #[test]
        fn agrees_with_the_definition(pattern in "[ab*?/]{0,8}", subject in "[ab/]{0,10}") {
            let expected = by_definition(pattern.as_bytes(), subject.as_bytes());

            prop_assert_eq!(matches(&pattern, &subject), expected);
        }

        #[test]
        fn patterns_of_one_subject_intersect(
            one in "[ab*?/]{0,8}", other in "[ab*?/]{0,8}", subject in "[ab/]{0,8}",
        ) {
            let both = matches(&one, &subject) && matches(&other, &subject);

            prop_assert!(!both || intersect(&one, &other));
        }

        #[test]
        fn patterns_that_intersect_have_a_common_subject(one in "[ab*?/]{0,3}", other in "[ab*?/]{0,3}") {
            let common = all(6).iter().any(|subject| matches(&one, subject) && matches(&other, subject));

            prop_assert_eq!(intersect(&one, &other), common);
        }

        #[test]
        fn never_panics(pattern in any::<String>(), subject in any::<String>()) {
            matches(&pattern, &subject);
            intersect(&pattern, &subject);
        }
    }
}
