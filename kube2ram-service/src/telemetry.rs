//! Logs to standard error, as text or JSON, and the formatter for errors. The only module that uses
//! tracing-subscriber. Called by `main` ([`Log::start`]), by `app` (changes of the level), and by all modules
//! that log an error.

pub mod lossy;

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    error::Error,
    io,
    panic::{self, PanicHookInfo},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use prometheus_client::registry::Registry as Metrics;
use tracing::{
    Metadata, callsite::rebuild_interest_cache, error, level_filters::LevelFilter, subscriber::Interest, warn,
};
use tracing_subscriber::{
    Layer as _, Registry, fmt,
    layer::{Context, Filter, SubscriberExt as _},
    util::SubscriberInitExt as _,
};

use self::lossy::{LossyWriter, Room};

/// What our own targets begin with.
const OURS: &str = "kube2ram";
const KUBE_CLIENT: &str = "kube_client";

/// How logs are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

/// The log level. Clones share it, and it can change at any time: tracing's call-site caches are then
/// rebuilt, so that a disabled line costs as little as a statically disabled one.
#[derive(Clone, Debug)]
pub struct Verbosity(Arc<Levels>);

#[derive(Debug)]
struct Levels {
    configured: LevelFilter,
    /// A target that is logged from debug on at any level.
    verbose: Option<&'static str>,
    /// Of [`LEVELS`].
    now: AtomicUsize,
}

const LEVELS: [LevelFilter; 6] = [
    LevelFilter::OFF,
    LevelFilter::ERROR,
    LevelFilter::WARN,
    LevelFilter::INFO,
    LevelFilter::DEBUG,
    LevelFilter::TRACE,
];

impl Verbosity {
    /// The level of the flags. Libraries are logged from `warn` on, whatever the level: their details do not
    /// help operators. `verbose` is a target that is logged from debug on at any level.
    pub fn new(configured: LevelFilter, verbose: Option<&'static str>) -> Self {
        let now = AtomicUsize::new(index(configured));
        Self(Arc::new(Levels { configured, verbose, now }))
    }

    /// What is logged now.
    pub fn level(&self) -> LevelFilter {
        LEVELS[self.0.now.load(Ordering::Relaxed).min(LEVELS.len() - 1)]
    }

    /// What the flags say.
    pub fn configured(&self) -> LevelFilter {
        self.0.configured
    }

    /// Changes what is logged.
    pub fn set(&self, level: LevelFilter) {
        self.0.now.store(index(level), Ordering::Relaxed);
        rebuild_interest_cache();
    }

    fn level_of(&self, target: &str) -> LevelFilter {
        let level = self.level();
        match target {
            verbose if self.0.verbose == Some(verbose) => level.max(LevelFilter::DEBUG),
            // It also returns every error, and its own log lines contain whole answers of the API server,
            // with the environment of other pods.
            library if library.starts_with(KUBE_CLIENT) => LevelFilter::OFF,
            ours if ours.starts_with(OURS) => level,
            _ => level.min(LevelFilter::WARN),
        }
    }
}

fn index(level: LevelFilter) -> usize {
    LEVELS.iter().position(|other| *other == level).unwrap_or_default()
}

impl<S> Filter<S> for Verbosity {
    fn enabled(&self, metadata: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        *metadata.level() <= self.level_of(metadata.target())
    }

    fn callsite_enabled(&self, metadata: &'static Metadata<'static>) -> Interest {
        if *metadata.level() <= self.level_of(metadata.target()) {
            Interest::always()
        } else {
            Interest::never()
        }
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.0.verbose.map_or(self.level(), |verbose| self.level_of(verbose)))
    }
}

/// The process's log.
#[derive(Clone, Debug)]
pub struct Log {
    verbosity: Verbosity,
    writer: LossyWriter,
}

impl Log {
    /// Sets up logging: a thread writes lines to standard error, and drops and counts them while standard
    /// error is not read. Panics are logged the same way.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn start(format: LogFormat, verbosity: Verbosity) -> io::Result<Self> {
        let writer = LossyWriter::start(io::stderr(), Room::default(), report_lost)?;
        let layer = fmt::layer::<Registry>().with_writer(writer.clone());
        let filter = verbosity.clone();
        match format {
            LogFormat::Json => tracing_subscriber::registry()
                .with(layer.json().flatten_event(true).with_filter(filter))
                .init(),
            LogFormat::Text => {
                tracing_subscriber::registry().with(layer.with_ansi(false).with_filter(filter)).init()
            }
        }
        panic::set_hook(Box::new(report_panic));
        Ok(Self { verbosity, writer })
    }

    /// What is logged.
    pub fn verbosity(&self) -> &Verbosity {
        &self.verbosity
    }

    /// Waits for what was logged to be written, a moment at most; the last thing that a process does.
    pub fn flush(&self) {
        let _is_written = self.writer.flush(FLUSH_LIMIT);
    }

    /// Registers the number of lines that were lost.
    pub fn register(&self, registry: &mut Metrics) {
        register_lost(registry, &self.writer);
    }
}

/// Registers the number of lines that `writer` lost.
pub fn register_lost(registry: &mut Metrics, writer: &LossyWriter) {
    let help = "Log lines dropped because standard error was not read fast enough";
    registry.register("log_lines_lost", help, writer.lost());
}

fn report_lost(lines: u64) {
    warn!(lines, "log lines were lost: standard error was not read fast enough");
}

/// The default hook writes to standard error itself, and so waits for its reader while it holds a lock that
/// other threads need.
fn report_panic(panic: &PanicHookInfo<'_>) {
    let backtrace = Backtrace::capture();
    let backtrace =
        (backtrace.status() == BacktraceStatus::Captured).then(|| tracing::field::display(&backtrace));
    error!(
        location = panic.location().map(tracing::field::display),
        thread = thread::current().name(),
        error = panic.payload_as_str().unwrap_or("no message"),
        backtrace,
        "a thread panicked"
    );
}

/// How long the process waits for the log's reader before it exits.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);

/// Writes an error with its causes on one line. A cause that the text before it already ends with, as kube's
/// and hyper's errors do, is not repeated.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    for cause in std::iter::successors(error.source(), |&error| error.source()) {
        let cause = cause.to_string();
        if !text.ends_with(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use tracing_subscriber::fmt::MakeWriter as _;

    use super::*;

    const VERDICTS: &str = "kube2ram::kernel";

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Layer {
        text: &'static str,
        source: Option<Box<Self>>,
    }

    #[test]
    fn a_panic_is_logged_as_other_errors_are_and_waits_for_no_reader() {
        let (mut reader, output) = io::pipe().unwrap();
        let writer =
            LossyWriter::start(output, Room { lines_bytes: 1024, errors_bytes: 64 * 1024 }, |_| {}).unwrap();
        let subscriber = fmt().with_ansi(false).with_writer(writer.clone()).finish();
        // The pipe is not read: it is full, and so is the room of other lines.
        let mut filled = 0;
        while writer.flush(Duration::from_millis(100)) {
            filled += 1;
            assert!(filled < 10_000);
            writer.make_writer().write_all(&[b'x'; 1000]).unwrap();
        }

        panic::set_hook(Box::new(report_panic));
        let panicking = thread::Builder::new().name("a-part".into()).spawn(|| {
            tracing::subscriber::with_default(subscriber, || panic!("the {} of it", "end"));
        });
        let panicked = panicking.unwrap().join();
        drop(panic::take_hook());

        assert!(panicked.is_err(), "although nobody has read yet");
        let reading = thread::spawn(move || {
            let (mut text, mut buffer) = (String::new(), [0; 4096]);
            while !text.contains("a thread panicked") {
                let read = reader.read(&mut buffer).unwrap();
                assert!(read > 0, "{text}");
                text.push_str(&String::from_utf8_lossy(&buffer[..read]));
            }
            text
        });
        assert!(writer.flush(Duration::from_secs(20)));
        let text = reading.join().unwrap();
        for part in ["ERROR", "telemetry.rs:", "a-part", "the end of it"] {
            assert!(text.contains(part), "{part} in {}", text.trim_start_matches('x'));
        }
    }

    #[test]
    fn a_cause_is_written_once() {
        let chained = |texts: &[&'static str]| {
            let layers = texts.iter().rev().fold(None, |source, text| Some(Box::new(Layer { text, source })));
            chain(&*layers.unwrap())
        };

        assert_eq!(
            chained(&["watch failed", "refused", "os error 111"]),
            "watch failed: refused: os error 111"
        );
        assert_eq!(
            chained(&[
                "service: client error (Connect)",
                "client error (Connect)",
                "tcp connect error",
                "refused"
            ]),
            "service: client error (Connect): tcp connect error: refused"
        );
        assert_eq!(chained(&["once"]), "once");
    }

    #[test]
    fn what_kube_logs_by_itself_is_never_shown() {
        let verbosity = Verbosity::new(LevelFilter::TRACE, Some(VERDICTS));

        for target in ["kube_client", "kube_client::client", "kube_client::client::builder"] {
            assert_eq!(verbosity.level_of(target), LevelFilter::OFF, "{target}");
        }
        assert_eq!(verbosity.level_of("kube_runtime::watcher"), LevelFilter::WARN);
    }

    #[test]
    fn libraries_are_logged_from_warn_on_and_verdicts_where_they_are_wanted() {
        let plain = Verbosity::new(LevelFilter::INFO, None);
        let verdicts = Verbosity::new(LevelFilter::INFO, Some(VERDICTS));
        let levels = |verbosity: &Verbosity| {
            ["kube2ram_agent::server", VERDICTS, "hyper::proto"].map(|target| verbosity.level_of(target))
        };

        assert_eq!(levels(&plain), [LevelFilter::INFO, LevelFilter::INFO, LevelFilter::WARN]);
        assert_eq!(levels(&verdicts), [LevelFilter::INFO, LevelFilter::DEBUG, LevelFilter::WARN]);
        plain.set(LevelFilter::TRACE);
        assert_eq!(levels(&plain), [LevelFilter::TRACE, LevelFilter::TRACE, LevelFilter::WARN]);
        plain.set(LevelFilter::ERROR);
        assert_eq!(levels(&plain), [LevelFilter::ERROR; 3]);
        assert_eq!((plain.level(), plain.configured()), (LevelFilter::ERROR, LevelFilter::INFO));
    }
}
