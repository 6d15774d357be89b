//! What `kubectl describe` shows of mappings that map nobody: Events on their objects. A list of the
//! ConfigMap has no status, so an Event is all that its author sees. Depends on k8s_openapi; called by the
//! parent and by `follow`. `kube2ram_service` posts them.

use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1::Event},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube2ram_service::{kubernetes, telemetry::chain};

use super::{config_map, crd};
use crate::mapping::{Report, State};

/// What is said about an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Notice {
    pub(super) about: About,
    pub(super) said: Said,
}

/// The object.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum About {
    /// The ConfigMap of this UID.
    ConfigMap(Box<str>),
    /// A RAMIdentityMapping: its name and its UID.
    Mapping(Box<str>, Box<str>),
}

/// The text, for any object.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Said {
    /// The label of the entry, or the name of the list.
    pub(super) label: Box<str>,
    reason: &'static str,
    message: String,
}

impl Said {
    /// About an entry that maps nobody; `None` of one that maps somebody.
    pub(super) fn of(report: &Report) -> Option<Self> {
        let (reason, message) = match &report.state {
            State::Conflict(other) => {
                let message = format!(
                    "{other} maps some of the same identities to another user: they are mapped to nobody"
                );
                ("MappingConflict", message)
            }
            State::Refused(error) => ("MappingRefused", chain(error)),
            State::Mapped { .. } => return None,
        };
        Some(Self { label: report.label.clone(), reason, message })
    }

    /// About a list that cannot be read.
    pub(super) fn of_list(list: &str, error: &str) -> Self {
        let message = format!("it cannot be read, and what was last read of it is used: {error}");
        Self { label: list.into(), reason: "MappingsUnreadable", message }
    }
}

impl kubernetes::Notice for Notice {
    type About = About;

    fn about(&self) -> &About {
        &self.about
    }
}

impl Notice {
    /// The Event, posted by the server of this name.
    pub(super) fn event(&self, instance: &str) -> Event {
        let Said { label, reason, message } = &self.said;
        let (api_version, kind, namespace, name, uid, note) = match &self.about {
            About::ConfigMap(uid) => (
                "v1".to_owned(),
                "ConfigMap".to_owned(),
                Some(config_map::NAMESPACE.to_owned()),
                config_map::NAME,
                uid,
                format!("{label}: {message}"),
            ),
            About::Mapping(name, uid) => {
                let resource = crd::resource();
                (resource.api_version, resource.kind, None, &**name, uid, message.clone())
            }
        };
        Event {
            // Of an object without a namespace it must be `default`, which is what is meant by none here.
            metadata: ObjectMeta { namespace: namespace.clone(), ..ObjectMeta::default() },
            regarding: Some(ObjectReference {
                api_version: Some(api_version),
                kind: Some(kind),
                namespace,
                name: Some(name.to_owned()),
                uid: Some(uid.to_string()),
                ..ObjectReference::default()
            }),
            type_: Some("Warning".to_owned()),
            reason: Some((*reason).to_owned()),
            action: Some("ReadMappings".to_owned()),
            note: Some(note),
            reporting_controller: Some(super::EVENT_SOURCE.to_owned()),
            reporting_instance: Some(instance.to_owned()),
            ..Event::default()
        }
    }
}
