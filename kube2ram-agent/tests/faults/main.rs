//! Rung 2: the agent and the uninstall are killed, or one of their system calls fails, at every step that
//! there is. Pods that were protected stay so, and the next plain start makes everything good. strace injects
//! the faults: the product has no code for them.

#![expect(clippy::expect_used, clippy::unwrap_used, reason = "a failed step fails the test")]

mod faults;
mod live;
mod node;
mod steps;
