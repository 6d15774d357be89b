//! The pods of this node, with their cgroups and what each gets. Called by the parent.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use tokio::task::spawn_blocking;

use super::{Operator, explain::Judged};
use crate::{
    identity::{PodUid, cgroup_id, pod_cgroups},
    kubernetes::{PodView, Presence},
    status::Pod,
};

/// Where a pod's processes are.
#[derive(Clone, Debug)]
pub(super) struct Identification {
    /// Its cgroup, as an absolute path.
    pub(super) cgroup: PathBuf,
    /// After what that is named.
    pub(super) named_after: &'static str,
    /// Its own listener's address.
    pub(super) listener: Option<String>,
}

impl Presence {
    fn as_str(self) -> &'static str {
        match self {
            Self::Departed => "departed",
            Self::Known => "known",
            Self::Restored => "restored",
            Self::Terminating => "terminating",
        }
    }
}

pub(super) fn presence_of(view: &PodView) -> &'static str {
    view.presence.as_str()
}

impl Operator {
    /// All of them, by namespace and name.
    pub(super) async fn pods(&self) -> Vec<Pod> {
        let cgroups = self.pod_cgroups().await;
        let mut view = self.cluster.pod_views();
        view.sort_by(|a, b| {
            (&a.pod.namespace, &a.pod.name, &a.pod.uid).cmp(&(&b.pod.namespace, &b.pod.name, &b.pod.uid))
        });
        let judge = self.judge();
        view.iter()
            .map(|view| self.pod(view, judge.judge(&view.pod), self.identification_of(view, &cgroups)))
            .collect()
    }

    fn pod(&self, view: &PodView, judged: Judged, identification: Option<Identification>) -> Pod {
        let PodView { pod, .. } = view;
        let below = |cgroup: &Path| {
            cgroup.strip_prefix(&self.settings.pods_cgroup).unwrap_or(cgroup).display().to_string()
        };
        Pod {
            namespace: pod.namespace.to_string(),
            name: pod.name.to_string(),
            uid: pod.uid.to_string(),
            presence: presence_of(view).to_owned(),
            host_network: pod.host_network,
            cgroup: identification.as_ref().map(|identification| below(&identification.cgroup)),
            identified_by: identification
                .as_ref()
                .map(|identification| identification.named_after.to_owned()),
            listener: identification.and_then(|identification| identification.listener),
            role: judged.role.map(|role| role.to_string()),
            role_from: judged.role_from,
            role_annotation: judged.role_annotation,
            verdict: judged.verdict,
            summary: judged.summary,
            issued_at: judged.held.map(|(issued, _)| super::rounded(issued)),
            expires_at: judged.held.map(|(_, expires)| super::rounded(expires)),
        }
    }

    /// Empty when they cannot be read, which the check of the programs reports.
    pub(super) async fn pod_cgroups(&self) -> HashMap<PodUid, PathBuf> {
        let (root, pods) = (self.settings.cgroup_root.clone(), self.settings.pods_cgroups());
        let walked = spawn_blocking(move || pod_cgroups(&root, &pods)).await;
        walked.ok().and_then(Result::ok).unwrap_or_default()
    }

    pub(super) fn identification_of(
        &self,
        view: &PodView,
        cgroups: &HashMap<PodUid, PathBuf>,
    ) -> Option<Identification> {
        let by_uid = cgroups.get(&view.pod.uid).map(|cgroup| (cgroup, "uid"));
        let by_hash = || Some((cgroups.get(view.config_hash.as_ref()?)?, "config_hash"));
        let (cgroup, named_after) = by_uid.or_else(by_hash)?;
        let id = cgroup_id(cgroup).ok()?;
        let listener = self.kernel.targets.of_pod(id).map(|target| format!("127.0.0.1:{}", target.port));
        Some(Identification { cgroup: cgroup.clone(), named_after, listener })
    }
}
