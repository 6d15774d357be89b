//! The `kube2ram` command: flags and environment, the runtime, signals and exit codes. Everything else is in
//! the library.

use std::{
    env,
    io::{self, IsTerminal as _, Write as _},
    num::NonZero,
    path::Path,
    process::ExitCode,
    thread,
    time::Duration,
};

use kube2ram_agent::{
    app::{self, AppError},
    args::{self, ArgsError, BootGuardCommand, Command, Config, Output},
    boot_guard::{self, Guard},
    control::{self, LogLevel, Request, Shown},
    datapath::VERDICTS,
    preflight::{self, NodePaths, Preflight},
    probe,
    status::{AccessKeyReport, Explanation, Paint, Status},
    uninstall::uninstall,
};
use kube2ram_service::{
    dump,
    telemetry::{Log, Verbosity},
};
use tikv_jemallocator::Jemalloc;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// jemalloc's options (jemalloc.net, TUNING), which it reads by this name: one arena for all threads, small
/// caches of each thread, and free pages go back to the kernel within a second. What an agent holds for
/// nothing is missing elsewhere on the node.
#[expect(unsafe_code, reason = "the name is jemalloc's, and nothing else has it")]
#[unsafe(export_name = "_rjem_malloc_conf")]
pub static ALLOCATOR_OPTIONS: &[u8; 87] =
    b"narenas:1,tcache_max:16384,lg_tcache_nslots_mul:1,dirty_decay_ms:1000,muzzy_decay_ms:0\0";

/// What a process that could not be set up, or lost a part that it cannot do without, exits with.
const EXIT_FAILURE: u8 = 1;

fn main() -> ExitCode {
    // Before there is a secret.
    if let Err(error) = dump::forbid() {
        drop(writeln!(io::stderr(), "kube2ram: cannot forbid core dumps: {error}"));
        return EXIT_FAILURE.into();
    }
    let config = match Command::from_args(env::args_os(), &|name| env::var_os(name)) {
        Ok(Command::Agent(config)) => match args::refuse_unknown(env::vars_os()) {
            Ok(()) => *config,
            Err(error) => return tell(&error),
        },
        Ok(Command::BootGuard(BootGuardCommand::Apply(guard))) => {
            warn_of_foreign(&guard);
            return conclude(boot_guard::apply(&guard).map_err(Into::into));
        }
        Ok(Command::BootGuard(BootGuardCommand::Install(installation))) => {
            warn_of_foreign(&installation.guard);
            return conclude(boot_guard::install(&installation).map_err(Into::into));
        }
        Ok(Command::BootGuard(BootGuardCommand::Remove { host_root })) => {
            return conclude(boot_guard::remove(&host_root).map_err(Into::into));
        }
        Ok(Command::Explain { namespace, name, output, state_dir }) => {
            let request = Request::Explain { namespace, name };
            return tell_of(&state_dir, &request, output, |text: &Explanation| {
                (text.to_text(paint()), text.exit_code())
            });
        }
        Ok(Command::ExplainAccessKey { access_key_id, output, state_dir }) => {
            let request = Request::ExplainAccessKey { access_key_id };
            return tell_of(&state_dir, &request, output, |text: &AccessKeyReport| {
                (text.to_text(paint()), text.exit_code())
            });
        }
        Ok(Command::Live(paths)) => {
            return conclude(probe::live(&paths).map_err(Into::into));
        }
        Ok(Command::LogLevel { change, state_dir }) => {
            return tell_of(&state_dir, &Request::LogLevel(change), Output::Text, |text: &LogLevel| {
                (text.to_string(), 0)
            });
        }
        Ok(Command::Preflight(paths)) => return conclude(preflight(&paths)),
        Ok(Command::Ready(paths)) => {
            return conclude(probe::ready(&paths).map_err(Into::into));
        }
        Ok(Command::Status { output, state_dir }) => {
            return tell_of(&state_dir, &Request::Status, output, |text: &Status| {
                (text.to_text(paint()), text.exit_code())
            });
        }
        Ok(Command::Store { state_dir }) => {
            return tell_of(&state_dir, &Request::Store, Output::Json, |_: &serde_json::Value| {
                (String::new(), 0)
            });
        }
        Ok(Command::Uninstall { bpf_dir, state_dir }) => {
            return conclude(uninstall(&bpf_dir, &state_dir).map_err(Into::into));
        }
        Err(error) => return tell(&error),
    };
    let verbosity = Verbosity::new(config.log_level, config.debug.then_some(VERDICTS));
    let log = match Log::start(config.log_format, verbosity) {
        Ok(log) => log,
        Err(error) => {
            drop(writeln!(io::stderr(), "kube2ram: cannot start the thread that writes the log: {error}"));
            return EXIT_FAILURE.into();
        }
    };
    let _flushed = Flushed(log.clone());
    match run(config, log) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "kube2ram stops");
            error.downcast_ref::<AppError>().map_or(EXIT_FAILURE, AppError::exit_code).into()
        }
    }
}

/// Has the log written when it is dropped: at the end, also if that is a panic.
struct Flushed(Log);

impl Drop for Flushed {
    fn drop(&mut self) {
        self.0.flush();
    }
}

/// There is no log yet. The reader may have ended (`kube2ram --help | head -1`), which is no reason to panic.
fn tell(error: &ArgsError) -> ExitCode {
    drop(match error {
        ArgsError::Help(text) => io::stdout().write_all(text.as_bytes()),
        ArgsError::Usage(line) => writeln!(io::stderr(), "kube2ram: {line}"),
    });
    error.exit_code().into()
}

/// What guards another cloud's address is done all the same: the machine's vendor is a hint.
fn warn_of_foreign(guard: &Guard) {
    if let Some(text) = preflight::foreign_address(guard.metadata) {
        drop(writeln!(io::stderr(), "kube2ram: {text}"));
    }
}

/// Fails with the whole list when one condition is not met.
fn preflight(paths: &NodePaths) -> anyhow::Result<Preflight> {
    let preflight = Preflight::of_node(paths);
    let failures = preflight.failures().count();
    anyhow::ensure!(failures == 0, "this node is not ready for the agent\n{preflight}");
    Ok(preflight)
}

/// Queries the running agent, and shows its document: as unchanged JSON, or as text with the corresponding
/// exit code.
fn tell_of<T: serde::de::DeserializeOwned>(
    state_dir: &Path,
    request: &Request,
    output: Output,
    show: impl FnOnce(&T) -> (String, u8),
) -> ExitCode {
    let shown = control::ask(state_dir, request)
        .and_then(|document| control::show(document, output == Output::Json, show))
        .unwrap_or_else(|error| Shown { text: String::new(), code: error.exit_code(), error: Some(error) });
    drop(io::stdout().write_all(shown.text.as_bytes()));
    if let Some(error) = shown.error {
        drop(writeln!(io::stderr(), "kube2ram: {:#}", anyhow::Error::new(error)));
    }
    shown.code.into()
}

fn paint() -> Paint {
    let variable = |name| env::var(name).ok();
    Paint::of(io::stdout().is_terminal(), variable("NO_COLOR").as_deref(), variable("TERM").as_deref())
}

/// How a subcommand ends: its output and exit code.
fn conclude(outcome: anyhow::Result<impl std::fmt::Display>) -> ExitCode {
    match outcome {
        Ok(report) => {
            drop(writeln!(io::stdout(), "{report}"));
            ExitCode::SUCCESS
        }
        Err(error) => {
            drop(writeln!(io::stderr(), "kube2ram: {error:#}"));
            EXIT_FAILURE.into()
        }
    }
}

/// As many threads as there are processors, but no more than this: a few already serve more than a node's
/// pods ask for, and each takes memory.
const MAX_THREADS: usize = 4;

fn run(config: Config, log: Log) -> anyhow::Result<()> {
    let processors = thread::available_parallelism().map_or(1, NonZero::get);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(processors.min(MAX_THREADS))
        .enable_all()
        .build()?;
    let ended = runtime.block_on(serve(config, log));
    if ended.as_ref().is_err_and(|error| error.is::<SecondSignal>()) {
        // Nothing is waited for, blocking work included.
        runtime.shutdown_background();
    } else {
        // What still reads a disk that hangs must not keep the process.
        runtime.shutdown_timeout(BLOCKING_WORK_LIMIT);
    }
    ended
}

/// How long the end of the agent waits for blocking work.
const BLOCKING_WORK_LIMIT: Duration = Duration::from_secs(2);

/// Why the agent did not drain.
#[derive(Debug, thiserror::Error)]
#[error("a second signal ended the agent before it had drained")]
struct SecondSignal;

async fn serve(config: Config, log: Log) -> anyhow::Result<()> {
    let shutdown = CancellationToken::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let environment = |name: &str| env::var(name).ok();
    let app = app::run(config, environment, log, shutdown.clone());
    tokio::pin!(app);
    tokio::select! {
        ended = &mut app => return Ok(ended?),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    shutdown.cancel();
    tokio::select! {
        ended = app => Ok(ended?),
        _ = terminate.recv() => Err(SecondSignal.into()),
        _ = interrupt.recv() => Err(SecondSignal.into()),
    }
}
