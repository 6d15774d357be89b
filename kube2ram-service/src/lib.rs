//! What any long-running program of kube2ram needs, whatever it does: time, drain, logs, the state directory,
//! bounded HTTP listeners, readiness and metrics, and the way to the API server. Knows neither eBPF nor a
//! cloud.

#![deny(unsafe_code)]

pub mod clock;
pub mod drain;
pub mod named_tasks;
pub mod dump;
pub mod glob;
pub mod rate_limiter;
pub mod telemetry;
pub mod command_line;
pub mod state_dir;
pub mod connection_limiter;
pub mod listener;
pub mod admin;
pub mod probe;
pub mod kubernetes;
