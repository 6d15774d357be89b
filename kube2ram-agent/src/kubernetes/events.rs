//! What the agent's Events look like. They are posted by `kube2ram_service::kubernetes::Events`. Depends on
//! kube; called by `kubernetes::cluster`.

use std::sync::Arc;

use k8s_openapi::{
    api::{core::v1::ObjectReference, events::v1::Event},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::Client;

use super::{About, Metrics, Notice, token_request::TOKENS_UNAVAILABLE};
use kube2ram_service::{clock::Clock, kubernetes};

pub(super) struct Events {
    events: kubernetes::Events<Notice>,
    node: Box<str>,
}

impl kubernetes::Notice for Notice {
    type About = About;

    fn about(&self) -> &About {
        &self.about
    }
}

impl Events {
    pub(super) fn new(node: Box<str>, clock: Arc<dyn Clock>, metrics: Metrics) -> Self {
        let events = kubernetes::Events::new("kube2ram", clock, move |result| metrics.event(result));
        Self { events, node }
    }

    pub(super) fn warn(&self, notice: Notice) {
        self.events.warn(notice);
    }

    /// Posts what is queued, and the counts of what was repeated, for ever.
    pub(super) async fn post_all(&self, client: &Client) {
        self.events.post_all(client, |notice| self.event(notice)).await;
    }

    fn event(&self, notice: &Notice) -> Event {
        let (kind, name, uid) = match &notice.about {
            About::Namespace(name) => ("Namespace", name.clone(), None),
            // As the kubelet does, and `kubectl describe node` expects: the UID is the name.
            About::Node => ("Node", self.node.clone(), Some(self.node.to_string())),
            About::Pod(_, name, uid) => ("Pod", name.clone(), Some(uid.to_string())),
        };
        let namespace = namespace_of(&notice.about);
        let (of_object, action) = match notice.about {
            About::Node if notice.reason == TOKENS_UNAVAILABLE => (None, "RequestToken"),
            About::Node => (None, "RepairDatapath"),
            About::Namespace(_) | About::Pod(..) => (Some(namespace.to_owned()), "IssueCredentials"),
        };
        Event {
            metadata: ObjectMeta { namespace: Some(namespace.to_owned()), ..Default::default() },
            regarding: Some(ObjectReference {
                api_version: Some("v1".into()),
                kind: Some(kind.into()),
                namespace: of_object,
                name: Some(name.into()),
                uid,
                ..Default::default()
            }),
            type_: Some("Warning".into()),
            reason: Some(notice.reason.into()),
            action: Some(action.into()),
            note: Some(notice.message.clone()),
            reporting_controller: Some("kube2ram".into()),
            reporting_instance: Some(self.node.to_string()),
            ..Default::default()
        }
    }
}

/// An Event's namespace must be its object's; for an object without a namespace it must be `default`.
fn namespace_of(about: &About) -> &str {
    match about {
        About::Namespace(name) => name,
        About::Node => "default",
        About::Pod(namespace, ..) => namespace,
    }
}
