//! Rows of what was asked, what came back and what should have.
//! Pure. Called by `show`.

use std::{fmt, time::Duration};

/// One question.
pub(super) struct Row {
    pub(super) who: String,
    pub(super) asked: String,
    pub(super) expected: String,
    pub(super) got: String,
    pub(super) latency: Option<Duration>,
}

/// All of them, in the order they were asked.
#[derive(Default)]
pub(super) struct Table {
    rows: Vec<Row>,
}

impl Table {
    pub(super) fn push(&mut self, row: Row) {
        self.rows.push(row);
    }

    /// Whether every answer was the expected one.
    pub(super) fn is_right(&self) -> bool {
        self.rows.iter().all(Row::is_right)
    }
}

impl Row {
    fn is_right(&self) -> bool {
        self.got == self.expected
    }

    fn cells(&self) -> [String; 4] {
        let first_line = self.got.lines().next().unwrap_or_default();
        let got = match self.got.as_str() {
            "403" => "403 forbidden",
            "404" => "404 no role",
            _ => first_line,
        };
        let got =
            if self.is_right() { got.to_owned() } else { format!("{got}  (should be {})", self.expected) };
        let time = self.latency.map_or_else(|| "-".into(), |latency| format!("{} µs", latency.as_micros()));
        [self.who.clone(), self.asked.clone(), got, time]
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cells = self.rows.iter().map(Row::cells).collect::<Vec<_>>();
        let width = |column: usize, title: &str| {
            let widths = cells.iter().map(|row| row[column].chars().count());
            widths.max().unwrap_or_default().max(title.len())
        };
        let [who, asked, got, time] =
            [width(0, "POD"), width(1, "ASKS FOR"), width(2, "GETS"), width(3, "TIME")];
        writeln!(f, "  {:who$}  {:asked$}  {:got$}  {:>time$}", "POD", "ASKS FOR", "GETS", "TIME")?;
        for (row, [a, b, c, d]) in self.rows.iter().zip(&cells) {
            writeln!(f, "{} {a:who$}  {b:asked$}  {c:got$}  {d:>time$}", mark(row.is_right()))?;
        }
        Ok(())
    }
}

/// ✓ or ✗.
pub(crate) fn mark(right: bool) -> char {
    if right { '✓' } else { '✗' }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_what_an_answer_should_have_been() {
        let row = |got: &str| Row {
            who: "orders".into(),
            asked: "which role?".into(),
            expected: "orders-role".into(),
            got: got.into(),
            latency: Some(Duration::from_micros(120)),
        };
        let mut table = Table::default();
        table.push(row("orders-role"));
        assert!(table.is_right());

        table.push(row("403"));

        assert!(!table.is_right());
        let text = table.to_string();
        assert!(text.contains("✓ orders  which role?  orders-role"), "{text}");
        assert!(
            text.contains("✗ orders  which role?  403 forbidden  (should be orders-role)  120 µs"),
            "{text}"
        );
    }
}
