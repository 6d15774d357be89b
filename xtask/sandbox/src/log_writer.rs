//! The agent's log, to be read after something has happened: a thread of the agent's writes it, on a busy
//! machine a moment later. Depends on procfs. Called by `agent` and `container`.

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

/// Waits until every agent in a cgroup has written what it has logged so far.
pub(crate) fn await_written(procs: &Path) {
    let deadline = Instant::now() + DEADLINE;
    let pids = fs::read_to_string(procs).unwrap_or_default();
    for pid in pids.lines() {
        while is_writing(pid) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Whether the thread does anything but wait for the next line. A process without one is no agent, or has
/// ended.
fn is_writing(pid: &str) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let stats = threads.filter_map(|thread| fs::read_to_string(thread.path().join("stat")).ok());
    // proc_pid_stat(5): the name in brackets, then the state.
    let state = stats
        .filter_map(|stat| stat.split_once(&format!("({THREAD}) ")).map(|(_, rest)| rest.to_owned()))
        .next();
    state.is_some_and(|state| state.starts_with(['D', 'R']))
}

/// As the agent calls it.
const THREAD: &str = "log-writer";
/// Somebody may have stopped it.
const DEADLINE: Duration = Duration::from_secs(5);
