//! The last failures of requests for tokens, by ServiceAccount, for status. Pure. Kept by
//! `kubernetes::account_api`, written and read by `kubernetes::token_request`.

use std::collections::VecDeque;

use jiff::{SignedDuration, Timestamp};

use kube2ram_cloud::role::ServiceAccount;

/// One for each of the accounts that failed last, the latest at the end.
#[derive(Debug, Default)]
pub(super) struct TokenFailures(VecDeque<TokenFailure>);

#[derive(Debug)]
struct TokenFailure {
    account: ServiceAccount,
    at: Timestamp,
    reason: Box<str>,
}

impl TokenFailures {
    /// Notes why there was no token of an account.
    pub(super) fn note(&mut self, account: &ServiceAccount, at: Timestamp, reason: &str) {
        self.clear(account);
        self.0.push_back(TokenFailure { account: account.clone(), at, reason: reason.into() });
        if self.0.len() > LIMIT {
            self.0.pop_front();
        }
    }

    /// Notes that there was a token of an account. It proves nothing about other accounts: a namespace can be
    /// without a right that others have.
    pub(super) fn clear(&mut self, account: &ServiceAccount) {
        self.0.retain(|failure| failure.account != *account);
    }

    /// When and why a request failed last, without those of long ago: the account may not be used any more.
    pub(super) fn latest(&self, now: Timestamp) -> Option<(Timestamp, Box<str>)> {
        let failure = self.0.back()?;
        (now.duration_since(failure.at) <= MAX_AGE).then(|| (failure.at, failure.reason.clone()))
    }
}

/// One is shown. With the others, a success of its account leaves the failures of some more.
const LIMIT: usize = 16;
/// Longer than the pause between two attempts of an account that a pod asks for.
const MAX_AGE: SignedDuration = SignedDuration::from_mins(10);

#[cfg(test)]
mod tests {
    use super::*;

    fn account(name: &str) -> ServiceAccount {
        ServiceAccount { namespace: "n".into(), name: name.into() }
    }

    #[test]
    fn a_success_clears_the_failure_of_its_own_account_alone() {
        let (mut failures, at) = (TokenFailures::default(), Timestamp::UNIX_EPOCH);
        failures.note(&account("a"), at, "of a");
        failures.note(&account("b"), at, "of b");

        failures.clear(&account("c"));
        assert_eq!(failures.latest(at), Some((at, "of b".into())));
        failures.clear(&account("b"));
        assert_eq!(failures.latest(at), Some((at, "of a".into())));
        failures.clear(&account("a"));

        assert_eq!(failures.latest(at), None);
    }

    #[test]
    fn a_failure_is_forgotten_in_time() {
        let (mut failures, at) = (TokenFailures::default(), Timestamp::UNIX_EPOCH);
        failures.note(&account("a"), at, "of a");

        assert!(failures.latest(at + MAX_AGE).is_some());
        assert!(failures.latest(at + MAX_AGE + SignedDuration::from_secs(1)).is_none());
        assert!(failures.latest(at - MAX_AGE).is_some(), "a clock that was set back");
    }

    #[test]
    fn failures_are_bounded_and_each_account_has_one() {
        let (mut failures, at) = (TokenFailures::default(), Timestamp::UNIX_EPOCH);
        for n in 0..100 {
            failures.note(&account("again"), at, "again");
            failures.note(&account(&format!("a{n}")), at, "of another");
        }

        assert_eq!(failures.0.len(), LIMIT);
        let of_one = failures.0.iter().filter(|failure| failure.account == account("again")).count();
        assert_eq!(of_one, 1);
    }
}
