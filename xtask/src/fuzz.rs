//! `cargo xtask fuzz`: libFuzzer against what reads foreign input, for a bounded time. What it finds on the
//! way stays under target; `--keep` puts it into the committed corpus. Depends on cargo-fuzz, which it
//! installs. Called by `main`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    command::{cargo, root, run, say, target_dir},
    counts::Counts,
    ebpf, setup,
};

/// Of cargo-fuzz.
const VERSION: &str = "0.13.2";
/// How long an input may be, in bytes; more only makes it slow. Heads of requests are cut off at 8 KiB.
const MAX_LENGTH: &str = "2048";
/// How long one input may take, in seconds. Regular expressions of hostile size must not.
const INPUT_TIMEOUT: &str = "10";

/// The fuzz crates; they stand outside of the workspace. Names of targets are unique among them.
const CRATES: [&str; 2] = ["kube2ram-agent/fuzz", "kube2ram-authenticator/fuzz"];

/// What to run.
#[derive(clap::Args)]
pub(crate) struct Fuzz {
    /// Only this target (a file of fuzz_targets in kube2ram-agent/fuzz or kube2ram-authenticator/fuzz,
    /// without .rs)
    target: Option<String>,
    /// How long, over all targets
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Where chance begins: the same number tries the same inputs; 0 is by chance
    #[arg(long, default_value_t = 0)]
    seed: u32,
    /// Puts the inputs that reach something new into the committed corpus, and drops those that no longer do
    #[arg(long)]
    keep: bool,
    /// Also `address`: slower, for the unsafe code below us
    #[arg(long, default_value = "none")]
    sanitizer: String,
}

impl Fuzz {
    /// Fuzzes, and returns how many targets found nothing.
    pub(crate) fn run(&self) -> Result<Counts> {
        program()?;
        // Nothing of it is fuzzed, but where it is missing the agent is compiled again for every target.
        setup::building()?;
        ebpf::build()?;
        let all = targets()?;
        let is_chosen = |target: &&Target| self.target.as_ref().is_none_or(|name| *name == target.name);
        let chosen: Vec<&Target> = all.iter().filter(is_chosen).collect();
        let names: Vec<&str> = all.iter().map(|target| &*target.name).collect();
        ensure!(!chosen.is_empty(), "no such target; there are {}", names.join(", "));
        let counts = Counts::passed(chosen.len());
        let seconds = (self.seconds / u64::try_from(chosen.len())?).max(1);
        for target in chosen {
            let name = &target.name;
            say(format!("fuzzing {name} for {seconds} s"));
            let found = target_dir().join("fuzz/corpus").join(name);
            fs::create_dir_all(&found)?;
            let limits = ["-max_len", MAX_LENGTH, "-timeout", INPUT_TIMEOUT, "-print_final_stats", "1"];
            let limits = limits.chunks(2).map(|flag| flag.join("="));
            let dictionary = format!("-dict={}", target.crate_dir.join("dictionary").display());
            // The first corpus is the one that grows.
            run(self.cargo_fuzz(target, &[&found, &target.corpus()])?.args(limits).args([
                format!("-max_total_time={seconds}"),
                format!("-seed={}", self.seed),
                dictionary,
            ]))?;
            if self.keep {
                self.keep(target, &found)?;
            }
        }
        Ok(counts)
    }

    /// Rebuilds the committed corpus from itself and from what was found: the smallest inputs that reach all
    /// that is reached.
    fn keep(&self, target: &Target, found: &Path) -> Result<()> {
        let (corpus, merged) = (target.corpus(), found.with_extension("merged"));
        if merged.exists() {
            fs::remove_dir_all(&merged)?;
        }
        fs::create_dir_all(&merged)?;
        run(self
            .cargo_fuzz(target, &[&merged, &corpus, found])?
            .args(["-merge=1", &format!("-max_len={MAX_LENGTH}")]))?;
        fs::remove_dir_all(&corpus)?;
        fs::create_dir_all(&corpus)?;
        for input in fs::read_dir(&merged)? {
            let input = input?;
            fs::copy(input.path(), corpus.join(input.file_name()))?;
        }
        say(format!("{} has {} inputs", target.name, fs::read_dir(&corpus)?.count()));
        Ok(())
    }

    /// `cargo fuzz run`; what is added are libFuzzer's own flags.
    fn cargo_fuzz(&self, target: &Target, corpora: &[&Path]) -> Result<Command> {
        let mut command = Command::new(program()?);
        command
            .current_dir(root())
            .args(["fuzz", "run", "--sanitizer", &self.sanitizer, "--fuzz-dir"])
            .arg(&target.crate_dir)
            .arg("--target-dir")
            .arg(target_dir().join("fuzz"))
            .arg(&target.name)
            .args(corpora)
            .arg("--")
            // Sanitizers are unstable options; the pinned compiler takes them, for this child only.
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO", cargo().get_program());
        Ok(command)
    }
}

/// A target of one of the crates.
struct Target {
    crate_dir: PathBuf,
    name: String,
}

impl Target {
    fn corpus(&self) -> PathBuf {
        self.crate_dir.join("corpus").join(&self.name)
    }
}

fn program() -> Result<PathBuf> {
    setup::crate_program("cargo-fuzz", VERSION, "cargo-fuzz", |_| Ok(()))
}

fn targets() -> Result<Vec<Target>> {
    let mut targets = Vec::new();
    for crate_dir in CRATES.map(|path| root().join(path)) {
        let sources = fs::read_dir(crate_dir.join("fuzz_targets")).context("cannot list the fuzz targets")?;
        for source in sources {
            let path = source?.path();
            let Some(name) = path.file_stem().and_then(|name| name.to_str()) else {
                bail!("{}", path.display())
            };
            targets.push(Target { crate_dir: crate_dir.clone(), name: name.to_owned() });
        }
    }
    targets.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(targets)
}
