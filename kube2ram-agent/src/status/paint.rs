//! Colours, where there are any. Used through the parent.

/// Whether text has colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paint {
    /// ANSI escapes, for a terminal.
    Ansi,
    /// None.
    Plain,
}

/// What a colour means.
#[derive(Clone, Copy, Debug)]
pub(super) enum Tone {
    Bad,
    Faint,
    Good,
    Strong,
    Uneasy,
}

impl Paint {
    /// Colours for a terminal, unless NO_COLOR has any value (no-color.org) or the terminal has none.
    pub fn of(is_terminal: bool, no_color: Option<&str>, term: Option<&str>) -> Self {
        let is_unwanted = no_color.is_some_and(|value| !value.is_empty()) || term == Some("dumb");
        if is_terminal && !is_unwanted { Self::Ansi } else { Self::Plain }
    }

    pub(super) fn apply(self, tone: Tone, text: &str) -> String {
        let code = match (self, tone) {
            (Self::Plain, _) => return text.to_owned(),
            (Self::Ansi, Tone::Bad) => "31",
            (Self::Ansi, Tone::Faint) => "2",
            (Self::Ansi, Tone::Good) => "32",
            (Self::Ansi, Tone::Strong) => "1",
            (Self::Ansi, Tone::Uneasy) => "33",
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_for_terminals_of_those_who_want_them() {
        assert_eq!(Paint::of(true, None, Some("xterm")), Paint::Ansi);
        assert_eq!(Paint::of(true, Some(""), None), Paint::Ansi);
        assert_eq!(Paint::of(true, Some("1"), None), Paint::Plain);
        assert_eq!(Paint::of(true, None, Some("dumb")), Paint::Plain);
        assert_eq!(Paint::of(false, None, None), Paint::Plain);
    }
}
