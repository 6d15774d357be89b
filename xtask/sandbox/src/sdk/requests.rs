//! The requests that a client makes, in one form whether the metadata server saw them or the agent logged them.
//! Pure. Called by `sdk`.

use anyhow::Result;
use serde::Deserialize;

use crate::standin::Seen;

/// Where a client learns its role, and below it the credentials.
pub(super) const LIST: &str = "/latest/meta-data/ram/security-credentials/";
/// Ends a request that carries a token.
pub(super) const WITH_TOKEN: &str = " +token";

/// A line of the agent's access log.
#[derive(Deserialize)]
struct Line {
    fields: Fields,
}

#[derive(Deserialize)]
struct Fields {
    message: String,
    method: Option<String>,
    path: Option<String>,
}

/// What pods sent to the metadata server. The role's name becomes `<role>`.
pub(super) fn seen(seen: &[Seen], role: &str) -> Vec<String> {
    let requests = seen.iter().map(|request| {
        let token = request.headers.contains_key("x-aliyun-ecs-metadata-token");
        let token = if token { WITH_TOKEN } else { "" };
        format!("{} {}{token}", request.method, request.target.replace(role, "<role>"))
    });
    requests.collect()
}

/// What the agent answered, in its log's words; refusals included.
pub(super) fn answered(log: &str, role: &str) -> Result<Vec<String>> {
    let mut requests = Vec::new();
    for line in log.lines() {
        let Line { fields: Fields { message, method, path } } = serde_json::from_str(line)?;
        if message.starts_with("request ") {
            let (method, path) = (method.unwrap_or_default(), path.unwrap_or_default());
            requests.push(format!("{method} {}", path.replace(role, "<role>")));
        }
    }
    Ok(requests)
}

/// On one line of a table.
pub(super) fn abridged(requests: &[String]) -> String {
    requests.join(", ").replace(LIST, "…/").replace("/latest/api/", "")
}
