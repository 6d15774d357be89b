//! All output of the agent, searched for secrets: log, Events, metrics, readiness, status, the store,
//! explanations, and the files that it leaves. Depends on `agent` and the stand-ins. Called when a sandbox
//! goes, so that the whole suite is searched.

use std::fs;

use crate::{Sandbox, agent::Agent, node::Pod, standin::AccessKey};

/// Every secret and token of the stand-ins contains one of these.
const MARKERS: [&str; 2] = [AccessKey::SECRET_MARKER, "SandboxToken"];
/// How many pods are explained: the text is the same for all.
const EXPLAINED: usize = 5;

/// Where secrets were found, and around what; empty when all is well. Of ServiceAccounts' tokens, no part may
/// be anywhere, but for the header: it is the same for all, and public.
pub(crate) fn told(sandbox: &Sandbox) -> Vec<String> {
    let Some(agent) = sandbox.agent_if_any() else { return Vec::new() };
    let tokens = sandbox.api().issued_tokens();
    let parts = tokens.iter().flat_map(|token| token.split('.').skip(1));
    let secrets: Vec<&str> = MARKERS.into_iter().chain(parts).collect();
    let events = sandbox.api().events().iter().map(ToString::to_string).collect();
    let mut texts = vec![("the log", agent.log()), ("Events", events)];
    texts.extend(files(agent));
    if agent.pid().is_some() {
        texts.extend(answers(agent, sandbox.pods()));
    }
    let found =
        texts.iter().filter_map(|(source, text)| Some(format!("{source}: {}", around(text, &secrets)?)));
    found.collect()
}

/// What it answers to operators. One that has just ended, or was stopped, answers nothing.
fn answers<'p>(agent: &Agent, pods: impl Iterator<Item = &'p Pod>) -> Vec<(&'static str, String)> {
    let mut texts: Vec<_> =
        ["/metrics", "/readyz"].map(|path| (path, agent.admin(path).map(|reply| reply.body))).into();
    // Each would wait for one that does not answer.
    if texts.iter().any(|(_, text)| text.is_err()) {
        return texts.into_iter().filter_map(|(source, text)| Some((source, text.ok()?))).collect();
    }
    let run = |args: &[&str]| {
        let output = agent.exec(args)?;
        let text = [output.stdout, output.stderr].concat();
        anyhow::Ok(String::from_utf8_lossy(&text).into_owned())
    };
    for format in ["text", "json"] {
        texts.push(("status", run(&["status", "-o", format])));
    }
    texts.push(("store", run(&["store"])));
    for pod in pods.take(EXPLAINED) {
        let name = format!("{}/{}", pod.spec().namespace, pod.spec().name);
        texts.push(("explain", run(&["explain", &name, "-o", "json"])));
    }
    texts.into_iter().filter_map(|(source, text)| Some((source, text.ok()?))).collect()
}

/// What it leaves in its state directory, but for sockets.
fn files(agent: &Agent) -> Vec<(&'static str, String)> {
    let entries = fs::read_dir(agent.state_dir()).into_iter().flatten().flatten();
    let files = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()));
    let read = files.filter_map(|entry| fs::read(entry.path()).ok());
    read.map(|bytes| ("a file in --state-dir", String::from_utf8_lossy(&bytes).into_owned())).collect()
}

fn around<'t>(text: &'t str, secrets: &[&str]) -> Option<&'t str> {
    const CONTEXT: usize = 120;
    let at = secrets.iter().filter_map(|secret| text.find(secret)).min()?;
    let (from, to) = (at.saturating_sub(CONTEXT), at.saturating_add(CONTEXT).min(text.len()));
    Some(&text[text.floor_char_boundary(from)..text.floor_char_boundary(to)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_a_secret_anywhere() {
        let text = format!("{}é{}é", "é".repeat(200), AccessKey::SECRET_MARKER);

        assert!(around(&text, &MARKERS).is_some_and(|found| found.contains(AccessKey::SECRET_MARKER)));
        assert!(around("token=SandboxToken-1", &MARKERS).is_some());
        assert!(around("a token: eyJhbGciOi.c2VjcmV0.c2lnbmF0dXJl", &["c2lnbmF0dXJl"]).is_some());
        assert_eq!(around("nothing of that kind", &MARKERS), None);
    }
}
