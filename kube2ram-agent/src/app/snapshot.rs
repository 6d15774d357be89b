//! Keeps the snapshot up to date, and reads the one of the agent before. Depends on `snapshot` and
//! `kubernetes`; composed by `app`.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
    time::Duration,
};

use prometheus_client::{
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use tokio::{
    sync::SetOnce,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    args::Config,
    kubernetes::Cluster,
    snapshot::{Discovered, Snapshot, SnapshotError, SnapshotFile, SnapshotScope},
};
use kube2ram_service::{clock::since_boot, state_dir::StateDir, telemetry::chain};

/// The time between two writes: for a node whose pods all start at once there are one or two writes.
const PAUSE: Duration = Duration::from_secs(1);
/// How often it is written although nothing has changed, to renew its age.
const HEARTBEAT: Duration = Duration::from_mins(5);

/// One label whose values are literals below.
pub(super) type Writes = Family<[(&'static str, &'static str); 1], Counter>;

/// The snapshot of this node; without a file when there can be none.
pub(super) struct SnapshotWriter {
    file: Option<(SnapshotFile, SnapshotScope)>,
    writes: Writes,
    /// The facts from the metadata server.
    pub(super) discovered: Arc<SetOnce<Discovered>>,
}

impl SnapshotWriter {
    /// With a state directory on a disk, the agent does what it can without a snapshot.
    pub(super) fn new(dir: &StateDir, config: &Config, registry: &mut Registry) -> Self {
        let file = SnapshotFile::in_dir(dir)
            .and_then(|file| {
                Ok((file, SnapshotScope::of_node(&config.node, config.cloud, annotations(config))?))
            })
            .inspect_err(|error| {
                warn!(
                    error = chain(error),
                    "snapshots are unavailable: after a restart, pods wait for the API server"
                );
            })
            .ok();
        Self { file, writes: metrics(registry), discovered: Arc::default() }
    }

    /// What the agent before left, if it can be used.
    pub(super) fn left(&self) -> Option<Snapshot> {
        let (file, scope) = self.file.as_ref()?;
        let read = || match file.read()? {
            Some(text) => Snapshot::decode(&text, scope, since_boot()).map(Some),
            None => Ok::<_, SnapshotError>(None),
        };
        read().inspect_err(|error| warn!(error = chain(error), "snapshot ignored")).ok().flatten()
    }

    /// Writes whenever something has changed, and at `shutdown`.
    pub(super) async fn run(self, cluster: Arc<Cluster>, shutdown: CancellationToken) {
        let mut written = None;
        let mut changes = cluster.changes();
        while !shutdown.is_cancelled() {
            changes.mark_unchanged();
            self.write(&cluster, &mut written);
            let rest = async {
                sleep(PAUSE).await;
                let _heartbeat = timeout(HEARTBEAT, changes.changed()).await;
            };
            shutdown.run_until_cancelled(rest).await;
        }
        self.write(&cluster, &mut None);
    }

    /// Writes, unless `written` says that the same was written not long ago: its hash, and when.
    fn write(&self, cluster: &Cluster, written: &mut Option<(u64, Instant)>) {
        // Only data that the API server has sent to this agent: an old snapshot must not be renewed.
        let (Some((file, scope)), Some(cluster)) = (&self.file, cluster.checkpoint()) else { return };
        let snapshot = Snapshot { cluster, discovered: self.discovered.get().cloned() };
        let mut hasher = DefaultHasher::new();
        snapshot.hash(&mut hasher);
        let hash = hasher.finish();
        if written.is_some_and(|(last, at)| last == hash && at.elapsed() < HEARTBEAT) {
            return;
        }
        let result = snapshot.encode(scope, since_boot()).and_then(|text| file.write(&text));
        *written = Some((hash, Instant::now()));
        self.writes.get_or_create(&[("result", if result.is_ok() { "ok" } else { "error" })]).inc();
        if let Err(error) = result {
            warn!(error = chain(&error), "snapshot not written");
        }
    }
}

/// The keys of all annotations that count: of pods, of ServiceAccounts if they do, and of namespaces.
fn annotations(config: &Config) -> Vec<Box<str>> {
    let keys = &config.annotation_keys;
    let of_accounts = keys.account_bounded().into_iter().flatten();
    let keys = keys.bounded().into_iter().chain(of_accounts).map(|(key, _)| key.into());
    keys.chain([config.namespace_key.clone()]).collect()
}

pub(super) fn metrics(registry: &mut Registry) -> Writes {
    let writes = Writes::default();
    let help = "Snapshots for the next agent, by result (error, ok)";
    registry.register("snapshot_writes", help, writes.clone());
    for result in ["error", "ok"] {
        drop(writes.get_or_create(&[("result", result)]));
    }
    writes
}

/// Offers what is known before any server has answered.
pub(super) fn offer(left: Option<Snapshot>, cluster: &Cluster) -> Option<Discovered> {
    let Snapshot { cluster: checkpoint, discovered } = left?;
    info!("snapshot of the previous agent loaded");
    cluster.offer(checkpoint);
    discovered
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Command;

    fn keys(flags: &[&str]) -> Vec<Box<str>> {
        let args = ["kube2ram", "--node=n", "--cloud=aws"].iter().chain(flags).map(Into::into);
        match Command::from_args(args, &|_| None).unwrap() {
            Command::Agent(config) => annotations(&config),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_agent_that_reads_other_annotations_has_another_scope() {
        let usual = keys(&[]);

        assert_eq!(keys(&["--app-port=8182"]), usual, "the allowed twin");
        for other in ["--service-account-roles", "--iam-role-key=role", "--namespace-key=allowed"] {
            assert_ne!(keys(&[other]), usual, "{other}");
        }
    }
}
