//! What of the cluster outlives the agent: the pods of this node, and the allow-lists of their namespaces.
//! Bounded. Pure; made and taken back by `kubernetes::cluster`, written by `snapshot`.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use super::object::Known;
use crate::{identity::PodUid, pod::Pod};

/// The pods of this node and the allow-lists of their namespaces, as the API server last sent them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Checkpoint {
    pods: Vec<CheckpointPod>,
    namespaces: BTreeMap<Box<str>, Option<Box<str>>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct CheckpointPod {
    pod: Pod,
    config_hash: Option<PodUid>,
}

impl Checkpoint {
    /// Stores pods up to the bounds, and their namespaces. Pods whose annotations, or whose ServiceAccount's,
    /// are longer than any valid ones are left out: they have no role anyway, and must not use the room of
    /// others.
    pub(super) fn of<'p>(
        pods: impl Iterator<Item = &'p Known>,
        allow_list: impl Fn(&str) -> Option<Option<Arc<str>>>,
    ) -> Self {
        let fits = |annotations: &BTreeMap<_, Box<str>>| {
            annotations.values().map(|value| value.len()).sum::<usize>() <= ANNOTATIONS_LIMIT_BYTES
        };
        let mut pods: Vec<_> = pods
            .filter(|known| {
                fits(&known.pod.annotations) && known.pod.account_annotations.as_ref().is_none_or(fits)
            })
            .take(PODS_LIMIT)
            .map(|known| CheckpointPod {
                pod: Pod::clone(&known.pod),
                config_hash: known.config_hash.clone(),
            })
            .collect();
        pods.sort_by(|a, b| a.pod.uid.cmp(&b.pod.uid));
        let names: BTreeSet<_> = pods.iter().map(|checkpoint| checkpoint.pod.namespace.clone()).collect();
        let namespaces = names
            .into_iter()
            .filter_map(|name| {
                let allow_list = allow_list(&name)?;
                Some((name, allow_list.map(|text| (*text).into())))
            })
            .collect();
        Self { pods, namespaces }
    }

    /// The pods whose cgroups are among `live`, and the namespaces.
    #[expect(clippy::type_complexity, reason = "written out only here")]
    pub(super) fn restore(
        self,
        live: &HashSet<PodUid>,
    ) -> (Vec<Known>, BTreeMap<Box<str>, Option<Box<str>>>) {
        let pods = self.pods.into_iter().map(|CheckpointPod { pod, config_hash }| Known {
            pod: Arc::new(pod),
            config_hash: config_hash.filter(PodUid::is_config_hash),
            ip: None,
            created_at: None,
            is_terminating: false,
            is_running: false,
        });
        let pods = pods.filter(|known| known.is_among(live)).collect();
        (pods, self.namespaces)
    }
}

/// More than the longest legal values of a pod, or of a ServiceAccount, together: a session policy of 2,048
/// characters of four bytes, an external id, and so on.
const ANNOTATIONS_LIMIT_BYTES: usize = 16 * 1024;
/// More pods than any node has.
const PODS_LIMIT: usize = 2048;

#[cfg(test)]
mod tests {
    use super::*;

    fn uid(n: u32) -> PodUid {
        PodUid::parse(&format!("00000000-0000-4000-8000-{n:012x}")).unwrap()
    }

    fn known(n: u32, annotation: &str) -> Known {
        let pod = Pod {
            uid: uid(n),
            namespace: format!("n{}", n % 3).into(),
            name: "p".into(),
            account_annotations: None,
            is_mirror: false,
            service_account: "default".into(),
            host_network: n == 2,
            annotations: [("role".into(), annotation.into())].into(),
        };
        let config_hash = (n == 2).then(|| PodUid::parse("9f86d081884c7d659a2feaa0c55ad015").unwrap());
        Known {
            pod: Arc::new(pod),
            config_hash,
            ip: None,
            created_at: None,
            is_terminating: false,
            is_running: false,
        }
    }

    #[test]
    fn comes_back_as_it_was_for_pods_whose_cgroups_are_still_there() {
        let pods = [known(1, "a"), known(2, "b"), known(3, "c")];
        let allow_list = |name: &str| (name != "n0").then(|| (name == "n1").then(|| "[\"a\"]".into()));
        let checkpoint = Checkpoint::of(pods.iter(), allow_list);
        let text = serde_json::to_string(&checkpoint).unwrap();

        let live = [uid(1), pods[1].config_hash.clone().unwrap()].into();
        let (restored, namespaces) = serde_json::from_str::<Checkpoint>(&text).unwrap().restore(&live);

        let shown = |pods: &[Known]| pods.iter().map(|known| format!("{known:?}")).collect::<Vec<_>>();
        assert_eq!(shown(&restored), shown(&pods[..2]));
        let namespaces: Vec<_> = namespaces.into_iter().collect();
        assert_eq!(namespaces, [("n1".into(), Some("[\"a\"]".into())), ("n2".into(), None)]);
    }

    #[test]
    fn is_bounded_whatever_pods_are_annotated_with() {
        let long = "x".repeat(ANNOTATIONS_LIMIT_BYTES + 1);
        let pods: Vec<_> = (0..3000).map(|n| known(n, if n < 900 { &long } else { "a" })).collect();

        let checkpoint = Checkpoint::of(pods.iter(), |_| None);

        assert_eq!(checkpoint.pods.len(), PODS_LIMIT);
        assert!(checkpoint.pods.iter().all(|checkpoint| checkpoint.pod.annotations["role"].len() == 1));
    }

    #[test]
    fn carries_the_annotations_of_the_service_account_within_the_same_bound() {
        let annotated = |n, value: &str| {
            let mut known = known(n, "a");
            Arc::make_mut(&mut known.pod).account_annotations = Some([("role".into(), value.into())].into());
            known
        };
        let pods = [
            annotated(1, "of the account"),
            annotated(3, &"x".repeat(ANNOTATIONS_LIMIT_BYTES + 1)),
            known(4, "not known yet"),
        ];

        let text = serde_json::to_string(&Checkpoint::of(pods.iter(), |_| None)).unwrap();
        let live = [uid(1), uid(3), uid(4)].into();
        let (restored, _) = serde_json::from_str::<Checkpoint>(&text).unwrap().restore(&live);

        let accounts: Vec<_> = restored.iter().map(|known| known.pod.account_annotations.clone()).collect();
        assert_eq!(accounts, [Some([("role".into(), "of the account".into())].into()), None]);
    }
}
