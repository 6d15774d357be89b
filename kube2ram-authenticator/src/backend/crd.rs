//! Mappings as objects of the kind RAMIdentityMapping, kept by a watch. Their spec decides; their status is
//! only a report. Pure but for its types and `schema`; the parent runs the watch and writes what
//! [`Objects::patch`] gives.

pub(super) mod schema;
mod status;

use std::collections::{BTreeMap, HashMap};

use jiff::Timestamp;
use kube::{
    core::{ApiResource, DynamicObject, GroupVersionKind},
    runtime::watcher::Event,
};
use kube2ram_service::kubernetes::Store;
use serde_json::Value;

use self::status::Observed;
use crate::mapping::{Entry, Report};

/// How much text of one object is kept.
const LIMIT_BYTES: usize = 16 * 1024;
/// How much is shown of the name of an unknown field.
const KEY_MAX_BYTES: usize = 64;

/// The resource of ack-ram-authenticator.
pub(super) fn resource() -> ApiResource {
    let kind = GroupVersionKind::gvk("ramauthenticator.k8s.alibabacloud", "v1alpha1", "RAMIdentityMapping");
    ApiResource::from_gvk_with_plural(&kind, "ramidentitymappings")
}

/// The objects as the watch has shown them.
#[derive(Debug, Default)]
pub(super) struct Objects {
    store: Store<Box<str>, Object>,
    /// What became of each of them in the newest index.
    reports: HashMap<Box<str>, Report>,
}

/// What is kept of an object.
#[derive(Debug)]
struct Object {
    /// For Events.
    uid: Option<Box<str>>,
    entry: Entry,
    generation: i64,
    observed: Observed,
}

impl Objects {
    /// Takes an event of the watch. Returns whether the mappings are to be used from now on.
    pub(super) fn take(&mut self, event: Event<DynamicObject>) -> bool {
        match event {
            Event::Init => {
                self.store.start_list();
                false
            }
            Event::InitApply(object) => {
                if let Some((name, object)) = Object::of(object) {
                    self.store.list(name, object);
                }
                false
            }
            Event::InitDone => {
                drop(self.store.finish_list());
                true
            }
            Event::Apply(object) => {
                let Some((name, object)) = Object::of(object) else { return false };
                // A status that somebody has written changes no mapping, and is not fought over.
                let is_news =
                    |known: &Object| known.entry != object.entry || known.generation != object.generation;
                let is_news = self.store.known().get(&name).is_none_or(is_news);
                drop(self.store.insert(name, object));
                is_news && self.store.is_listed()
            }
            Event::Delete(object) => {
                let Some(name) = object.metadata.name else { return false };
                drop(self.store.remove(&name.into()));
                self.store.is_listed()
            }
        }
    }

    /// Whether a list was complete.
    pub(super) fn is_listed(&self) -> bool {
        self.store.is_listed()
    }

    /// All mappings, by the objects' names.
    pub(super) fn entries(&self) -> Vec<Entry> {
        let by_name: BTreeMap<_, _> = self.store.known().iter().collect();
        by_name.into_values().map(|object| object.entry.clone()).collect()
    }

    /// Takes what became of the entries. Returns the names of the objects whose status does not say so yet.
    pub(super) fn report(&mut self, reports: Vec<Report>) -> Vec<Box<str>> {
        self.reports = reports.into_iter().map(|report| (report.label.clone(), report)).collect();
        let mut names: Vec<_> = self
            .store
            .known()
            .keys()
            .filter(|name| self.patch(name, Timestamp::UNIX_EPOCH).is_some())
            .cloned()
            .collect();
        names.sort_unstable();
        names
    }

    /// The UID of an object, if it exists.
    pub(super) fn uid(&self, name: &str) -> Option<Box<str>> {
        self.store.known().get(name)?.uid.clone()
    }

    /// The merge patch that makes an object's status say what became of it; `None` if it says so, or the
    /// object no longer exists.
    pub(super) fn patch(&self, name: &str, now: Timestamp) -> Option<Value> {
        let object = self.store.known().get(name)?;
        status::patch(self.reports.get(name)?, object.generation, &object.observed, now)
    }
}

impl Object {
    /// An object without a name is none.
    fn of(object: DynamicObject) -> Option<(Box<str>, Self)> {
        let name: Box<str> = object.metadata.name?.into();
        let generation = object.metadata.generation.unwrap_or_default();
        let observed = Observed::of(object.data.get("status").unwrap_or(&Value::Null));
        let spec = object.data.get("spec").unwrap_or(&Value::Null);
        let mut entry = entry(&name, spec);
        let uid = object.metadata.uid.map(Into::into);
        let applied = object.metadata.annotations.and_then(|mut all| all.remove(LAST_APPLIED));
        if entry.fault.is_none() && entry.user_id.is_none() && applied.is_some_and(|applied| has_id(&applied))
        {
            entry.fault = Some(ID_LOST.into());
        }
        Some((name, Self { uid, entry, generation, observed }))
    }
}

/// What kubectl notes of an object that it applies: the object as its author wrote it.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
const ID_LOST: &str = "it was applied with spec.userID and does not have it: apply the custom resource \
                       definition of kube2ram-authenticator, and then the mapping again, or remove the \
                       annotation kubectl.kubernetes.io/last-applied-configuration";
/// What a spec may have. Anything else is misspelt, and would have no effect.
const FIELDS: [&str; 4] = ["arn", "groups", "userID", "username"];

/// Whether a mapping was written with an id.
fn has_id(applied: &str) -> bool {
    let applied: Option<Value> = serde_json::from_str(applied).ok();
    let spec = applied.as_ref().and_then(|applied| applied["spec"].as_object());
    spec.is_some_and(|spec| spec.keys().any(|key| key.eq_ignore_ascii_case("userID")))
}

/// The entry of a spec, of which nothing is believed: somebody may have changed the schema.
fn entry(name: &str, spec: &Value) -> Entry {
    let unknown = spec.as_object().and_then(|spec| spec.keys().find(|key| !FIELDS.contains(&key.as_str())));
    let mut fault = unknown.map(|key| {
        let key = &key[..key.floor_char_boundary(KEY_MAX_BYTES)];
        format!("spec.{key} is unknown: known are arn, groups, userID and username")
    });
    let mut text = |field: &str| match &spec[field] {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        _ => {
            fault = Some(format!("spec.{field} is not a string"));
            None
        }
    };
    let (arn, username, user_id) = (text("arn"), text("username"), text("userID"));
    // An id that is written and empty is no id, and not the absence of one.
    let user_id = user_id.or_else(|| spec.get("userID").map(|_| String::new()));
    let groups: Option<Vec<String>> = match &spec["groups"] {
        Value::Null => Some(Vec::new()),
        Value::Array(groups) => groups.iter().map(|group| group.as_str().map(str::to_owned)).collect(),
        _ => None,
    };
    if groups.is_none() {
        fault = Some("spec.groups is not a list of strings".to_owned());
    }
    let groups = groups.unwrap_or_default();
    let texts = [&arn, &username, &user_id].into_iter().flatten().chain(&groups);
    if texts.map(String::len).sum::<usize>() > LIMIT_BYTES {
        let fault = Some("it has more than 16 KiB of text".into());
        return Entry { label: name.into(), fault, ..Entry::default() };
    }
    Entry {
        label: name.into(),
        arn: arn.unwrap_or_default(),
        username: username.unwrap_or_default(),
        groups,
        user_id,
        fault: fault.map(Into::into),
    }
}

#[cfg(test)]
mod tests;
