//! Real clients: installs pinned versions of unmodified SDKs under target/sdks and lets the sandbox try each
//! of them, and the HTTP clients of their languages. Depends on the package managers of their languages.
//! Called by `main`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    build,
    command::{cargo, root, run, say, target_dir},
    counts::Counts,
    setup,
};

/// SDKs that are installed together. Sources and lock files are in `xtask/sdks/<name>`, whose copy in
/// `target/sdks/<name>` is where they are installed and built.
struct Language {
    name: &'static str,
    /// What must be on the machine.
    tools: &'static [&'static str],
    /// Called in the copy.
    install: fn(&Path) -> Result<()>,
    clients: &'static [Client],
}

struct Client {
    name: &'static str,
    /// Its words, in which `./` stands for the copy.
    command: &'static [&'static str],
    trial: Trial,
}

/// What a client is tried for.
#[derive(Clone, Copy)]
enum Trial {
    /// The language's own HTTP client: that it gets the pod's role by both of the metadata server's
    /// addresses.
    Addresses,
    /// An SDK: that it obtains credentials.
    Credentials {
        /// How many seconds before their end it wants other credentials, by its source; `always`, or `hourly`
        /// for the one that looks at its own clock alone.
        refresh: &'static str,
    },
}

const LANGUAGES: [Language; 5] = [
    Language {
        name: "python",
        tools: &["python3"],
        install: |here| {
            run(Command::new("python3").current_dir(here).args(["-m", "venv", "venv"]))?;
            let pip = here.join("venv/bin/pip");
            run(Command::new(pip)
                .current_dir(here)
                .args(["install", "--quiet", "--no-deps", "--disable-pip-version-check"])
                .args(["--requirement", "requirements.txt"]))
        },
        clients: &[
            Client {
                name: "python-alibabacloud-credentials",
                command: &["./venv/bin/python", "./client.py", "alibabacloud-credentials"],
                trial: Trial::Credentials { refresh: "900" },
            },
            Client {
                name: "python-aliyun-python-sdk-core",
                command: &["./venv/bin/python", "./client.py", "aliyun-python-sdk-core"],
                trial: Trial::Credentials { refresh: "hourly" },
            },
            // 15 % of their whole life, that is of 24 s.
            Client {
                name: "python-oss2",
                command: &["./venv/bin/python", "./client.py", "oss2"],
                trial: Trial::Credentials { refresh: "4" },
            },
        ],
    },
    Language {
        name: "node",
        tools: &["node", "npm"],
        install: |here| {
            run(Command::new("npm").current_dir(here).args([
                "ci",
                "--silent",
                "--ignore-scripts",
                "--no-audit",
                "--no-fund",
            ]))
        },
        clients: &[
            Client {
                name: "node-credentials",
                command: &["node", "./client.js"],
                trial: Trial::Credentials { refresh: "3600" },
            },
            Client { name: "node-http", command: &["node", "./get.js"], trial: Trial::Addresses },
        ],
    },
    Language {
        name: "go",
        tools: &["go"],
        install: |here| {
            let build = |arguments: &[&str]| {
                run(Command::new("go").current_dir(here).args(["build", "-buildvcs=false"]).args(arguments))
            };
            build(&["-o", "client", "."])?;
            build(&["-o", "get", "get.go"])
        },
        clients: &[
            Client {
                name: "go-credentials-go",
                command: &["./client"],
                trial: Trial::Credentials { refresh: "180" },
            },
            Client { name: "go-net-http", command: &["./get"], trial: Trial::Addresses },
        ],
    },
    Language {
        name: "java",
        tools: &["java", "javac", "mvn"],
        install: |here| {
            run(Command::new("mvn").current_dir(here).args([
                "--quiet",
                "--batch-mode",
                "compile",
                "dependency:copy-dependencies",
            ]))
        },
        clients: &[
            Client {
                name: "java-credentials-java",
                command: &["java", "-classpath", "./target/classes:./target/dependency/*", "Client"],
                trial: Trial::Credentials { refresh: "900" },
            },
            Client {
                name: "java-net-http",
                command: &["java", "-classpath", "./target/classes", "Get"],
                trial: Trial::Addresses,
            },
        ],
    },
    Language {
        name: "rust",
        tools: &[],
        install: |here| {
            run(cargo().current_dir(here).args(["build", "--quiet", "--locked", "--target-dir", "target"]))
        },
        clients: &[Client {
            name: "rust-reqsign-aliyun-oss",
            command: &["./target/debug/client"],
            trial: Trial::Credentials { refresh: "always" },
        }],
    },
];

/// Installs every SDK whose language is on this machine, and tries each in a pod.
pub(crate) fn test(no_skip: bool) -> Result<Counts> {
    if !setup::is_root() && !setup::in_path("sudo") {
        bail!("the sandbox makes cgroups, network namespaces and eBPF programs: run it as root");
    }
    setup::building()?;
    setup::programs()?;
    let build::Programs { agent, sandbox } = build::programs()?;
    let mut skipped = Vec::new();
    let mut commands = Vec::new();
    for language in &LANGUAGES {
        let missing = language.tools.iter().find(|tool| !setup::in_path(tool));
        if let Some(tool) = missing {
            skipped.extend(language.clients.iter().map(|client| format!("{} (no {tool})", client.name)));
            continue;
        }
        let here = language.installed()?;
        for client in language.clients {
            commands.push((client, expanded(client.command, &here)));
        }
    }

    say("real clients, each in a pod of its own sandbox");
    say(format!("  {:<31}  {:<8}  {:<9}  REQUESTS", "CLIENT", "VERSION", "SIGNATURE"));
    let mut failed = Vec::new();
    let passed = commands.len();
    for (Client { name, trial, .. }, command) in commands {
        let mut trying = setup::privileged(&sandbox);
        match trial {
            Trial::Addresses => {
                trying.arg("addresses");
            }
            Trial::Credentials { refresh } => {
                let fixture = root().join("xtask/sdks/fixtures").join(name).with_extension("txt");
                trying.args(["sdk", "--refresh", refresh, "--fixture"]).arg(fixture);
            }
        }
        if run(trying.args(["--name", name, "--agent"]).arg(&agent).arg("--").args(command)).is_err() {
            failed.push(name);
        }
    }
    for client in &skipped {
        say(format!("SKIPPED: {client}"));
    }
    if !failed.is_empty() {
        bail!("failed: {failed:?}");
    }
    if no_skip && !skipped.is_empty() {
        bail!("skipped: {skipped:?}");
    }
    Ok(Counts { passed, failed: 0, skipped: skipped.len() })
}

impl Language {
    /// Installs unless exactly these sources have been; tells where.
    fn installed(&self) -> Result<PathBuf> {
        let (from, here) =
            (root().join("xtask/sdks").join(self.name), target_dir().join("sdks").join(self.name));
        let files = sources(&from)?;
        let stamp = here.join("installed");
        let wanted = files.iter().flat_map(|(_, text)| text.bytes()).collect::<Vec<_>>();
        if fs::read(&stamp).is_ok_and(|installed| installed == wanted) {
            return Ok(here);
        }
        say(format!("installing the SDKs for {}", self.name));
        if here.exists() {
            fs::remove_dir_all(&here)?;
        }
        fs::create_dir_all(&here)?;
        for (path, text) in files {
            fs::write(here.join(path.file_name().context("a file has a name")?), text)?;
        }
        (self.install)(&here).with_context(|| format!("cannot install the SDKs for {}", self.name))?;
        fs::write(&stamp, wanted)?;
        Ok(here)
    }
}

/// The command with absolute paths: the client is given no directory and no PATH of ours.
fn expanded(words: &[&str], here: &Path) -> Vec<String> {
    let here = format!("{}/", here.display());
    let mut words = words.iter().map(|word| word.replace("./", &here)).collect::<Vec<_>>();
    if let Some(program) = setup::find(&words[0]) {
        words[0] = program.display().to_string();
    }
    words
}

/// The files of a directory, in order.
fn sources(directory: &Path) -> Result<Vec<(PathBuf, String)>> {
    let mut files = fs::read_dir(directory)?
        .map(|entry| {
            let path = entry?.path();
            let text =
                fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            Ok((path, text))
        })
        .collect::<Result<Vec<_>>>()?;
    files.sort();
    Ok(files)
}
