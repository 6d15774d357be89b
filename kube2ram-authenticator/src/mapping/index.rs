//! The mappings of one backend, to look identities up in: never changed, only replaced as a whole. Pure; made
//! by `backend`, asked by the parent.

use std::{
    cmp::Reverse,
    collections::{HashMap, HashSet},
    sync::Arc,
};

use super::{
    entry::{Entry, EntryError, Mapping, Restrictions, reserved},
    glob,
};
use crate::identity::{Identity, Mapped, User};

/// As many mappings has a backend at most; later ones are refused. A ConfigMap has no room for more.
pub const MAPPINGS_MAX: usize = 10_000;

/// How much work the search for conflicts may be, in steps of comparing two patterns: some 50 ms. Conflicts
/// that are not found in it are still found when somebody logs in.
const CONFLICT_STEPS: usize = 20_000_000;
/// What comparing two mappings of one ARN counts as.
const EXACT_STEPS: usize = 64;

/// The mappings of one backend.
#[derive(Debug)]
pub struct Index {
    mappings: Vec<Named>,
    /// The mappings without wildcards, by ARN.
    exact: HashMap<Box<str>, Vec<usize>>,
    /// The others, by the length of what stands before the first wildcard: the longest first.
    globs: Vec<usize>,
    accounts: HashSet<Box<str>>,
    restrictions: Arc<Restrictions>,
}

#[derive(Debug)]
struct Named {
    label: Box<str>,
    mapping: Mapping,
}

/// What became of one entry of a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The entry's label.
    pub label: Box<str>,
    /// The ARN that is looked up, in lower case and without a session. `None` if the entry has none.
    pub canonical: Option<Box<str>>,
    /// Whether it maps anybody.
    pub state: State,
}

/// Whether an entry maps anybody.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Another entry, of this label, gives another user to some of the same identities. These are mapped to
    /// nobody.
    Conflict(Box<str>),
    /// It maps whoever it is for.
    Mapped {
        /// What its author may not expect.
        warnings: Vec<&'static str>,
    },
    /// It maps nobody.
    Refused(EntryError),
}

/// What an index says about an identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The result.
    pub mapped: Mapped,
    /// The labels of the entries that decided.
    pub by: Vec<Box<str>>,
}

/// An account in which every user and role is mapped, as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// Where it stands, for people.
    pub label: Box<str>,
    /// The account's id.
    pub id: String,
}

impl Index {
    /// Makes the index, and reports on each entry, then on each account, in their order.
    pub fn new(
        entries: &[Entry],
        accounts: &[Account],
        restrictions: Arc<Restrictions>,
    ) -> (Self, Vec<Report>) {
        let mut index = Self {
            mappings: Vec::new(),
            exact: HashMap::new(),
            globs: Vec::new(),
            accounts: HashSet::new(),
            restrictions,
        };
        let added: Vec<_> = entries.iter().map(|entry| index.add(entry)).collect();
        index.globs.sort_by_key(|at| {
            let prefix = index.mappings.get(*at).and_then(Named::literal_prefix).unwrap_or_default();
            (Reverse(prefix.len()), prefix)
        });
        let conflicts = index.conflicts();
        let report = |(entry, added): (&Entry, Result<usize, EntryError>)| {
            let named = added.as_ref().ok().and_then(|at| Some((*at, index.mappings.get(*at)?)));
            let state = match (added, named) {
                (Err(error), _) => State::Refused(error),
                (Ok(_), named) => match named.and_then(|(at, _)| conflicts.get(&at)) {
                    Some(other) => State::Conflict(other.clone()),
                    None => State::Mapped {
                        warnings: named
                            .map(|(_, named)| named.mapping.warnings().collect())
                            .unwrap_or_default(),
                    },
                },
            };
            let canonical = named.map(|(_, named)| named.mapping.pattern.as_str().into());
            Report { label: entry.label.clone(), canonical, state }
        };
        let mut reports: Vec<Report> = entries.iter().zip(added).map(report).collect();
        reports.extend(accounts.iter().map(|account| index.add_account(account)));
        (index, reports)
    }

    fn add(&mut self, entry: &Entry) -> Result<usize, EntryError> {
        let at = self.mappings.len();
        if at >= MAPPINGS_MAX {
            return Err(EntryError::Fault("this backend has more than 10,000 mappings".into()));
        }
        let mapping = Mapping::try_new(entry, &self.restrictions)?;
        match mapping.pattern.literal_prefix() {
            None => self.exact.entry(mapping.pattern.as_str().into()).or_default().push(at),
            Some(_) => self.globs.push(at),
        }
        self.mappings.push(Named { label: entry.label.clone(), mapping });
        Ok(at)
    }

    fn add_account(&mut self, account: &Account) -> Report {
        let id = account.id.trim();
        let is_id = (1..=32).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_digit());
        let state = if !is_id {
            State::Refused(EntryError::Fault(format!("the account {id:?} is not made of digits").into()))
        } else if self.restrictions.needs_user_id {
            State::Refused(EntryError::UserId)
        } else if self.accounts.len() >= MAPPINGS_MAX {
            State::Refused(EntryError::Fault("this backend has more than 10,000 accounts".into()))
        } else {
            self.accounts.insert(id.into());
            State::Mapped { warnings: Vec::new() }
        };
        Report { label: account.label.clone(), canonical: None, state }
    }

    /// The user that an identity is: of the mapping of its ARN; without one, of the pattern with the longest
    /// text before its first wildcard; without one, itself if its account is mapped and no mapping of its
    /// ARN is for another id. Where two mappings come first and differ, nobody.
    pub fn decide(&self, identity: &Identity) -> Decision {
        let found = self.foremost(identity);
        let by = found.iter().map(|named| named.label.clone()).collect();
        let mapped = match found.split_first() {
            None => return self.decide_by_account(identity),
            Some((first, others))
                if others.iter().all(|named| named.mapping.has_target_of(&first.mapping)) =>
            {
                first.mapping.user(identity, &self.restrictions).map_or_else(
                    || Mapped::Conflict("the session's name gives no username that may be used".into()),
                    Mapped::User,
                )
            }
            Some((first, others)) => {
                let other = others.iter().find(|named| !named.mapping.has_target_of(&first.mapping));
                let other = other.map_or("", |named| &*named.label);
                Mapped::Conflict(format!("{} and {other} give different users", first.label).into())
            }
        };
        Decision { mapped, by }
    }

    fn decide_by_account(&self, identity: &Identity) -> Decision {
        // A mapping of this ARN has found another id: a user or role created again.
        let is_another = self.exact.contains_key(&*subject_of(identity));
        if is_another || !self.accounts.contains(&identity.account_id) {
            return Decision { mapped: Mapped::Nobody, by: Vec::new() };
        }
        let user = User { username: identity.canonical_arn.clone(), groups: Vec::new() };
        let by = vec![format!("account {}", identity.account_id).into()];
        let mapped = match reserved(&user.username, &self.restrictions.reserved_usernames) {
            None => Mapped::User(user),
            Some(_) => Mapped::Conflict("the ARN begins with a prefix that is reserved here".into()),
        };
        Decision { mapped, by }
    }

    /// The labels and patterns of all mappings that name an identity, whether they decide or not.
    pub fn candidates(&self, identity: &Identity) -> Vec<(Box<str>, Box<str>)> {
        let subject = subject_of(identity);
        let named = self.mappings.iter().filter(|named| named.is_for(identity, &subject));
        named.map(|named| (named.label.clone(), named.mapping.pattern.as_str().into())).collect()
    }

    /// How many mappings and accounts there are.
    pub fn len(&self) -> usize {
        self.mappings.len() + self.accounts.len()
    }

    /// Whether it maps nobody.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The mappings for an identity that no other one goes before.
    fn foremost(&self, identity: &Identity) -> Vec<&Named> {
        let subject = subject_of(identity);
        let exact = self.exact.get(&*subject).into_iter().flatten();
        let exact: Vec<&Named> = self.all(exact).filter(|named| named.is_for(identity, &subject)).collect();
        if !exact.is_empty() {
            return exact;
        }
        let mut found: Vec<&Named> = Vec::new();
        for named in self.all(self.globs.iter()) {
            let is_later = found.first().is_some_and(|first| named.prefix_len() < first.prefix_len());
            if is_later {
                break;
            }
            if named.is_for(identity, &subject) {
                found.push(named);
            }
        }
        found
    }

    fn all<'a>(&'a self, places: impl Iterator<Item = &'a usize>) -> impl Iterator<Item = &'a Named> {
        places.filter_map(move |at| self.mappings.get(*at))
    }

    /// For each mapping that is in conflict, the label of one that it is in conflict with.
    fn conflicts(&self) -> HashMap<usize, Box<str>> {
        let mut conflicts = HashMap::new();
        let mut steps = CONFLICT_STEPS;
        let groups = self.exact.values().map(Vec::as_slice);
        // Patterns come first at once only if the same text stands before their first wildcards.
        let globs = self.globs.chunk_by(|a, b| self.prefix_of(*a) == self.prefix_of(*b));
        for group in groups.chain(globs) {
            for (n, at) in group.iter().enumerate() {
                for other in group.iter().skip(n + 1) {
                    let (Some(a), Some(b)) = (self.mappings.get(*at), self.mappings.get(*other)) else {
                        continue;
                    };
                    let Some(left) = steps.checked_sub(a.steps_with(b)) else { return conflicts };
                    steps = left;
                    if a.is_in_conflict_with(b) {
                        conflicts.entry(*at).or_insert_with(|| b.label.clone());
                        conflicts.entry(*other).or_insert_with(|| a.label.clone());
                    }
                }
            }
        }
        conflicts
    }

    fn prefix_of(&self, at: usize) -> Option<&str> {
        self.mappings.get(at).and_then(Named::literal_prefix)
    }
}

impl Named {
    fn literal_prefix(&self) -> Option<&str> {
        self.mapping.pattern.literal_prefix()
    }

    fn prefix_len(&self) -> usize {
        self.literal_prefix().map_or(0, str::len)
    }

    fn is_for(&self, identity: &Identity, subject: &str) -> bool {
        self.mapping.is_for_id(&identity.user_id) && self.mapping.pattern.matches(subject)
    }

    fn steps_with(&self, other: &Self) -> usize {
        match (self.literal_prefix(), other.literal_prefix()) {
            (Some(_), Some(_)) => self.mapping.pattern.as_str().len() * other.mapping.pattern.as_str().len(),
            _ => EXACT_STEPS,
        }
    }

    /// Whether an identity exists for which both come first and give different users. Both have the same text
    /// before their first wildcards, or the same ARN.
    fn is_in_conflict_with(&self, other: &Self) -> bool {
        !self.mapping.has_target_of(&other.mapping)
            && self.mapping.shares_ids_with(&other.mapping)
            && glob::intersect(self.mapping.pattern.as_str(), other.mapping.pattern.as_str())
    }
}

/// What of an identity is compared with patterns. RAM's names are ASCII, and another character would be
/// several for `?`: such an identity is compared as nothing.
fn subject_of(identity: &Identity) -> String {
    if identity.canonical_arn.is_ascii() {
        identity.canonical_arn.to_ascii_lowercase()
    } else {
        String::new()
    }
}

#[cfg(test)]
mod tests;
