//! API objects as they come over the wire, cut down to what is used while they are parsed.
//! Pure; called by `kubernetes::cluster` and `kubernetes::namespaces`.

use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use jiff::Timestamp;
use kube::core::{ApiResource, ObjectMeta, object::Object};
use serde::{Deserialize, de::IgnoredAny};

use crate::{identity::PodUid, pod::Pod};

/// A pod as the API server sends it. Nine tenths of a pod (containers, volumes, conditions) are skipped, not
/// built and dropped.
pub(super) type ApiPod = Object<Lenient<PodSpec>, Lenient<PodStatus>>;

/// A part of an object that may be malformed: one malformed object must not prevent the others of its list
/// from being read.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Lenient<T> {
    Sound(T),
    Unreadable(IgnoredAny),
}

impl<T: Default> Default for Lenient<T> {
    fn default() -> Self {
        Self::Sound(T::default())
    }
}

impl<T: Default> Lenient<T> {
    /// What it is, if it is sound.
    pub(super) fn sound(self) -> Option<T> {
        match self {
            Self::Sound(part) => Some(part),
            Self::Unreadable(_) => None,
        }
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PodSpec {
    service_account_name: Option<Box<str>>,
    pub(super) node_name: Option<Box<str>>,
    #[serde(default)]
    host_network: bool,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct PodStatus {
    pub(super) phase: Option<Box<str>>,
    #[serde(rename = "podIP")]
    pod_ip: Option<Box<str>>,
    #[serde(rename = "containerStatuses", default)]
    container_statuses: Vec<ContainerStatus>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct ContainerStatus {
    #[serde(default)]
    state: ContainerState,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct ContainerState {
    running: Option<IgnoredAny>,
}

/// The content of one pod object.
#[derive(Debug)]
pub(super) enum PodUpdate {
    /// It will never run (again).
    Ended(PodUid),
    /// It may run, or runs, or is about to end.
    Live(Known),
}

/// A pod, the other possible name of its cgroup, and fields for status.
#[derive(Clone, Debug)]
pub(super) struct Known {
    pub(super) pod: Arc<Pod>,
    pub(super) config_hash: Option<PodUid>,
    pub(super) ip: Option<IpAddr>,
    /// When it was created, by the API server's clock; `None` for one from a checkpoint.
    pub(super) created_at: Option<Timestamp>,
    /// Whether it was deleted; its processes may still run.
    pub(super) is_terminating: bool,
    /// Whether one of its containers runs.
    pub(super) is_running: bool,
}

impl Known {
    /// Whether its cgroup is among `live`, under either name.
    pub(super) fn is_among(&self, live: &HashSet<PodUid>) -> bool {
        live.contains(&self.pod.uid) || self.config_hash.as_ref().is_some_and(|hash| live.contains(hash))
    }
}

pub(super) fn pod_resource() -> ApiResource {
    ApiResource::erase::<k8s_openapi::api::core::v1::Pod>(&())
}

/// The annotations of a mirror pod: that it is one, and the name of its cgroup.
pub(super) const MIRROR_ANNOTATIONS: [&str; 2] = ["kubernetes.io/config.mirror", "kubernetes.io/config.hash"];

/// Whether a pod is as the API has it: each has a name, a namespace and a UID.
pub(super) fn is_sound(pod: &ApiPod) -> bool {
    let metadata = &pod.metadata;
    let is_named = metadata.name.is_some() && metadata.namespace.is_some() && uid_of(metadata).is_some();
    is_named && matches!((&pod.spec, &pod.status), (Lenient::Sound(_), None | Some(Lenient::Sound(_))))
}

/// Trims an object to the annotations named in `keep`, with this many bytes of each; `None` when it has no
/// usable name or UID, or is malformed.
pub(super) fn pod_update(object: ApiPod, keep: &[(Box<str>, usize)]) -> Option<PodUpdate> {
    let uid = uid_of(&object.metadata)?;
    let is_terminating = object.metadata.deletion_timestamp.is_some();
    let created_at = object.metadata.creation_timestamp.map(|time| time.0);
    let spec = object.spec.sound()?;
    let PodStatus { phase, pod_ip, container_statuses } = object.status.unwrap_or_default().sound()?;
    // kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle: a pod never leaves these two phases.
    if matches!(phase.as_deref(), Some("Failed" | "Succeeded")) {
        return Some(PodUpdate::Ended(uid));
    }
    let annotations = object.metadata.annotations.unwrap_or_default();
    // For mirror pods only. The kubelet deletes a mirror pod that is not its own. But every user who may
    // create pods can write both annotations, so two claims to one name are both refused.
    let [mirror, hash] = MIRROR_ANNOTATIONS;
    let mirror = annotations.contains_key(mirror);
    let config_hash = annotations
        .get(hash)
        .filter(|_| mirror)
        .and_then(|hash| PodUid::parse(hash))
        .filter(PodUid::is_config_hash);
    let annotations = kept_annotations(annotations, keep);
    let pod = Pod {
        uid,
        namespace: object.metadata.namespace?.into(),
        name: object.metadata.name?.into(),
        account_annotations: None,
        is_mirror: mirror,
        service_account: spec
            .service_account_name
            .filter(|name| !name.is_empty())
            .unwrap_or_else(|| "default".into()),
        host_network: spec.host_network,
        annotations,
    };
    let ip = pod_ip.and_then(|ip| ip.parse().ok());
    let is_running = container_statuses.iter().any(|status| status.state.running.is_some());
    Some(PodUpdate::Live(Known {
        pod: Arc::new(pod),
        config_hash,
        ip,
        created_at,
        is_terminating,
        is_running,
    }))
}

pub(super) fn uid_of(metadata: &ObjectMeta) -> Option<PodUid> {
    PodUid::parse(metadata.uid.as_deref()?)
}

/// The annotations named in `keep`, with this many bytes of each.
pub(super) fn kept_annotations(
    mut annotations: BTreeMap<String, String>,
    keep: &[(Box<str>, usize)],
) -> BTreeMap<Box<str>, Box<str>> {
    let kept = |(key, limit_bytes): &(Box<str>, usize)| {
        Some((key.clone(), cut(annotations.remove(&**key)?, *limit_bytes)))
    };
    keep.iter().filter_map(kept).collect()
}

/// A truncated value ends in a mark that no valid annotation may have, so that `role` refuses it whatever the
/// rest is.
fn cut(value: String, limit_bytes: usize) -> Box<str> {
    if value.len() <= limit_bytes {
        return value.into();
    }
    format!("{}{CUT}", &value[..value.floor_char_boundary(limit_bytes)]).into()
}

/// The value of one annotation; what is longer than any sane allow-list becomes a text that parses as none.
pub(super) fn bounded_annotation(metadata: ObjectMeta, key: &str) -> Option<Arc<str>> {
    let value = metadata.annotations?.remove(key)?;
    Some(if value.len() > VALUE_LIMIT_BYTES { OVERSIZED.into() } else { value.into() })
}

/// Not ASCII, as all values but a policy are, and no end of a JSON object.
pub(super) const CUT: char = '…';
/// Of an allow-list.
pub(super) const VALUE_LIMIT_BYTES: usize = 64 * 1024;
const OVERSIZED: &str = "the annotation is longer than 64 KiB";

/// Pods for the tests of what takes them.
#[cfg(test)]
pub(super) mod testing {
    use super::*;

    pub(in crate::kubernetes) fn uid(n: u8) -> PodUid {
        PodUid::parse(&format!("00000000-0000-4000-8000-0000000000{n:02x}")).unwrap()
    }

    pub(in crate::kubernetes) fn pod_update(n: u8, name: &str) -> PodUpdate {
        let pod = Pod {
            uid: uid(n),
            namespace: "n".into(),
            name: name.into(),
            account_annotations: None,
            is_mirror: false,
            service_account: "default".into(),
            host_network: false,
            annotations: [].into(),
        };
        PodUpdate::Live(Known {
            pod: Arc::new(pod),
            config_hash: None,
            ip: None,
            created_at: None,
            is_terminating: false,
            is_running: false,
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const LIMIT: usize = 100;
    const UID: &str = "0c5a1e7b-3f0d-4d0e-9a55-1f2e3d4c5b6a";

    fn live(object: serde_json::Value, keep: &[&str]) -> Option<Known> {
        let keep: Vec<_> = keep.iter().map(|key| ((*key).into(), LIMIT)).collect();
        match pod_update(serde_json::from_value(object).unwrap(), &keep)? {
            PodUpdate::Live(known) => Some(known),
            PodUpdate::Ended(_) => None,
        }
    }

    #[test]
    fn keeps_what_is_used_and_the_annotations_asked_for() {
        let object = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": "team-a", "name": "web", "uid": UID.to_uppercase(),
                "creationTimestamp": "2026-01-01T00:00:00Z", "annotations": {"role": "reader", "other": "x"},
                "managedFields": [{"fieldsV1": {"f:x": {}}}]},
            "spec": {"containers": [{"name": "c", "image": "i"}], "serviceAccountName": "sa", "hostNetwork": true},
            "status": {"phase": "Running", "podIP": "10.0.0.1"},
        });

        let known = live(object, &["role", "absent"]).unwrap();
        let pod = known.pod;

        assert_eq!((known.ip, known.is_terminating), (Some([10, 0, 0, 1].into()), false));
        assert_eq!(known.created_at, Some("2026-01-01T00:00:00Z".parse().unwrap()));

        assert_eq!(pod.uid.as_str(), UID);
        assert_eq!((&*pod.namespace, &*pod.name, &*pod.service_account), ("team-a", "web", "sa"));
        assert!(pod.host_network);
        assert_eq!(pod.annotations, [("role".into(), "reader".into())].into());
    }

    #[test]
    fn keeps_a_bounded_part_of_an_annotation_and_marks_it() {
        let kept = |value: String| {
            let object = json!({"metadata": {"namespace": "n", "name": "p", "uid": UID, "annotations": {"role": value}}, "spec": {}});
            live(object, &["role"]).unwrap().pod.annotations["role"].to_string()
        };

        assert_eq!(kept("x".repeat(LIMIT)), "x".repeat(LIMIT));
        assert_eq!(kept("x".repeat(LIMIT + 1)), "x".repeat(LIMIT) + "…");
        assert_eq!(kept("\u{00fc}".repeat(100_000)), "\u{00fc}".repeat(LIMIT / 2) + "…");
    }

    #[test]
    fn a_minimal_pod_has_the_default_service_account() {
        let object = json!({"metadata": {"namespace": "n", "name": "p", "uid": UID}, "spec": {"serviceAccountName": ""}});

        let known = live(object, &["role"]).unwrap();

        assert_eq!(&*known.pod.service_account, "default");
        assert!(!known.pod.host_network && known.pod.annotations.is_empty() && known.config_hash.is_none());
    }

    #[test]
    fn a_pod_without_a_usable_uid_is_passed_over() {
        for uid in [json!(null), json!(""), json!("1"), json!("../../etc")] {
            let object = json!({"metadata": {"namespace": "n", "name": "p", "uid": uid}, "spec": {}});

            assert!(live(object, &[]).is_none());
        }
    }

    #[test]
    fn a_pod_that_is_not_as_the_api_has_it_is_passed_over_and_its_list_is_read() {
        let pod = |spec, status| json!({"metadata": {"namespace": "n", "name": "p", "uid": UID}, "spec": spec, "status": status});

        for (spec, status) in [
            (json!({"hostNetwork": "yes"}), json!({})),
            (json!([]), json!({})),
            (json!(null), json!({})),
            (json!({}), json!({"phase": 1})),
            (json!({}), json!({"containerStatuses": [{"state": 1}]})),
        ] {
            let list: kube::core::ObjectList<ApiPod> = serde_json::from_value(json!({
                "kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": [pod(spec, status), pod(json!({}), json!({}))],
            }))
            .unwrap();
            let [odd, sound] = list.items.try_into().unwrap();

            assert_eq!((is_sound(&odd), is_sound(&sound)), (false, true));
            assert!(pod_update(odd, &[]).is_none() && pod_update(sound, &[]).is_some());
        }
    }

    #[test]
    fn an_oversized_allow_list_is_kept_as_malformed() {
        let with = |value: String| ObjectMeta {
            annotations: Some([("k".into(), value)].into()),
            ..Default::default()
        };

        assert_eq!(bounded_annotation(with("[\"a\"]".into()), "k").as_deref(), Some("[\"a\"]"));
        assert_eq!(
            bounded_annotation(with("[".repeat(VALUE_LIMIT_BYTES + 1)), "k").as_deref(),
            Some(OVERSIZED)
        );
        assert_eq!(bounded_annotation(with("x".into()), "other"), None);
    }
}
