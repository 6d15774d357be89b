//! Logs to standard error, as text or JSON, and the one way in which errors are written there. The only home of tracing-subscriber.
//! Called by `main` ([`init`]) and by whoever logs an error.

use std::{error::Error, io};

use tracing::level_filters::LevelFilter;
use tracing_subscriber::{
    Layer as _, Registry, filter::Targets, fmt, layer::SubscriberExt as _, util::SubscriberInitExt as _,
};

/// The target of the kernel half's verdicts.
pub(crate) const VERDICTS: &str = "kube2ram::kernel";

/// How logs are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

/// Sets the process's log up; `verdicts` lets those of the kernel half through at any level. Libraries are heard from `warn` on, whatever the level: theirs is not ours to explain.
pub fn init(format: LogFormat, level: LevelFilter, verdicts: bool) {
    let filter = Targets::new()
        .with_default(level.min(LevelFilter::WARN))
        .with_target("kube2ram", level)
        .with_target(VERDICTS, if verdicts { level.max(LevelFilter::DEBUG) } else { level })
        .with_target("kube2ram_agent", level);
    let layer = fmt::layer::<Registry>().with_writer(io::stderr);
    match format {
        LogFormat::Json => {
            tracing_subscriber::registry().with(layer.json().flatten_event(true).with_filter(filter)).init()
        }
        LogFormat::Text => {
            tracing_subscriber::registry().with(layer.with_ansi(false).with_filter(filter)).init()
        }
    }
}

/// Writes an error with its causes on one line.
pub(crate) fn chain(error: &dyn Error) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
