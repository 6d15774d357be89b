//! The documents as text for a terminal: aligned, the verdict first. Pure; used through the parent.

use std::fmt::Write as _;

use jiff::{SignedDuration, Timestamp};

use super::{
    AccessKeyReport, Explanation, Outcome, Paint, Pod, ServiceAccounts, Source, Status, Verdict, paint::Tone,
};

/// The width of the names of parts.
const LABEL: usize = 17;
/// What a table leaves between its columns.
const GAP: usize = 2;

/// How long ago `at` was, in the two largest units: `3m 4s ago`.
pub(super) fn ago(now: Timestamp, at: Timestamp) -> String {
    format!("{} ago", span(now.duration_since(at)))
}

/// A span of time in its two largest units.
pub(super) fn span(span: SignedDuration) -> String {
    let seconds = span.as_secs().max(0);
    let parts =
        [(seconds / 86_400, "d"), (seconds / 3_600 % 24, "h"), (seconds / 60 % 60, "m"), (seconds % 60, "s")];
    let from = parts.iter().position(|(count, _)| *count > 0).unwrap_or(parts.len() - 1);
    let shown =
        parts[from..].iter().take(2).filter(|(count, unit)| *count > 0 || (*unit == "s" && seconds == 0));
    shown.map(|(count, unit)| format!("{count}{unit}")).collect::<Vec<_>>().join(" ")
}

fn left(now: Timestamp, end: Timestamp) -> String {
    if end <= now {
        format!("expired {}", ago(now, end))
    } else {
        format!("expire in {}", span(end.duration_since(now)))
    }
}

/// Text from elsewhere, made harmless for a terminal.
fn safe(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

struct Page {
    text: String,
    paint: Paint,
}

impl Page {
    fn line(&mut self, line: &str) {
        self.text.push_str(line);
        self.text.push('\n');
    }

    fn row(&mut self, label: &str, says: &str) {
        let label = format!("{label:LABEL$}");
        let label = self.paint.apply(Tone::Strong, &label);
        self.line(&format!("{label} {}", safe(says)));
    }

    /// Of a part that has more than one row.
    fn more(&mut self, says: &str) {
        self.line(&format!("{:LABEL$} {}", "", safe(says)));
    }
}

pub(super) fn status(status: &Status, paint: Paint) -> String {
    let mut page = Page { text: String::new(), paint };
    head(&mut page, status);
    datapath(&mut page, status);
    guards(&mut page, status);
    api_server(&mut page, status);
    metadata_server(&mut page, status);
    service_accounts(&mut page, status);
    cloud(&mut page, status);
    pods(&mut page, status);
    page.text
}

fn head(page: &mut Page, status: &Status) {
    let Status { agent, problems, at, .. } = status;
    let (tone, verdict) = match problems.len() {
        0 => (Tone::Good, "all is well".to_owned()),
        1 => (Tone::Bad, "1 problem".to_owned()),
        many => (Tone::Bad, format!("{many} problems")),
    };
    let verdict = page.paint.apply(tone, &verdict);
    page.line(&format!("kube2ram {} on {}: {verdict}", safe(&agent.version), safe(&agent.node)));
    for problem in problems {
        let part = page.paint.apply(Tone::Bad, &format!("✗ {:w$}", problem.part, w = LABEL - 2));
        page.line(&format!("{part} {}", safe(&problem.what)));
        page.more(&format!("→ {}", problem.remedy));
    }
    page.line("");
    let ready = match agent.pending.as_slice() {
        [] => "ready".to_owned(),
        pending => format!("not ready, waiting for: {}", pending.join(", ")),
    };
    let draining = if agent.is_draining { "draining, " } else { "" };
    let up = span(at.duration_since(agent.started_at));
    page.row("agent", &format!("{draining}{ready}; up {up}; pid {}", agent.pid));
    let until = agent.log_level_until.map(|until| format!(" for {} more", span(until.duration_since(*at))));
    page.more(&format!("log level {}{}", agent.log_level, until.unwrap_or_default()));
    for hint in &agent.hints {
        page.more(hint);
    }
}

fn datapath(page: &mut Page, status: &Status) {
    let Status { datapath, at, .. } = status;
    let state = if datapath.is_in_force { "active" } else { "NOT in the expected state" };
    let checked = datapath.checked_at.map(|checked| format!("; checked {}", ago(*at, checked)));
    let mode = if datapath.mode == "root" {
        "redirects at the root cgroup"
    } else {
        "redirects at the pods' cgroup"
    };
    page.row("datapath", &format!("{state}, {mode}{}", checked.unwrap_or_default()));
    for failure in &datapath.failures {
        page.more(&format!("✗ {failure}"));
    }
    let mut cgroups: Vec<&str> = datapath.programs.iter().map(|program| program.cgroup.as_str()).collect();
    cgroups.dedup();
    for cgroup in cgroups {
        let on = datapath.programs.iter().filter(|program| program.cgroup == cgroup);
        let names: Vec<_> =
            on.map(|program| program.name.strip_prefix("k2r_").unwrap_or(&program.name)).collect();
        page.more(&match &names[..] {
            [name] => format!("{cgroup}: k2r_{name}"),
            names => format!("{cgroup}: k2r_{{{}}}", names.join(",")),
        });
    }
    let probe = &datapath.interception;
    page.more(&match (&probe.failure, probe.arrived_at) {
        (None, Some(arrived)) => {
            format!("the self-test's connection to the metadata address arrived {}", ago(*at, arrived))
        }
        (Some(failure), _) => format!("✗ self-test: {failure}"),
        (None, None) => "the self-test has not run yet".to_owned(),
    });
    let total: u64 = datapath.repairs.values().sum();
    let kinds = counts(&datapath.repairs);
    page.more(&match &datapath.last_repair {
        Some(last) => format!(
            "drift repaired {total} times ({kinds}), last {}: {} {}",
            ago(*at, last.at),
            last.of,
            last.kind
        ),
        None => "no drift since the agent started".to_owned(),
    });
    page.more(&format!("kernel: {}", counts(&datapath.outcomes)));
}

fn counts(counts: &std::collections::BTreeMap<String, u64>) -> String {
    let counted = counts.iter().filter(|(_, count)| **count > 0);
    let counted: Vec<_> = counted.map(|(name, count)| format!("{name} {count}")).collect();
    if counted.is_empty() { "nothing yet".to_owned() } else { counted.join(", ") }
}

fn guards(page: &mut Page, status: &Status) {
    let guard = &status.forward_guard;
    let families = if guard.has_ipv6 { "for IPv4 and IPv6" } else { "for IPv4" };
    let ipvs = if guard.has_ipvs { ", with rules against IPVS" } else { "" };
    page.row(
        "netfilter rules",
        &match (guard.is_wanted, guard.is_in_force, &guard.failure) {
            (false, ..) => "off (--forward-guard=off)".to_owned(),
            (true, true, _) => format!("active, {families}{ipvs}; repaired {} times", guard.repairs),
            (true, false, Some(failure)) => format!("✗ not active: {failure}"),
            (true, false, None) => "not checked yet".to_owned(),
        },
    );
    let wire = &status.wire_guard;
    page.row(
        "wire guard",
        &match (wire.is_wanted, wire.is_in_force, &wire.failure) {
            (false, ..) => "off (--wire-guard=off)".to_owned(),
            (true, true, _) => format!(
                "active on {} devices of the node and {} of pods; repaired {} times",
                wire.node_devices, wire.pod_devices, wire.repairs
            ),
            (true, false, Some(failure)) => format!("✗ not active everywhere: {failure}"),
            (true, false, None) => "not checked yet".to_owned(),
        },
    );
    page.row(
        "boot guard",
        match &*status.boot_guard.state {
            "absent" => "was not active at this boot (kube2ram boot-guard install, with the agent's flags)",
            "in_force" => "still active",
            "taken_over" => "was active at this boot until an agent took over",
            _ => "unknown",
        },
    );
}

fn api_server(page: &mut Page, status: &Status) {
    page.row("API server", &status.api_server.address);
    for watch in &status.api_server.watches {
        let heard = match watch.heard_at {
            Some(heard) => format!("answered {}", ago(status.at, heard)),
            None => "never answered".to_owned(),
        };
        let failing = match (watch.failing_since, &watch.failure) {
            (Some(since), Some(failure)) => {
                format!("; ✗ fails since {}: {failure}", ago(status.at, since))
            }
            _ => String::new(),
        };
        page.more(&format!("{}: {heard}{failing}", watch.resource));
    }
    if status.api_server.restored_pods > 0 {
        page.more(&format!("{} pods are known from the snapshot only", status.api_server.restored_pods));
    }
}

fn metadata_server(page: &mut Page, status: &Status) {
    let server = &status.metadata_server;
    let answered = match server.answered_at {
        Some(answered) => format!("answered {}", ago(status.at, answered)),
        None => "never answered".to_owned(),
    };
    let failing = match (server.failing_since, &server.failure) {
        (Some(since), Some(failure)) => format!("; ✗ fails since {}: {failure}", ago(status.at, since)),
        (None, _) | (_, None) => String::new(),
    };
    page.row("metadata server", &format!("{}: {answered}{failing}", server.address));
}

fn service_accounts(page: &mut Page, status: &Status) {
    let ServiceAccounts { are_read, token_requester, own_token, pods, .. } = &status.service_accounts;
    if !are_read {
        return;
    }
    let way = match token_requester.as_deref() {
        Some("node") => "roles are assumed by their tokens, which the agent asks for as its node",
        Some(_) => "roles are assumed by their tokens, which the agent asks for as itself",
        None => "their annotations are read; roles are assumed by the agent's own right",
    };
    page.row("ServiceAccounts", way);
    if token_requester.as_deref() == Some("node") {
        page.more(match &**own_token {
            "this_node" => "the agent's own token is bound to this node",
            "other_node" => "✗ the agent's own token is bound to another node",
            "no_node" => "✗ the agent's own token is bound to no node",
            _ => "it is not known yet what the agent's own token is bound to",
        });
    }
    let counted: Vec<_> = pods.iter().map(|(from, count)| format!("{count} {}", from.as_text())).collect();
    if !counted.is_empty() {
        page.more(&format!("pods with a role: {}", counted.join(", ")));
    }
    let accounts = &status.service_accounts;
    let failures = [
        ("annotations cannot be read", accounts.read_failed_at, &accounts.read_failure),
        ("no token", accounts.token_failed_at, &accounts.token_failure),
    ];
    for (what, at, failure) in failures {
        if let (Some(at), Some(failure)) = (at, failure) {
            page.more(&format!("✗ {what}, {}: {failure}", ago(status.at, at)));
        }
    }
}

fn cloud(page: &mut Page, status: &Status) {
    let Status { base_credentials: base, sts, at, .. } = status;
    let source = match (&*base.source, &base.role) {
        ("unused", _) => "not used: the agent signs nothing".to_owned(),
        ("static_keys", _) => "static keys".to_owned(),
        ("oidc", role) => format!("the agent's own role {} (OIDC)", role.as_deref().unwrap_or_default()),
        (_, Some(role)) => format!("the node's role {role}"),
        (_, None) => "the node's role".to_owned(),
    };
    let account = base.account.as_ref().map(|account| format!(", account {account}")).unwrap_or_default();
    let expiry = match base.expires_at {
        _ if base.source == "unused" => String::new(),
        Some(end) => format!("; {}", left(*at, end)),
        None if base.source == "static_keys" => "; expiry unknown to the agent, if they have one".to_owned(),
        None => "; not needed yet".to_owned(),
    };
    page.row("base credentials", &format!("{source}{account}{expiry}"));
    if let (Some(failure), Some(failed)) = (&base.failure, base.failed_at) {
        page.more(&format!("✗ {}: {failure}", ago(*at, failed)));
    }
    let success = match sts.succeeded_at {
        Some(succeeded) => format!("last success {}", ago(*at, succeeded)),
        None => "no success yet".to_owned(),
    };
    let throttled = if sts.is_throttled { "✗ throttled; " } else { "" };
    let known = if sts.can_issue { "" } else { "account and region are not known yet; " };
    page.row(
        "STS",
        &format!("{known}{throttled}{success}; {} sessions held, {} queued", sts.sessions, sts.queued),
    );
    if let Some(failure) = &sts.last_failure {
        let id = failure.request_id.as_ref().map(|id| format!(", request id {id}")).unwrap_or_default();
        page.more(&format!(
            "last failure {}: {}: {} ({}{id})",
            ago(*at, failure.at),
            failure.code,
            failure.message,
            failure.role
        ));
    }
}

fn pods(page: &mut Page, status: &Status) {
    let denied = status.pods.iter().filter(|pod| pod.verdict == Verdict::Denied).count();
    let unavailable = status.pods.iter().filter(|pod| pod.verdict == Verdict::Unavailable).count();
    page.line("");
    let title = format!(
        "{} pods; {denied} denied, {unavailable} without credentials that they should have",
        status.pods.len()
    );
    let title = page.paint.apply(Tone::Strong, &title);
    page.line(&title);
    if status.pods.is_empty() {
        return;
    }
    const HEAD: [&str; 8] =
        ["NAMESPACE/POD", "ROLE", "GETS", "CREDENTIALS", "STATE", "LISTENER", "KNOWN BY", "CGROUP"];
    let rows: Vec<_> = status.pods.iter().map(|pod| pod_row(pod, status.at)).collect();
    let mut widths = HEAD.map(|name| name.chars().count());
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let head = table_line(&HEAD.map(str::to_owned), &widths, |_, cell| cell.to_owned());
    let head = page.paint.apply(Tone::Faint, &head);
    page.line(&head);
    let paint = page.paint;
    for (row, pod) in rows.iter().zip(&status.pods) {
        page.line(&table_line(row, &widths, |column, cell| match column {
            2 => paint.apply(tone_of(pod.verdict), cell),
            _ => cell.to_owned(),
        }));
        if matches!(pod.verdict, Verdict::Denied | Verdict::Unavailable) {
            page.line(&format!("  └ {}", safe(&pod.summary)));
        }
    }
}

fn pod_row(pod: &Pod, now: Timestamp) -> [String; 8] {
    let text = |text: &Option<String>| text.as_deref().map_or_else(|| "-".to_owned(), safe);
    let role = pod.role.as_ref().map(|role| role.split_once(":role/").map_or(&**role, |(_, name)| name));
    let credentials = match (pod.issued_at, pod.expires_at) {
        (Some(issued), Some(end)) => format!("{}, {} old", left(now, end), span(now.duration_since(issued))),
        _ => "-".to_owned(),
    };
    let state =
        if pod.host_network { format!("{}, hostNetwork", pod.presence) } else { pod.presence.clone() };
    let listener = if pod.listener.is_some() { "own" } else { "host" };
    [
        safe(&format!("{}/{}", pod.namespace, pod.name)),
        safe(role.unwrap_or("-")),
        pod.verdict.as_str().to_owned(),
        credentials,
        state,
        listener.to_owned(),
        match &pod.identified_by {
            Some(by) => format!("{by} {}", pod.uid),
            None => format!("no cgroup, uid {}", pod.uid),
        },
        text(&pod.cgroup),
    ]
}

fn table_line<const N: usize>(
    row: &[String; N],
    widths: &[usize; N],
    shown: impl Fn(usize, &str) -> String,
) -> String {
    let mut line = String::new();
    for (column, (cell, width)) in row.iter().zip(widths).enumerate() {
        line.push_str(&shown(column, cell));
        if column + 1 < N {
            line.extend(std::iter::repeat_n(' ', width - cell.chars().count() + GAP));
        }
    }
    line
}

fn tone_of(verdict: Verdict) -> Tone {
    match verdict {
        Verdict::Denied | Verdict::Unavailable | Verdict::Unknown => Tone::Bad,
        Verdict::Granted => Tone::Good,
        Verdict::NoRole | Verdict::NodeRole => Tone::Faint,
        Verdict::Pending => Tone::Uneasy,
    }
}

pub(super) fn explanation(explanation: &Explanation, paint: Paint) -> String {
    let mut page = Page { text: String::new(), paint };
    let title = format!("{}/{}", explanation.namespace, explanation.name);
    let title = paint.apply(Tone::Strong, &safe(&title));
    page.line(&title);
    for step in &explanation.steps {
        let (tone, mark) = match step.outcome {
            Outcome::Failed => (Tone::Bad, '✗'),
            Outcome::Passed => (Tone::Good, '✓'),
            Outcome::Waiting => (Tone::Uneasy, '…'),
        };
        let mark = paint.apply(tone, &mark.to_string());
        page.line(&format!("{mark} {:9} {}", step.stage.as_str(), safe(&step.says)));
    }
    let verdict = explanation.verdict.as_str().to_uppercase().replace('_', " ");
    let verdict = paint.apply(tone_of(explanation.verdict), &verdict);
    page.line(&format!("\n{verdict}: {}", safe(&explanation.summary)));
    if let Some(remedy) = &explanation.remedy {
        let _infallible = writeln!(page.text, "→ {}", safe(remedy));
    }
    page.text
}

pub(super) fn access_key(report: &AccessKeyReport, paint: Paint) -> String {
    let mut page = Page { text: String::new(), paint };
    let title = paint.apply(Tone::Strong, &safe(&report.access_key_id));
    page.line(&title);
    if let Some(session) = &report.session {
        page.row("role", &session.role);
        page.row("session", &session.session);
        page.row("grant", &session.grant);
        page.row("request id", session.request_id.as_deref().unwrap_or("unknown"));
        page.row("node", &session.node);
        let issued = session.issued_at.map_or_else(|| "unknown".to_owned(), |at| at.to_string());
        page.row("issued", &issued);
        page.row("expires", &session.expires_at.to_string());
        if let Some(pod) = &session.fetched_for {
            page.row("fetched for", &pod.label());
        }
    }
    for pod in &report.pods {
        page.row("given to", &format!("{}, {}", pod.label(), pod.at));
    }
    let tone = if report.session.is_some() { Tone::Good } else { Tone::Uneasy };
    let source = report.source.map_or("NOT FOUND", |source| match source {
        Source::File => "IN THE FILE",
        Source::Memory => "IN MEMORY",
    });
    let source = paint.apply(tone, source);
    page.line(&format!("\n{source}: {}", safe(&report.summary)));
    if let Some(remedy) = &report.remedy {
        let _infallible = writeln!(page.text, "→ {}", safe(remedy));
    }
    page.text
}
