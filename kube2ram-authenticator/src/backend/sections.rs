//! The three lists that mappings are written in, in files and in the ConfigMap: parsed, and kept while a new
//! version cannot be read. Pure. The home of serde_saphyr, with `config`. Used by `file` and `config_map`.

use std::collections::BTreeMap;

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, IgnoredAny},
};

use super::any_case::AnyCase;
use crate::mapping::{Account, Entry};

/// One of the lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Section {
    Accounts,
    Roles,
    Users,
}

impl Section {
    pub(super) const ALL: [Self; 3] = [Self::Roles, Self::Users, Self::Accounts];

    /// Its key.
    pub(super) fn key(self) -> &'static str {
        match self {
            Self::Accounts => "mapAccounts",
            Self::Roles => "mapRoles",
            Self::Users => "mapUsers",
        }
    }
}

/// How the lists are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// The configuration file: YAML, below `server`.
    ConfigFile,
    /// A file of the lists alone, in JSON.
    Json,
    /// One list as a text of its own, in YAML.
    Yaml,
}

/// Why a list cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum SectionError {
    #[error("it is not the JSON that was expected")]
    Json(#[source] serde_json::Error),
    #[error("it is not the YAML that was expected")]
    Yaml(#[source] serde_saphyr::Error),
}

/// A list that was read.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum List {
    Accounts(Vec<Account>),
    Entries(Vec<Entry>),
}

/// The lists as they were last read, each of them by itself.
#[derive(Debug, Default)]
pub(super) struct Sections {
    roles: Vec<Entry>,
    users: Vec<Entry>,
    accounts: Vec<Account>,
    /// What is wrong with the newest version of a list, if the one before it is still used.
    broken: BTreeMap<Section, String>,
}

impl Sections {
    /// Takes what was read of a list; if it could not be read, why, and the list stays as it was.
    pub(super) fn take(&mut self, section: Section, read: Result<List, String>) {
        match (section, read) {
            (_, Err(error)) => {
                self.broken.insert(section, error);
                return;
            }
            (Section::Accounts, Ok(List::Accounts(accounts))) => self.accounts = accounts,
            (Section::Roles, Ok(List::Entries(entries))) => self.roles = entries,
            (Section::Users, Ok(List::Entries(entries))) => self.users = entries,
            // `parse` gives each section its own kind of list.
            (_, Ok(List::Accounts(_) | List::Entries(_))) => {}
        }
        self.broken.remove(&section);
    }

    /// Empties all lists.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// The lists that could not be read, and why.
    pub(super) fn broken(&self) -> &BTreeMap<Section, String> {
        &self.broken
    }

    /// All mappings: roles before users.
    pub(super) fn entries(&self) -> Vec<Entry> {
        self.roles.iter().chain(&self.users).cloned().collect()
    }

    pub(super) fn accounts(&self) -> &[Account] {
        &self.accounts
    }
}

/// A mapping as it is written in a list. The names are in lower case for [`AnyCase`].
#[derive(Debug, Default, Deserialize)]
struct WrittenEntry {
    rolearn: Option<String>,
    userarn: Option<String>,
    username: Option<String>,
    groups: Option<Vec<String>>,
    #[serde(default, deserialize_with = "written_id")]
    userid: Option<String>,
    #[serde(flatten)]
    unknown: BTreeMap<String, IgnoredAny>,
}

/// An id that is written without a value is an empty one, which is refused: a mapping with it was not meant
/// for everybody of the name.
fn written_id<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    Option::<String>::deserialize(deserializer).map(|id| Some(id.unwrap_or_default()))
}

/// A file with all three lists.
#[derive(Debug, Default, Deserialize)]
struct Lists {
    #[serde(default)]
    maproles: Option<Vec<WrittenEntry>>,
    #[serde(default)]
    mapusers: Option<Vec<WrittenEntry>>,
    #[serde(default)]
    mapaccounts: Option<Vec<String>>,
}

#[derive(Debug, Default, Deserialize)]
struct Roles {
    #[serde(default)]
    maproles: Option<Vec<WrittenEntry>>,
}

#[derive(Debug, Default, Deserialize)]
struct Users {
    #[serde(default)]
    mapusers: Option<Vec<WrittenEntry>>,
}

#[derive(Debug, Default, Deserialize)]
struct Accounts {
    #[serde(default)]
    mapaccounts: Option<Vec<String>>,
}

#[derive(Debug, Default, Deserialize)]
struct ConfigFile<T> {
    server: Option<T>,
}

/// Reads all lists of a file: at once if nothing is wrong with it, else each by itself, so that a wrong list
/// keeps no other from being read. The text of a list alone ([`Form::Yaml`]) is not such a file.
pub(super) fn parse_all(form: Form, text: &str) -> [(Section, Result<List, SectionError>); 3] {
    let Ok(Lists { maproles, mapusers, mapaccounts }) = whole::<Lists>(form, text) else {
        return Section::ALL.map(|section| (section, parse(form, section, text)));
    };
    [
        (Section::Roles, Ok(List::Entries(entries(Section::Roles, maproles)))),
        (Section::Users, Ok(List::Entries(entries(Section::Users, mapusers)))),
        (Section::Accounts, Ok(List::Accounts(accounts(mapaccounts)))),
    ]
}

/// Reads one list of `text`, which may hold more than it. A list that is not there is empty.
///
/// # Errors
/// The text as a whole, or this list, is not of the form.
pub(super) fn parse(form: Form, section: Section, text: &str) -> Result<List, SectionError> {
    Ok(match (section, form) {
        (Section::Accounts, Form::Yaml) => List::Accounts(accounts(yaml(text)?)),
        (Section::Accounts, _) => List::Accounts(accounts(whole::<Accounts>(form, text)?.mapaccounts)),
        (Section::Roles | Section::Users, Form::Yaml) => List::Entries(entries(section, yaml(text)?)),
        (Section::Roles, _) => List::Entries(entries(section, whole::<Roles>(form, text)?.maproles)),
        (Section::Users, _) => List::Entries(entries(section, whole::<Users>(form, text)?.mapusers)),
    })
}

fn whole<T: DeserializeOwned + Default>(form: Form, text: &str) -> Result<T, SectionError> {
    match form {
        Form::ConfigFile | Form::Yaml => Ok(yaml::<ConfigFile<T>>(text)?.server.unwrap_or_default()),
        Form::Json => serde_json::from_str::<AnyCase<T>>(text).map(|read| read.0).map_err(SectionError::Json),
    }
}

fn yaml<T: DeserializeOwned>(text: &str) -> Result<T, SectionError> {
    // The lines around an error would make a log line of many lines.
    let options = serde_saphyr::options! { with_snippet: false };
    let read = serde_saphyr::from_str_with_options::<AnyCase<T>>(text, options);
    read.map(|read| read.0).map_err(SectionError::Yaml)
}

fn accounts(written: Option<Vec<String>>) -> Vec<Account> {
    let numbered = written.into_iter().flatten().enumerate();
    numbered.map(|(n, id)| Account { label: label(Section::Accounts, n), id }).collect()
}

fn entries(section: Section, written: Option<Vec<WrittenEntry>>) -> Vec<Entry> {
    let numbered = written.into_iter().flatten().enumerate();
    numbered.map(|(n, written)| entry(label(section, n), written)).collect()
}

fn label(section: Section, n: usize) -> Box<str> {
    format!("{}[{n}]", section.key()).into()
}

fn entry(label: Box<str>, written: WrittenEntry) -> Entry {
    let WrittenEntry { rolearn, userarn, username, groups, userid, unknown } = written;
    let fault = match (&rolearn, &userarn, unknown.keys().next()) {
        (_, _, Some(key)) => Some(format!(
            "it has the unknown key {key:?}: known are rolearn, userarn, username, groups and userid"
        )),
        (Some(_), Some(_), None) => Some("it has both rolearn and userarn".to_owned()),
        (None, None, None) => Some("it has neither rolearn nor userarn".to_owned()),
        _ => None,
    };
    Entry {
        label,
        arn: rolearn.or(userarn).unwrap_or_default(),
        username: username.unwrap_or_default(),
        groups: groups.unwrap_or_default(),
        user_id: userid,
        fault: fault.map(Into::into),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entries_of(form: Form, section: Section, text: &str) -> Vec<Entry> {
        match parse(form, section, text) {
            Ok(List::Entries(entries)) => entries,
            other => panic!("{other:?}"),
        }
    }

    fn accounts_of(form: Form, text: &str) -> Vec<String> {
        match parse(form, Section::Accounts, text) {
            Ok(List::Accounts(accounts)) => accounts.into_iter().map(|account| account.id).collect(),
            other => panic!("{other:?}"),
        }
    }

    fn alice(label: &str) -> Entry {
        Entry {
            label: label.into(),
            arn: "acs:ram::000000000000:user/Alice".into(),
            username: "alice".into(),
            groups: vec!["system:masters".into()],
            user_id: None,
            fault: None,
        }
    }

    const CONFIG: &str = "clusterID: c\n\
                          server:\n  port: 21362\n  mapRoles:\n  - roleARN: acs:ram::000000000000:role/Admin\n    \
                          username: kubernetes-admin\n  mapUsers:\n  - userARN: acs:ram::000000000000:user/Alice\n    \
                          username: alice\n    groups:\n    - system:masters\n  mapAccounts:\n  - 000123456789\n";

    #[test]
    fn reads_each_list_of_a_configuration_file() {
        let roles = entries_of(Form::ConfigFile, Section::Roles, CONFIG);

        assert_eq!((&*roles[0].username, &*roles[0].label), ("kubernetes-admin", "mapRoles[0]"));
        assert!(roles[0].groups.is_empty());
        assert_eq!(entries_of(Form::ConfigFile, Section::Users, CONFIG), [alice("mapUsers[0]")]);
        assert_eq!(accounts_of(Form::ConfigFile, CONFIG), ["000123456789"], "zeros are kept");
    }

    #[test]
    fn reads_a_list_of_the_config_map_with_keys_in_any_case() {
        let text = "- uSeRaRn: acs:ram::000000000000:user/Alice\n  UsErNaMe: alice\n  gRoUpS:\n    - system:masters\n";

        assert_eq!(entries_of(Form::Yaml, Section::Users, text), [alice("mapUsers[0]")]);
        assert_eq!(accounts_of(Form::Yaml, "- \"555555555555\"\n- 1234567890123456\n").len(), 2);
        for empty in ["", "\n", "[]", "~"] {
            assert!(entries_of(Form::Yaml, Section::Roles, empty).is_empty(), "{empty:?}");
            assert!(accounts_of(Form::Yaml, empty).is_empty(), "{empty:?}");
        }
    }

    #[test]
    fn reads_the_lists_of_a_json_file_with_ids() {
        let text = r#"{"mapUsers": [{"userarn": "acs:ram::000000000000:user/Alice", "username": "alice",
            "groups": ["system:masters"], "userid": "2"}], "mapAccounts": ["123"], "other": {}}"#;

        let expected = Entry { user_id: Some("2".into()), ..alice("mapUsers[0]") };
        assert_eq!(entries_of(Form::Json, Section::Users, text), [expected]);
        assert!(entries_of(Form::Json, Section::Roles, text).is_empty());
        assert_eq!(accounts_of(Form::Json, text), ["123"]);
    }

    #[test]
    fn an_id_without_a_value_is_no_absent_id() {
        let ids = |form, text| -> Vec<Option<String>> {
            entries_of(form, Section::Users, text).into_iter().map(|entry| entry.user_id).collect()
        };

        let yaml = "- userarn: a\n- userarn: a\n  userid:\n- userarn: a\n  userID: ''\n- userarn: a\n  userid: 012\n";
        let empty = Some(String::new());
        assert_eq!(ids(Form::Yaml, yaml), [None, empty.clone(), empty.clone(), Some("012".into())]);
        let json = r#"{"mapUsers": [{"userarn": "a", "userid": null}, {"userarn": "a"}]}"#;
        assert_eq!(ids(Form::Json, json), [empty, None]);
    }

    #[test]
    fn a_file_that_is_read_at_once_is_read_as_its_lists_are() {
        let json =
            r#"{"MapUsers": [{"userarn": "a", "username": "x"}], "mapAccounts": ["012"], "other": {}}"#;
        let wrong = "server:\n  mapRoles: nonsense\n  mapUsers: [{userarn: a}]\n  mapAccounts: [012]\n";
        let twice = "server:\n  mapUsers: []\n  mapusers: []\n  mapAccounts: [1]\n";
        let files = [(Form::ConfigFile, CONFIG), (Form::Json, json), (Form::ConfigFile, "")];
        let files = files.into_iter().chain([wrong, twice].map(|text| (Form::ConfigFile, text)));

        for (form, text) in files {
            for (section, list) in parse_all(form, text) {
                assert_eq!(list.ok(), parse(form, section, text).ok(), "{section:?} of {text}");
            }
        }
        let read = parse_all(Form::ConfigFile, wrong).map(|(_, list)| list.is_ok());
        assert_eq!(read, [false, true, true], "one wrong list keeps no other from being read");
    }

    #[test]
    fn one_wrong_list_keeps_no_other_from_being_read() {
        let text = "server:\n  mapRoles: nonsense\n  mapUsers: []\n";

        assert!(parse(Form::ConfigFile, Section::Roles, text).is_err());
        assert!(entries_of(Form::ConfigFile, Section::Users, text).is_empty());
        for section in Section::ALL {
            assert!(parse(Form::ConfigFile, section, "server: [").is_err(), "{section:?}");
            assert!(parse(Form::Json, section, "{").is_err(), "{section:?}");
            assert!(parse(Form::Yaml, section, "a: b: c").is_err(), "{section:?}");
        }
    }

    #[test]
    fn one_wrong_entry_keeps_no_other_from_being_read() {
        let text = "- userarn: a\n  username: x\n  group: [g]\n- username: y\n- userarn: a\n  rolearn: b\n- rolearn: b\n";

        let faults: Vec<bool> =
            entries_of(Form::Yaml, Section::Roles, text).iter().map(|entry| entry.fault.is_some()).collect();

        assert_eq!(faults, [true, true, true, false]);
    }

    #[test]
    fn a_list_that_cannot_be_read_stays_as_it_was_and_the_others_change() {
        let mut sections = Sections::default();
        let read = |section, text| parse(Form::Yaml, section, text).map_err(|error| error.to_string());
        let users =
            "- userarn: acs:ram::000000000000:user/Alice\n  username: alice\n  groups: [system:masters]\n";
        sections.take(Section::Users, read(Section::Users, users));
        sections.take(Section::Accounts, read(Section::Accounts, "- 1\n"));

        sections.take(Section::Users, read(Section::Users, "x: ["));
        sections.take(Section::Accounts, read(Section::Accounts, ""));

        assert_eq!(sections.entries(), [alice("mapUsers[0]")]);
        assert!(sections.accounts().is_empty());
        assert_eq!(sections.broken().keys().collect::<Vec<_>>(), [&Section::Users]);
        sections.take(Section::Users, read(Section::Users, ""));
        assert!(sections.broken().is_empty() && sections.entries().is_empty());
    }

    proptest! {
        #[test]
        fn never_panics(text in any::<String>(), lines in "([a-z:\\[\\]{}&*!| -]{0,12}\n){0,8}") {
            for form in [Form::ConfigFile, Form::Json, Form::Yaml] {
                for section in Section::ALL {
                    drop(parse(form, section, &text));
                    drop(parse(form, section, &lines));
                }
            }
            for form in [Form::ConfigFile, Form::Json] {
                for (section, list) in parse_all(form, &lines) {
                    prop_assert_eq!(list.ok(), parse(form, section, &lines).ok());
                }
            }
        }
    }
}
