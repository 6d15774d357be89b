//! What of the cluster outlives the agent: the pods of this node, the annotations of their ServiceAccounts,
//! and the allow-lists of their namespaces. Bounded. Pure; made and taken back by `kubernetes::cluster`,
//! written by `snapshot`.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    hash::{Hash, Hasher},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use super::{accounts::Annotations, object::Known};
use crate::{identity::PodUid, pod::Pod};

/// The pods of this node, their ServiceAccounts and the allow-lists of their namespaces, as the API server
/// last sent them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// The resourceVersion of the pods; `None` if an agent wrote it that did not store it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    version: Option<Box<str>>,
    pods: Vec<CheckpointPod>,
    /// The annotations that are known of the pods' ServiceAccounts, by namespace and name.
    accounts: BTreeMap<Box<str>, BTreeMap<Box<str>, Annotations>>,
    namespaces: BTreeMap<Box<str>, Option<Box<str>>>,
}

/// Without the version, which each bookmark changes: a snapshot is written when its content has changed.
impl Hash for Checkpoint {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let Self { version: _, pods, accounts, namespaces } = self;
        (pods, accounts, namespaces).hash(state);
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct CheckpointPod {
    /// Without the annotations of its ServiceAccount.
    pod: Pod,
    config_hash: Option<PodUid>,
}

impl Checkpoint {
    /// Stores pods up to the bounds, and their namespaces. Pods whose annotations are longer than any valid
    /// ones are left out: they have no role anyway, and must not use the room of others. So are those of
    /// ServiceAccounts, whose pods then wait as if their account had not been read yet.
    pub(super) fn of<'p>(
        pods: impl Iterator<Item = &'p Known>,
        allow_list: impl Fn(&str) -> Option<Option<Arc<str>>>,
    ) -> Self {
        let fits = |annotations: &BTreeMap<_, Box<str>>| {
            annotations.values().map(|value| value.len()).sum::<usize>() <= ANNOTATIONS_LIMIT_BYTES
        };
        let mut accounts: BTreeMap<_, BTreeMap<_, Annotations>> = BTreeMap::new();
        let mut pods: Vec<_> = pods
            .filter(|known| fits(&known.pod.annotations))
            .take(PODS_LIMIT)
            .map(|known| {
                let pod = &known.pod;
                // A mirror has no ServiceAccount, whatever its object says.
                let of_account = pod.account_annotations.as_ref().filter(|it| !pod.is_mirror && fits(it));
                if let Some(annotations) = of_account {
                    let in_namespace = accounts.entry(pod.namespace.clone()).or_default();
                    let account = in_namespace.entry(pod.service_account.clone());
                    account.or_insert_with(|| Annotations::clone(annotations));
                }
                let pod = Pod { account_annotations: None, ..Pod::clone(pod) };
                CheckpointPod { pod, config_hash: known.config_hash.clone() }
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
        Self { version: None, pods, accounts, namespaces }
    }

    /// The same with the resourceVersion up to which the pods are known, or a later one.
    pub(super) fn at(self, version: Option<Box<str>>) -> Self {
        Self { version, ..self }
    }

    /// The resourceVersion of the pods, if it is known.
    pub(super) fn version(&self) -> Option<&str> {
        self.version.as_deref()
    }

    /// Leaves out the largest entries, so that the others have so many bytes at most as JSON: a tenant with
    /// long annotations must not cost the others their snapshot. What is left out is unknown to the next
    /// agent until the API server answers.
    pub(crate) fn shorten(&mut self, limit_bytes: usize) {
        let accounts = self.accounts.iter().flat_map(|(namespace, accounts)| {
            accounts.iter().map(move |(name, annotations)| size_of_json(&(namespace, name, annotations)))
        });
        let sizes = self.pods.iter().map(size_of_json).chain(accounts);
        let sizes = sizes.chain(self.namespaces.iter().map(|namespace| size_of_json(&namespace)));
        let mut by_size: Vec<_> = sizes.enumerate().map(|(index, size)| (size, index)).collect();
        by_size.sort_unstable();
        let mut room = limit_bytes;
        let kept: HashSet<_> = by_size
            .into_iter()
            .map_while(|(size, index)| {
                room = room.checked_sub(size)?;
                Some(index)
            })
            .collect();
        // In the order in which they were counted.
        let mut indices = 0..;
        let mut is_kept = || indices.next().is_some_and(|index| kept.contains(&index));
        self.pods.retain(|_| is_kept());
        self.accounts.values_mut().for_each(|accounts| accounts.retain(|_, _| is_kept()));
        self.namespaces.retain(|_, _| is_kept());
    }

    /// The pods whose cgroups are among `live`, and the namespaces.
    #[expect(clippy::type_complexity, reason = "written out only here")]
    pub(super) fn restore(
        self,
        live: &HashSet<PodUid>,
    ) -> (Vec<Known>, BTreeMap<Box<str>, Option<Box<str>>>) {
        let accounts: BTreeMap<_, BTreeMap<_, _>> = self
            .accounts
            .into_iter()
            .map(|(namespace, accounts)| {
                let shared = accounts.into_iter().map(|(name, annotations)| (name, Arc::new(annotations)));
                (namespace, shared.collect())
            })
            .collect();
        let pods = self.pods.into_iter().map(|CheckpointPod { mut pod, config_hash }| {
            if !pod.is_mirror {
                let account = accounts.get(&pod.namespace).and_then(|it| it.get(&pod.service_account));
                pod.account_annotations = account.cloned();
            }
            Known {
                pod: Arc::new(pod),
                config_hash: config_hash.filter(PodUid::is_config_hash),
                ip: None,
                created_at: None,
                is_terminating: false,
                is_running: false,
            }
        });
        let pods = pods.filter(|known| known.is_among(live)).collect();
        (pods, self.namespaces)
    }
}

/// Of an entry, with the comma behind it. What cannot be written counts as too long for any room.
fn size_of_json(entry: &impl Serialize) -> usize {
    serde_json::to_vec(entry).map_or(usize::MAX, |text| text.len() + ENTRY_BYTES)
}

/// More than what nested entries have between them, in addition to their own texts.
const ENTRY_BYTES: usize = 8;
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
            Arc::make_mut(&mut known.pod).account_annotations =
                Some(Arc::new([("role".into(), value.into())].into()));
            known
        };
        let pods = [
            annotated(1, "of the account"),
            annotated(3, &"x".repeat(ANNOTATIONS_LIMIT_BYTES + 1)),
            known(5, "not known yet"),
        ];

        let restored = restored(&Checkpoint::of(pods.iter(), |_| None));

        let accounts: Vec<_> = restored.iter().map(|known| known.pod.account_annotations.clone()).collect();
        assert_eq!(accounts, [Some(Arc::new([("role".into(), "of the account".into())].into())), None, None]);
    }

    fn restored(checkpoint: &Checkpoint) -> Vec<Known> {
        let text = serde_json::to_string(checkpoint).unwrap();
        let live = checkpoint.pods.iter().map(|checkpoint| checkpoint.pod.uid.clone()).collect();
        serde_json::from_str::<Checkpoint>(&text).unwrap().restore(&live).0
    }

    #[test]
    fn the_annotations_of_an_account_are_stored_once_and_shared_by_its_pods() {
        let policy = "x".repeat(8 * 1024);
        let annotations = Arc::new(Annotations::from([("policy".into(), policy.into())]));
        let pods: Vec<_> = (0..300)
            .map(|n| {
                let mut known = known(3 * n, "a");
                Arc::make_mut(&mut known.pod).account_annotations = Some(Arc::clone(&annotations));
                known
            })
            .collect();

        let checkpoint = Checkpoint::of(pods.iter(), |_| None);
        let restored = restored(&checkpoint);

        assert!(serde_json::to_string(&checkpoint).unwrap().len() < 300 * 1024);
        let first = restored[0].pod.account_annotations.as_ref().unwrap();
        assert_eq!((restored.len(), first), (300, &annotations));
        let is_shared = |known: &Known| Arc::ptr_eq(known.pod.account_annotations.as_ref().unwrap(), first);
        assert!(restored.iter().all(is_shared));
    }

    #[test]
    fn a_mirror_stands_for_no_account() {
        let mut mirror = known(1, "a");
        let pod = Arc::make_mut(&mut mirror.pod);
        (pod.is_mirror, pod.account_annotations) = (true, Some(Arc::default()));
        let pods = [mirror, known(4, "a")];

        let restored = restored(&Checkpoint::of(pods.iter(), |_| None));

        let is_unknown = |known: &Known| known.pod.account_annotations.is_none();
        assert_eq!((restored.len(), restored.iter().all(is_unknown)), (2, true));
    }

    #[test]
    fn what_is_too_long_costs_the_largest_entries_and_no_others() {
        let long = "x".repeat(ANNOTATIONS_LIMIT_BYTES / 2);
        let pods: Vec<_> = (0..30)
            .map(|n| {
                let mut known = known(n, if n % 10 == 0 { &long } else { "a" });
                let value = if n % 3 == 1 { &long } else { "of the account" };
                Arc::make_mut(&mut known.pod).account_annotations =
                    Some(Arc::new([("role".into(), value.into())].into()));
                known
            })
            .collect();
        let list =
            |name: &str| Some(Some(if name == "n2" { "y".repeat(20_000).into() } else { "[]".into() }));
        let whole = Checkpoint::of(pods.iter(), list);
        let mut shortened = whole.clone();

        shortened.shorten(1024 * 1024);
        assert_eq!(shortened, whole, "the allowed twin");
        shortened.shorten(8 * 1024);

        assert!(serde_json::to_string(&shortened).unwrap().len() <= 8 * 1024 + 64);
        assert_eq!(shortened.pods.len(), 27);
        assert!(shortened.pods.iter().all(|checkpoint| &*checkpoint.pod.annotations["role"] == "a"));
        assert_eq!(shortened.namespaces.keys().map(|name| &**name).collect::<Vec<_>>(), ["n0", "n1"]);
        let known = |known: &Known| known.pod.account_annotations.is_some();
        let restored = restored(&shortened);
        assert!(restored.iter().all(|it| known(it) == (&*it.pod.namespace != "n1")), "its pods wait");
        shortened.shorten(0);
        assert!(shortened.pods.is_empty() && shortened.namespaces.is_empty());
    }

    #[test]
    fn the_version_is_carried_and_is_no_reason_to_write_a_snapshot() {
        let of = |version: &str| {
            let version = (!version.is_empty()).then(|| version.into());
            Checkpoint::of([known(1, "a")].iter(), |_| None).at(version)
        };
        let hash = |checkpoint: &Checkpoint| {
            let mut hasher = std::hash::DefaultHasher::new();
            checkpoint.hash(&mut hasher);
            hasher.finish()
        };
        let text = serde_json::to_string(&of("42")).unwrap();

        assert_eq!(serde_json::from_str::<Checkpoint>(&text).unwrap().version(), Some("42"));
        assert_eq!(hash(&of("42")), hash(&of("43")));
        assert_ne!(hash(&of("42")), hash(&Checkpoint::default()), "the content is one");
        // As agents wrote it that did not store the version.
        let former = serde_json::to_string(&of("")).unwrap();
        assert!(!former.contains("version"), "{former}");
        assert_eq!(serde_json::from_str::<Checkpoint>(&former).unwrap().version(), None);
    }
}
