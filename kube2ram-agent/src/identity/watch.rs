//! Reports changes in directories, by inotify: of cgroups, and of pins. Owns the thread that waits for them.
//! Called by `listeners` and `reconcile`.

use std::{io, mem::MaybeUninit, os::fd::OwnedFd, path::Path, sync::Arc, thread};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::sync::mpsc;

/// Names a watched file or directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct WatchId(i32);

impl WatchId {
    /// Events were dropped: anything may have happened (inotify(7), `IN_Q_OVERFLOW`).
    pub(crate) const OVERFLOW: Self = Self(-1);
}

/// The events. Dropping it ends the thread.
#[derive(Debug)]
pub(crate) struct Watch {
    handle: Handle,
    events: mpsc::Receiver<WatchId>,
    waker: i32,
}

/// Says what is watched.
#[derive(Clone, Debug)]
pub(crate) struct Handle(Arc<OwnedFd>);

/// How many events are buffered here. More are buffered in the kernel (16,384 by default), which reports if
/// it dropped some.
const QUEUE: usize = 256;

impl Watch {
    /// Starts to watch nothing.
    pub(crate) fn start() -> io::Result<Self> {
        let inotify = Arc::new(inotify::init(CreateFlags::CLOEXEC)?);
        // Removing a watch causes an event, and this event ends the thread. This watch has no other event.
        let waker = inotify::add_watch(&*inotify, "/", WatchFlags::DELETE_SELF)?;
        let (sender, events) = mpsc::channel(QUEUE);
        let reader = Arc::clone(&inotify);
        thread::Builder::new().name("cgroup-events".into()).spawn(move || forward(&reader, &sender))?;
        Ok(Self { handle: Handle(inotify), events, waker })
    }

    pub(crate) fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Waits for events; `false` when none will come any more.
    ///
    /// # Cancel safety
    /// No event is lost.
    pub(crate) async fn next(&mut self, events: &mut Vec<WatchId>) -> bool {
        self.events.recv_many(events, QUEUE).await > 0
    }
}

impl Handle {
    /// Watches a directory for children that come and go. Again, if it is watched already, which costs
    /// nothing.
    pub(crate) fn children(&self, directory: &Path) -> io::Result<()> {
        let flags = WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVE | WatchFlags::ONLYDIR;
        inotify::add_watch(&*self.0, directory, flags).map(drop).map_err(Into::into)
    }

    /// Watches a cgroup for its first process and its last (`populated` in `cgroup.events`,
    /// Documentation/admin-guide/cgroup-v2.rst). Remove the watch with [`Self::end`]: it does not end with
    /// the cgroup, because kernfs does not notify watches of a removed file.
    pub(crate) fn population(&self, cgroup: &Path) -> io::Result<WatchId> {
        let file = cgroup.join("cgroup.events");
        inotify::add_watch(&*self.0, file, WatchFlags::MODIFY).map(WatchId).map_err(Into::into)
    }

    /// Removes a watch, which causes an event.
    pub(crate) fn end(&self, watch: WatchId) {
        if let Err(error) = inotify::remove_watch(&*self.0, watch.0) {
            // A kernel that ends watches with their files was faster.
            tracing::debug!(%error, "cannot remove an inotify watch");
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.events.close();
        if let Err(error) = inotify::remove_watch(&*self.handle.0, self.waker) {
            tracing::warn!(%error, "cannot end the thread that watches cgroups");
        }
    }
}

/// Ends when the receiver has ended, or when reading fails, which only permanent errors cause.
fn forward(inotify: &OwnedFd, events: &mpsc::Sender<WatchId>) {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = inotify::Reader::new(inotify, &mut buffer);
    loop {
        match reader.next() {
            Ok(event) if events.blocking_send(WatchId(event.wd())).is_err() => return,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "cannot read inotify events of cgroups");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn reports_children_and_ends_its_thread() {
        let directory = tempfile::tempdir().unwrap();
        let mut watch = Watch::start().unwrap();
        let inotify = Arc::downgrade(&watch.handle.0);
        watch.handle().children(directory.path()).unwrap();

        fs::create_dir(directory.path().join("pod")).unwrap();

        let mut events = Vec::new();
        assert!(timeout(Duration::from_secs(10), watch.next(&mut events)).await.unwrap());
        assert_eq!(events.len(), 1);
        drop(watch);
        let ended = async {
            while inotify.strong_count() > 0 {
                tokio::task::yield_now().await;
            }
        };
        timeout(Duration::from_secs(10), ended).await.unwrap();
    }
}
