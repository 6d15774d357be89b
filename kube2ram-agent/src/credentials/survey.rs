//! A survey of the cache's entries. Pure: time is passed in. Called by `cache`, for `app`'s metrics.

use std::time::Duration;

use super::entry::{Entry, Now};

/// The role sessions in the cache.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    counts: [u32; Standing::ALL.len()],
    /// The shortest time that is left of valid credentials.
    pub shortest_left: Option<Duration>,
    /// The age of the oldest valid credentials.
    pub oldest: Option<Duration>,
}

/// How a role session stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Its credentials are valid, but less is left of them than what pods are promised.
    BelowFloor,
    /// STS refuses them.
    Denied,
    /// There are no valid credentials, and STS issues none.
    Failing,
    /// Its credentials are as they should be.
    Fresh,
    /// They were not asked for yet.
    Pending,
}

impl Standing {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::BelowFloor, Self::Denied, Self::Failing, Self::Fresh, Self::Pending];

    /// The metrics label.
    pub fn label(self) -> &'static str {
        match self {
            Self::BelowFloor => "below_floor",
            Self::Denied => "denied",
            Self::Failing => "failing",
            Self::Fresh => "fresh",
            Self::Pending => "pending",
        }
    }
}

impl Survey {
    /// How many role sessions stand so.
    pub fn count(&self, standing: Standing) -> u32 {
        self.counts[standing as usize]
    }

    pub(super) fn of<'e>(entries: impl Iterator<Item = &'e Entry>, now: Now) -> Self {
        let mut survey = Self::default();
        for entry in entries {
            survey.counts[entry.standing(now) as usize] += 1;
            if let Some((left, age)) = entry.span(now) {
                survey.shortest_left = Some(survey.shortest_left.map_or(left, |shortest| shortest.min(left)));
                survey.oldest = Some(survey.oldest.map_or(age, |oldest| oldest.max(age)));
            }
        }
        survey
    }
}
