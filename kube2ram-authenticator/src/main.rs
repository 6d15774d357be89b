//! The `kube2ram-authenticator` command: flags and environment, the runtime, signals and exit codes.
//! Everything else is in the library.

use std::{
    env, fmt,
    io::{self, BufRead as _, Read as _, Write as _},
    net::SocketAddr,
    num::NonZero,
    os::unix::fs::chown,
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::Context as _;
use kube2ram_authenticator::{
    args::{Add, ApiVersion, Args, ArgsError, Check, Command, Init, Output, Server, Token, Verify},
    backend::{self, Backends},
    check::{self, Checked},
    client::{self, AssumedRole, StsChoice},
    config::{self, Config},
    identity::Identity,
    serve::{self, Listeners, Parts},
    tls,
    token::ClusterId,
    verify::{self, Rates, Verifier},
    webhook,
};
use kube2ram_cloud::{
    Endpoint, StsClient,
    alibaba::{
        caller_identity::CallerIdentityClient,
        endpoint::{Region, global},
    },
};
use kube2ram_service::{
    admin::Readiness,
    clock::{Clock, SystemClock},
    dump,
    kubernetes::ClientConfig,
    named_tasks::NamedTasks,
    probe::{self, Probe, ProbeError, SocketPaths},
    telemetry::{Log, Verbosity, chain},
};
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio::{
    runtime::{Builder, Runtime},
    signal::unix::{SignalKind, signal},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

/// What a process that could not be set up, or lost a part that it cannot do without, exits with.
const EXIT_FAILURE: u8 = 1;
/// How long logins may go on once the server is to stop. The API server waits 30 s for one.
const GRACE: Duration = Duration::from_secs(20);
/// An answer is a word.
const ANSWER_MAX_BYTES: u64 = 64;
/// As many threads as there are processors, but no more than this: a login is little work.
const MAX_THREADS: usize = 4;

fn main() -> ExitCode {
    // Before there is a secret.
    if let Err(error) = dump::forbid() {
        complain(&format!("cannot forbid core dumps: {error}"));
        return EXIT_FAILURE.into();
    }
    let args = match Args::parse(env::args_os(), &|name| env::var(name).ok()) {
        Ok(args) => args,
        Err(error) => return tell(&error),
    };
    let Args { command, log_format, log_level, notices } = args;
    match command {
        Command::Server(server) => {
            let log = match Log::start(log_format, Verbosity::new(log_level, None)) {
                Ok(log) => log,
                Err(error) => {
                    complain(&format!("cannot start the thread that writes the log: {error}"));
                    return EXIT_FAILURE.into();
                }
            };
            let ended = run(*server, &notices, &log);
            if let Err(error) = &ended {
                tracing::error!(error = format!("{error:#}"), "kube2ram-authenticator stops");
            }
            log.flush();
            if ended.is_ok() { ExitCode::SUCCESS } else { EXIT_FAILURE.into() }
        }
        Command::Add(command) => conclude(add(command)),
        Command::Check(command) => {
            notices.iter().for_each(|notice| complain(notice));
            conclude(check(command))
        }
        Command::Init(command) => conclude(init(&command)),
        Command::Live { probe_dir } => probed(probe::live(&SocketPaths::new(&probe_dir, &probe_dir))),
        Command::Ready { probe_dir } => probed(probe::ready(&SocketPaths::new(&probe_dir, &probe_dir))),
        Command::Token(command) => conclude(token(command)),
        Command::Verify(command) => conclude(verify(command)),
        Command::Version { is_short, output } => conclude(Ok(version(is_short, output))),
    }
}

/// What a command prints, and whether the answer is yes.
struct Printed {
    text: String,
    is_yes: bool,
}

impl Printed {
    fn yes(text: impl fmt::Display) -> Self {
        Self { text: format!("{text}\n"), is_yes: true }
    }
}

/// There may be no log. The reader may have ended (`… | head -1`), which is no reason to panic.
fn tell(error: &ArgsError) -> ExitCode {
    match error {
        ArgsError::Help(text) => drop(io::stdout().write_all(text.as_bytes())),
        ArgsError::Usage(line) => complain(line),
    }
    error.exit_code().into()
}

fn complain(line: &str) {
    drop(writeln!(io::stderr(), "kube2ram-authenticator: {line}"));
}

fn conclude(outcome: anyhow::Result<Printed>) -> ExitCode {
    match outcome {
        Ok(Printed { text, is_yes }) => {
            drop(io::stdout().write_all(text.as_bytes()));
            if is_yes { ExitCode::SUCCESS } else { EXIT_FAILURE.into() }
        }
        Err(error) => {
            complain(&format!("{error:#}"));
            EXIT_FAILURE.into()
        }
    }
}

fn probed(state: Result<impl fmt::Display, ProbeError>) -> ExitCode {
    conclude(state.map(Printed::yes).map_err(|error| match error {
        // Its text names the agent.
        ProbeError::Silent(source) => {
            anyhow::Error::new(source).context("the server of this container does not answer")
        }
        ProbeError::Listen { .. } | ProbeError::Pending(_) => error.into(),
    }))
}

fn version(is_short: bool, output: Output) -> Printed {
    let version = env!("CARGO_PKG_VERSION");
    Printed::yes(match output {
        Output::Text if is_short => version.to_owned(),
        Output::Text => format!("kube2ram-authenticator {version}"),
        Output::Json => json!({ "Version": version }).to_string(),
        Output::Yaml => format!("Version: {version}"),
    })
}

/// JSON is YAML, too.
fn shown(output: Output, document: &Value, text: impl fmt::Display) -> String {
    match output {
        Output::Json | Output::Yaml => format!("{document:#}\n"),
        Output::Text => format!("{text}"),
    }
}

fn add(command: Add) -> anyhow::Result<Printed> {
    let Add { addition, kubeconfigs: mut paths, context, server, asks } = command;
    if paths.is_empty() {
        let home = env::var_os("HOME").context("there is no kubeconfig: give --kubeconfig")?;
        paths.push(PathBuf::from(home).join(".kube/config"));
    }
    let client = ClientConfig::Files { paths, context };
    let _installed_before = rustls::crypto::ring::default_provider().install_default();
    let runtime = runtime()?;
    let edit = runtime.block_on(backend::add::prepare(client, server, &addition))?;
    let lines = edit.lines();
    edit.warnings().iter().for_each(|warning| complain(warning));
    if asks {
        // Not into the output, which a script may read.
        write!(io::stderr(), "{lines}Add this? [y/N] ")?;
        let mut answer = String::new();
        io::stdin().lock().take(ANSWER_MAX_BYTES).read_line(&mut answer)?;
        if !["y", "yes"].contains(&answer.trim().to_ascii_lowercase().as_str()) {
            return Ok(Printed { text: "nothing was changed\n".to_owned(), is_yes: false });
        }
    }
    runtime.block_on(edit.write())?;
    Ok(Printed { text: format!("added to {lines}"), is_yes: true })
}

fn init(command: &Init) -> anyhow::Result<Printed> {
    let webhook = config::Webhook::load(&command.given)?;
    let wanted = wanted(&webhook);
    let now = SystemClock.now();
    if command.is_check {
        let findings = tls::check(&wanted, now)?;
        let text: String = findings.iter().map(|finding| format!("{finding}\n")).collect();
        let is_yes = findings.is_empty();
        return Ok(if is_yes { Printed::yes("nothing is to be done") } else { Printed { text, is_yes } });
    }
    let report = tls::init(&wanted, now)?;
    if let Some(owner) = command.owner {
        let directory = &webhook.state_dir;
        for path in [directory.clone(), directory.join("cert.pem"), directory.join("key.pem")] {
            chown(&path, Some(owner), Some(owner))
                .with_context(|| format!("cannot change the owner of {}", path.display()))?;
        }
    }
    Ok(Printed::yes(report))
}

/// What the API server needs of the webhook.
fn wanted(webhook: &config::Webhook) -> tls::Init {
    let client = webhook.client_files.clone();
    tls::Init {
        directory: webhook.state_dir.clone(),
        kubeconfig: webhook.generate_kubeconfig.clone(),
        hostname: webhook.hostname.clone(),
        address: webhook.address,
        port: webhook.port,
        client: client.map(|(certificate, key)| tls::ClientFiles { certificate, key }),
    }
}

fn check(command: Check) -> anyhow::Result<Printed> {
    let identity = check::identity(&command.arn, command.session_name, command.user_id)?;
    let config = Config::load(command.given)?;
    let checked = runtime()?.block_on(async {
        let (clock, readiness) = (Arc::new(SystemClock), Readiness::default());
        let backends = connect(config, clock, readiness, &mut Registry::default()).await?;
        backends.read_once().await?;
        anyhow::Ok(Checked::of(&backends.indexes(), &identity))
    })?;
    let text = shown(command.output, &checked.to_json(), &checked);
    Ok(Printed { text, is_yes: checked.is_mapped() })
}

async fn connect(
    config: Config,
    clock: Arc<dyn Clock>,
    readiness: Readiness,
    registry: &mut Registry,
) -> Result<Backends, backend::BackendError> {
    // An error means that it is installed already.
    let _installed_before = rustls::crypto::ring::default_provider().install_default();
    let settings = backend::Settings {
        client: config.client(),
        backends: config.backends,
        config_file: config.config_file,
        dynamic_file: config.dynamic_file,
        instance: rustix::system::uname().nodename().to_string_lossy().into(),
        readiness,
    };
    Backends::connect(settings, clock, registry).await
}

/// The endpoints of STS, to try in their order.
fn endpoints(only: Option<Endpoint>, region: Option<&Region>) -> anyhow::Result<Vec<Endpoint>> {
    match (only, region) {
        (Some(endpoint), _) => Ok(vec![endpoint]),
        (None, Some(region)) => Ok(region.sts_endpoints()?),
        (None, None) => Ok(vec![global()]),
    }
}

fn verify(command: Verify) -> anyhow::Result<Printed> {
    let config = Config::load(command.given)?;
    let cluster = ClusterId::parse(&config.cluster_id)?;
    let endpoints = endpoints(command.sts_endpoint, config.region.as_ref())?;
    let _installed_before = rustls::crypto::ring::default_provider().install_default();
    let client = StsClient::try_new(endpoints.iter().all(Endpoint::is_https))?;
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let sts = CallerIdentityClient::new(client, endpoints, Arc::clone(&clock));
    let settings = verify::Settings { cache_ttl: Duration::ZERO, rates: Rates::default() };
    let tasks = TaskTracker::new();
    let verifier = Verifier::new(cluster, settings, sts, clock, tasks, &mut Registry::default());
    let verified = runtime()?.block_on(verifier.verify(&command.token))?;
    let Identity { arn, canonical_arn, account_id, user_id, session_name, access_key_id } =
        &*verified.identity;
    let session_name = session_name.as_deref().unwrap_or_default();
    // ack-ram-authenticator's fields.
    let document = json!({
        "ARN": arn, "CanonicalARN": canonical_arn, "AccountID": account_id, "UserID": user_id,
        "SessionName": session_name, "AccessKeyID": access_key_id,
    });
    let text = format!(
        "ARN            {arn}\ncanonical ARN  {canonical_arn}\naccount        {account_id}\nuser id        {user_id}\n\
         session        {session_name}\naccess key id  {access_key_id}\n"
    );
    Ok(Printed { text: shown(command.output, &document, text), is_yes: true })
}

fn token(command: Token) -> anyhow::Result<Printed> {
    let home = env::var_os("HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
    let cache = home.as_ref().map(|home| home.join(".kube/cache/kube2ram-authenticator"));
    let credentials = command.credentials;
    let request = client::Request {
        cluster: ClusterId::parse(&command.cluster_id)?,
        role: command.role.map(|role| AssumedRole {
            role: role.arn,
            session: role.session,
            external_id: role.external_id,
        }),
        version: match command.api_version {
            ApiVersion::V1 => client::Version::V1,
            ApiVersion::V1beta1 => client::Version::V1Beta1,
        },
        options: client::Options {
            node_role: credentials.node_role,
            ignore_environment: credentials.ignore_environment,
            ignore_profiles: credentials.ignore_profiles,
            profile: credentials.profile,
            profile_file: credentials.profile_file,
        },
        sts: match (command.sts_endpoint, command.region) {
            (Some(endpoint), _) => StsChoice::Only(endpoint),
            (None, Some(region)) => StsChoice::Region(region.to_string().into()),
            (None, None) => StsChoice::Global,
        },
        cache: cache.filter(|_| command.is_cached),
    };
    let variable = |name: &str| env::var(name).ok();
    let text = runtime()?.block_on(client::token(request, variable, home, Arc::new(SystemClock)))?;
    if !command.is_bare {
        return Ok(Printed::yes(text));
    }
    let document: Value = serde_json::from_str(&text).context("cannot read the token that was made")?;
    let token = document["status"]["token"].as_str().context("the document that was made has no token")?;
    Ok(Printed::yes(token))
}

fn runtime() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

fn run(server: Server, notices: &[String], log: &Log) -> anyhow::Result<()> {
    notices.iter().for_each(|notice| warn!("{notice}"));
    let processors = thread::available_parallelism().map_or(1, NonZero::get);
    let runtime =
        Builder::new_multi_thread().worker_threads(processors.min(MAX_THREADS)).enable_all().build()?;
    let ended = runtime.block_on(until_signal(server, log));
    if ended.as_ref().is_err_and(|error| error.is::<SecondSignal>()) {
        // Nothing is waited for, blocking work included.
        runtime.shutdown_background();
    }
    ended
}

/// Why the server did not drain.
#[derive(Debug, thiserror::Error)]
#[error("a second signal ended the server before it had drained")]
struct SecondSignal;

async fn until_signal(server: Server, log: &Log) -> anyhow::Result<()> {
    let shutdown = CancellationToken::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut serving = Box::pin(serve(server, log, shutdown.clone()));
    tokio::select! {
        ended = &mut serving => return ended,
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    shutdown.cancel();
    tokio::select! {
        ended = serving => ended,
        _ = terminate.recv() => Err(SecondSignal.into()),
        _ = interrupt.recv() => Err(SecondSignal.into()),
    }
}

async fn serve(server: Server, log: &Log, shutdown: CancellationToken) -> anyhow::Result<()> {
    let config = Config::load(server.given)?;
    config.notices.iter().for_each(|notice| warn!("{notice}"));
    let cluster = ClusterId::parse(&config.cluster_id)?;
    let sts = endpoints(server.sts_endpoint, config.region.as_ref())?;
    let wanted = wanted(&config.webhook);
    let tls = tls::Settings {
        certificate: match &server.tls_files {
            Some((certificate, key)) => {
                tls::Source::Files { certificate: certificate.clone(), key: key.clone() }
            }
            None => tls::Source::Own { directory: wanted.directory.clone(), names: wanted.names() },
        },
        client_ca: server.client_ca,
    };
    let makes_files = server.tls_files.is_none() && !config.kubeconfig_pregenerated;
    let webhook_address = SocketAddr::new(config.webhook.address, config.webhook.port);
    let admin_address = SocketAddr::new(server.metrics_address, server.metrics_port);

    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let readiness = Readiness::default();
    let mut registry = Registry::with_prefix("kube2ram_authenticator");
    log.register(&mut registry);
    let connecting = connect(config, Arc::clone(&clock), readiness.clone(), &mut registry);
    let backends = Arc::new(connecting.await?);
    let map = backends.map();
    let mut background = NamedTasks::default();
    let until = shutdown.clone();
    background.spawn("mappings", async move {
        if let Err(error) = backends.run(until).await {
            tracing::error!(
                error = format!("{:#}", anyhow::Error::new(error)),
                "mappings are not read any more"
            );
        }
    });
    let settings = serve::Settings {
        cluster,
        sts,
        tls,
        init: makes_files.then_some(wanted),
        verify: verify::Settings {
            cache_ttl: server.sts_cache_ttl,
            rates: Rates {
                key: server.sts_rates.key,
                known: server.sts_rates.known,
                unknown: server.sts_rates.unknown,
            },
        },
        webhook: webhook::Settings {
            deny_with_error: server.deny_with_error,
            extended_extra: server.extended_extra,
        },
        grace: GRACE,
    };
    let listeners = Listeners::bind(webhook_address, admin_address).await?;
    let probe = Probe::open(&SocketPaths::new(&server.probe_dir, &server.probe_dir));
    // ack-ram-authenticator's manifests have no such directory.
    let probe = probe
        .inspect_err(|error| info!(error = chain(error), "the commands live and ready get no answer"))
        .ok();
    let parts = Parts { map, clock, readiness, registry, background, listeners, probe };
    Ok(serve::run(settings, parts, shutdown).await?)
}
