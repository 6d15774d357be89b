//! When a pod is examined again: some time after an event, and after its listener was destroyed. Pure except
//! for tokio's clock; called by `listeners` and `examine`.

use std::time::Duration;

use tokio::time::Instant;

/// When a pod is examined next.
#[derive(Debug)]
pub(super) struct Schedule {
    /// How often it was examined since its last event, and when it will be again.
    examined: u32,
    again_at: Option<Instant>,
    /// How often a process in the pod destroyed its listener.
    ended: u32,
}

/// A pod's first process is in the pod's cgroup some milliseconds before it is in the pod's namespace, and
/// there is no event for that. After an event a pod is therefore examined again after this time, twice this
/// time, and so on.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
/// The last of these pauses is 10 s; after that, only the next event or the next full pass helps. On a busy
/// node a new namespace can take seconds: the kernel may be clearing former ones away.
const PAUSES: u32 = 12;
/// A pod that ends its listener, as it can with NET_ADMIN, has it back this much later; twice that the second
/// time, and so on up to 8 s.
const REOPEN_AFTER: Duration = Duration::from_millis(500);
const MAX_REOPEN_DOUBLINGS: u32 = 4;

impl Schedule {
    /// A new pod is due at once.
    pub(super) fn new() -> Self {
        Self { examined: 0, again_at: Some(Instant::now()), ended: 0 }
    }

    /// `None` when only an event or a full pass leads to the next examination.
    pub(super) fn next_at(&self) -> Option<Instant> {
        self.again_at
    }

    /// An examination begins.
    pub(super) fn begin(&mut self) {
        self.again_at = None;
    }

    /// An examination has ended: another one follows, unless there were enough since the last event.
    pub(super) fn repeat(&mut self) {
        if self.examined < PAUSES {
            self.again_at = Some(Instant::now() + FIRST_PAUSE * 2_u32.pow(self.examined));
            self.examined += 1;
        }
    }

    /// After an event, the next pauses are short again.
    pub(super) fn restart(&mut self) {
        self.examined = 0;
    }

    /// A process in the pod has destroyed the listener. Returns whether it is the first time.
    pub(super) fn reopen(&mut self) -> bool {
        let is_first = self.ended == 0;
        self.again_at = Some(Instant::now() + REOPEN_AFTER * 2_u32.pow(self.ended.min(MAX_REOPEN_DOUBLINGS)));
        (self.examined, self.ended) = (0, self.ended + 1);
        is_first
    }
}
