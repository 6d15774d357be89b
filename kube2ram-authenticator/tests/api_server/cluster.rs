//! The sandbox's cluster with the programs of this build. Used by all tests here.

use std::{
    ops::{Deref, DerefMut},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use kube2ram_sandbox::login::{self, Programs};
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_kube2ram-authenticator");
const DEADLINE: Duration = Duration::from_secs(120);

pub(crate) struct Cluster {
    cluster: login::Cluster,
    _directory: TempDir,
}

impl Cluster {
    /// With these flags of the API server, and the users and roles of [`login::Cluster::start`].
    pub(crate) fn start(flags: &[&str]) -> Self {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let programs = Programs {
            authenticator: PROGRAM.into(),
            // `cargo xtask test --api-server` links to them next to the directory of the profile.
            tools: Path::new(PROGRAM).ancestors().nth(2).unwrap().join("tools"),
            deploy: Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("deploy/authenticator"),
        };
        let cluster = login::Cluster::start(programs, directory.path(), flags).unwrap();
        Self { cluster, _directory: directory }
    }
}

impl Deref for Cluster {
    type Target = login::Cluster;

    fn deref(&self) -> &login::Cluster {
        &self.cluster
    }
}

impl DerefMut for Cluster {
    fn deref_mut(&mut self) -> &mut login::Cluster {
        &mut self.cluster
    }
}

/// How long it takes until this holds.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < DEADLINE, "it does not come: {what}");
        thread::sleep(Duration::from_millis(200));
    }
    start.elapsed()
}
