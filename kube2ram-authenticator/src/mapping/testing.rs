//! What the tests of this module and of `backend` are made of.

use super::Entry;
use crate::identity::Identity;

pub(crate) const ACCOUNT: &str = "123456789012";

/// A session of a role, as STS identifies it.
pub(crate) fn role(name: &str, session: &str) -> Identity {
    Identity {
        arn: format!("acs:ram::{ACCOUNT}:assumed-role/{name}/{session}").into(),
        canonical_arn: format!("acs:ram::{ACCOUNT}:role/{name}").into(),
        account_id: ACCOUNT.into(),
        user_id: format!("id-of-role-{name}").into(),
        session_name: Some(session.into()),
        access_key_id: "STS.testid".into(),
    }
}

/// A user, as STS identifies one.
pub(crate) fn user(name: &str) -> Identity {
    let arn: Box<str> = format!("acs:ram::{ACCOUNT}:user/{name}").into();
    Identity {
        arn: arn.clone(),
        canonical_arn: arn,
        account_id: ACCOUNT.into(),
        user_id: format!("id-of-user-{name}").into(),
        session_name: None,
        access_key_id: "testid".into(),
    }
}

/// A mapping, labelled with its ARN.
pub(crate) fn entry(arn: &str, username: &str, groups: &[&str]) -> Entry {
    Entry {
        label: arn.into(),
        arn: arn.to_owned(),
        username: username.to_owned(),
        groups: groups.iter().map(|group| (*group).to_owned()).collect(),
        user_id: None,
        fault: None,
    }
}
