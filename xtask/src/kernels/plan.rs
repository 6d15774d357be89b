//! What a kernel's machine runs, and what it needs for that. Called by `kernels`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use super::{
    Rows,
    initramfs::{self, Contents, Modules},
};
use crate::{build::Programs, command::root, rungs};

/// What tests of the eBPF programs alone call, and what starts them.
const PROGRAMS: [&str; 13] = [
    "bpftool", "cat", "ip", "mkdir", "mount", "nsenter", "python3", "setpriv", "sh", "sleep", "tc", "uname",
    "unshare",
];
/// Protocols, kube-proxy's IPVS, tc's filters, and what the sandbox makes a node of.
const MODULES: [&str; 11] = [
    "cls_bpf",
    "dccp_ipv4",
    "dummy",
    "ip_vs_rr",
    "nft_chain_nat",
    "nft_ct",
    "nft_masq",
    "sch_ingress",
    "sctp",
    "smc",
    "veth",
];
/// What pods, and nodes that are tried with the whole agent, have besides.
const SANDBOX_MODULES: [&str; 14] = [
    "8021q",
    "act_mirred",
    "bonding",
    "bridge",
    "cls_u32",
    "ipvlan",
    "macvlan",
    "nft_nat",
    "nft_redir",
    "nft_reject_inet",
    "nft_reject_ipv4",
    "tcp_diag",
    "tun",
    "vxlan",
];
/// A module below 5.11 only; built in since.
const COUNTER: (&str, &str) = ("5.10", "nft_counter");
/// What a sandbox, its pods, and the tests in them call.
const SANDBOX_PROGRAMS: [&str; 11] =
    ["curl", "dd", "env", "find", "kill", "ln", "nft", "sort", "ss", "true", "umount"];
/// The agent wants some certificate.
const CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";
/// What a kernel lacks for some rows, which these report as skipped. A row that is skipped for anything else
/// fails.
const LACKS: [(&str, &str); 3] = [
    // Debian builds it without CONFIG_MPTCP. Newer are the egress hook of nf_tables (5.16) and
    // IORING_OP_SOCKET (5.19).
    ("5.10", "IORING_OP_SOCKET,MPTCP,SO_NETNS_COOKIE,nft-egress,tcx"),
    // Newer are MSG_FASTOPEN for MPTCP (6.2) and tcx (6.6).
    ("6.1", "MPTCP-MSG_FASTOPEN,tcx"),
    ("6.12", ""),
];
/// The series whose machines load modules in each run, for what this machine's own kernel may not have.
const MODULES_ON: &str = "6.1";
/// The tests that need nothing but the kernel, cgroups and a loopback device.
const TESTS: [&str; 3] = ["boot_guard_kernel", "datapath_kernel", "identity_attacks"];
/// The tests with the whole agent in a sandbox that run on each kernel.
const SANDBOX_TESTS: [&str; 6] =
    ["bypass", "hard_to_kill", "identity_kernel", "in_pod", "uninstall", "wire_guard"];

/// What one machine runs.
pub(super) struct Plan {
    pub(super) runs: Vec<Run>,
    may_lack: &'static str,
    tests: Vec<PathBuf>,
    /// None where nothing that runs needs one.
    modules: Vec<&'static str>,
}

/// A command of the machine's shell, whose end is one of the results.
pub(super) struct Run {
    pub(super) name: String,
    pub(super) command: String,
}

impl Plan {
    pub(super) fn new(series: &str, rows: Rows, objects: &Path) -> Result<Self> {
        let has_modules = rows == Rows::All || series == MODULES_ON;
        let mut runs = vec![
            unprivileged("datapath_kernel", "returns_the_cgroup_that_connected"),
            unprivileged("boot_guard_kernel", "denies_all_but_the_hosts_own"),
            tests("boot_guard_kernel", ""),
            // What makes network devices needs modules.
            tests("datapath_kernel", if has_modules { "" } else { "--skip wire::a_program_on_the_card" }),
        ];
        let mut modules = if has_modules { MODULES.to_vec() } else { Vec::new() };
        let mut names = TESTS.to_vec();
        if has_modules {
            runs.push(Run { name: "modules".into(), command: "python3 /modules/load.py".into() });
        }
        match rows {
            Rows::All => {
                modules.extend(SANDBOX_MODULES);
                modules.extend((series == COUNTER.0).then_some(COUNTER.1));
                runs.extend(SANDBOX_TESTS.map(|test| tests(test, "")));
                names.extend(SANDBOX_TESTS);
            }
            Rows::Essential if has_modules => {
                runs.push(tests("bypass", "of_a_module::"));
                names.push("bypass");
            }
            Rows::Essential => {}
        }
        // Last, because it uses net_cls below 5.15: unless 8520e224f547 is back-ported, sockets do not know
        // their cgroup from then on. The essential rows leave out thousands of connects, for races that do
        // not depend on the kernel.
        runs.push(tests(
            "identity_attacks",
            if rows == Rows::All { "" } else { "--skip race:: --skip ports_that" },
        ));
        let may_lack = LACKS.iter().find(|(name, _)| *name == series).context("an unknown series")?.1;
        Ok(Self { runs, may_lack, tests: rungs::executables(objects, &names)?, modules })
    }

    /// Writes what the machine boots from.
    pub(super) fn write(&self, archive: &Path, kernel: &Path, programs: &Programs) -> Result<()> {
        if self.modules.is_empty() {
            return initramfs::write(
                archive,
                &Contents {
                    may_lack: self.may_lack,
                    runs: &self.runs,
                    programs: &PROGRAMS,
                    tests: &self.tests,
                    modules: None,
                },
            );
        }
        let scripts = fs::read_dir(root().join("kube2ram-agent/tests/bypass"))?;
        let mut files = scripts.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        files.retain(|path| path.extension().is_some_and(|end| end == "py"));
        files.extend([programs.agent.clone(), CERTIFICATES.into()]);
        let contents = Contents {
            may_lack: self.may_lack,
            runs: &self.runs,
            programs: &[&PROGRAMS[..], &SANDBOX_PROGRAMS].concat(),
            tests: &[&self.tests[..], std::slice::from_ref(&programs.sandbox)].concat(),
            modules: Some(Modules { kernel, names: &self.modules, files: &files }),
        };
        initramfs::write(archive, &contents)
    }
}

/// One of the tests' executables, with its own arguments.
fn tests(name: &str, arguments: &str) -> Run {
    let command = format!("/tests/{name} {arguments} --ignored --nocapture --test-threads=1");
    Run { name: name.to_owned(), command }
}

/// One test with the capabilities of an agent without CAP_SYS_ADMIN and CAP_PERFMON, for which the verifier
/// is stricter (and CAP_DAC_OVERRIDE, because the tests make cgroups below the root; CAP_NET_RAW, because one
/// tries a raw socket).
fn unprivileged(name: &str, test: &str) -> Run {
    let Run { name, command } = tests(name, test);
    let capabilities = "setpriv --bounding-set -all,+bpf,+dac_override,+net_admin,+net_raw --inh-caps -all";
    let command = format!("sh -c 'ulimit -l unlimited; exec {capabilities} {command}'");
    Run { name: format!("unprivileged-{name}"), command }
}
