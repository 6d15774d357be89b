//! Debian packages of any release, from where this machine's own apt finds Debian, into a directory of our
//! own: nothing is installed, and this machine's own sources and lists stay as they are. Called by `musl`,
//! `kernels` and `disk`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::command::{capture, run};

const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// An apt of our own.
pub(crate) struct Apt {
    directory: PathBuf,
    /// As Debian calls it.
    architecture: &'static str,
}

impl Apt {
    /// Knows what the suites offer. `base` suites are of the archive, `security` ones of its security
    /// updates.
    pub(crate) fn open(
        directory: &Path,
        architecture: &'static str,
        base: &[&str],
        security: &[&str],
    ) -> Result<Self> {
        for below in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(directory.join(below))?;
        }
        // As if nothing were installed.
        fs::write(directory.join("status"), "")?;
        let mut sources = String::new();
        for (suites, is_security) in [(base, false), (security, true)] {
            for suite in suites {
                let archive = archive(is_security).context("apt knows no Debian archive")?;
                sources.push_str(&format!("deb [signed-by={KEYS}] {archive} {suite} main\n"));
            }
        }
        fs::write(directory.join("sources.list"), sources)?;
        let apt = Self { directory: directory.to_owned(), architecture };
        run(apt.command("apt-get").args(["update", "-qq"]))?;
        Ok(apt)
    }

    /// The packages whose name begins like this, one a line.
    pub(crate) fn names(&self, prefix: &str) -> Result<String> {
        capture(self.command("apt-cache").args(["pkgnames", prefix])).context("apt-cache fails")
    }

    /// Downloads one package, without what it depends on.
    pub(crate) fn download(&self, package: &str) -> Result<PathBuf> {
        run(self.command("apt-get").args(["download", "-qq", package]))?;
        self.packages(&self.directory)?.pop().context("nothing was downloaded")
    }

    /// Downloads packages and everything that they depend on.
    pub(crate) fn download_all(&self, packages: &[&str]) -> Result<Vec<PathBuf>> {
        let mut download = self.command("apt-get");
        download.args(["install", "-y", "-qq", "--no-install-recommends", "--download-only"]);
        // Which prints what it would install.
        capture(download.args(packages))
            .with_context(|| format!("cannot download {}", packages.join(" ")))?;
        let archives = self.packages(&self.directory.join("cache/archives"))?;
        ensure!(archives.len() >= packages.len(), "apt downloaded only {} packages", archives.len());
        Ok(archives)
    }

    fn packages(&self, directory: &Path) -> Result<Vec<PathBuf>> {
        let entries = fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        Ok(entries.into_iter().filter(|path| path.extension().is_some_and(|end| end == "deb")).collect())
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        for (option, value) in [
            ("Dir::Etc::sourcelist", "sources.list"),
            ("Dir::State::lists", "lists"),
            ("Dir::State::status", "status"),
            ("Dir::Cache", "cache"),
        ] {
            command.arg("-o").arg(format!("{option}={}", self.directory.join(value).display()));
        }
        command.args(["-o", "Dir::Etc::sourceparts=/dev/null", "-o", "APT::Sandbox::User=root"]);
        for option in ["Architecture", "Architectures"] {
            command.arg("-o").arg(format!("APT::{option}={}", self.architecture));
        }
        command.current_dir(&self.directory);
        command
    }
}

/// Where this machine's own apt finds Debian, or its security updates; other releases are next to this one.
fn archive(security: bool) -> Option<String> {
    let format = ["indextargets", "--format", "$(ORIGIN) $(LABEL) $(REPO_URI)", "Created-By: Packages"];
    let targets = capture(Command::new("apt-get").args(format))?;
    let label = if security { "Debian Debian-Security " } else { "Debian Debian " };
    targets.lines().find_map(|target| target.strip_prefix(label)).map(str::to_owned)
}
