//! `kube2ram-sandbox`: the shop windows (`show` and `logins`), trials of real clients (`sdk`), a way into its
//! pods (`exec`) and the client that runs inside them (`client`). Depends on the library. Called by
//! `cargo xtask sandbox`, people, and tests.

use std::{
    env,
    ffi::OsString,
    fs,
    io::{Read as _, Write as _, stdin, stdout},
    net::SocketAddr,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{self, ExitCode},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, Subcommand};
use kube2ram_sandbox::{
    Cloud, CredentialsFrom,
    bench::{self, Subject},
    client::{Dial, Family, Hold, Load, Repeat, Request, Storm, raw},
    login,
    node::Record,
    sdk::{self, Addresses, Refresh, Sdk},
    show,
};
use tokio::signal::unix::{SignalKind, signal};

#[derive(Parser)]
#[command(about = "One machine as a Kubernetes node, to see kube2ram at work")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs a language's own HTTP client in pods, with the URLs of both of the metadata server's addresses;
    /// prints a row of a table, and exits with 1 when it does not get the pod's own role by each.
    #[command(hide = true)]
    Addresses {
        /// The agent's binary.
        #[arg(long)]
        agent: PathBuf,
        /// What to call it.
        #[arg(long)]
        name: String,
        /// The client; the URLs are appended.
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    /// Measures what the programs cost, next to what they are compared with.
    #[command(hide = true)]
    Bench {
        /// The agent's binary.
        #[arg(long)]
        agent: Option<PathBuf>,
        /// The authenticator's binary.
        #[arg(long)]
        authenticator: Option<PathBuf>,
        /// The cloud that the machine stands for.
        #[arg(long, value_enum, default_value = "alibaba")]
        cloud: Cloud,
        /// What to measure.
        #[arg(required = true)]
        subjects: Vec<Subject>,
    },
    /// Runs one request or many from where it is started; prints JSON.
    #[command(hide = true, subcommand)]
    Client(Client),
    /// Lets users, roles and intruders log in to a real API server by the authenticator, and shows who became
    /// whom; exits with 1 when that is not what it should be.
    Logins {
        /// `deploy/authenticator`.
        #[arg(long)]
        deploy: PathBuf,
        /// Where files are put. It is emptied before and removed afterwards.
        #[arg(long)]
        directory: PathBuf,
        /// The authenticator's binary.
        #[arg(long)]
        authenticator: PathBuf,
        /// The directory of the tools, with kube-apiserver, etcd and kubectl.
        #[arg(long)]
        tools: PathBuf,
    },
    /// Makes a node with pods, runs the agent on it and shows what each pod gets; exits with 1 when that is
    /// not what it should be.
    Show {
        /// The agent's binary.
        #[arg(long)]
        agent: PathBuf,
        /// The cloud that the node is in.
        #[arg(long, value_enum, default_value_t)]
        cloud: Cloud,
        /// By whose right pods' roles are assumed.
        #[arg(long, value_enum, default_value_t)]
        credentials_from: CredentialsFrom,
        /// Leaves everything running until Ctrl-C.
        #[arg(long)]
        keep: bool,
    },
    /// Runs a real client in a pod, with nothing but the agent to get credentials from; prints a row of a
    /// table, and exits with 1 when it does not get what it should.
    #[command(hide = true)]
    Sdk {
        /// The agent's binary.
        #[arg(long)]
        agent: PathBuf,
        /// Whose SDK it is.
        #[arg(long, value_enum)]
        cloud: Cloud,
        /// By whose right pods' roles are assumed.
        #[arg(long, value_enum, default_value_t)]
        credentials_from: CredentialsFrom,
        /// The requests that it is known to make; recorded when there is no such file.
        #[arg(long)]
        fixture: PathBuf,
        /// What to call it.
        #[arg(long)]
        name: String,
        /// How many seconds before their end a kept client wants other credentials; `always`, or `clock` for
        /// one whose clock is moved.
        #[arg(long, value_parser = refresh)]
        refresh: Refresh,
        /// The client; the address of STS is appended, and the pod's role or AWS's region.
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    /// Runs a command in a pod of a sandbox that is being kept.
    Exec {
        /// The sandbox; needed when several have such a pod.
        #[arg(long)]
        sandbox: Option<String>,
        /// `pod` or `pod/container`.
        target: String,
        /// The command.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
}

#[derive(Subcommand)]
enum Client {
    /// Connects as often as each line of standard input asks, and prints the median of each, in nanoseconds.
    Dial {
        #[arg(long)]
        connect: SocketAddr,
        #[arg(long)]
        udp: bool,
    },
    /// Sends one request.
    Get {
        /// By default, that of the address.
        #[arg(long, value_enum)]
        family: Option<Family>,
        #[arg(short = 'X', long, default_value = "GET")]
        method: String,
        /// `Name: value`.
        #[arg(short = 'H', long = "header")]
        headers: Vec<String>,
        url: String,
    },
    /// Is a server that answers every request with what standard input held.
    Hello {
        #[arg(long)]
        listen: SocketAddr,
    },
    /// Keeps connections open and busy until standard input ends. Prints a line once all of them are open.
    Hold {
        #[arg(long)]
        connect: SocketAddr,
        #[arg(long)]
        connections: usize,
        /// Sent once on each connection, in hex.
        #[arg(long)]
        first: String,
        /// Sent on each connection ten times a second, in hex.
        #[arg(long)]
        then: String,
    },
    /// Asks for a role's name and credentials until standard input ends, and prints what was not answered.
    Load {
        #[arg(long)]
        connect: SocketAddr,
        #[arg(long, value_enum, default_value_t)]
        cloud: Cloud,
        /// The role that every answer must be of.
        #[arg(long)]
        expect: String,
    },
    /// Sends bytes and prints what comes back, both in hex.
    Raw {
        #[arg(long)]
        connect: SocketAddr,
        #[arg(long)]
        hex: String,
    },
    /// Makes as many system calls as each line of standard input asks, and prints the mean of each, in
    /// nanoseconds: setsockopt(2), or sendto(2) to an address.
    Repeat {
        #[arg(long)]
        send_to: Option<SocketAddr>,
    },
    /// Asks for a role's credentials on many connections and checks whose they are.
    Storm {
        #[arg(long)]
        connects: usize,
        #[arg(long, value_enum, default_value_t)]
        cloud: Cloud,
        #[arg(long, default_value_t = 8)]
        concurrency: usize,
        /// The role that every answer must be of.
        #[arg(long)]
        expect: String,
        /// `http://address`, or several to take in turns.
        #[arg(required = true)]
        urls: Vec<String>,
    },
}

fn main() -> Result<ExitCode> {
    match Args::parse().command {
        Command::Addresses { agent, name, command } => {
            remove_on_signal(sdk::NAME)?;
            if !(Addresses { command, name }).run(&agent, &mut stdout())? {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Bench { agent, authenticator, cloud, subjects } => {
            remove_on_signal(bench::NAME)?;
            let programs = bench::Programs { agent, authenticator };
            bench::bench(&programs, cloud, &subjects, &mut stdout())?;
        }
        Command::Client(client) => run_client(client)?,
        Command::Exec { sandbox, target, command } => return exec(sandbox.as_deref(), &target, &command),
        Command::Sdk { agent, cloud, credentials_from, fixture, name, refresh, command } => {
            remove_on_signal(sdk::NAME)?;
            if !(Sdk { cloud, command, credentials_from, fixture, name, refresh })
                .run(&agent, &mut stdout())?
            {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Logins { authenticator, deploy, directory, tools } => {
            // kubectl looks for a plugin next to its kubeconfig.
            let authenticator = authenticator.canonicalize()?;
            let programs = login::Programs { authenticator, tools, deploy };
            return run_logins(programs, &directory);
        }
        Command::Show { agent, cloud, credentials_from, keep } => {
            return run_show(&agent, cloud, credentials_from, keep);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn refresh(text: &str) -> Result<Refresh, std::num::ParseIntError> {
    Ok(match text {
        "always" => Refresh::Always,
        "clock" => Refresh::Clock,
        seconds => Refresh::Left(Duration::from_secs(seconds.parse()?)),
    })
}

fn run_logins(programs: login::Programs, directory: &Path) -> Result<ExitCode> {
    if directory.exists() {
        fs::remove_dir_all(directory)?;
    }
    fs::create_dir_all(directory)?;
    // The cluster ends before its files are removed.
    let (_, is_right) = login::show::show(programs, directory, &mut stdout())?;
    fs::remove_dir_all(directory)?;
    Ok(if is_right { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn run_show(agent: &Path, cloud: Cloud, credentials_from: CredentialsFrom, keep: bool) -> Result<ExitCode> {
    remove_on_signal(show::NAME)?;
    let (sandbox, right) = show::show(agent, cloud, credentials_from, &mut stdout())?;
    if keep {
        writeln!(
            stdout(),
            "\nThe sandbox is yours until Ctrl-C. In another terminal, as root:\n  \
             {} exec --sandbox {} orders -- curl -s http://{}{}",
            env::current_exe()?.display(),
            sandbox.node().name(),
            cloud.metadata_ip(),
            cloud.list()
        )?;
        loop {
            thread::park();
        }
    }
    drop(sandbox);
    Ok(if right { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A signal ends the process without dropping anything, so what is on record is removed first.
fn remove_on_signal(node: &'static str) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async {
            let (Ok(mut interrupt), Ok(mut terminate)) =
                (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
            else {
                return;
            };
            tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
            Record::remove(node);
            process::exit(130);
        });
    })?;
    Ok(())
}

fn run_client(client: Client) -> Result<()> {
    let answer = match client {
        Client::Get { family, method, headers, url } => {
            let mut request = Request { method, ..Request::get(url) };
            request.family = family.unwrap_or(request.family);
            for header in headers {
                let (name, value) = header.split_once(':').context("a header is `Name: value`")?;
                request = request.header(name, value.trim());
            }
            serde_json::to_string(&request.send()?)?
        }
        Client::Dial { connect, udp } => return Dial { addr: connect, udp }.run(stdin().lock(), stdout()),
        Client::Hello { listen } => {
            let mut body = Vec::new();
            stdin().read_to_end(&mut body)?;
            return bench::hello(listen, body);
        }
        Client::Hold { connect, connections, first, then } => {
            return Hold { addr: connect, connections, first: hex::decode(first)?, then: hex::decode(then)? }
                .run(stdin(), stdout());
        }
        Client::Load { connect, cloud, expect } => {
            serde_json::to_string(&Load { addr: connect, cloud, role: expect }.run(stdin())?)?
        }
        Client::Repeat { send_to } => {
            let call = send_to.map_or(Repeat::Option, Repeat::Send);
            return call.run(stdin().lock(), stdout());
        }
        Client::Raw { connect, hex } => hex::encode(raw(connect, &hex::decode(hex)?)?),
        Client::Storm { connects, cloud, concurrency, expect, urls } => {
            let storm = Storm { base_urls: urls, cloud, connects, concurrency, role: expect };
            serde_json::to_string(&storm.run())?
        }
    };
    Ok(writeln!(stdout(), "{answer}")?)
}

fn exec(sandbox: Option<&str>, target: &str, command: &[String]) -> Result<ExitCode> {
    let (name, container) = match target.split_once('/') {
        Some((pod, container)) => (pod, Some(container)),
        None => (target, None),
    };
    let mut records = Record::load_all()?;
    records.retain(|record| {
        record.pods.contains_key(name) && sandbox.is_none_or(|sandbox| sandbox == record.name)
    });
    let found: Vec<_> = records.iter().map(|record| &*record.name).collect();
    ensure!(
        found.len() < 2,
        "pod {name:?} is in several sandboxes: --sandbox is one of {}",
        found.join(", ")
    );
    let pod = records.first().and_then(|record| record.pods.get(name));
    let pod = pod.with_context(|| format!("no sandbox has a pod {name:?}: cargo xtask sandbox --keep"))?;
    let (program, args) = command.split_first().context("no command")?;
    Err(pod.command(container, PathBuf::from(program))?.args(args).exec().into())
}
