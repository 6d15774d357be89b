//! The shop window: every kind of pod asks for credentials, through the real agent on the real kernel, next
//! to what it should get. Depends on `sandbox`. Called by the binary's `show`, which `cargo xtask sandbox`
//! runs.

mod accounts;
mod table;

pub(crate) use self::table::mark;

use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use self::table::{Row, Table};
use crate::{
    Cloud, CredentialsFrom, Sandbox,
    client::{Credentials, Family, Reply, caller_identity},
    node::PodSpec,
    say,
    standin::{Accounts, Role},
};

/// Makes the sandbox, asks, and prints the answers to `out`. Returns the sandbox, and whether everything was
/// as it should be.
///
/// # Errors
/// When the sandbox cannot be made or the agent does not get ready.
pub fn show(
    agent: &Path,
    cloud: Cloud,
    credentials_from: CredentialsFrom,
    out: &mut dyn std::io::Write,
) -> Result<(Sandbox, bool)> {
    let started = Instant::now();
    say(
        "making a node: cgroups, network namespaces, stand-ins for the API server, the metadata server and STS",
    );
    let mut sandbox = Sandbox::create_in(NAME, cloud)?;
    match credentials_from {
        CredentialsFrom::Node => populate(&mut sandbox)?,
        CredentialsFrom::ServiceAccount => accounts::populate(&mut sandbox)?,
    }
    let before = sandbox.pod("orders")?.curl(cloud.list())?;
    say(&format!("without kube2ram, pod orders is given the node's own role: {}", before.body));
    let leaked = packets_from_pods(&sandbox);

    say(&format!("starting {}", agent.display()));
    let agent_started = Instant::now();
    let flags = credentials_from.flags(cloud);
    let mut flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    flags.extend(["--auto-discover-base-arn", "--namespace-restrictions"]);
    sandbox.start_agent(agent, &flags)?;
    say(&format!("ready after {:.0?}; asking", agent_started.elapsed()));

    let mut table = Table::default();
    match credentials_from {
        CredentialsFrom::Node => ask(&mut sandbox, &mut table)?,
        CredentialsFrom::ServiceAccount => accounts::ask(&mut sandbox, &mut table)?,
    }
    let arrived = packets_from_pods(&sandbox) - leaked;
    writeln!(out, "\n{table}")?;
    writeln!(
        out,
        "STS: {} calls, {} of them AssumeRole and {} {}; {} tokens of ServiceAccounts",
        sandbox.sts().calls().len(),
        sandbox.sts().count("AssumeRole"),
        sandbox.sts().count(cloud.exchange()),
        cloud.exchange(),
        sandbox.api().issued_tokens().len(),
    )?;
    writeln!(
        out,
        "{} {arrived} packets from pods reached the metadata server ({leaked} did before kube2ram started), at \
         {} and {}",
        mark(arrived == 0),
        cloud.metadata_ip(),
        cloud.metadata_ip6()
    )?;
    writeln!(out, "{:.1?} in all", started.elapsed())?;

    Ok((sandbox, table.is_right() && arrived == 0))
}

/// The node's name; also how the signal handler finds what to remove.
pub const NAME: &str = "show";

fn populate(sandbox: &mut Sandbox) -> Result<()> {
    let cloud = sandbox.cloud();
    // And a node role that trusts itself: if an agent asked for it on a pod's behalf, STS would allow it.
    for role in ["orders-role", "billing-role", "daemon-role", "locked-role", Accounts::NODE_ROLE] {
        sandbox.accounts().add_role(cloud.role_arn(role), Role::default());
    }
    let allow_list = cloud.annotation("allowed-roles");
    for (namespace, roles) in [
        ("shop", r#"["orders-role", "billing-role"]"#),
        ("system", r#"["daemon-role"]"#),
        ("vault", r#"["other-*"]"#),
    ] {
        sandbox.api().apply_namespace(namespace, &[(&*allow_list, roles)])?;
    }
    for spec in [
        PodSpec::new("orders").namespace("shop").role("orders-role").containers(&["app", "sidecar"]),
        PodSpec::new("billing").namespace("shop").role("billing-role"),
        PodSpec::new("daemon").namespace("system").role("daemon-role").host_network(),
        PodSpec::new("plain").namespace("shop"),
        PodSpec::new("locked").namespace("vault").role("locked-role"),
    ] {
        sandbox.add_pod(&spec)?;
    }

    Ok(())
}

fn packets_from_pods(sandbox: &Sandbox) -> usize {
    let node = sandbox.node();
    // What comes from the node's own addresses is the agent's or the host's, or a hostNetwork pod's, whose
    // answers show it.
    node.sniffer().packets().iter().filter(|packet| !node.owns(packet.source.ip())).count()
}

fn ask(sandbox: &mut Sandbox, table: &mut Table) -> Result<()> {
    let cloud = sandbox.cloud();
    let list = cloud.list();
    let direct = format!("http://{}{list}", sandbox.agent()?.app_addr());
    let (orders, billing) = (sandbox.pod("orders")?, sandbox.pod("billing")?);
    let (daemon, plain, locked) = (sandbox.pod("daemon")?, sandbox.pod("plain")?, sandbox.pod("locked")?);
    let role = |name: &str| format!("{list}{name}");

    table.add("orders", "which role?", "orders-role", || orders.curl(list).map(body));
    let sts = sandbox.sts().url();
    let mut credentials =
        |pod: &'static str, what: &'static str, role: &str, ask: &dyn Fn() -> Result<Reply>| {
            table.add(pod, what, role, || ask().map(credentials_of));
            let identity = format!("assumed-role/{role}");
            table.add(pod, "  who does STS say that is?", &identity, || Ok(identify(&sts, &ask()?)));
        };
    credentials("orders", "credentials", "orders-role", &|| orders.curl(&role("orders-role")));
    credentials("billing", "credentials", "billing-role", &|| billing.curl(&role("billing-role")));
    credentials("daemon (hostNetwork)", "credentials", "daemon-role", &|| daemon.curl(&role("daemon-role")));

    let mapped = format!("http://{}{}", cloud.metadata_ip(), role("orders-role"));
    table.add("orders/sidecar", "credentials, IPv4-mapped socket", "orders-role", || {
        orders.curl_from("sidecar", Family::V6Mapped, &mapped).map(credentials_of)
    });
    table.add("orders", "credentials, nested cgroup", "orders-role", || {
        orders.curl_nested("app", &role("orders-role")).map(credentials_of)
    });
    if sandbox.node().has_ipv6() {
        table.add("orders", "credentials, IPv6 address", "orders-role", || {
            orders.curl6(&role("orders-role")).map(credentials_of)
        });
    }
    table.add("orders", "instance-id", cloud.instance_id(), || {
        orders.curl("/latest/meta-data/instance-id").map(body)
    });
    table.add("orders", "billing's credentials", "403", || orders.curl(&role("billing-role")).map(body));
    table
        .add("orders", "the node's credentials", "403", || orders.curl(&role(Accounts::NODE_ROLE)).map(body));
    table.add("orders", "which role?, the agent dialled", "orders-role", || {
        orders.curl_from("app", Family::V4, &direct).map(body)
    });
    table.add("host process", "which role?, the agent dialled", "403", || {
        sandbox.host_curl_url(&direct).map(body)
    });
    table.add("plain (no role)", "which role?", "404", || plain.curl(list).map(body));
    table.add("locked (not allowed)", "credentials", "403", || locked.curl(&role("locked-role")).map(body));
    table.add("host process", "which role?", Accounts::NODE_ROLE, || sandbox.host_curl(list).map(body));

    sandbox.agent()?.kill()?;
    let orders = sandbox.pod("orders")?;
    table.add("orders", "which role?, the agent killed", REFUSED, || refusal(orders.curl(list)));
    table.add("host process", "which role?, the agent killed", Accounts::NODE_ROLE, || {
        sandbox.host_curl(list).map(body)
    });
    sandbox.agent()?.start()?;
    let orders = sandbox.pod("orders")?;
    table.add("orders", "credentials, the agent back", "orders-role", || {
        orders.curl(&role("orders-role")).map(credentials_of)
    });

    Ok(())
}

const REFUSED: &str = "connection refused";

/// A refused connection is an answer here.
fn refusal(reply: Result<Reply>) -> Result<Answer> {
    match reply {
        Err(error) if format!("{error:#}").to_lowercase().contains(REFUSED) => {
            Ok(Answer { latency: Duration::ZERO, status: 0, text: REFUSED.into() })
        }
        reply => reply.map(body),
    }
}

/// An answer, and how long it took.
struct Answer {
    latency: Duration,
    status: u16,
    text: String,
}

fn body(reply: Reply) -> Answer {
    // A refusal is told by its status; its reason is the agent's own wording.
    let text = if reply.status == 200 { reply.body } else { reply.status.to_string() };
    Answer { latency: Duration::from_micros(reply.latency_us), status: reply.status, text }
}

fn credentials_of(reply: Reply) -> Answer {
    let given = serde_json::from_str::<Credentials>(&reply.body);
    let mut answer = body(reply);
    if answer.status == 200 {
        answer.text = given.map_or("no credentials".to_owned(), |given| given.role().to_owned());
    }
    answer
}

fn identify(sts_url: &str, reply: &Reply) -> Answer {
    let started = Instant::now();
    let arn = serde_json::from_str::<Credentials>(&reply.body)
        .context("no credentials")
        .and_then(|credentials| caller_identity(sts_url, &credentials));
    let text = match arn {
        // acs:ram::<uid>:assumed-role/<role>/<session>, arn:aws:sts::<account>:assumed-role/…
        Ok(arn) => arn
            .rsplit(':')
            .next()
            .and_then(|name| name.rsplit_once('/'))
            .map_or("?".into(), |(role, _)| role.into()),
        Err(error) => format!("{error:#}"),
    };
    Answer { latency: started.elapsed(), status: 200, text }
}

/// How long an answer may be 503, "not ready yet", before that is the answer.
const PATIENCE: Duration = Duration::from_secs(5);

impl Table {
    fn add(&mut self, who: &str, asked: &str, expected: &str, ask: impl Fn() -> Result<Answer>) {
        let deadline = Instant::now() + PATIENCE;
        let answer = loop {
            match ask() {
                Ok(answer) if answer.status == 503 && Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(50));
                }
                answer => break answer,
            }
        };
        let (got, latency) = match answer {
            Ok(answer) => (answer.text, (!answer.latency.is_zero()).then_some(answer.latency)),
            Err(error) => (format!("{error:#}"), None),
        };
        self.push(Row { who: who.into(), asked: asked.into(), expected: expected.into(), got, latency });
    }
}
