//! The background tasks of the agent, none of which may end before the shutdown. Called by `app`.

use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

use super::AppError;

/// All of them; dropping it ends them.
#[derive(Default)]
pub(super) struct BackgroundTasks {
    /// Tasks that write to what agents share, and end by themselves after `stop`.
    blocking_writers: JoinSet<&'static str>,
    /// Tells them to.
    stop: CancellationToken,
    /// Tasks that write to what agents share, and can be aborted.
    writers: JoinSet<&'static str>,
    others: JoinSet<&'static str>,
}

impl BackgroundTasks {
    pub(super) fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        spawn(&mut self.others, name, task);
    }

    /// A task that writes to what the agents of a node share: the eBPF programs, or netfilter.
    pub(super) fn spawn_writer(
        &mut self,
        name: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        spawn(&mut self.writers, name, task);
    }

    /// A task that writes there from threads that may block, and that cannot be aborted: it must return soon
    /// after the token is cancelled.
    pub(super) fn spawn_blocking_writer<P: Future<Output = ()> + Send + 'static>(
        &mut self,
        name: &'static str,
        task: impl FnOnce(CancellationToken) -> P,
    ) {
        spawn(&mut self.blocking_writers, name, task(self.stop.clone()));
    }

    /// Ends the tasks that write, and waits until they have ended.
    pub(super) async fn stop_writing(&mut self) {
        self.stop.cancel();
        while self.blocking_writers.join_next().await.is_some() {}
        self.writers.shutdown().await;
    }

    pub(super) async fn until(&mut self, shutdown: &CancellationToken) -> Result<(), AppError> {
        let Self { blocking_writers, stop: _, writers, others } = self;
        tokio::select! {
            biased;
            () = shutdown.cancelled() => Ok(()),
            Some(ended) = blocking_writers.join_next() => Err(why(ended)),
            Some(ended) = writers.join_next() => Err(why(ended)),
            Some(ended) = others.join_next() => Err(why(ended)),
        }
    }
}

fn spawn(
    background: &mut JoinSet<&'static str>,
    name: &'static str,
    task: impl Future<Output = ()> + Send + 'static,
) {
    background.spawn(async move {
        task.await;
        name
    });
}

fn why(ended: Result<&'static str, JoinError>) -> AppError {
    match ended {
        Ok(name) => AppError::Ended(name),
        Err(error) => AppError::Panicked(error),
    }
}
