//! Flags of the predecessors that have no effect any more. They are accepted, so that old manifests
//! start, and logged.
//! Depends on clap; called by the parent.

use clap::{Arg, ArgMatches, Command};

use super::value;

const UNKNOWN_PODS: &str = "the agent waits for a pod that is not known yet, within a fixed deadline";

/// Name, whether it is a switch, and what happens instead.
const FLAGS: [(&str, bool, &str); 7] = [
    ("backoff-max-elapsed-time", false, UNKNOWN_PODS),
    ("backoff-max-interval", false, UNKNOWN_PODS),
    ("cache-resync-period", false, "watches keep pods and namespaces up to date"),
    ("host-interface", false, "pods are recognised by their cgroup, whatever interface they use"),
    (
        "iam-role-error-ttl",
        false,
        "the agent remembers a refusal of STS for a while that depends on the reason",
    ),
    ("iptables", true, "connections are redirected by eBPF programs, without iptables rules"),
    ("resolve-duplicate-cache-ips", true, "pods that share an IP address are distinguished by their cgroup"),
];

/// Adds the flags to the command.
pub(super) fn add_to(command: Command) -> Command {
    FLAGS.iter().fold(command, |command, &(name, switch, instead)| {
        let arg = Arg::new(name)
            .long(name)
            .help(format!("No effect: {instead}"))
            .help_heading("Accepted for the sake of old manifests");
        command.arg(if switch { value::switch(arg) } else { arg.value_name("VALUE") })
    })
}

/// One line for each of the flags that was set.
pub(super) fn notices(matches: &ArgMatches) -> Vec<String> {
    let set = FLAGS.iter().filter(|(name, ..)| matches.contains_id(name));
    set.map(|(name, _, instead)| format!("--{name} has no effect: {instead}")).collect()
}
