//! The background tasks of the agent, none of which may end before the shutdown. Called by `app`.

use tokio_util::sync::CancellationToken;

use super::AppError;
use kube2ram_service::named_tasks::{Ended, NamedTasks};

/// All of them; dropping it ends them.
#[derive(Default)]
pub(super) struct BackgroundTasks {
    /// Tasks that write to what agents share, and end by themselves after `stop`.
    blocking_writers: NamedTasks,
    /// Tells them to.
    stop: CancellationToken,
    /// Tasks that write to what agents share, and can be aborted.
    writers: NamedTasks,
    others: NamedTasks,
}

impl BackgroundTasks {
    pub(super) fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.others.spawn(name, task);
    }

    /// A task that writes to what the agents of a node share: the eBPF programs, or netfilter.
    pub(super) fn spawn_writer(
        &mut self,
        name: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        self.writers.spawn(name, task);
    }

    /// A task that writes there from threads that may block, and that cannot be aborted: it must return soon
    /// after the token is cancelled.
    pub(super) fn spawn_blocking_writer<P: Future<Output = ()> + Send + 'static>(
        &mut self,
        name: &'static str,
        task: impl FnOnce(CancellationToken) -> P,
    ) {
        self.blocking_writers.spawn(name, task(self.stop.clone()));
    }

    /// Ends the tasks that write, and waits until they have ended.
    pub(super) async fn stop_writing(&mut self) {
        self.stop.cancel();
        while self.blocking_writers.ended().await.is_some() {}
        self.writers.shutdown().await;
    }

    pub(super) async fn until(&mut self, shutdown: &CancellationToken) -> Result<(), AppError> {
        let Self { blocking_writers, stop: _, writers, others } = self;
        tokio::select! {
            biased;
            () = shutdown.cancelled() => Ok(()),
            Some(ended) = blocking_writers.ended() => Err(why(ended)),
            Some(ended) = writers.ended() => Err(why(ended)),
            Some(ended) = others.ended() => Err(why(ended)),
        }
    }
}

fn why(ended: Ended) -> AppError {
    match ended {
        Ended::Panicked(error) => AppError::Panicked(error),
        Ended::Returned(name) => AppError::Ended(name),
    }
}
