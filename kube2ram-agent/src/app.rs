//! The composition root: creates all parts, spawns the long-running ones, and stops when one of them ends.
//! Depends on all other modules; called by `main`.

#[cfg(test)]
mod budget;
mod cluster;
mod discovery;
mod error;
mod frontend;
mod host_port;
mod log_level;
mod metrics;
mod node;
mod node_name;
mod operator;
mod outside;
mod background_tasks;
mod prefetch;
mod service;
mod snapshot;
mod store;
mod warm_up;

use std::{pin::pin, sync::Arc, time::Duration};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

pub use self::error::AppError;
use self::{
    background_tasks::BackgroundTasks,
    frontend::Frontend,
    node::Node,
    service::{Opened, Service, StsAccess},
};
use crate::{
    args::{Config, CredentialsFrom, is_of_own_credentials},
    control::Control,
    datapath::Datapath,
    handover::{self, LockOutcome, OutgoingAgent, StandbyListener},
    probe::{Probe, SocketPaths},
};
use kube2ram_cloud::{CloudSettings, StsClient};
use kube2ram_service::{
    admin::{Pending, Readiness},
    state_dir::StateDir,
    telemetry::{Log, chain},
};

/// How long in-pod listeners may take to open before the outgoing agent is told to stop. The outgoing agent
/// waits a little longer.
const OPENING: Duration = Duration::from_secs(5);

/// Runs the agent until `shutdown`: stands by while another agent serves this node, serves, hands over to a
/// standby agent, if there is one, and drains. `environment` looks up a variable; `log` receives the log
/// lines.
///
/// The API server, the metadata server and STS may all be away: what they are needed for is then answered
/// with 503.
///
/// # Errors
/// [`AppError`]: something without which no pod could be served.
///
/// # Cancel safety
/// Dropping the future stops serving at once. The eBPF programs stay attached either way.
pub async fn run(
    config: Config,
    environment: impl Fn(&str) -> Option<String>,
    log: Log,
    shutdown: CancellationToken,
) -> Result<(), AppError> {
    for notice in &config.notices {
        warn!("{notice}");
    }
    // An error means that a test has installed it already.
    let _installed_before = rustls::crypto::ring::default_provider().install_default();
    // What is wrong with it, no attempt mends.
    let sts = sts_access(environment, &config);
    raise_descriptor_limit();
    let node = Node::examine(&config)?;
    let state = StateDir::open(&config.state_dir).map_err(AppError::StateDir)?;
    let mut background = BackgroundTasks::default();
    let readiness = Readiness::default();
    state.hold().map_err(AppError::StateDir)?;
    let paths = SocketPaths::new(&config.pod_dir, &config.state_dir);
    let probe = Probe::open(&paths).map_err(AppError::Probe)?;
    let starting = readiness.wait_for("the start");
    background.spawn("the probes", probe.run(readiness.clone()));

    // If the running agent does not hand over, there is nothing to prepare: this agent only waits for its
    // end. Kubernetes may end it only when this agent is ready.
    let mut starting = Some(starting);
    let claim = handover::claim(&config.bpf_dir, &state, &node.hello, || {
        match &sts {
            Ok(_) => starting.take().into_iter().for_each(Pending::ready),
            // Not ready, or Kubernetes ends the one that serves for one that cannot.
            Err(error) => error!(
                error = chain(error),
                "this agent cannot serve; it waits until the running agent has ended"
            ),
        }
    });
    let Some(lock_outcome) = shutdown.run_until_cancelled(claim).await else { return Ok(()) };
    let (standing, pass) = match lock_outcome.map_err(AppError::Handover)? {
        LockOutcome::Free(lock) => {
            let frontend = Frontend::open(&node, lock)?;
            let pass = frontend.datapath.pass().map_err(AppError::Datapath)?;
            (Standing::Serves(Box::new(frontend)), pass)
        }
        LockOutcome::Taken(_) if sts.is_err() => return sts.map(drop),
        LockOutcome::Taken(outgoing) => {
            let pass = Datapath::rehearse(&node.settings).map_err(AppError::Datapath)?;
            (Standing::By(outgoing), pass)
        }
    };
    let pass = Arc::new(pass);

    // Not sooner: the programs deny already, and an agent that ends before leaves a new node's pods the
    // node's role.
    let sts = sts?;
    state.require_writable().map_err(AppError::StateDir)?;
    let mut service =
        Service::prepare(config, sts, &node, &state, Arc::clone(&pass), &readiness, &mut background).await?;
    let mut wrong_name = pin!(service.wrong_node_name(&readiness));
    if matches!(standing, Standing::By(_)) {
        service.warm_up(&readiness, &mut background);
    }
    starting.into_iter().for_each(Pending::ready);
    let (frontend, outgoing) = match standing {
        Standing::Serves(frontend) => (*frontend, None),
        Standing::By(outgoing) => {
            let taken_over = tokio::select! {
                ended = background.until(&shutdown) => return ended,
                error = &mut wrong_name => return Err(error),
                taken_over = take_over(outgoing, &node, &state, &readiness) => taken_over?,
            };
            if !taken_over.0.datapath.honours(&pass).map_err(AppError::Datapath)? {
                return Err(AppError::Replaced);
            }
            taken_over
        }
    };
    let is_first = outgoing.is_none();
    let Opened { holdings, operator, are_open, targets } =
        service.open(frontend, &node, readiness, is_first, &log, &mut background).await?;
    background.spawn("the log level", Arc::clone(&operator).keep_log_level());
    match Control::open(&state) {
        Ok(control) => {
            let answer = move |request| Arc::clone(&operator).answer(request);
            background.spawn("the control socket", control.run(answer));
        }
        // Pods are served without it.
        Err(error) => {
            error!(%error, "cannot create the control socket: kube2ram status and kube2ram explain get no answer")
        }
    }
    let standby_listener = StandbyListener::open(&state, node.hello.clone()).map_err(AppError::Handover)?;
    let standbys = standby_listener.standbys();
    background.spawn("the standby listener", standby_listener.run());
    if let Some(outgoing) = outgoing {
        // The outgoing agent serves its own in-pod listeners until it is told to stop.
        if timeout(OPENING, are_open).await.is_err() {
            warn!(
                "not all in-pod listeners are open yet; the host listener serves the other pods until they are"
            );
        }
        if let Err(error) = targets.forget_adopted() {
            warn!(
                error = chain(&error),
                "cannot remove the outgoing agent's in-pod listeners from the target map"
            );
        }
        if let Err(error) = outgoing.serving().await {
            debug!(error = chain(&error), "the outgoing agent has already ended");
        }
    }
    info!(agent = %node.agent.0, metadata = %node.settings.metadata, "serving");

    tokio::select! {
        ended = background.until(&shutdown) => ended?,
        error = wrong_name => return Err(error),
    }
    service.end(standbys, holdings, &mut background).await;
    Ok(())
}

/// Which agent serves the node now.
enum Standing {
    /// Another one, which will hand over.
    By(OutgoingAgent),
    /// This one.
    Serves(Box<Frontend>),
}

/// Waits until the running agent hands over, or ends without a handover.
async fn take_over(
    mut outgoing: OutgoingAgent,
    node: &Node,
    state: &StateDir,
    readiness: &Readiness,
) -> Result<(Frontend, Option<OutgoingAgent>), AppError> {
    loop {
        let mut is_prepared = false;
        let offered = loop {
            tokio::select! {
                biased;
                offered = outgoing.handover_state() => break offered,
                () = readiness.ready(), if !is_prepared => {
                    is_prepared = true;
                    info!("prepared to serve");
                    if let Err(error) = outgoing.prepared().await {
                        debug!(error = chain(&error), "cannot report to the running agent that this one is prepared");
                    }
                }
            }
        };
        match offered {
            Ok(handover_state) => {
                let frontend = Frontend::take_over(node, handover_state)?;
                return Ok((frontend, Some(outgoing)));
            }
            Err(error) => warn!(error = chain(&error), "the outgoing agent did not hand over"),
        }
        // It may hold descriptors that the other agent has already sent, the lock among them.
        drop(outgoing);
        let lock_outcome = handover::claim(&node.settings.bpf_dir, state, &node.hello, || {});
        match lock_outcome.await.map_err(AppError::Handover)? {
            LockOutcome::Free(lock) => return Ok((Frontend::open(node, lock)?, None)),
            LockOutcome::Taken(another) => outgoing = another,
        }
    }
}

/// How STS is asked, and the variables for it.
fn sts_access(environment: impl Fn(&str) -> Option<String>, config: &Config) -> Result<StsAccess, AppError> {
    let signs = config.credentials_from == CredentialsFrom::Node;
    // Where nothing is signed, what is said of the agent's own credentials must not keep it from starting.
    let environment = |name: &str| match signs || !is_of_own_credentials(name) {
        true => environment(name),
        false => None,
    };
    let settings = CloudSettings::from_env(config.cloud, environment, &config.node)
        .map_err(AppError::BaseCredentials)?;
    let client = StsClient::try_new(config.sts_endpoint.is_https()).map_err(AppError::StsClient)?;
    Ok(StsAccess { client, settings })
}

/// Each connection takes a descriptor, and some runtimes set a soft limit of 1,024: the server's own limit
/// must be reached first, because without descriptors nothing else works.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        warn!(%error, "cannot raise the limit of open files");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Command;

    #[test]
    fn what_is_said_of_own_credentials_does_not_count_where_nothing_is_signed() {
        let _installed = rustls::crypto::ring::default_provider().install_default();
        let half = |name: &str| {
            (name == "ALIBABA_CLOUD_OIDC_PROVIDER_ARN").then(|| "acs:ram::1:oidc-provider/ack".to_owned())
        };
        let access = |flags: &[&str]| {
            let args = ["kube2ram", "--node=n"].iter().chain(flags).map(Into::into);
            match Command::from_args(args, &|name: &str| half(name).map(Into::into)).unwrap() {
                Command::Agent(config) => sts_access(half, &config).map(drop),
                other => panic!("{other:?}"),
            }
        };

        assert!(access(&["--credentials-from=service-account"]).is_ok());
        let error = access(&[]).unwrap_err();
        assert!(matches!(error, AppError::BaseCredentials(_)), "half of what the agent's own role takes");
    }
}
