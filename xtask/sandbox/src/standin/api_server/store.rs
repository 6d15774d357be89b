//! The cluster's objects, their history since the last compaction, and what a selector sees of them.
//! Pure state behind a lock. Called by the API server stand-in and its watches.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Mutex,
    time::Duration,
};

use anyhow::{Context as _, Result};
use http::StatusCode;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::locked;

/// What the stand-in stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Namespace,
    Node,
    Pod,
    ServiceAccount,
}

impl Kind {
    fn parse(name: &str) -> Option<Self> {
        [Self::Namespace, Self::Node, Self::Pod, Self::ServiceAccount]
            .into_iter()
            .find(|kind| kind.name() == name)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Node => "Node",
            Self::Pod => "Pod",
            Self::ServiceAccount => "ServiceAccount",
        }
    }

    /// Those of a collection that the agent may list. It has the right to read single ServiceAccounts only.
    pub(super) fn from_plural(plural: &str) -> Option<Self> {
        match plural {
            "namespaces" => Some(Self::Namespace),
            "nodes" => Some(Self::Node),
            "pods" => Some(Self::Pod),
            _ => None,
        }
    }
}

/// Which objects a request is about, and in which form it wants them.
#[derive(Clone, Debug)]
pub(super) struct Selector {
    fields: Vec<(&'static str, String)>,
    kind: Kind,
    metadata_only: bool,
}

impl Selector {
    /// `None` when the field selector names a field that the real API server cannot select by.
    pub(super) fn parse(
        kind: Kind,
        namespace: &str,
        field_selector: &str,
        metadata_only: bool,
    ) -> Option<Self> {
        let mut fields = Vec::new();
        if !namespace.is_empty() {
            fields.push(("/metadata/namespace", namespace.to_owned()));
        }
        for term in field_selector.split(',').filter(|term| !term.is_empty()) {
            let (name, value) = term.split_once('=')?;
            let pointer = match (name, kind) {
                ("metadata.name", _) => "/metadata/name",
                ("metadata.namespace", Kind::Pod | Kind::ServiceAccount) => "/metadata/namespace",
                ("spec.nodeName", Kind::Pod) => "/spec/nodeName",
                _ => return None,
            };
            fields.push((pointer, value.trim_start_matches('=').to_owned()));
        }

        Some(Self { fields, kind, metadata_only })
    }

    fn matches(&self, kind: Kind, object: &Value) -> bool {
        kind == self.kind
            && self.fields.iter().all(|(pointer, value)| {
                object.pointer(pointer).and_then(Value::as_str).unwrap_or_default() == value
            })
    }

    pub(super) fn view(&self, object: &Value) -> Value {
        if !self.metadata_only {
            return object.clone();
        }
        json!({ "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": object["metadata"] })
    }

    pub(super) fn bookmark(&self, version: u64, annotations: &Value) -> Value {
        let metadata = json!({ "resourceVersion": version.to_string(), "annotations": annotations });
        self.view(&json!({ "kind": self.kind.name(), "apiVersion": "v1", "metadata": metadata }))
    }
}

#[derive(Clone, Debug)]
struct Change {
    kind: Kind,
    object: Value,
    verb: &'static str,
    version: u64,
}

/// The objects and their history.
#[derive(Debug)]
pub(super) struct Store {
    bookmark_interval: Mutex<Duration>,
    cluster: Mutex<Cluster>,
    changed: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Cluster {
    /// Watches do not see past this while they are held.
    held_at: Option<u64>,
    history: VecDeque<Change>,
    objects: BTreeMap<(Kind, String, String), Value>,
    /// Watches from before this version are told 410.
    oldest: u64,
    version: u64,
}

impl Default for Store {
    fn default() -> Self {
        // A cluster is never at version 0, which has its own meaning.
        let cluster = Cluster { version: 100, oldest: 100, ..Cluster::default() };
        let bookmark_interval = Mutex::new(BOOKMARK_INTERVAL);
        Self { bookmark_interval, cluster: Mutex::new(cluster), changed: watch::channel(()).0 }
    }
}

/// The real server's: staging/src/k8s.io/apiserver/pkg/storage/cacher/cacher.go, `bookmarkFrequency`.
const BOOKMARK_INTERVAL: Duration = Duration::from_secs(60);

/// How much history a watch can catch up with.
const HISTORY_MAX: usize = 10_000;

impl Store {
    pub(super) fn apply(&self, object: Value) -> Result<()> {
        let kind = object["kind"].as_str().and_then(Kind::parse);
        let kind = kind.with_context(|| format!("cannot store an object of kind {}", object["kind"]))?;
        let name = object["metadata"]["name"].as_str().context("the object has no name")?.to_owned();
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
        let mut cluster = locked(&self.cluster);
        let key = (kind, namespace, name);
        let verb = if cluster.objects.contains_key(&key) { "MODIFIED" } else { "ADDED" };
        let object = cluster.record(kind, verb, object);
        cluster.objects.insert(key, object);
        drop(cluster);
        self.changed.send_replace(());
        Ok(())
    }

    /// An object; its namespace is empty if it is in none.
    pub(super) fn get(&self, kind: Kind, namespace: &str, name: &str) -> Option<Value> {
        locked(&self.cluster).objects.get(&(kind, namespace.to_owned(), name.to_owned())).cloned()
    }

    /// Merges a patch (RFC 7386) into an object without a namespace, if that is at the version that the patch
    /// names.
    pub(super) fn merge(&self, kind: Kind, name: &str, patch: &Value) -> Result<Value, StatusCode> {
        let mut cluster = locked(&self.cluster);
        let key = (kind, String::new(), name.to_owned());
        let mut object = cluster.objects.get(&key).ok_or(StatusCode::NOT_FOUND)?.clone();
        let version = &patch["metadata"]["resourceVersion"];
        if !version.is_null() && *version != object["metadata"]["resourceVersion"] {
            return Err(StatusCode::CONFLICT);
        }
        merge(&mut object, patch);
        let object = cluster.record(kind, "MODIFIED", object);
        cluster.objects.insert(key, object.clone());
        drop(cluster);
        self.changed.send_replace(());
        Ok(object)
    }

    pub(super) fn delete(&self, kind: Kind, namespace: &str, name: &str) {
        let mut cluster = locked(&self.cluster);
        if let Some(object) = cluster.objects.remove(&(kind, namespace.to_owned(), name.to_owned())) {
            cluster.record(kind, "DELETED", object);
        }
        drop(cluster);
        self.changed.send_replace(());
    }

    pub(super) fn hold(&self, hold: bool) {
        let mut cluster = locked(&self.cluster);
        cluster.held_at = hold.then_some(cluster.version);
        drop(cluster);
        self.changed.send_replace(());
    }

    pub(super) fn bookmark_every(&self, interval: Duration) {
        *locked(&self.bookmark_interval) = interval;
        self.changed.send_replace(());
    }

    pub(super) fn bookmark_interval(&self) -> Duration {
        *locked(&self.bookmark_interval)
    }

    pub(super) fn expire(&self) {
        let mut cluster = locked(&self.cluster);
        cluster.version += 1;
        cluster.oldest = cluster.version;
        cluster.history.clear();
        drop(cluster);
        self.changed.send_replace(());
    }

    /// The selected objects and the version they are at.
    pub(super) fn list(&self, selector: &Selector) -> (Vec<Value>, u64) {
        let cluster = locked(&self.cluster);
        let selected = cluster.objects.iter().filter(|((kind, ..), object)| selector.matches(*kind, object));
        (selected.map(|(_, object)| selector.view(object)).collect(), cluster.version)
    }

    /// What happened to the selected objects after a version: (verb, object)s, and the version to go on from.
    /// `None`: too old.
    pub(super) fn since(
        &self,
        selector: &Selector,
        version: u64,
    ) -> Option<(Vec<(&'static str, Value)>, u64)> {
        let cluster = locked(&self.cluster);
        if version < cluster.oldest {
            return None;
        }
        let until = cluster.held_at.unwrap_or(cluster.version);
        let changes = cluster
            .history
            .iter()
            .filter(|change| change.version > version && change.version <= until)
            .filter(|change| selector.matches(change.kind, &change.object))
            .map(|change| (change.verb, selector.view(&change.object)))
            .collect();
        Some((changes, until.max(version)))
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }
}

/// RFC 7386, section 2.
fn merge(target: &mut Value, patch: &Value) {
    let Some(patch) = patch.as_object() else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (name, value) in patch {
        match target.as_object_mut() {
            Some(target) if value.is_null() => drop(target.remove(name)),
            _ => merge(&mut target[name], value),
        }
    }
}

impl Cluster {
    fn record(&mut self, kind: Kind, verb: &'static str, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.history.push_back(Change { kind, object: object.clone(), verb, version: self.version });
        if self.history.len() > HISTORY_MAX
            && let Some(forgotten) = self.history.pop_front()
        {
            self.oldest = forgotten.version;
        }
        object
    }
}
