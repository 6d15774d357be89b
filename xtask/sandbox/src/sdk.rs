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
use self::{
    client::{Answer, Client, With},
    requests::Known,
};
use crate::{
    Cloud, CredentialsFrom, Sandbox,
    client::caller_identity,
    node::PodSpec,
    show::mark,
    standin::{Accounts, Role, Sts, StsMode, Tokens},
};

/// The client under trial.
#[derive(Debug)]
pub struct Sdk {
    /// Whose SDK it is.
    pub cloud: Cloud,
    /// The program and its arguments. The address of STS is appended, and the pod's role; on AWS the region
    /// instead of the role. For each line of its input the program prints a line of JSON, with its `Version`:
    ///
    /// * `new`, `kept`, `later`: it obtains credentials with a new client of the SDK or the kept one, and
    ///   prints them. If it can make a signed call, it prints the `Arn` that STS returned. The programs for
    ///   AWS print that and `Millis`, how long the call took from the making of the client on, but no
    ///   credentials.
    /// * `region`, on AWS only: it prints the `Region` that the SDK finds by itself, or null if the SDK looks
    ///   for none.
    pub command: Vec<OsString>,
    /// By whose right pods' roles are assumed. From ServiceAccounts, the trial ends before the client
    /// refreshes what it has: that is between client and agent alone.
    pub credentials_from: CredentialsFrom,
    /// The requests that it is known to make, one a line: those for credentials, and after an empty line
    /// those for the region.
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
    /// By its own clock, which the test moves: less than an hour after it got them.
    Clock,
    /// When they last no longer than this.
    Left(Duration),
}

/// The node's name; also how the signal handler finds what to remove.
pub const NAME: &str = "sdks";

const POD: &str = "orders";
const ROLE: &str = "orders-role";
/// Has no annotation. Its role, the default role, is therefore not fetched before it asks.
const COLD_POD: &str = "cold";
const COLD_ROLE: &str = "cold-role";
/// How long STS takes when the cold pod asks.
const SLOW: Duration = Duration::from_millis(400);

/// The variable by which AWS's SDKs dial the metadata server's IPv6 address.
const IPV6: (&str, &str) = ("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "IPv6");

impl Sdk {
    /// Runs the trial and prints a row of the table. Returns whether everything was as it should be.
    ///
    /// # Errors
    /// When the sandbox cannot be made or nobody listens.
    pub fn run(&self, agent: &Path, out: &mut dyn Write) -> Result<bool> {
        let mut sandbox = Sandbox::create_in(NAME, self.cloud)?;
        self.populate(&mut sandbox)?;
        let sts = sandbox.sts_for_pods()?;

        let verdict = self.try_out(&mut sandbox, &sts, agent);
        let right = verdict.is_ok();
        let text = match verdict {
            Ok(Passed { known, rounds, signature, times, version }) => {
                let requests = known.abridged(self.cloud, rounds);
                let times = times.map_or_else(String::new, |(first, cold)| {
                    format!("; first call after {first} ms, on a cold miss after {cold} ms")
                });
                format!("{version:<8}  {signature:<9}  {requests}{times}")
            }
            Err(error) => format!("{error:#}"),
        };
        let name = match self.credentials_from {
            CredentialsFrom::Node => self.name.clone(),
            CredentialsFrom::ServiceAccount => format!("{}, by account", self.name),
        };
        writeln!(out, "{} {name:<43}  {text}", mark(right))?;
        Ok(right)
    }

    /// Makes the roles and the pods. What says that they belong together is on the pod, or on the
    /// ServiceAccount, and then on nothing of the pod.
    fn populate(&self, sandbox: &mut Sandbox) -> Result<()> {
        let pod = PodSpec::new(POD).service_account(POD);
        let cold = PodSpec::new(COLD_POD).service_account(COLD_POD);
        match self.credentials_from {
            CredentialsFrom::Node => {
                for role in [ROLE, COLD_ROLE] {
                    sandbox.accounts().add_role(self.cloud.role_arn(role), Role::default());
                }
                sandbox.add_pod(&pod.role(ROLE))?;
            }
            CredentialsFrom::ServiceAccount => {
                sandbox.accounts().deny_node();
                for (role, account) in [(ROLE, POD), (COLD_ROLE, COLD_POD)] {
                    sandbox.add_role_of_account(role, &pod.namespace, account);
                }
                let key = self.cloud.annotation("role");
                sandbox.api().apply_service_account(&pod.namespace, POD, &[(&*key, ROLE)])?;
                sandbox.add_pod(&pod)?;
            }
        }
        sandbox.add_pod(&cold)
    }

    fn try_out(&self, sandbox: &mut Sandbox, sts: &Sts, agent: &Path) -> Result<Passed> {
        let known = self.without_agent(sandbox, sts).context("without an agent")?;
        self.compare(&known)?;

        let default_role = format!("--default-role={COLD_ROLE}");
        let flags = self.credentials_from.flags(self.cloud);
        let mut arguments: Vec<&str> = flags.iter().map(String::as_str).collect();
        arguments.extend(["--auto-discover-base-arn", "--metadata-policy=standard", &default_role]);
        sandbox.add_agent(agent, &arguments)?.set_env("KUBE2RAM_LOG_FORMAT", "json");
        sandbox.agent()?.start()?;
        let leaked = packets_from_pods(sandbox);
        let mut client = self.start(sandbox, sts, POD, ROLE, &[])?;
        let (answer, rounds) =
            expect_own_role(sandbox, sts, &mut client, With::New, &known).context("with the agent")?;
        let cold = self.on_a_cold_miss(sandbox, sts, &known).context("on a cold miss")?;
        if self.cloud == Cloud::Aws {
            self.expect_region(sandbox, &mut client, &known).context("the region")?;
            let mut client = self.start(sandbox, sts, POD, ROLE, &[IPV6])?;
            expect_own_role(sandbox, sts, &mut client, With::New, &known).context("by IPv6")?;
        }
        sandbox.agent()?.restart(None)?;
        expect_own_role(sandbox, sts, &mut client, With::New, &known)
            .context("after a restart of the agent")?;
        match self.credentials_from {
            CredentialsFrom::Node => {
                self.with_tokens_required(sandbox, sts, &mut client, &known)?;
                self.across_a_refresh(sandbox, sts, &mut client, &known).context("across a refresh")?;
            }
            CredentialsFrom::ServiceAccount => {
                let calls = sandbox.sts().count("AssumeRole");
                ensure!(calls == 0, "the agent called AssumeRole {calls} times");
            }
        }
        let arrived = packets_from_pods(sandbox) - leaked;
        ensure!(arrived == 0, "{arrived} packets reached the metadata server");

        let signature = sts.calls().last().map_or("-", |call| call.signature);
        Ok(Passed {
            known,
            rounds,
            signature,
            times: answer.millis.zip(cold.millis),
            version: answer.version,
        })
    }

    /// The metadata server takes requests with tokens only, and so does the agent, if the client has them.
    fn with_tokens_required(
        &self,
        sandbox: &mut Sandbox,
        sts: &Sts,
        client: &mut Client,
        known: &Known,
    ) -> Result<()> {
        sandbox.agent()?.terminate()?;
        sandbox.metadata().set_tokens(Tokens::Required);
        sandbox.metadata().forget_tokens();
        ensure!(
            matches!(sandbox.host_curl(self.cloud.list())?.status, 401 | 403),
            "the metadata server is not in token-only mode"
        );
        if known.has_tokens() {
            sandbox.agent()?.set_env("KUBE2RAM_REQUIRE_TOKEN", "true");
        }
        sandbox.agent()?.start()?;
        expect_own_role(sandbox, sts, client, With::New, known).context("in token-only mode")?;
        Ok(())
    }

    /// Without an agent the client talks to the metadata server itself, which shows what it expects to find
    /// there.
    fn without_agent(&self, sandbox: &Sandbox, sts: &Sts) -> Result<Known> {
        let seen = |from: usize| {
            let mut seen = sandbox.metadata().seen();
            seen.drain(..from);
            seen
        };
        let mut client = self.start(sandbox, sts, POD, Accounts::NODE_ROLE, &[])?;
        let answer = client.ask(With::New)?;
        check_owner(sandbox, sts, &client, &answer)?;
        let requests = seen(0);
        let credentials = requests::seen(&requests, self.cloud, Accounts::NODE_ROLE);
        if self.cloud == Cloud::Alibaba {
            return Ok(Known { credentials, region: Vec::new() });
        }

        let region = client.ask(With::Region)?.region;
        let look_up = seen(requests.len());
        let known = Known { credentials, region: requests::seen(&look_up, self.cloud, Accounts::NODE_ROLE) };
        self.check_region(region.as_deref(), &known)?;

        let mut client = self.start(sandbox, sts, POD, Accounts::NODE_ROLE, &[IPV6])?;
        let answer = client.ask(With::New)?;
        check_owner(sandbox, sts, &client, &answer)?;
        let by_ipv6 = seen(requests.len() + look_up.len());
        ensure!(by_ipv6.iter().all(|request| request.peer.is_ipv6()), "it dialled IPv4 in IPv6 mode");
        let same = requests::seen(&by_ipv6, self.cloud, Accounts::NODE_ROLE);
        ensure!(same == known.credentials, "its requests by IPv6 are others: {same:?}");
        Ok(known)
    }

    /// The pod asks for a role that no pod has asked for before, and STS is slow.
    fn on_a_cold_miss(&self, sandbox: &mut Sandbox, sts: &Sts, known: &Known) -> Result<Answer> {
        let role = self.cloud.role_arn(COLD_ROLE);
        let mut client = self.start(sandbox, sts, COLD_POD, COLD_ROLE, &[])?;
        sandbox.sts().set_mode(StsMode::Slow(SLOW))?;
        let before = sandbox.sts().assumed(&role).len();
        ensure!(before == 0, "the agent fetched the role before the pod asked");
        let (answer, _) = expect_own_role(sandbox, sts, &mut client, With::New, known)?;
        let calls = sandbox.sts().assumed(&role).len();
        ensure!(calls == 1, "the agent called STS {calls} times");
        sandbox.sts().set_mode(StsMode::Ok)?;
        Ok(answer)
    }

    /// The SDK finds the region by the agent too, with the known requests.
    fn expect_region(&self, sandbox: &mut Sandbox, client: &mut Client, known: &Known) -> Result<()> {
        let logged = sandbox.agent()?.log().len();
        let region = client.ask(With::Region)?.region;
        self.check_region(region.as_deref(), known)?;
        let log = sandbox.agent()?.log();
        requests::rounds(&log[logged..], client.role(), &known.region)?;
        Ok(())
    }

    /// An SDK that asks for the region must find it.
    fn check_region(&self, region: Option<&str>, known: &Known) -> Result<()> {
        let expected = (!known.region.is_empty()).then_some(self.cloud.region());
        ensure!(region == expected, "it found the region {region:?} by {:?}", known.region);
        Ok(())
    }

    /// A kept client has credentials that soon become too old for it, by STS's expiry. Until then it uses
    /// them without a request; then it asks by itself, and signs with what it gets. Clocks are everybody's
    /// own: what is short is the credentials' life, but for the client whose clock the test moves. Other
    /// credentials are there when it asks because the agent, which keeps none across a restart, has been
    /// restarted.
    fn across_a_refresh(
        &self,
        sandbox: &mut Sandbox,
        sts: &Sts,
        client: &mut Client,
        known: &Known,
    ) -> Result<()> {
        let left = match self.refresh {
            Refresh::Always | Refresh::Clock => Duration::from_secs(3600),
            Refresh::Left(left) => left + QUIET,
        };
        let with = if self.refresh == Refresh::Clock { With::Later } else { With::Kept };
        sandbox.sts().set_lifetime(Some(left));
        sandbox.agent()?.restart(None)?;
        let deadline = Instant::now() + QUIET * 3;
        let (first, _) = expect_own_role(sandbox, sts, client, With::Kept, known)?;
        let first = key(sts, &first)?;
        sandbox.sts().set_lifetime(None);
        sandbox.agent()?.restart(None)?;
        let logged = sandbox.agent()?.log().len();

        if self.refresh != Refresh::Always {
            let quiet = client.ask(With::Kept)?;
            ensure!(key(sts, &quiet)? == first, "it did not use what it has");
            let log = sandbox.agent()?.log();
            let asked = requests::answered(&log[logged..], client.role())?;
            ensure!(asked.is_empty(), "it asked too early: {asked:?}");
        }
        loop {
            let answer = client.ask(with)?;
            if key(sts, &answer)? != first {
                break check_owner(sandbox, sts, client, &answer)?;
            }
            ensure!(Instant::now() < deadline, "it keeps using what is too old for it");
            thread::sleep(Duration::from_millis(500));
        }
        let log = sandbox.agent()?.log();
        let log = &log[logged..];
        // A kept client may keep its session token as well.
        requests::rounds(log, client.role(), &known.credentials)
            .or_else(|_| requests::rounds(log, client.role(), &known.by_a_kept_token()))?;
        Ok(())
    }

    fn start(
        &self,
        sandbox: &Sandbox,
        sts: &Sts,
        pod: &str,
        role: &str,
        environment: &[(&str, &str)],
    ) -> Result<Client> {
        let (program, args) = self.command.split_first().context("no command")?;
        let mut command = sandbox.pod(pod)?.pod().command("app", program)?;
        let given = match self.cloud {
            Cloud::Alibaba => role,
            Cloud::Aws => self.cloud.region(),
        };
        command.args(args).arg(sts.url().trim_start_matches("http://")).arg(given);
        Client::start(command, role, environment, sandbox.node().directory())
    }

    /// Compares with the fixture. A missing one is recorded, and fails all the same: someone must have looked
    /// at it.
    fn compare(&self, known: &Known) -> Result<()> {
        let path = self.fixture.display();
        let made = known.to_string();
        if !self.fixture.exists() {
            fs::write(&self.fixture, made).with_context(|| format!("cannot write {path}"))?;
            bail!("recorded {path}: look at it and run this again");
        }
        let recorded = fs::read_to_string(&self.fixture).with_context(|| format!("cannot read {path}"))?;
        ensure!(
            made == recorded,
            "its requests are no longer those of {path} (remove it to record them): {known:?}"
        );
        Ok(())
    }
}

struct Passed {
    known: Known,
    /// How often it made them for one call: an SDK may want new credentials long before the old ones end.
    rounds: usize,
    /// Of its own call to STS; `-` when it can make none, and the sandbox asks STS with what it got.
    signature: &'static str,
    /// How many milliseconds its first call took, and the first one of the cold pod, if it measures them.
    times: Option<(u64, u64)>,
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
    known: &Known,
) -> Result<(Answer, usize)> {
    let logged = sandbox.agent()?.log().len();
    let answer = client.ask(with)?;
    check_owner(sandbox, sts, client, &answer)?;
    let log = sandbox.agent()?.log();
    let rounds = requests::rounds(&log[logged..], client.role(), &known.credentials)?;
    Ok((answer, rounds))
}

/// Checks whose credentials these are, by their name and by STS's answer to a call that they signed.
fn check_owner(sandbox: &Sandbox, sts: &Sts, client: &Client, answer: &Answer) -> Result<()> {
    let (key, role) = (key(sts, answer)?, client.role());
    // `STS.<role>.<unique>`, on AWS `ASIA.<role>.<unique>`.
    ensure!(key.split('.').nth(1) == Some(role), "it got the credentials {key}");
    let arn = match (&answer.arn, &answer.credentials) {
        (Some(arn), _) => arn.clone(),
        (None, Some(credentials)) => caller_identity(&sandbox.sts().url(), credentials)?,
        (None, None) => bail!("it printed neither its identity nor credentials"),
    };
    ensure!(arn.contains(&format!(":assumed-role/{role}/")), "STS says that it is {arn}");
    let calls = sts.calls();
    ensure!(calls.iter().all(|call| call.outcome == "OK"), "a call of its own failed: {calls:?}");
    let signer = calls.last().map(|call| &*call.access_key_id);
    ensure!(answer.arn.is_none() || signer == Some(&*key), "it signed with other credentials than it has");
    Ok(())
}

/// The key's id in the credentials that it printed, else that of the key which signed its last call.
fn key(sts: &Sts, answer: &Answer) -> Result<String> {
    if let Some(credentials) = &answer.credentials {
        return Ok(credentials.access_key_id.clone());
    }
    let calls = sts.calls();
    Ok(calls.last().context("it printed no credentials and made no call")?.access_key_id.clone())
}

fn packets_from_pods(sandbox: &Sandbox) -> usize {
    let node = sandbox.node();
    node.sniffer().packets().iter().filter(|packet| !node.owns(packet.source.ip())).count()
}
