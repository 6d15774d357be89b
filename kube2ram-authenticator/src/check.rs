//! What an ARN is mapped to, and why: for the command `check`. Pure. Depends on `mapping` and `backend` for
//! their types; called by `main`.

use std::{fmt, sync::Arc};

use serde_json::{Value, json};

use crate::{
    backend::Mode,
    identity::{Identity, IdentityError, Mapped, canonical},
    mapping::Index,
};

/// What an identity is mapped to, and why.
#[derive(Debug)]
pub struct Checked {
    canonical_arn: Box<str>,
    mapped: Mapped,
    /// The backend that decided, and the labels of its mappings that did.
    decided: Option<(Mode, Vec<Box<str>>)>,
    candidates: Vec<Candidate>,
    /// The first backend that is not known.
    unknown: Option<Mode>,
}

/// A mapping that names the identity.
#[derive(Debug)]
struct Candidate {
    backend: Mode,
    label: Box<str>,
    pattern: Box<str>,
}

/// Makes the identity of an ARN, with the name of a session and an id if they are given.
///
/// # Errors
/// [`IdentityError::Arn`].
pub fn identity(
    arn: &str,
    session_name: Option<Box<str>>,
    user_id: Option<Box<str>>,
) -> Result<Identity, IdentityError> {
    let canonical_arn = canonical(arn)?;
    let in_arn = arn.contains(":assumed-role/").then(|| arn.rsplit('/').next()).flatten();
    let account_id = arn.split(':').nth(3).unwrap_or_default();
    Ok(Identity {
        arn: arn.into(),
        canonical_arn,
        account_id: account_id.into(),
        user_id: user_id.unwrap_or_default(),
        session_name: session_name.or(in_arn.map(Into::into)),
        access_key_id: Box::default(),
    })
}

impl Checked {
    /// Decides as the server does.
    pub fn of(indexes: &[(Mode, Option<Arc<Index>>)], identity: &Identity) -> Self {
        let mut checked = Self {
            canonical_arn: identity.canonical_arn.clone(),
            mapped: Mapped::Nobody,
            decided: None,
            candidates: Vec::new(),
            unknown: None,
        };
        for (backend, index) in indexes {
            let Some(index) = index else {
                checked.unknown = checked.unknown.or(Some(*backend));
                continue;
            };
            let named = index.candidates(identity).into_iter();
            checked.candidates.extend(named.map(|(label, pattern)| Candidate {
                backend: *backend,
                label,
                pattern,
            }));
            if checked.decided.is_none() && checked.unknown.is_none() {
                let decision = index.decide(identity);
                if decision.mapped != Mapped::Nobody {
                    checked.mapped = decision.mapped;
                    checked.decided = Some((*backend, decision.by));
                }
            }
        }
        checked
    }

    /// Whether the identity can log in.
    pub fn is_mapped(&self) -> bool {
        matches!(self.mapped, Mapped::User(_))
    }

    /// For programs.
    pub fn to_json(&self) -> Value {
        let (result, username, groups, reason) = match &self.mapped {
            Mapped::Conflict(reason) => ("conflict", None, None, Some(reason)),
            Mapped::Nobody => ("nobody", None, None, None),
            Mapped::User(user) => ("user", Some(&user.username), Some(&user.groups), None),
        };
        let candidates: Vec<Value> = self
            .candidates
            .iter()
            .map(|Candidate { backend, label, pattern }| {
                json!({ "backend": backend.name(), "mapping": label, "arn": pattern })
            })
            .collect();
        json!({
            "canonicalArn": self.canonical_arn,
            "result": result,
            "username": username,
            "groups": groups,
            "reason": reason,
            "backend": self.decided.as_ref().map(|(backend, _)| backend.name()),
            "decidedBy": self.decided.as_ref().map(|(_, labels)| labels),
            "unknownBackend": self.unknown.map(Mode::name),
            "candidates": candidates,
        })
    }
}

impl fmt::Display for Checked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "ARN        {}", self.canonical_arn)?;
        match &self.mapped {
            Mapped::Conflict(reason) => writeln!(f, "user       none: {reason}")?,
            Mapped::Nobody => writeln!(f, "user       none: no mapping names the ARN")?,
            Mapped::User(user) => {
                writeln!(f, "user       {}", user.username)?;
                writeln!(f, "groups     {}", user.groups.join(", "))?;
            }
        }
        if let Some((backend, labels)) = &self.decided {
            writeln!(f, "decided by {} of {backend}", labels.join(", "))?;
        }
        if let Some(backend) = self.unknown {
            writeln!(
                f,
                "unknown    the mappings of {backend}: the server answers 503 until it has read them"
            )?;
        }
        for Candidate { backend, label, pattern } in &self.candidates {
            writeln!(f, "names it   {label} of {backend}: {pattern}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::{
        Entry,
        testing::{ACCOUNT, entry},
    };

    fn arn(rest: &str) -> String {
        format!("acs:ram::{ACCOUNT}:{rest}")
    }

    fn index(entries: &[Entry]) -> Option<Arc<Index>> {
        Some(Arc::new(Index::new(entries, &[], Arc::default()).0))
    }

    fn check(indexes: &[(Mode, Option<Arc<Index>>)], arn: &str) -> Checked {
        Checked::of(indexes, &identity(arn, None, None).unwrap())
    }

    #[test]
    fn a_sessions_arn_is_its_role_and_brings_its_name() {
        let session = identity(&arn("assumed-role/Admin/a@b"), None, None).unwrap();
        let named = identity(&arn("role/Admin"), Some("s".into()), Some("2".into())).unwrap();

        assert_eq!(*session.canonical_arn, *arn("role/Admin"));
        assert_eq!((session.session_name.as_deref(), &*session.account_id), (Some("a@b"), ACCOUNT));
        assert_eq!((named.session_name.as_deref(), &*named.user_id), (Some("s"), "2"));
        assert!(identity("nonsense", None, None).is_err());
    }

    #[test]
    fn says_who_somebody_becomes_by_what_and_what_else_names_him() {
        let file = index(&[
            Entry { label: "mapRoles[0]".into(), ..entry(&arn("role/*"), "any", &[]) },
            Entry { label: "mapRoles[1]".into(), ..entry(&arn("role/admin"), "admin", &["ops", "dev"]) },
        ]);
        let crd = index(&[Entry { label: "object".into(), ..entry(&arn("role/admin"), "other", &[]) }]);

        let checked = check(&[(Mode::MountedFile, file), (Mode::Crd, crd)], &arn("assumed-role/Admin/s"));

        assert!(checked.is_mapped());
        assert_eq!(
            checked.to_string(),
            format!(
                "ARN        {0}Admin\nuser       admin\ngroups     ops, dev\ndecided by mapRoles[1] of MountedFile\n\
                 names it   mapRoles[0] of MountedFile: {0}*\nnames it   mapRoles[1] of MountedFile: {0}admin\n\
                 names it   object of CRD: {0}admin\n",
                arn("role/")
            )
        );
        let document = checked.to_json();
        assert_eq!((&document["result"], &document["username"]), (&json!("user"), &json!("admin")));
        assert_eq!(document["groups"], json!(["ops", "dev"]));
        assert_eq!(document["candidates"].as_array().unwrap().len(), 3);
    }

    #[test]
    fn says_why_somebody_is_nobody() {
        let both = index(&[entry(&arn("role/a"), "x", &[]), entry(&arn("role/a"), "y", &[])]);

        let conflict = check(&[(Mode::Crd, both.clone())], &arn("role/a"));
        let nobody = check(&[(Mode::Crd, both)], &arn("role/b"));

        assert!(!conflict.is_mapped() && conflict.to_string().contains("give different users"));
        assert_eq!(conflict.to_json()["result"], "conflict");
        assert!(!nobody.is_mapped() && nobody.to_string().contains("no mapping names the ARN"));
        assert_eq!(nobody.to_json()["backend"], Value::Null);
    }

    #[test]
    fn a_backend_that_is_not_known_is_named_and_none_after_it_decides() {
        let admin = index(&[entry(&arn("role/a"), "x", &[])]);

        let checked = check(&[(Mode::Crd, None), (Mode::MountedFile, admin)], &arn("role/a"));

        assert!(!checked.is_mapped() && checked.to_string().contains("503"));
        assert_eq!(checked.to_json()["unknownBackend"], "CRD");
    }
}
