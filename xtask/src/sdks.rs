//! Real clients: installs pinned versions of unmodified SDKs under target/sdks and lets the sandbox try each
//! of them, and the HTTP clients of their languages. Depends on the package managers of their languages.
//! Called by `main`.

mod languages;

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use self::languages::LANGUAGES;
use crate::{
    build,
    command::{root, run, say, target_dir},
    counts::Counts,
    setup,
};

/// SDKs of a cloud that are installed together. Sources and lock files are in `xtask/sdks/<name>`, whose copy
/// in `target/sdks/<name>` is where they are installed and built.
struct Language {
    /// Whose SDKs they are, in the sandbox's words.
    cloud: &'static str,
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
        /// How many seconds before their end it wants other credentials, by its source; `always`, or `clock`
        /// for one whose clock must be moved, because real time would take too long.
        refresh: &'static str,
    },
}

/// By whose right pods' roles are assumed, in the sandbox's words.
pub(crate) const CREDENTIALS_FROM: [&str; 2] = ["node", "service-account"];

/// Installs every SDK whose language is on this machine, and tries each in a pod: with each of
/// [`CREDENTIALS_FROM`], or with one alone. A language's own HTTP client is tried once.
pub(crate) fn test(credentials_from: Option<&str>, no_skip: bool) -> Result<Counts> {
    if !setup::is_root() && !setup::in_path("sudo") {
        bail!("the sandbox makes cgroups, network namespaces and eBPF programs: run it as root");
    }
    setup::building()?;
    setup::programs()?;
    let build::Programs { agent, sandbox, .. } = build::programs()?;
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
            commands.push((language.cloud, client, expanded(client.command, &here)));
        }
    }

    say("real clients, each in a pod of its own sandbox");
    say(format!("  {:<43}  {:<8}  {:<9}  REQUESTS", "CLIENT", "VERSION", "SIGNATURE"));
    let mut failed = Vec::new();
    let mut passed = 0;
    for from in CREDENTIALS_FROM.into_iter().filter(|from| credentials_from.is_none_or(|only| only == *from))
    {
        for (cloud, Client { name, trial, .. }, command) in &commands {
            let mut trying = setup::privileged(&sandbox);
            match trial {
                Trial::Addresses if from == CREDENTIALS_FROM[0] => {
                    trying.arg("addresses");
                }
                Trial::Addresses => continue,
                Trial::Credentials { refresh } => {
                    let fixture = root().join("xtask/sdks/fixtures").join(name).with_extension("txt");
                    trying.args(["sdk", "--cloud", cloud, "--credentials-from", from]);
                    trying.args(["--refresh", refresh, "--fixture"]).arg(fixture);
                }
            }
            if run(trying.args(["--name", name, "--agent"]).arg(&agent).arg("--").args(command)).is_err() {
                failed.push(format!("{name}, from {from}"));
            }
            passed += 1;
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
