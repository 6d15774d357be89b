//! docs/bpftool.md is true: it names what the code names, and each of its commands, run against a running
//! agent, prints lines of the shape that the page shows.

use std::{
    collections::BTreeSet,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use kube2ram_common::{abi::Counter, names};
use kube2ram_sandbox::{
    Sandbox,
    node::{CgroupDriver, PodSpec},
    standin::{Accounts, Role},
};

const AGENT: &str = env!("CARGO_BIN_EXE_kube2ram");
const PAGE: &str = include_str!("../../docs/bpftool.md");
const LIST: &str = "/latest/meta-data/ram/security-credentials/";
/// Stands for any lines.
const OMITTED: &str = "…";

/// A command, and what the page shows of its output.
#[derive(Debug)]
struct Example {
    command: String,
    output: Vec<&'static str>,
}

fn examples() -> Vec<Example> {
    let (mut is_console, mut examples) = (false, Vec::<Example>::new());
    for line in PAGE.lines() {
        if let Some(fence) = line.strip_prefix("```") {
            is_console = fence == "console";
        } else if is_console {
            match (line.strip_prefix("# "), examples.last_mut()) {
                (Some(command), _) => {
                    examples.push(Example { command: command.to_owned(), output: Vec::new() });
                }
                (None, Some(example)) => example.output.push(line),
                (None, None) => panic!("{line}: the output of what?"),
            }
        }
    }
    examples
}

/// A line without its numbers and the width of its columns.
fn shape(line: &str) -> String {
    let is_name = |char: char| char.is_ascii_alphanumeric() || char == '_';
    let number = |part: &str| {
        let digits = part.trim_start_matches("0x");
        // The T is a timestamp's; bytes in hexadecimal may be letters alone.
        let is_number = digits.chars().all(|char| char.is_ascii_hexdigit() || char == 'T');
        is_number && (digits.len() == 2 || digits.contains(|char: char| char.is_ascii_digit()))
    };
    let word = |word: &str| {
        let parts = word.split_inclusive(|char| !is_name(char)).map(|part| {
            let name = part.trim_end_matches(|char| !is_name(char));
            if number(name) { part.replacen(name, "0", 1) } else { part.to_owned() }
        });
        parts.collect::<String>()
    };
    line.split_whitespace().map(word).collect::<Vec<_>>().join(" ")
}

/// Whether the lines that are shown stand in the output, in their order, one after the other but for what is
/// omitted.
fn is_shown(shown: &[&str], output: &[&str]) -> bool {
    let output: Vec<_> = output.iter().map(|line| shape(line)).collect();
    let mut at = 0;
    let mut may_skip = true;
    for line in shown {
        if *line == OMITTED {
            may_skip = true;
            continue;
        }
        let wanted = shape(line);
        let found = output[at..].iter().position(|line| *line == wanted);
        match found {
            Some(0) => at += 1,
            Some(skipped) if may_skip => at += skipped + 1,
            _ => return false,
        }
        may_skip = false;
    }
    true
}

#[test]
fn a_shape_is_what_does_not_change() {
    assert_eq!(shape("12: cgroup  prog 34"), shape("7:  cgroup prog 1234"));
    assert_eq!(shape("key: 7c 01 00 ff"), shape("key: ab cd 00 00"));
    assert_eq!(shape("loaded_at 2026-11-22T10:48:01+0000"), shape("loaded_at 2027-01-02T23:00:00+0000"));
    assert_ne!(shape("name k2r_connect4"), shape("name k2r_connect6"));
    assert_ne!(shape("\"addr_be\": 1,"), shape("\"port_be\": 1,"));
    assert!(is_shown(&["a 1", OMITTED, "c"], &["a 2", "b", "c"]));
    assert!(!is_shown(&["a 1", "c"], &["a 2", "b", "c"]));
}

#[test]
fn the_page_names_what_the_code_names() {
    let known: BTreeSet<_> = names::map::ALL.into_iter().chain(names::program::ALL).collect();
    let boot = names::boot::MAPS.into_iter().chain(names::boot::PROGRAMS);
    let others: BTreeSet<_> = boot.chain(names::program::WIRES).collect();
    let is_part = |char: char| char.is_ascii_alphanumeric() || char == '_';
    let named: BTreeSet<_> = PAGE
        .split(|char| !is_part(char))
        .filter(|word| word.starts_with(names::PREFIX) && *word != names::PREFIX)
        .collect();

    let unknown: Vec<_> = named
        .iter()
        .filter(|name| !known.contains(**name) && !others.contains(**name) && **name != "k2r_boot_")
        .collect();
    let missing: Vec<_> = known.difference(&named).collect();

    assert_eq!(unknown, Vec::<&&str>::new(), "on the page, but not in the code");
    assert_eq!(missing, Vec::<&&str>::new(), "in the code, but not on the page");
}

#[test]
fn the_page_numbers_the_counters_as_the_ebpf_programs_do() {
    let row = |line: &str| -> Option<(usize, String)> {
        let mut cells = line.strip_prefix('|')?.split('|').map(str::trim);
        Some((cells.next()?.parse().ok()?, cells.next()?.trim_matches('`').to_owned()))
    };
    let told: Vec<_> = PAGE.lines().filter_map(row).collect();

    let expected: Vec<_> =
        Counter::ALL.iter().map(|(counter, name)| (*counter as usize, (*name).to_owned())).collect();

    assert_eq!(told, expected);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn each_command_prints_what_the_page_shows() {
    let mut sandbox = Sandbox::create_with("bpftool", CgroupDriver::Systemd).unwrap();
    sandbox.accounts().add_role(Accounts::role_arn("orders-role"), Role::default());
    sandbox.add_pod(&PodSpec::new("orders").role("orders-role")).unwrap();
    sandbox.start_agent(AGENT.as_ref(), &["--auto-discover-base-arn"]).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while sandbox.agent().unwrap().metric("kube2ram_pod_listeners").unwrap() < 1.0 {
        assert!(Instant::now() < deadline, "the pod has no listener");
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(sandbox.pod("orders").unwrap().curl(LIST).unwrap().body, "orders-role");
    let admin = sandbox.agent().unwrap().admin_addr().to_string();
    let here = |text: &str| {
        let node = sandbox.node();
        let text = if text.ends_with("show /sys/fs/cgroup") {
            text.replace("/sys/fs/cgroup", node.cgroup_root().to_str().unwrap())
        } else {
            text.to_owned()
        };
        text.replace("/sys/fs/bpf/kube2ram", node.bpffs().join("kube2ram").to_str().unwrap())
            .replace("/sys/fs/cgroup/kubepods.slice", node.pods_cgroup().to_str().unwrap())
            .replace("localhost:9181", &admin)
    };
    let examples = examples();
    assert!(examples.len() > 10, "{examples:?}");
    let mut wrong = String::new();

    for Example { command, output } in &examples {
        let mut shell = Command::new("sh");
        shell.args(["-c", &here(command)]).env("POD", sandbox.pod("orders").unwrap().pod().cgroup());
        let printed = shell.output().unwrap();
        let text = String::from_utf8([printed.stdout, printed.stderr].concat()).unwrap();
        let lines: Vec<_> = text.lines().collect();
        let shown: Vec<_> = output.iter().map(|line| here(line)).collect();
        let shown: Vec<_> = shown.iter().map(String::as_str).collect();
        if !printed.status.success() || !is_shown(&shown, &lines) {
            wrong += &format!("# {command}\n{text}\n");
        }
    }

    assert!(wrong.is_empty(), "these print something else than the page shows:\n{wrong}");
}
