//! The problems of a status, and their remedies. Pure; used by `app`, and tested through the parent.

use jiff::{SignedDuration, Timestamp};

use super::{Problem, Status, Verdict, service_accounts, text::ago};

/// The problems, the worst first. A denied pod is no fault of the agent, and not among them.
pub fn problems_of(status: &Status) -> Vec<Problem> {
    let parts = [
        datapath,
        taken_port,
        outside_pods,
        interception,
        forward_guard,
        wire_guard,
        api_server,
        metadata_server,
        service_accounts::annotations,
        service_accounts::tokens,
        base_credentials,
        sts,
        pods_without_credentials,
        boot_guard,
        pending,
    ];
    parts.into_iter().filter_map(|look| look(status)).collect()
}

pub(super) fn problem(part: &str, what: String, remedy: &str) -> Option<Problem> {
    Some(Problem { part: part.to_owned(), what, remedy: remedy.to_owned() })
}

fn datapath(status: &Status) -> Option<Problem> {
    let failure = status.datapath.failures.first()?;
    problem(
        "datapath",
        format!("the eBPF programs are not in the expected state: {failure}"),
        "find the process that changes it (bpftool cgroup tree, mount | grep bpf); the agent tries again every second",
    )
}

fn taken_port(status: &Status) -> Option<Problem> {
    let port = status.agent.taken_ports.first()?;
    let refused = match &*port.flag {
        "--app-port" => "; hostNetwork pods, and pods without an in-pod listener, are refused",
        _ => "",
    };
    problem(
        "agent",
        format!(
            "the agent cannot listen on {} ({}): {} has the port{refused}",
            port.address, port.flag, port.holder
        ),
        "stop that process, or give the agent another port (--app-port, --metrics-port); the agent tries again every second",
    )
}

fn outside_pods(status: &Status) -> Option<Problem> {
    let outside = &status.datapath.outside_pods;
    let first = outside.first()?;
    let others = match outside.len() - 1 {
        0 => String::new(),
        others => format!(" (and {others} more)"),
    };
    problem(
        "datapath",
        format!("{}/{}{others}: {}", first.namespace, first.name, first.message()),
        "kube2ram status -o json lists them in datapath.outside_pods",
    )
}

fn interception(status: &Status) -> Option<Problem> {
    let Status { datapath, at, .. } = status;
    let failure = datapath.interception.failure.as_deref()?;
    let last = match datapath.interception.arrived_at {
        Some(arrived_at) => format!("the last one arrived {}", ago(*at, arrived_at)),
        None => "none ever did".to_owned(),
    };
    problem(
        "datapath",
        format!(
            "the self-test fails: a connection to the metadata address does not arrive at the agent: {failure}; {last}"
        ),
        "check for other programs on the cgroup (bpftool cgroup tree), and the rules of the host's firewall (nft list ruleset)",
    )
}

fn forward_guard(status: &Status) -> Option<Problem> {
    let guard = &status.forward_guard;
    if !guard.is_wanted || guard.is_in_force {
        return None;
    }
    let why = guard.failure.as_deref().unwrap_or("not checked yet");
    problem(
        "forward_guard",
        format!("packets that the node forwards to the metadata server are not dropped: {why}"),
        "load nf_tables on the node and give the agent NET_ADMIN; nft list table ip kube2ram, and ip6 kube2ram, shows the rules",
    )
}

fn wire_guard(status: &Status) -> Option<Problem> {
    let guard = &status.wire_guard;
    if !guard.is_wanted || guard.is_in_force {
        return None;
    }
    let why = guard.failure.as_deref().unwrap_or("not checked yet");
    problem(
        "wire_guard",
        format!("packet sockets of pods may reach the metadata server: {why}"),
        "check what else is attached to the device (bpftool net show, tc filter show dev … egress); the agent tries again twice a second",
    )
}

fn api_server(status: &Status) -> Option<Problem> {
    let mut failing = status.api_server.watches.iter().filter(|watch| watch.failing_since.is_some());
    let watch = failing.next()?;
    let since = watch.failing_since.map(|since| ago(status.at, since)).unwrap_or_default();
    let remedy = match &*watch.resource {
        "namespaces" => {
            "check the API server, the network path to it, and that the agent's service account may list and watch namespaces, which --namespace-restrictions requires"
        }
        _ => {
            "check the API server, the network path to it, and that the agent's service account may list and watch pods"
        }
    };
    problem(
        "api_server",
        format!(
            "the API server {} does not answer ({}, since {since}): {}; known pods keep their roles, new ones get 503",
            status.api_server.address,
            watch.resource,
            watch.failure.as_deref().unwrap_or("no reason"),
        ),
        remedy,
    )
}

fn metadata_server(status: &Status) -> Option<Problem> {
    let server = &status.metadata_server;
    let (since, failed_at) = server.failing_since.zip(server.failed_at)?;
    if status.at.duration_since(failed_at) >= RECENT {
        return None;
    }
    problem(
        "metadata_server",
        format!(
            "the metadata server {} does not answer (since {}): {}; requests that are passed to it get 502 or 504, credentials in the cache are served",
            server.address,
            ago(status.at, since),
            server.failure.as_deref().unwrap_or("no reason"),
        ),
        &format!(
            "query it from the node (curl http://{}/latest/meta-data/instance-id): a machine that is no node of the cloud has none; otherwise check the node's routes and firewall",
            server.address
        ),
    )
}

fn base_credentials(status: &Status) -> Option<Problem> {
    let base = &status.base_credentials;
    let remedy = match &*base.source {
        "oidc" => {
            "check the mounted token, the cluster's OIDC provider, and that the agent's role trusts its service account"
        }
        "static_keys" => "check the static keys of the agent, and renew them",
        _ => "check that a role is attached to the node and that its metadata server answers",
    };
    let refused = status.sts.last_failure.as_ref().filter(|failure| {
        failure.kind == "base_credentials" && is_last_word(status.sts.succeeded_at, failure.at)
    });
    let expired = base.expires_at.filter(|end| *end <= status.at);
    match (&base.failure, refused, expired) {
        (Some(failure), _, expired) => {
            let until = match (base.expires_at, expired) {
                (Some(_), Some(end)) => format!("the previous ones expired {}", ago(status.at, end)),
                (Some(end), None) => format!("the previous ones last {} more", text_until(status.at, end)),
                (None, _) => "there were none before".to_owned(),
            };
            let what = format!("the agent cannot obtain its own credentials: {failure}; {until}");
            problem("base_credentials", what, remedy)
        }
        (None, Some(refused), _) => {
            let what = format!("STS rejects the agent's own credentials: {}", refused.code);
            problem("base_credentials", what, remedy)
        }
        // Renewed when they are needed next.
        (None, None, _) => None,
    }
}

fn text_until(now: Timestamp, end: Timestamp) -> String {
    super::text::span(end.duration_since(now))
}

fn sts(status: &Status) -> Option<Problem> {
    let failure = status.sts.last_failure.as_ref()?;
    let is_recent = status.at.duration_since(failure.at) < RECENT;
    let what = match &*failure.kind {
        "throttled" if status.sts.is_throttled => "STS throttles this account's calls".to_owned(),
        "unavailable" if is_recent && is_last_word(status.sts.succeeded_at, failure.at) => {
            format!("STS is not available: {}: {}", failure.code, failure.message)
        }
        "unexpected" if is_recent && is_last_word(status.sts.succeeded_at, failure.at) => {
            format!(
                "STS refuses with a code that the agent does not know: {}: {}",
                failure.code, failure.message
            )
        }
        _ => return None,
    };
    problem("sts", format!("{what} (last {})", ago(status.at, failure.at)), &failure.remedy)
}

/// Problems of one role, while STS answers for others: otherwise STS is the problem.
fn pods_without_credentials(status: &Status) -> Option<Problem> {
    let others = [api_server, service_accounts::annotations, service_accounts::tokens, base_credentials, sts];
    if others.iter().any(|look| look(status).is_some()) {
        return None;
    }
    let mut pods = status.pods.iter().filter(|pod| pod.verdict == Verdict::Unavailable);
    let first = pods.next()?;
    let others = match pods.count() {
        0 => String::new(),
        others => format!(" (and {others} more)"),
    };
    problem(
        "sts",
        format!("{}/{}{others}: {}", first.namespace, first.name, first.summary),
        "kube2ram explain shows the reason and the remedy for each pod; the agent tries again by itself",
    )
}

fn boot_guard(status: &Status) -> Option<Problem> {
    let failure = status.boot_guard.installation_failure.as_deref()?;
    problem(
        "boot_guard",
        format!(
            "the boot guard could not be installed: {failure}; from the next boot on, pods that start before the agent reach the node's role"
        ),
        "correct the cause and restart the agent's pod, or use the start-up taint instead of the boot guard",
    )
}

fn pending(status: &Status) -> Option<Problem> {
    let pending = &status.agent.pending;
    if pending.is_empty() {
        return None;
    }
    problem(
        "agent",
        format!("not ready; waiting for: {}", pending.join(", ")),
        "see the agent's log (kubectl logs), from level warn on, and the other problems in this list",
    )
}

pub(super) fn is_last_word(succeeded_at: Option<Timestamp>, failed_at: Timestamp) -> bool {
    succeeded_at.is_none_or(|succeeded_at| succeeded_at < failed_at)
}

/// An older failure, of a role or a server that is no longer used, does not count.
pub(super) const RECENT: SignedDuration = SignedDuration::from_mins(10);
