//! Globs in which only `*` is special: any run of characters, `/` and none at all included.
//! Depends on nothing; called by `allow_list`.

/// Whether `subject` matches `pattern` as a whole. Case-sensitive. Each piece between stars is searched for
/// once, from the left, so no pattern causes backtracking.
pub fn matches(pattern: &str, subject: &str) -> bool {
    let Some((head, rest)) = pattern.split_once('*') else { return pattern == subject };
    let (middle, tail) = rest.rsplit_once('*').unwrap_or(("", rest));
    let inner = subject.strip_prefix(head).and_then(|subject| subject.strip_suffix(tail));

    inner.is_some_and(|inner| {
        // Without the filter the result would be the same, but each star of a row would cost a search.
        let mut pieces = middle.split('*').filter(|piece| !piece.is_empty());
        pieces.try_fold(inner, |left, piece| left.split_once(piece).map(|(_, after)| after)).is_some()
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::matches;

    #[test]
    fn matches_as_the_predecessors_engine_does() {
        let subject = "this is a ϗѾ test";
        let patterns = [
            "*test",
            "this*",
            "this*test",
            "*is *",
            "*is*a*",
            "**test**",
            "**is**a***test*",
            "* *",
            "*",
            "**********",
            "*Ѿ*",
            "*is a ϗѾ *",
        ];

        for pattern in patterns {
            assert!(matches(pattern, subject), "{pattern}");
        }
    }

    #[test]
    fn refuses_as_the_predecessors_engine_does() {
        let patterns = ["test*", "*is", "*no*", " ", "* ", " *", "*ʤ*", "this*this is a test"];

        for pattern in patterns {
            assert!(!matches(pattern, "this is a test"), "{pattern}");
        }
    }

    #[test]
    fn an_empty_subject_matches_stars_only() {
        for pattern in ["", "*", "**", "***"] {
            assert!(matches(pattern, ""), "{pattern}");
        }
        for pattern in ["test", "*test*", "*x", "x*", "x*x"] {
            assert!(!matches(pattern, ""), "{pattern}");
        }
        assert!(!matches("", "x"));
    }

    #[test]
    fn pieces_match_in_order_without_overlap() {
        assert!(matches("a*b*c", "a-c-b-c"));
        assert!(!matches("a*b*c", "a-b-c-d"));
        assert!(!matches("a*a", "a"));
        assert!(!matches("*ab*ba*", "aba"));
    }

    #[test]
    fn a_million_stars_do_no_harm() {
        let stars = "*".repeat(1_000_000);

        assert!(matches(&stars, "role"));
        assert!(matches(&format!("{stars}e"), "role"));
        assert!(!matches(&format!("{stars}x"), "role"));
    }

    /// The literal definition: exponential, but obviously correct.
    fn by_definition(pattern: &[char], subject: &[char]) -> bool {
        match pattern {
            [] => subject.is_empty(),
            ['*', rest @ ..] => (0..=subject.len()).any(|skipped| by_definition(rest, &subject[skipped..])),
            [first, rest @ ..] => subject.first() == Some(first) && by_definition(rest, &subject[1..]),
        }
    }

    proptest! {
        #[test]
        fn agrees_with_the_definition(pattern in "[ab*ü]{0,8}", subject in "[abü]{0,10}") {
            let chars = |text: &str| text.chars().collect::<Vec<_>>();

            prop_assert_eq!(matches(&pattern, &subject), by_definition(&chars(&pattern), &chars(&subject)));
        }

        #[test]
        fn never_panics(pattern in any::<String>(), subject in any::<String>()) {
            matches(&pattern, &subject);
        }
    }
}
