//! One mapping: as it was written ([`Entry`]), and checked ([`Mapping`]). Pure; used by `index`, and by
//! `backend` for its types.

use super::{
    arn::{ArnError, Kind, Pattern},
    template::{Template, TemplateError},
};
use crate::identity::{Identity, User};

/// A mapping as it was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Where it stands, for people: `mapRoles[2]`, or the name of an object.
    pub label: Box<str>,
    /// The ARN of a user or role.
    pub arn: String,
    /// The template of the username.
    pub username: String,
    /// The templates of the groups.
    pub groups: Vec<String>,
    /// The only id that the user or role may have, if it is given.
    pub user_id: Option<String>,
    /// What else is wrong with it. Such a mapping is refused.
    pub fault: Option<Box<str>>,
}

/// What a backend's mappings may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restrictions {
    /// What no username may begin with.
    pub reserved_usernames: Vec<Box<str>>,
    /// What no group may begin with.
    pub reserved_groups: Vec<Box<str>>,
    /// Whether a group may have a session's name in it, and a username may begin with one. Whoever assumes
    /// the role chooses it, and so the group and the user.
    pub trusts_session_names: bool,
    /// Whether a mapping must have the id of the user or role.
    pub needs_user_id: bool,
}

impl Default for Restrictions {
    fn default() -> Self {
        Self {
            reserved_usernames: vec!["system:".into()],
            reserved_groups: Vec::new(),
            trusts_session_names: false,
            needs_user_id: false,
        }
    }
}

/// Why a mapping is refused. A refused mapping maps nobody.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    /// The ARN is none, or is one of something else.
    #[error("the ARN is not used")]
    Arn(#[source] ArnError),
    /// The entry as a whole.
    #[error("{0}")]
    Fault(Box<str>),
    /// A group's template.
    #[error("the group is not used")]
    Group(#[source] TemplateError),
    /// A group begins with a reserved prefix.
    #[error("the group {group:?} begins with {prefix:?}, which is reserved here")]
    GroupReserved {
        /// The group.
        group: Box<str>,
        /// The prefix.
        prefix: Box<str>,
    },
    /// There are more groups than a user can have.
    #[error("it has {0} groups, not up to 64")]
    Groups(usize),
    /// A user or the account itself has no session.
    #[error("only roles have sessions, so this ARN has no {{{{SessionName}}}}")]
    NoSession,
    /// Whoever assumes the role would choose the group.
    #[error(
        "whoever assumes the role would choose the group {0:?}: name the group, or set --trust-session-names"
    )]
    SessionGroup(Box<str>),
    /// Whoever assumes the role would choose the whole beginning of the username.
    #[error(
        "whoever assumes the role would choose how the username {0:?} begins: write a prefix before the \
         session's name, or set --trust-session-names"
    )]
    SessionUsername(Box<str>),
    /// The backend matches by id, and there is none.
    #[error("it has no userID, which this backend requires")]
    UserId,
    /// The id is none, although there is one: a template may have rendered nothing.
    #[error(
        "the userID {0:?} is not an id: it must have 1 to 128 printable ASCII characters without a colon"
    )]
    UserIdForm(Box<str>),
    /// The username's template.
    #[error("the username is not used")]
    Username(#[source] TemplateError),
    /// The username begins with a reserved prefix.
    #[error("the username {username:?} begins with {prefix:?}, which is reserved here")]
    UsernameReserved {
        /// The username.
        username: Box<str>,
        /// The prefix.
        prefix: Box<str>,
    },
}

const GROUPS_MAX: usize = 64;
const USER_ID_MAX_BYTES: usize = 128;
/// The group that may do everything, whatever RBAC grants.
const MASTERS: &str = "system:masters";

/// A checked mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    pub(super) pattern: Pattern,
    user_id: Option<Box<str>>,
    username: Template,
    groups: Vec<Template>,
}

impl Mapping {
    pub(super) fn try_new(entry: &Entry, allowed: &Restrictions) -> Result<Self, EntryError> {
        if let Some(fault) = &entry.fault {
            return Err(EntryError::Fault(fault.clone()));
        }
        let pattern = Pattern::parse(&entry.arn).map_err(EntryError::Arn)?;
        let user_id: Option<Box<str>> = entry.user_id.as_deref().map(Into::into);
        if let Some(id) = user_id.as_deref().filter(|id| !is_user_id(id)) {
            let shown = &id[..id.floor_char_boundary(USER_ID_MAX_BYTES)];
            return Err(EntryError::UserIdForm(shown.into()));
        }
        if allowed.needs_user_id && user_id.is_none() {
            return Err(EntryError::UserId);
        }
        let username = Template::parse(&entry.username).map_err(EntryError::Username)?;
        let mut groups = Vec::new();
        for group in &entry.groups {
            let group = Template::parse(group).map_err(EntryError::Group)?;
            if !groups.contains(&group) {
                groups.push(group);
            }
        }
        if groups.len() > GROUPS_MAX {
            return Err(EntryError::Groups(groups.len()));
        }
        if let Some(prefix) = reserved(username.as_str(), &allowed.reserved_usernames) {
            return Err(EntryError::UsernameReserved { username: username.as_str().into(), prefix });
        }
        for group in &groups {
            if let Some(prefix) = reserved(group.as_str(), &allowed.reserved_groups) {
                return Err(EntryError::GroupReserved { group: group.as_str().into(), prefix });
            }
        }
        let has_session = username.has_session() || groups.iter().any(Template::has_session);
        if has_session && pattern.kind() != Kind::Role {
            return Err(EntryError::NoSession);
        }
        if !allowed.trusts_session_names {
            if username.begins_with_session() {
                return Err(EntryError::SessionUsername(username.as_str().into()));
            }
            if let Some(group) = groups.iter().find(|group| group.has_session()) {
                return Err(EntryError::SessionGroup(group.as_str().into()));
            }
        }
        Ok(Self { pattern, user_id, username, groups })
    }

    /// Whether it is for the user or role of this id.
    pub(super) fn is_for_id(&self, id: &str) -> bool {
        self.user_id.as_deref().is_none_or(|only| only == id)
    }

    /// Whether both give the same user.
    pub(super) fn has_target_of(&self, other: &Self) -> bool {
        self.username == other.username
            && self.groups.len() == other.groups.len()
            && self.groups.iter().all(|group| other.groups.contains(group))
    }

    /// Whether a user or role exists that both could be for, as far as ids tell.
    pub(super) fn shares_ids_with(&self, other: &Self) -> bool {
        match (&self.user_id, &other.user_id) {
            (Some(one), Some(other)) => one == other,
            _ => true,
        }
    }

    /// The user that an identity becomes; `None` where the identity lacks what a placeholder needs, or the
    /// name would begin with a reserved prefix.
    pub(super) fn user(&self, identity: &Identity, allowed: &Restrictions) -> Option<User> {
        let username = self.username.fill(identity)?;
        let groups: Option<Vec<Box<str>>> = self.groups.iter().map(|group| group.fill(identity)).collect();
        let groups = groups?;
        let is_reserved = reserved(&username, &allowed.reserved_usernames).is_some()
            || groups.iter().any(|group| reserved(group, &allowed.reserved_groups).is_some());
        (!is_reserved).then_some(User { username, groups })
    }

    /// What its author may not expect.
    pub(super) fn warnings(&self) -> impl Iterator<Item = &'static str> {
        let is_master = self.groups.iter().any(|group| group.as_str() == MASTERS);
        [
            is_master.then_some("the group system:masters may do everything, whatever RBAC grants"),
            self.pattern
                .is_session()
                .then_some("the ARN is a session's: every session of the role is mapped"),
        ]
        .into_iter()
        .flatten()
    }
}

/// In a principal's id, what comes before the colon.
fn is_user_id(text: &str) -> bool {
    (1..=USER_ID_MAX_BYTES).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b':')
}

/// The reserved prefix that a name begins with.
pub(super) fn reserved(name: &str, prefixes: &[Box<str>]) -> Option<Box<str>> {
    prefixes.iter().find(|prefix| name.starts_with(&***prefix)).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::testing::{entry, role, user};

    fn check(arn: &str, username: &str, groups: &[&str]) -> Result<Mapping, EntryError> {
        Mapping::try_new(&entry(arn, username, groups), &Restrictions::default())
    }

    const ROLE: &str = "acs:ram::123456789012:role/admin";
    const USER: &str = "acs:ram::123456789012:user/alice";

    #[test]
    fn gives_a_user_with_its_groups_once() {
        let mapping = check(ROLE, "ram:{{SessionName}}", &["dev", "ops", "dev"]).unwrap();

        let user = mapping.user(&role("admin", "a@b"), &Restrictions::default()).unwrap();

        assert_eq!(&*user.username, "ram:a-b");
        assert_eq!(user.groups, ["dev", "ops"].map(Box::<str>::from));
    }

    #[test]
    fn a_group_with_the_sessions_name_needs_the_flag() {
        let asked = entry(ROLE, "admin", &["team-{{SessionName}}"]);
        let trusting = Restrictions { trusts_session_names: true, ..Restrictions::default() };

        let refused = Mapping::try_new(&asked, &Restrictions::default());

        assert_eq!(refused, Err(EntryError::SessionGroup("team-{{SessionName}}".into())));
        let mapping = Mapping::try_new(&asked, &trusting).unwrap();
        assert_eq!(
            mapping.user(&role("admin", "x"), &trusting).unwrap().groups,
            [Box::<str>::from("team-x")]
        );
    }

    #[test]
    fn a_username_that_is_only_the_sessions_name_needs_the_flag() {
        for username in ["{{SessionName}}", "{{SessionNameRaw}}-x"] {
            let refused = check(ROLE, username, &[]);
            assert_eq!(refused, Err(EntryError::SessionUsername(username.into())));
            let trusting = Restrictions { trusts_session_names: true, ..Restrictions::default() };
            assert!(Mapping::try_new(&entry(ROLE, username, &[]), &trusting).is_ok());
        }
        assert!(check(ROLE, "{{AccountID}}:{{SessionName}}", &[]).is_ok(), "the allowed twin");
    }

    #[test]
    fn users_have_no_session() {
        for arn in [USER, "acs:ram::1:root"] {
            assert_eq!(check(arn, "ram:{{SessionName}}", &[]), Err(EntryError::NoSession));
            assert!(check(arn, "ram:{{AccountID}}", &[]).is_ok(), "the allowed twin");
        }
    }

    #[test]
    fn reserved_names_are_refused_as_written_and_as_filled_in() {
        let refused = check(ROLE, "system:node:{{SessionName}}", &[]);
        assert!(matches!(refused, Err(EntryError::UsernameReserved { prefix, .. }) if &*prefix == "system:"));
        assert!(check(ROLE, "systems", &["system:masters"]).is_ok(), "only usernames are, unless set");

        let strict = Restrictions {
            reserved_usernames: vec!["ops-".into()],
            reserved_groups: vec!["system:".into()],
            trusts_session_names: true,
            needs_user_id: false,
        };
        let refused = Mapping::try_new(&entry(ROLE, "a", &["system:masters"]), &strict);
        assert!(matches!(refused, Err(EntryError::GroupReserved { .. })));
        let mapping =
            Mapping::try_new(&entry(ROLE, "{{SessionName}}", &["{{SessionName}}"]), &strict).unwrap();
        assert_eq!(mapping.user(&role("admin", "ops-1"), &strict), None);
        assert!(mapping.user(&role("admin", "dev-1"), &strict).is_some(), "the allowed twin");
    }

    #[test]
    fn an_id_is_required_where_it_is_strict_and_holds_everywhere() {
        let strict = Restrictions { needs_user_id: true, ..Restrictions::default() };
        let mut asked = entry(USER, "alice", &[]);
        assert_eq!(Mapping::try_new(&asked, &strict), Err(EntryError::UserId));
        for restrictions in [&strict, &Restrictions::default()] {
            for id in ["", " ", "2:session", "2\n"] {
                asked.user_id = Some(id.into());
                assert_eq!(Mapping::try_new(&asked, restrictions), Err(EntryError::UserIdForm(id.into())));
            }
        }
        asked.user_id = Some("2".into());

        let mapping = Mapping::try_new(&asked, &strict).unwrap();

        assert!(mapping.is_for_id("2") && !mapping.is_for_id("3"));
        assert!(check(USER, "alice", &[]).unwrap().is_for_id(&user("alice").user_id));
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert!(matches!(check("arn", "a", &[]), Err(EntryError::Arn(_))));
        assert!(matches!(check(ROLE, "", &[]), Err(EntryError::Username(TemplateError::Empty))));
        assert!(matches!(check(ROLE, "a", &[""]), Err(EntryError::Group(TemplateError::Empty))));
        let many: Vec<String> = (0..65).map(|n| n.to_string()).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(check(ROLE, "a", &many), Err(EntryError::Groups(65)));
        assert!(check(ROLE, "a", &many[1..]).is_ok(), "the allowed twin");
        let faulty = Entry { fault: Some("unknown key x".into()), ..entry(ROLE, "a", &[]) };
        let refused = Mapping::try_new(&faulty, &Restrictions::default());
        assert_eq!(refused.unwrap_err().to_string(), "unknown key x");
    }

    #[test]
    fn warns_of_what_is_more_than_it_seems() {
        let warnings = |arn, groups| check(arn, "a", groups).unwrap().warnings().count();

        assert_eq!(warnings(ROLE, &["system:masters"]), 1);
        assert_eq!(warnings("acs:ram::1:assumed-role/admin/alice", &["system:masters"]), 2);
        assert_eq!(warnings(ROLE, &["view"]), 0);
    }

    #[test]
    fn the_order_of_groups_makes_no_other_user() {
        let of = |groups| check(ROLE, "a", groups).unwrap();

        assert!(of(&["x", "y"]).has_target_of(&of(&["y", "x", "y"])));
        assert!(!of(&["x", "y"]).has_target_of(&of(&["x"])));
        assert!(!of(&["x"]).has_target_of(&of(&["x", "y"])));
    }
}
