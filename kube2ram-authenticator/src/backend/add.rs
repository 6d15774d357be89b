//! `add user` and `add role`: one more mapping in the ConfigMap `kube-system/alibabacloud-auth`. The entry is
//! appended to the text of its list, whose comments stay. Depends on `sections` and kube; called by `main`.

use std::time::Duration;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
    core::ObjectMeta,
};
use kube2ram_service::kubernetes::{ClientConfig, ClientError, client_config};
use serde_json::json;
use tokio::time::{error::Elapsed, timeout};

use super::{
    config_map::{NAME, NAMESPACE},
    sections::{Form, List, Section, SectionError, parse},
};
use crate::mapping::{Entry, EntryError, Index, Pattern, Restrictions, State};

/// What is to be added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addition {
    /// Whether it is a role's mapping, else a user's.
    pub is_role: bool,
    /// The ARN.
    pub arn: String,
    /// The username, with or without placeholders.
    pub username: String,
    /// The groups, with or without placeholders.
    pub groups: Vec<String>,
    /// The only id that is mapped, if it matters.
    pub user_id: Option<String>,
}

/// Why nothing is added.
#[derive(Debug, thiserror::Error)]
pub enum AddError {
    /// The API server cannot be asked.
    #[error("cannot use the API server")]
    Client(#[source] ClientError),
    /// The ARN is mapped already.
    #[error("{0} has this ARN already: change it there, by kubectl edit")]
    Duplicate(Box<str>),
    /// The API server takes too long.
    #[error("the API server does not answer")]
    Late(#[source] Elapsed),
    /// The mapping would map nobody.
    #[error("such a mapping would be refused")]
    Refused(#[source] EntryError),
    /// The API server refuses to read or to write the ConfigMap.
    #[error("cannot {what} the ConfigMap {NAMESPACE}/{NAME}")]
    Request {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: kube::Error,
    },
    /// The list is not one to which lines can be appended.
    #[error("the list {0} is not written as a block of lines: add the mapping by kubectl edit")]
    Style(&'static str),
    /// The list cannot be read.
    #[error("the list {list} cannot be read: correct it by kubectl edit first")]
    Unreadable {
        /// Which.
        list: &'static str,
        /// Why not.
        #[source]
        source: SectionFault,
    },
}

/// Why a list cannot be read.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct SectionFault(Box<SectionError>);

/// A ConfigMap as it would be.
#[derive(Debug)]
pub struct Edit {
    api: Api<ConfigMap>,
    /// The version that was read; `None` if there is no such ConfigMap.
    version: Option<String>,
    key: &'static str,
    appended: Appended,
}

/// A list with one more entry.
#[derive(Debug)]
struct Appended {
    text: String,
    /// Those that are new.
    lines: String,
    /// What its author may not expect.
    warnings: Vec<&'static str>,
}

/// How long one request may take.
const TIMEOUT: Duration = Duration::from_secs(15);

/// Reads the ConfigMap and makes the text of the list with the mapping. Nothing is written.
///
/// # Errors
/// See [`AddError`].
pub async fn prepare(
    config: ClientConfig,
    server: Option<http::Uri>,
    addition: &Addition,
) -> Result<Edit, AddError> {
    let mut config = client_config(config).await.map_err(AddError::Client)?;
    config.cluster_url = server.unwrap_or(config.cluster_url);
    let client = Client::try_from(config).map_err(ClientError::Client).map_err(AddError::Client)?;
    let api: Api<ConfigMap> = Api::namespaced(client, NAMESPACE);
    let found = timeout(TIMEOUT, api.get_opt(NAME)).await.map_err(AddError::Late)?;
    let found = found.map_err(|source| AddError::Request { what: "read", source })?;
    let version = found.as_ref().and_then(|object| object.metadata.resource_version.clone());
    let data = found.and_then(|object| object.data).unwrap_or_default();
    let text = |section: Section| data.get(section.key()).map_or("", String::as_str);
    let section = section_of(addition);
    // Users may stand among roles, too.
    for other in [Section::Roles, Section::Users].into_iter().filter(|other| *other != section) {
        ensure_new(&read(other, text(other))?, &addition.arn)?;
    }
    let appended = appended(text(section), addition)?;
    Ok(Edit { api, version, key: section.key(), appended })
}

impl Edit {
    /// What is added, and where.
    pub fn lines(&self) -> String {
        format!("{} of {NAMESPACE}/{NAME}:\n{}", self.key, self.appended.lines)
    }

    /// What the author may not expect of it.
    pub fn warnings(&self) -> &[&'static str] {
        &self.appended.warnings
    }

    /// Writes it, unless somebody has changed the ConfigMap since it was read.
    ///
    /// # Errors
    /// [`AddError::Request`] and [`AddError::Late`].
    pub async fn write(self) -> Result<(), AddError> {
        let Self { api, version, key, appended: Appended { text, .. } } = self;
        let failed = |source| AddError::Request { what: "write", source };
        let Some(version) = version else {
            let metadata = ObjectMeta { name: Some(NAME.into()), ..ObjectMeta::default() };
            let data = Some([(key.to_owned(), text)].into());
            let object = ConfigMap { metadata, data, ..ConfigMap::default() };
            let params = PostParams::default();
            return timeout(TIMEOUT, api.create(&params, &object))
                .await
                .map_err(AddError::Late)?
                .map(drop)
                .map_err(failed);
        };
        // The API server refuses another version than the one that was read.
        let patch = json!({ "metadata": { "resourceVersion": version }, "data": { key: text } });
        let (params, patch) = (PatchParams::default(), Patch::Merge(&patch));
        let written = timeout(TIMEOUT, api.patch(NAME, &params, &patch)).await.map_err(AddError::Late)?;
        written.map(drop).map_err(failed)
    }
}

fn section_of(addition: &Addition) -> Section {
    if addition.is_role { Section::Roles } else { Section::Users }
}

fn appended(text: &str, addition: &Addition) -> Result<Appended, AddError> {
    let section = section_of(addition);
    let mut entries = read(section, text)?;
    ensure_new(&entries, &addition.arn)?;
    let Addition { is_role: _, arn, username, groups, user_id } = addition.clone();
    let label = format!("{}[{}]", section.key(), entries.len()).into();
    let entry = Entry { label, arn, username, groups, user_id, fault: None };
    let (_, reports) = Index::new(std::slice::from_ref(&entry), &[], Restrictions::default().into());
    let warnings = match reports.into_iter().next().map(|report| report.state) {
        Some(State::Refused(error)) => return Err(AddError::Refused(error)),
        Some(State::Mapped { warnings }) => warnings,
        // With itself alone it is in no conflict.
        Some(State::Conflict(_)) | None => Vec::new(),
    };
    // Only where nothing but an empty list is written, nothing is lost by writing it anew.
    let is_empty = ["", "[]", "~", "null"].contains(&text.split_whitespace().collect::<String>().as_str());
    entries.push(entry);
    let indent = text.lines().find(|line| line.trim_start().starts_with("- "));
    let indent = indent.map_or(0, |line| line.len() - line.trim_start().len());
    let lines = lines_of(addition, indent);
    let after = [text.trim_end(), "\n", &lines].concat();
    // Another style, such as `[]`, does not take lines.
    let candidates = [after.trim_start_matches('\n'), if is_empty { &lines } else { "" }];
    let is_right = |candidate: &&str| read(section, candidate).is_ok_and(|read| read == entries);
    let found = candidates.into_iter().find(is_right).map(str::to_owned);
    Ok(Appended { text: found.ok_or_else(|| AddError::Style(section.key()))?, lines, warnings })
}

/// The lines of an entry. A JSON string is a YAML one.
fn lines_of(addition: &Addition, indent: usize) -> String {
    let key = if addition.is_role { "rolearn" } else { "userarn" };
    let blank = " ".repeat(indent);
    let mut lines =
        format!("{blank}- {key}: {}\n{blank}  username: {}\n", json!(addition.arn), json!(addition.username));
    if let Some(id) = &addition.user_id {
        lines += &format!("{blank}  userid: {}\n", json!(id));
    }
    if !addition.groups.is_empty() {
        lines += &format!("{blank}  groups:\n");
    }
    for group in &addition.groups {
        lines += &format!("{blank}  - {}\n", json!(group));
    }
    lines
}

fn read(section: Section, text: &str) -> Result<Vec<Entry>, AddError> {
    let list = section.key();
    match parse(Form::Yaml, section, text) {
        Ok(List::Entries(entries)) => Ok(entries),
        Ok(List::Accounts(_)) => Err(AddError::Style(list)),
        Err(source) => Err(AddError::Unreadable { list, source: SectionFault(Box::new(source)) }),
    }
}

fn ensure_new(entries: &[Entry], arn: &str) -> Result<(), AddError> {
    let pattern = Pattern::parse(arn).map_err(|error| AddError::Refused(EntryError::Arn(error)))?;
    let canonical = |entry: &&Entry| Pattern::parse(&entry.arn).is_ok_and(|other| other == pattern);
    match entries.iter().find(canonical) {
        Some(entry) => Err(AddError::Duplicate(entry.label.clone())),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(name: &str, groups: &[&str]) -> Addition {
        Addition {
            is_role: false,
            arn: format!("acs:ram::123456789012:user/{name}"),
            username: name.to_lowercase(),
            groups: groups.iter().map(|group| (*group).to_owned()).collect(),
            user_id: None,
        }
    }

    const LINES: &str =
        "- userarn: \"acs:ram::123456789012:user/Bob\"\n  username: \"bob\"\n  groups:\n  - \"dev\"\n";

    #[test]
    fn an_entry_is_appended_and_what_is_there_stays() {
        let there = "# our users\n- userarn: acs:ram::123456789012:user/Alice # admin\n  username: alice\n";

        let Appended { text, lines, warnings } = appended(there, &user("Bob", &["dev"])).unwrap();

        assert_eq!((text.as_str(), lines.as_str()), (format!("{there}{LINES}").as_str(), LINES));
        assert!(warnings.is_empty());
        let indented = "  - userarn: acs:ram::123456789012:user/alice\n    username: alice";
        let text = appended(indented, &user("Bob", &[])).unwrap().text;
        assert!(
            text.ends_with("alice\n  - userarn: \"acs:ram::123456789012:user/Bob\"\n    username: \"bob\"\n"),
            "{text}"
        );
    }

    #[test]
    fn an_empty_list_gets_its_first_entry() {
        for empty in ["", "\n", "[]", "[]\n", "~"] {
            assert_eq!(appended(empty, &user("Bob", &["dev"])).unwrap().text, LINES, "{empty:?}");
        }
        let text = appended("# nobody yet\n", &user("Bob", &["dev"])).unwrap().text;
        assert_eq!(text, format!("# nobody yet\n{LINES}"));
    }

    #[test]
    fn an_id_is_written_and_what_is_not_expected_is_named() {
        let admin = Addition { user_id: Some("012".to_owned()), ..user("Bob", &["system:masters"]) };

        let Appended { text, warnings, .. } = appended("", &admin).unwrap();

        let [entry] = read(Section::Users, &text).unwrap().try_into().unwrap();
        assert_eq!(entry.user_id, admin.user_id);
        assert!(warnings.iter().any(|warning| warning.contains("system:masters")), "{warnings:?}");
        let none = Addition { user_id: Some(String::new()), ..user("Bob", &[]) };
        assert!(matches!(appended("", &none), Err(AddError::Refused(EntryError::UserIdForm(_)))));
    }

    #[test]
    fn a_name_cannot_add_more_than_itself() {
        let odd = Addition { username: "a\", \"x\": [*: #'".to_owned(), ..user("Bob", &["- b: {", "c # d"]) };

        let text = appended("", &odd).unwrap().text;

        let [entry] = read(Section::Users, &text).unwrap().try_into().unwrap();
        assert_eq!((entry.username, entry.groups), (odd.username, odd.groups));
    }

    #[test]
    fn what_is_there_twice_or_would_map_nobody_is_refused() {
        let there = "- userarn: acs:ram::123456789012:user/alice\n  username: x\n";
        assert!(
            matches!(appended(there, &user("Alice", &[])), Err(AddError::Duplicate(label)) if &*label == "mapUsers[0]")
        );
        let system = Addition { username: "system:admin".to_owned(), ..user("Bob", &[]) };
        assert!(matches!(appended("", &system), Err(AddError::Refused(EntryError::UsernameReserved { .. }))));
        let arn = Addition { arn: "acs:ram::*:user/x".to_owned(), ..user("Bob", &[]) };
        assert!(matches!(appended("", &arn), Err(AddError::Refused(EntryError::Arn(_)))));
        let role = Addition { is_role: true, ..user("Bob", &["team-{{SessionName}}"]) };
        assert!(matches!(appended("", &role), Err(AddError::Refused(_))));
        assert!(appended(there, &user("Bob", &[])).is_ok(), "the allowed twin");
    }

    #[test]
    fn a_list_in_another_style_or_one_that_cannot_be_read_is_left_alone() {
        let flow = "[{userarn: 'acs:ram::123456789012:user/alice', username: alice}]";
        assert!(matches!(appended(flow, &user("Bob", &[])), Err(AddError::Style("mapUsers"))));
        for commented in ["# managed by X\n[]", "[] # managed by X"] {
            assert!(matches!(appended(commented, &user("Bob", &[])), Err(AddError::Style("mapUsers"))));
        }
        assert!(matches!(
            appended("x: [", &user("Bob", &[])),
            Err(AddError::Unreadable { list: "mapUsers", .. })
        ));
    }
}
