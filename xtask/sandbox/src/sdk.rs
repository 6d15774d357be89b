//! A trial of a real client: unmodified, with no configuration at all, in a pod whose only source of
//! credentials is the agent. Depends on `sandbox`. Called by the binary's `sdk`, which `cargo xtask test
//! --sdks` runs for each client.

mod addresses;
mod client;
mod requests;

use std::{
    ffi::OsString,
    fs,
    io::Write,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

pub use self::addresses::Addresses;
use self::client::{Answer, Client, With};
use crate::{
    Sandbox,
    client::caller_identity,
    node::PodSpec,
    show::mark,
    standin::{Accounts, Role, Sts, Tokens},
};

/// The client under trial.
#[derive(Debug)]
pub struct Sdk {
    /// The program and its arguments. It is given the address of STS and the pod's role besides; for each
    /// line of its input, `new` or `kept`, it obtains credentials with a new client of the SDK or the kept
    /// one, and prints them, in JSON, with its `Version` and, when it can make a signed call, the `Arn` that
    /// STS told it.
    pub command: Vec<OsString>,
    /// The requests that it is known to make, one a line.
    pub fixture: PathBuf,
    /// What to call it.
    pub name: String,
    /// When a kept client wants other credentials than those that it has.
    pub refresh: Refresh,
}

/// When an SDK asks for other credentials, according to its source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refresh {
    /// At each call.
    Always,
    /// Less than an hour after it got them, whatever their end: by its own clock alone.
    Hourly,
    /// When they last no longer than this.
    Left(Duration),
}

/// The node's name; also how the signal handler finds what to remove.
pub const NAME: &str = "sdks";

const POD: &str = "orders";
const ROLE: &str = "orders-role";

impl Sdk {
    /// Runs the trial and prints a row of the table. Returns whether everything was as it should be.
    ///
    /// # Errors
    /// When the sandbox cannot be made or nobody listens.
    pub fn run(&self, agent: &Path, out: &mut dyn Write) -> Result<bool> {
        let mut sandbox = Sandbox::create(NAME)?;
        sandbox.accounts().add_role(Accounts::role_arn(ROLE), Role::default());
        sandbox.add_pod(&PodSpec::new(POD).role(ROLE))?;
        let sts = sandbox.sts_for_pods()?;

        let verdict = self.try_out(&mut sandbox, &sts, agent);
        let right = verdict.is_ok();
        let text = match verdict {
            Ok(Passed { requests, rounds, signature, version }) => {
                format!("{version:<8}  {signature:<9}  {}", requests::abridged(&requests, rounds))
            }
            Err(error) => format!("{error:#}"),
        };
        writeln!(out, "{} {:<31}  {text}", mark(right), self.name)?;
        Ok(right)
    }

    fn try_out(&self, sandbox: &mut Sandbox, sts: &Sts, agent: &Path) -> Result<Passed> {
        // Without an agent it talks to the metadata server itself, which shows what a client expects to find
        // there.
        let answer = self.start(sandbox, sts, Accounts::NODE_ROLE)?.ask(With::New)?;
        ensure!(answer.role() == Accounts::NODE_ROLE, "got {:?} without an agent", answer.role());
        let requests = requests::seen(&sandbox.metadata().seen(), Accounts::NODE_ROLE);
        self.compare(&requests)?;

        sandbox.add_agent(agent, &["--auto-discover-base-arn"])?.set_env("KUBE2RAM_LOG_FORMAT", "json");
        sandbox.agent()?.start()?;
        let leaked = packets_from_pods(sandbox);
        let mut client = self.start(sandbox, sts, ROLE)?;
        let (answer, rounds) =
            expect_own_role(sandbox, sts, &mut client, With::New, &requests).context("with the agent")?;
        sandbox.agent()?.restart(None)?;
        expect_own_role(sandbox, sts, &mut client, With::New, &requests)
            .context("after a restart of the agent")?;
        sandbox.agent()?.terminate()?;
        sandbox.metadata().set_tokens(Tokens::Required);
        sandbox.metadata().forget_tokens();
        ensure!(
            sandbox.host_curl(requests::LIST)?.status == 403,
            "the metadata server is not in token-only mode"
        );
        if requests.iter().any(|request| request.ends_with(requests::WITH_TOKEN)) {
            sandbox.agent()?.set_env("KUBE2RAM_REQUIRE_TOKEN", "true");
        }
        sandbox.agent()?.start()?;
        expect_own_role(sandbox, sts, &mut client, With::New, &requests).context("in token-only mode")?;
        self.across_a_refresh(sandbox, sts, &mut client, &requests).context("across a refresh")?;
        let arrived = packets_from_pods(sandbox) - leaked;
        ensure!(arrived == 0, "{arrived} packets reached the metadata server");

        let signature = sts.calls().last().map_or("-", |call| call.signature);
        Ok(Passed { requests, rounds, signature, version: answer.version })
    }

    /// A kept client has credentials that soon become too old for it, by STS's expiry. Until then it uses
    /// them without a request; then it asks by itself, and signs with what it gets. Clocks are everybody's
    /// own: what is short is the credentials' life, but for the client that looks at its clock alone, whose
    /// clock moves. Other credentials are there when it asks because the agent, which keeps none across a
    /// restart, has been restarted.
    fn across_a_refresh(
        &self,
        sandbox: &mut Sandbox,
        sts: &Sts,
        client: &mut Client,
        requests: &[String],
    ) -> Result<()> {
        let left = match self.refresh {
            Refresh::Always | Refresh::Hourly => Duration::from_secs(3600),
            Refresh::Left(left) => left + QUIET,
        };
        let with = if self.refresh == Refresh::Hourly { With::Later } else { With::Kept };
        sandbox.sts().set_lifetime(Some(left));
        sandbox.agent()?.restart(None)?;
        let deadline = Instant::now() + QUIET * 3;
        let (first, _) = expect_own_role(sandbox, sts, client, With::Kept, requests)?;
        sandbox.sts().set_lifetime(None);
        sandbox.agent()?.restart(None)?;
        let logged = sandbox.agent()?.log().len();

        if self.refresh != Refresh::Always {
            let quiet = client.ask(With::Kept)?;
            ensure!(
                quiet.credentials.access_key_id == first.credentials.access_key_id,
                "it did not use what it has"
            );
            let log = sandbox.agent()?.log();
            ensure!(requests::rounds(&log[logged..], ROLE, requests).is_err(), "it asked too early");
        }
        loop {
            let answer = client.ask(with)?;
            if answer.credentials.access_key_id != first.credentials.access_key_id {
                break check_owner(sandbox, sts, &answer)?;
            }
            ensure!(Instant::now() < deadline, "it keeps using what is too old for it");
            thread::sleep(Duration::from_millis(500));
        }
        let log = sandbox.agent()?.log();
        requests::rounds(&log[logged..], ROLE, requests)?;
        Ok(())
    }

    fn start(&self, sandbox: &Sandbox, sts: &Sts, role: &str) -> Result<Client> {
        let (program, args) = self.command.split_first().context("no command")?;
        let mut command = sandbox.pod(POD)?.pod().command("app", program)?;
        command.args(args).arg(sts.url().trim_start_matches("http://")).arg(role);
        Client::start(command, sandbox.node().directory())
    }

    /// Compares with the fixture. A missing one is recorded, and fails all the same: someone must have looked
    /// at it.
    fn compare(&self, requests: &[String]) -> Result<()> {
        let path = self.fixture.display();
        let made = requests.join("\n") + "\n";
        if !self.fixture.exists() {
            fs::write(&self.fixture, made).with_context(|| format!("cannot write {path}"))?;
            bail!("recorded {path}: look at it and run this again");
        }
        let known = fs::read_to_string(&self.fixture).with_context(|| format!("cannot read {path}"))?;
        ensure!(
            made == known,
            "its requests are no longer those of {path} (remove it to record them): {requests:?}"
        );
        Ok(())
    }
}

struct Passed {
    requests: Vec<String>,
    /// How often it made them for one call: an SDK may want new credentials long before the old ones end.
    rounds: usize,
    /// Of its own call to STS; `-` when it can make none, and the sandbox asks STS with what it got.
    signature: &'static str,
    version: String,
}

/// How long a kept client has credentials that are not too old for it.
const QUIET: Duration = Duration::from_secs(20);

/// Asks once more, and checks whose credentials come, their owner according to STS, and that the agent saw
/// the known requests and no others.
fn expect_own_role(
    sandbox: &mut Sandbox,
    sts: &Sts,
    client: &mut Client,
    with: With,
    requests: &[String],
) -> Result<(Answer, usize)> {
    let logged = sandbox.agent()?.log().len();
    let answer = client.ask(with)?;
    check_owner(sandbox, sts, &answer)?;
    let log = sandbox.agent()?.log();
    let rounds = requests::rounds(&log[logged..], ROLE, requests)?;
    Ok((answer, rounds))
}

/// Checks whose credentials these are, by their name and by STS's answer to a call that they signed.
fn check_owner(sandbox: &Sandbox, sts: &Sts, answer: &Answer) -> Result<()> {
    ensure!(answer.role() == ROLE, "it got credentials of {:?}", answer.role());
    let arn = match &answer.arn {
        Some(arn) => arn.clone(),
        None => caller_identity(&sandbox.sts().url(), &answer.credentials)?,
    };
    ensure!(arn.contains(&format!(":assumed-role/{ROLE}/")), "STS says that it is {arn}");
    let calls = sts.calls();
    ensure!(calls.iter().all(|call| call.outcome == "OK"), "a call of its own failed: {calls:?}");
    let signer = calls.last().map(|call| &*call.access_key_id);
    ensure!(
        answer.arn.is_none() || signer == Some(&*answer.credentials.access_key_id),
        "it signed with other credentials than it has"
    );
    Ok(())
}

fn packets_from_pods(sandbox: &Sandbox) -> usize {
    let node = sandbox.node();
    node.sniffer().packets().iter().filter(|packet| !node.owns(packet.source.ip())).count()
}
