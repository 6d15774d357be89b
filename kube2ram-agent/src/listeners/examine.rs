//! The examination of one pod: finds its network namespace by its processes, and opens or closes its listener
//! there. Depends on `netns`, `processes` and `datapath`. Called by `listeners`, of which it is a part.

use std::{
    io,
    sync::{Arc, atomic::AtomicBool},
};

use tokio::net::TcpListener;
use tracing::{debug, warn};

use super::{
    Ending, NetnsId, Open, PodListeners,
    netns::{self, Netns, Opened},
    processes::{self, Found},
};
use crate::{
    datapath::{DatapathError, PodOrigin, PodTarget},
    identity::CgroupId,
};
use kube2ram_service::{drain::Drain, telemetry::chain};

/// Why a pod has no in-pod listener.
#[derive(Debug, thiserror::Error)]
enum ListenError {
    /// The listener could not be opened.
    #[error("cannot listen in the pod")]
    Listen(#[source] io::Error),
    /// The target map could not be written.
    #[error("cannot redirect the pod")]
    Redirect(#[source] DatapathError),
}

impl PodListeners {
    /// Opens or closes the in-pod listener as its namespace requires, and schedules the next examination.
    pub(super) fn examine(&mut self, id: CgroupId, host: NetnsId, drain: &Drain) {
        let Some(pod) = self.pods.get_mut(&id) else { return };
        pod.schedule.begin();
        pod.first = None;
        let found = match processes::of_pod(&pod.cgroup.path, host) {
            Ok(found) => found,
            Err(error) => {
                self.metrics.failed("find");
                return self.warn_once("cannot read a pod's processes", Some(&error));
            }
        };
        match found {
            Found::Denied => {
                self.metrics.failed("find");
                let what = "pods' processes may not be looked at: add SYS_PTRACE to the container's securityContext.capabilities; the host \
                            listener serves all pods";
                return self.warn_once(what, None);
            }
            Found::Hidden => {
                self.metrics.failed("find");
                let what = "pods' processes are hidden: set hostPID: true; the host listener serves all pods";
                return self.warn_once(what, None);
            }
            // The listener would keep the namespace alive, and the network plugin may wait for the
            // namespace's end.
            Found::Nobody => {
                pod.netns = None;
                self.close(id);
            }
            Found::Own(netns, first) => {
                (pod.netns, pod.first) = (Some(netns.id), Some(first));
                let is_open_there = pod.open.as_ref().is_some_and(|open| open.netns == netns.id);
                if !self.is_contested(id, netns.id) && !is_open_there {
                    self.open_or_close(id, &netns, drain);
                }
            }
            Found::Hosts => self.leave_to_host(id),
            // Its namespace is about to go, or has yet to come.
            Found::Monitors => pod.netns = pod.netns.filter(|_| pod.open.is_some()),
        }
        // A first process moves on: from the host's namespace to its own, or from an old sandbox's to a new
        // one's. One that moves between the pod's cgroups during the search is found in none of them.
        if let Some(pod) = self.pods.get_mut(&id) {
            pod.schedule.repeat();
        }
    }

    /// Whether another pod has the same namespace. Then the two cannot be distinguished there, and neither
    /// has a listener: a process that was moved must not give one pod the other's role. The next look at
    /// either pod finds out when this has ended.
    fn is_contested(&mut self, id: CgroupId, netns: NetnsId) -> bool {
        let claimed = self.pods.iter().filter(|(_, pod)| pod.netns == Some(netns)).map(|(id, _)| *id);
        let claimed: Vec<_> = claimed.collect();
        if claimed.iter().all(|other| *other == id) {
            return false;
        }
        self.metrics.failed("contested");
        for pod in claimed {
            self.close(pod);
            if let Some(pod) = self.pods.get_mut(&pod).filter(|pod| !pod.complained) {
                pod.complained = true;
                warn!(pod.uid = %pod.cgroup.uid, "another pod's process is in this pod's network namespace; the host listener serves both pods");
            }
        }
        true
    }

    /// A pod in the host's namespace cannot reach a listener in another namespace, including one of an
    /// earlier agent.
    fn leave_to_host(&mut self, id: CgroupId) {
        let Some(pod) = self.pods.get_mut(&id) else { return };
        (pod.seen, pod.netns) = (None, None);
        if pod.open.is_some()
            && self.close(id)
            && let Some(pod) = self.pods.get_mut(&id)
        {
            pod.schedule.restart(); // its first process may be a new one, which has yet to be moved
        }
    }

    /// If it cannot be opened, the in-pod listener of the pod's earlier namespace is useless, too.
    fn open_or_close(&mut self, id: CgroupId, netns: &Netns, drain: &Drain) {
        let outcome = self.open(id, netns, drain);
        if let Err(error) = &outcome {
            self.close(id);
            self.metrics.failed(error.step());
            if matches!(error, ListenError::Listen(error) if error.kind() == io::ErrorKind::PermissionDenied)
            {
                let what = "listeners in pods are not permitted: add NET_BIND_SERVICE to the container's securityContext.capabilities; the host \
                            listener serves all pods";
                self.warn_once(what, None);
            }
        }
        let Some(pod) = self.pods.get_mut(&id) else { return };
        let has_complained = std::mem::replace(&mut pod.complained, outcome.is_err());
        if let Err(error) = outcome
            && !has_complained
        {
            warn!(cgroup.id = %id, error = chain(&error), "the host listener serves a pod");
        }
    }

    /// Opens a listener in a namespace and redirects the pod to it; then closes the one that the pod had in
    /// an earlier namespace.
    fn open(&mut self, id: CgroupId, netns: &Netns, drain: &Drain) -> Result<(), ListenError> {
        let Some(pod) = self.pods.get_mut(&id) else { return Ok(()) };
        let Opened { port, v4, v6, inside } =
            netns::listen_in(netns, &*self.kernel.pass).map_err(ListenError::Listen)?;
        let cookie = self.kernel.cookies.of(&inside).map_err(ListenError::Listen)?;
        let listeners = [Some(v4), v6].into_iter().flatten().map(TcpListener::from_std);
        let listeners = listeners.collect::<io::Result<Vec<_>>>().map_err(ListenError::Listen)?;
        let target = PodTarget { netns: cookie, port, has_ipv6: listeners.len() == 2 };
        self.kernel.targets.insert(id, target).map_err(ListenError::Redirect)?;

        let open =
            Open { port, netns: netns.id, drain: drain.child(), has_ended: Arc::new(AtomicBool::new(false)) };
        for listener in listeners {
            let ending = Ending { has_ended: Arc::clone(&open.has_ended), notify: Arc::clone(&self.ended) };
            let origin = Arc::new(PodOrigin(pod.cgroup.uid.clone()));
            (self.serve)(Arc::new(listener), origin, open.drain.clone(), ending);
        }
        debug!(cgroup.id = %id, port, "in-pod listener open");
        if let Some(former) = pod.open.replace(open) {
            former.drain.close();
        }
        Ok(())
    }

    /// Redirects a pod to the host listener, then closes its in-pod listener. In this order no connection is
    /// redirected to a closed listener. Returns whether the pod has no listener now.
    pub(super) fn close(&mut self, id: CgroupId) -> bool {
        let Some(pod) = self.pods.get_mut(&id) else { return true };
        let Some(open) = pod.open.take() else { return true };
        if let Err(error) = self.kernel.targets.remove(id) {
            pod.open = Some(open); // to be tried again
            self.metrics.failed("close");
            warn!(cgroup.id = %id, error = chain(&error), "cannot remove an in-pod listener from the target map");
            return false;
        }
        open.drain.close();
        debug!(cgroup.id = %id, port = open.port, "in-pod listener closed");
        true
    }
}

impl ListenError {
    /// The metrics label.
    fn step(&self) -> &'static str {
        match self {
            Self::Listen(_) => "listen",
            Self::Redirect(_) => "redirect",
        }
    }
}
