//! Looks for pods that run on this node, as the API server reports, and have no process below the pods'
//! cgroup: a container runtime put them elsewhere, where the eBPF programs do not see them. Depends on
//! `kubernetes` and `identity`; spawned by `app`.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use prometheus_client::{
    metrics::{family::Family, gauge::Gauge},
    registry::Registry,
};
use tokio::{
    task::spawn_blocking,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::{
    datapath::Settings,
    identity::{PodUid, is_populated, pod_cgroups},
    kubernetes::{About, Cluster, Notice, Notices as _, PodView, Presence},
    status::OutsidePod,
};

/// The time between two checks.
const LOOK_EVERY: Duration = Duration::from_secs(15);
/// How long a pod may be outside. The API server learns of ended containers a little later than they end.
const PATIENCE: Duration = Duration::from_mins(1);
/// How many cgroups are searched for pods outside of the pods' cgroup.
const MAX_CGROUPS: usize = 100_000;
/// How many pods the status names.
const MAX_REPORTED: usize = 32;

type Pods = Family<[(&'static str, &'static str); 1], Gauge>;

/// What was found last. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct State(Arc<Mutex<Vec<OutsidePod>>>);

impl State {
    pub(super) fn read(&self) -> Vec<OutsidePod> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Pods outside of the pods' cgroup.
pub(super) struct Outside {
    cluster: Arc<Cluster>,
    root: PathBuf,
    pods: Vec<PathBuf>,
    gauge: Pods,
    state: State,
    known: HashMap<PodUid, Found>,
}

/// A pod that is outside.
#[derive(Clone, Debug)]
struct Found {
    since: Instant,
    is_reported: bool,
    cgroup: Option<PathBuf>,
}

/// Registers the metric.
pub(super) fn metrics(registry: &mut Registry) -> Pods {
    let pods = Pods::default();
    let help = "Pods without a process below the pods' cgroup for more than a minute, so that the programs do not see them, by network (host, own)";
    registry.register("pods_outside_cgroup", help, pods.clone());
    for network in ["host", "own"] {
        drop(pods.get_or_create(&[("network", network)]));
    }
    pods
}

impl Outside {
    pub(super) fn new(cluster: Arc<Cluster>, settings: &Settings, registry: &mut Registry) -> Self {
        Self {
            cluster,
            root: settings.cgroup_root.clone(),
            pods: settings.pods_cgroups(),
            gauge: metrics(registry),
            state: State::default(),
            known: HashMap::new(),
        }
    }

    pub(super) fn state(&self) -> State {
        self.state.clone()
    }

    /// Runs until `shutdown`.
    pub(super) async fn run(mut self, shutdown: CancellationToken) {
        let looks = async {
            loop {
                self.look().await;
                sleep(LOOK_EVERY).await;
            }
        };
        shutdown.run_until_cancelled(looks).await;
    }

    async fn look(&mut self) {
        let (root, pods) = (self.root.clone(), self.pods.clone());
        let inside = match spawn_blocking(move || populated(&root, &pods)).await {
            Ok(Ok(inside)) => inside,
            // The check of the programs reports this.
            Ok(Err(error)) => return debug!(%error, "cannot read the pods' cgroups"),
            Err(error) => return debug!(%error, "the check of the pods' cgroups panicked"),
        };
        // After that: a new pod is inside by now, or not known yet.
        let mut outside = self.cluster.pod_views();
        outside
            .retain(|view| view.presence == Presence::Known && view.is_running && !is_among(view, &inside));
        note(&mut self.known, &outside, Instant::now());
        outside.retain(|view| self.known.get(&view.pod.uid).is_some_and(Found::is_due));
        self.locate(&outside).await;
        self.report(&outside);
    }

    /// Searches for the cgroups of new ones.
    async fn locate(&mut self, outside: &[PodView]) {
        let new = |view: &&PodView| self.known.get(&view.pod.uid).is_some_and(|found| !found.is_reported);
        let wanted: HashSet<_> = outside.iter().filter(new).flat_map(names).collect();
        if wanted.is_empty() {
            return;
        }
        let (root, pods) = (self.root.clone(), self.pods.clone());
        let cgroups = spawn_blocking(move || search(&root, &pods, &wanted)).await.unwrap_or_default();
        for view in outside {
            if let Some(found) = self.known.get_mut(&view.pod.uid) {
                let cgroup = names(view).find_map(|name| cgroups.get(&name).cloned());
                found.cgroup = cgroup.or_else(|| found.cgroup.take());
            }
        }
    }

    fn report(&mut self, outside: &[PodView]) {
        for (network, is_host) in [("host", true), ("own", false)] {
            let count = outside.iter().filter(|view| view.pod.host_network == is_host).count();
            self.gauge.get_or_create(&[("network", network)]).set(count as i64);
        }
        let mut reported = Vec::new();
        for view in outside {
            let Some(found) = self.known.get_mut(&view.pod.uid) else { continue };
            let pod = &view.pod;
            let entry = OutsidePod {
                namespace: pod.namespace.to_string(),
                name: pod.name.to_string(),
                uid: pod.uid.to_string(),
                host_network: pod.host_network,
                cgroup: found.cgroup.as_ref().map(|path| path.display().to_string()),
            };
            if !std::mem::replace(&mut found.is_reported, true) {
                let message = entry.message();
                warn!(pod.namespace = %pod.namespace, pod.name = %pod.name, pod.uid = %pod.uid, "{message}");
                let about = About::Pod(pod.namespace.clone(), pod.name.clone(), pod.uid.clone());
                self.cluster.warn(Notice { about, reason: "OutsidePodsCgroup", message });
            }
            reported.push(entry);
        }
        // The node's role is in reach of these.
        reported.sort_by_key(|pod| (!pod.host_network, pod.namespace.clone(), pod.name.clone()));
        reported.truncate(MAX_REPORTED);
        *self.state.0.lock().unwrap_or_else(PoisonError::into_inner) = reported;
    }
}

impl Found {
    fn is_due(&self) -> bool {
        self.since.elapsed() >= PATIENCE
    }
}

/// Records since when each pod is outside, and forgets those that are no longer outside.
fn note(known: &mut HashMap<PodUid, Found>, outside: &[PodView], now: Instant) {
    let uids: HashSet<_> = outside.iter().map(|view| &view.pod.uid).collect();
    known.retain(|uid, _| uids.contains(uid));
    for uid in uids {
        known.entry(uid.clone()).or_insert(Found { since: now, is_reported: false, cgroup: None });
    }
}

/// After what its cgroup may be named.
fn names(view: &PodView) -> impl Iterator<Item = PodUid> {
    [Some(view.pod.uid.clone()), view.config_hash.clone()].into_iter().flatten()
}

fn is_among(view: &PodView, inside: &HashSet<PodUid>) -> bool {
    names(view).any(|name| inside.contains(&name))
}

/// The pods that have a process below the pods' cgroup. A cgroup alone proves nothing: the kubelet makes one
/// for each pod, and a runtime with another driver leaves it empty.
fn populated(root: &Path, pods: &[PathBuf]) -> io::Result<HashSet<PodUid>> {
    let cgroups = pod_cgroups(root, pods)?.into_iter();
    Ok(cgroups.filter(|(_, cgroup)| is_populated(cgroup)).map(|(uid, _)| uid).collect())
}

/// Cgroups elsewhere whose names contain one of these, as far as the search finds them.
fn search(root: &Path, pods: &[PathBuf], wanted: &HashSet<PodUid>) -> HashMap<PodUid, PathBuf> {
    let mut found = HashMap::new();
    let mut left = vec![root.to_owned()];
    let mut searched = 0;
    while let Some(directory) = left.pop().filter(|_| searched < MAX_CGROUPS && found.len() < wanted.len()) {
        searched += 1;
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            let path = entry.path();
            if pods.contains(&path) || !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            let name = entry.file_name().to_string_lossy().replace('_', "-");
            if let Some(uid) = wanted.iter().find(|uid| name.contains(uid.as_str())) {
                found.entry(uid.clone()).or_insert_with(|| path.clone());
            }
            left.push(path);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;
    use crate::pod::Pod;

    const UID: &str = "0c5a1e7b-3f0d-4d0e-9a55-1f2e3d4c5b6a";

    fn uid() -> PodUid {
        PodUid::parse(UID).unwrap()
    }

    fn view() -> PodView {
        let pod = Pod {
            uid: uid(),
            namespace: "shop".into(),
            name: "orders".into(),
            account_annotations: None,
            is_mirror: false,
            service_account: "default".into(),
            host_network: true,
            annotations: [].into(),
        };
        let presence = Presence::Known;
        PodView { pod: Arc::new(pod), config_hash: None, ip: None, presence, is_running: true }
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_is_outside_after_a_minute_and_again_after_it_was_inside() {
        let mut known = HashMap::new();
        let mut is_due = |outside: &[PodView]| {
            note(&mut known, outside, Instant::now());
            known.get(&uid()).is_some_and(Found::is_due)
        };

        assert!(!is_due(&[view()]));
        advance(PATIENCE - Duration::from_secs(1)).await;
        assert!(!is_due(&[view()]));
        advance(Duration::from_secs(1)).await;
        assert!(is_due(&[view()]));
        assert!(!is_due(&[]));
        assert!(!is_due(&[view()]));
    }

    #[test]
    fn the_kubelets_empty_cgroup_is_no_proof_and_a_static_pod_goes_by_its_hash() {
        let root = tempfile::tempdir().unwrap();
        let pods = root.path().join("kubepods");
        let hash = "0123456789abcdef0123456789abcdef";
        for (name, populated) in [(UID, 0), (hash, 1)] {
            let cgroup = pods.join(format!("pod{name}"));
            fs::create_dir_all(&cgroup).unwrap();
            fs::write(cgroup.join("cgroup.events"), format!("populated {populated}\n")).unwrap();
        }

        let inside = populated(root.path(), &[pods]).unwrap();

        assert!(!is_among(&view(), &inside));
        let mut mirror = view();
        mirror.config_hash = PodUid::parse(hash);
        assert!(is_among(&mirror, &inside));
    }

    #[test]
    fn a_cgroup_elsewhere_is_found_by_either_drivers_name() {
        for name in [
            format!("kubepods-besteffort-pod{}.slice:cri-containerd:1", UID.replace('-', "_")),
            format!("pod{UID}"),
        ] {
            let root = tempfile::tempdir().unwrap();
            let elsewhere = root.path().join("system.slice/containerd.service").join(&name);
            fs::create_dir_all(elsewhere.join("inner")).unwrap();
            fs::create_dir_all(root.path().join("kubepods").join(format!("pod{UID}"))).unwrap();

            let found = search(root.path(), &[root.path().join("kubepods")], &[uid()].into());

            assert_eq!(found[&uid()], elsewhere);
        }
    }
}
