//! The real binary from the outside: exit codes, and one line with the remedy.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use kube2ram_agent::identity::find_cgroup_root;

/// `EX_USAGE` of sysexits.h.
const USAGE: i32 = 64;

/// The agent without any environment of ours.
fn agent(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kube2ram"));
    command.env_clear().args(args).stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> &str {
    str::from_utf8(bytes).unwrap()
}

/// Flags with which an agent would start on a node; it then talks to nobody.
fn on_a_node(extra: &[&str]) -> Output {
    let free_port = || TcpListener::bind("0.0.0.0:0").unwrap().local_addr().unwrap().port();
    let ports = [format!("--app-port={}", free_port()), format!("--metrics-port={}", free_port())];
    let node = ["--node=n", "--host-ip=127.0.0.1", "--api-server=http://127.0.0.1:1", "--log-format=json"];
    agent(&node).args(ports).args(extra).output().unwrap()
}

/// The one line at level ERROR, as the log has it.
fn last_words(output: &Output) -> String {
    let log: Vec<serde_json::Value> =
        text(&output.stderr).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let errors: Vec<_> = log.iter().filter(|line| line["level"] == "ERROR").collect();
    assert_eq!(errors.len(), 1, "{log:?}");
    errors[0]["error"].as_str().unwrap().to_owned()
}

#[test]
fn the_allocator_takes_its_options() {
    let output = agent(&["--help"]).env("_RJEM_MALLOC_CONF", "confirm_conf:true").output().unwrap();

    let told = text(&output.stderr);
    for option in
        ["narenas:1", "tcache_max:16384", "lg_tcache_nslots_mul:1", "dirty_decay_ms:1000", "muzzy_decay_ms:0"]
    {
        assert!(told.contains(&format!("Set conf value: {option}\n")), "{option} in {told}");
    }
    assert!(!told.contains("Invalid"), "{told}");
}

#[test]
fn a_bad_flag_ends_in_64_and_one_line_with_the_remedy() {
    let cases: [(&[&str], &str); 26] = [
        (&[], "set --node"),
        (&["--node=n", "--nonsense"], "unexpected argument '--nonsense'"),
        (&["--node=n", "surplus"], "unrecognized subcommand 'surplus'"),
        (&["--node=n", "--verbos"], "--verbose"),
        (&["--node=N,spec.x=y"], "give the name of a Node"),
        (&["--node=n", "--node"], "a value is required"),
        (&["--node=n", "--app-port=0"], "0 is not in 1..=65535"),
        (&["--node=n", "--app-port=65536"], "65536 is not in 1..=65535"),
        (&["--node=n", "--app-port=1", "--metrics-port=1"], "change one of them"),
        (&["--node=n", "--host-ip=node"], "invalid value 'node'"),
        (&["--node=n", "--metadata-addr=::1"], "give an IPv4 address"),
        (
            &["--node=n", "--base-role-arn=arn:aws:iam::1:role/"],
            "is not a base ARN, acs:ram::<account>:role/",
        ),
        (&["--node=n", "--base-role-arn=acs:ram::1:role/", "--auto-discover-base-arn"], "drop one of them"),
        (&["--node=n", "--default-role=x"], "add --base-role-arn or --auto-discover-base-arn"),
        (&["--node=n", "--default-role=x", "--auto-discover-default-role"], "drop one of them"),
        (&["--node=n", "--default-role=a b", "--base-role-arn=acs:ram::1:role/"], "only letters, digits"),
        (&["--node=n", "--ram-role-key=two words"], "give an annotation key"),
        (&["--node=n", "--ram-role-session-ttl=1s"], "give 7m30s to 6h"),
        (&["--node=n", "--ram-role-session-ttl=soon"], "give a number with a unit"),
        (&["--node=n", "--namespace-restriction-format=perl"], "give glob or regexp"),
        (&["--node=n", "--host-network-pods=maybe"], "[possible values: deny, pass]"),
        (&["--node=n", "--api-server=kubernetes"], "give https://<host>[:<port>]"),
        (&["--node=n", "--api-token=x"], "add it, or drop the token"),
        (&["--node=n", "--api-server=http://a", "--insecure"], "need an --api-server with https://"),
        (&["--node=n", "--sts-endpoint=http://sts.aliyuncs.com"], "http:// for loopback"),
        (&["--node=n", "--log-level=loud\nlouder"], "give trace, debug, info, warn or error"),
    ];

    for (args, remedy) in cases {
        let output = agent(args).output().unwrap();

        let line = text(&output.stderr);
        assert_eq!(output.status.code(), Some(USAGE), "{args:?}: {line}");
        assert!(line.starts_with("kube2ram: ") && line.ends_with('\n'), "{args:?}: {line:?}");
        assert_eq!(line.lines().count(), 1, "{args:?}: {line}");
        assert!(line.contains(remedy), "{args:?}: {line}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn a_bad_variable_ends_like_the_flag_it_stands_for() {
    let output = agent(&["--node=n"]).env("KUBE2RAM_APP_PORT", "none").output().unwrap();

    assert_eq!(output.status.code(), Some(USAGE));
    assert!(text(&output.stderr).contains("--app-port"), "{}", text(&output.stderr));
}

#[test]
fn help_and_version_go_to_standard_output() {
    for (flag, expected) in [
        ("--help", "--namespace-restrictions"),
        ("--version", concat!("kube2ram ", env!("CARGO_PKG_VERSION"))),
    ] {
        let output = agent(&[flag]).output().unwrap();

        assert_eq!(output.status.code(), Some(0), "{flag}");
        assert!(text(&output.stdout).contains(expected), "{flag}: {}", text(&output.stdout));
        assert!(output.stderr.is_empty(), "{flag}: {}", text(&output.stderr));
    }
}

/// `kube2ram --help | head -1`, and a supervisor that reads nothing.
#[test]
fn a_reader_that_has_ended_is_no_crash() {
    for (args, code) in [(["--help"], 0), (["--nonsense"], USAGE)] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);

        let status = agent(&args).stdout(writer.try_clone().unwrap()).stderr(writer).status().unwrap();

        assert_eq!(status.code(), Some(code), "{args:?}");
    }
}

#[test]
fn probes_without_an_agent_end_in_1_and_a_line_and_make_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state");
    for probe in ["live", "ready"] {
        let output = agent(&[probe, &format!("--state-dir={}", state.display())]).output().unwrap();

        let line = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{probe}: {line}");
        assert!(
            line.starts_with("kube2ram: the agent of this container does not answer: "),
            "{probe}: {line}"
        );
        assert_eq!(line.lines().count(), 1, "{probe}: {line}");
        assert!(output.stdout.is_empty() && !state.exists(), "{probe}");
    }
}

#[test]
fn a_missing_cgroup_ends_in_1_and_names_the_flag() {
    let directory = tempfile::tempdir().unwrap();
    let root = format!("--cgroup-root={}", directory.path().display());
    let absent = format!("--cgroup-root={}", directory.path().join("absent").display());

    for (flags, remedy) in [
        (vec![&*root], "correct --cgroup-root"),
        (vec![&*absent], "absent: No such file or directory"),
        (vec!["--pods-cgroup=/proc"], "correct --pods-cgroup"),
    ] {
        let output = on_a_node(&flags);

        assert_eq!(output.status.code(), Some(1), "{flags:?}: {}", text(&output.stderr));
        assert!(last_words(&output).contains(remedy), "{flags:?}: {}", last_words(&output));
    }
}

/// A cgroup of this test's own below the mount, removed when dropped.
struct Cgroup(PathBuf);

impl Cgroup {
    fn make() -> Self {
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        let root = find_cgroup_root(None).unwrap();
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let path = root.join(format!("kube2ram-command-line-{}-{serial}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        drop(fs::remove_dir(&self.0));
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_pin_directory_on_no_bpffs_ends_in_1_and_names_the_mount_command() {
    let (directory, pods) = (tempfile::tempdir().unwrap(), Cgroup::make());
    let pins = directory.path().join("pins");
    let flag = |name: &str, path: &Path| format!("--{name}={}", path.display());

    let output = on_a_node(&[&flag("pods-cgroup", &pods.0), &flag("bpf-dir", &pins)]);

    assert_eq!(output.status.code(), Some(1));
    let error = last_words(&output);
    assert!(error.contains("mount -t bpf bpf /sys/fs/bpf") && error.contains("--bpf-dir"), "{error}");
    assert!(!pins.exists(), "nothing is made there");
}
