//! Tasks that a program cannot go on without, each with a name for the error when it ends. Depends on
//! nothing.

use tokio::task::{JoinError, JoinSet};

/// The tasks; dropping this ends them.
#[derive(Debug, Default)]
pub struct NamedTasks(JoinSet<&'static str>);

/// How a task ended that should not have.
#[derive(Debug)]
pub enum Ended {
    /// It panicked.
    Panicked(JoinError),
    /// The task of this name returned.
    Returned(&'static str),
}

impl NamedTasks {
    /// Starts one.
    pub fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.0.spawn(async move {
            task.await;
            name
        });
    }

    /// The next one that ends; `None` when there is none left.
    ///
    /// # Cancel safety
    /// Dropping the future loses nothing.
    pub async fn ended(&mut self) -> Option<Ended> {
        Some(match self.0.join_next().await? {
            Ok(name) => Ended::Returned(name),
            Err(error) => Ended::Panicked(error),
        })
    }

    /// Aborts all of them, and waits until they have ended.
    pub async fn shutdown(&mut self) {
        self.0.shutdown().await;
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    #[tokio::test]
    async fn tells_which_task_returned_that_one_panicked_and_that_none_is_left() {
        let mut tasks = NamedTasks::default();
        tasks.spawn("one", async {});
        assert!(matches!(tasks.ended().await, Some(Ended::Returned("one"))));
        tasks.spawn("two", async { panic!("on purpose") });
        assert!(matches!(tasks.ended().await, Some(Ended::Panicked(_))));
        tasks.spawn("three", pending());

        tasks.shutdown().await;

        assert!(tasks.ended().await.is_none());
    }
}
