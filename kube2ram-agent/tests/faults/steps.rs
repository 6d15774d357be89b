//! The steps of a start or an uninstall: its system calls, in order, as strace reports them.

use std::{collections::BTreeMap, fs, path::Path, process::Command};

/// The system calls that change what is attached, or read it.
pub(crate) const CALLS: &str = "bpf,flock,mkdir,rename,rmdir,sendto,unlink,unlinkat";

/// One system call, and the how manyth of its kind it was.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    pub(crate) call: String,
    pub(crate) number: usize,
    pub(crate) arguments: String,
}

/// What happens at a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    Error(&'static str),
    Kill,
}

impl Step {
    /// The arguments of strace that make it fail.
    pub(crate) fn inject(&self, fault: Fault) -> [String; 2] {
        let what = match fault {
            Fault::Error(error) => format!("error={error}"),
            Fault::Kill => "signal=KILL".to_owned(),
        };
        ["--output=/dev/null".to_owned(), format!("--inject={}:{what}:when={}", self.call, self.number)]
    }

    /// The first argument: what bpf(2) is to do.
    pub(crate) fn command(&self) -> &str {
        self.arguments.split(',').next().unwrap_or_default()
    }

    /// Whether it is a message to netfilter.
    pub(crate) fn is_netfilter(&self) -> bool {
        self.arguments.contains("NFNL") || self.arguments.contains("nfgen_family")
    }

    /// Whether what is pinned, attached or written differs after it. A process that is killed at one that
    /// changes nothing leaves what one leaves that is killed at the next.
    pub(crate) fn changes(&self) -> bool {
        const COMMANDS: [&str; 6] = [
            "BPF_OBJ_PIN",
            "BPF_LINK_CREATE",
            "BPF_LINK_UPDATE",
            "BPF_LINK_DETACH",
            "BPF_MAP_UPDATE_ELEM",
            "BPF_MAP_DELETE_ELEM",
        ];
        self.call != "bpf" || COMMANDS.contains(&self.command())
    }
}

/// Makes a command run under strace.
pub(crate) fn traced(command: &mut Command, options: &[String], program: &str) {
    command.args(["--follow-forks", "--seccomp-bpf", "--quiet=all", &format!("--trace={CALLS}")]);
    command.args(options).args(["--", program]);
}

/// Reads what strace wrote of a whole run: the calls of the thread that made most of a kind.
pub(crate) fn read(trace: &Path, kind: impl Fn(&Step) -> bool) -> Vec<Step> {
    let text = fs::read_to_string(trace).unwrap();
    let mut threads = BTreeMap::<&str, Vec<&str>>::new();
    for line in text.lines() {
        let (thread, call) = line.trim_start().split_once(' ').unwrap();
        threads.entry(thread).or_default().push(call.trim_start());
    }
    let of_kind = |steps: &Vec<Step>| steps.iter().filter(|step| kind(step)).count();
    threads.into_values().map(of_thread).max_by_key(of_kind).expect("a trace")
}

fn of_thread(calls: Vec<&str>) -> Vec<Step> {
    let mut numbers = BTreeMap::<&str, usize>::new();
    let mut steps = Vec::new();
    for line in calls {
        let Some((call, arguments)) = line.split_once('(') else { continue };
        let number = numbers.entry(call).or_default();
        *number += 1;
        steps.push(Step { call: call.to_owned(), number: *number, arguments: arguments.to_owned() });
    }
    steps
}
