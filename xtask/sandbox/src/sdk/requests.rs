//! The requests that a client makes, in one form whether the metadata server saw them or the agent logged
//! them. Pure. Called by `sdk`.

use anyhow::{Result, ensure};
use serde::Deserialize;

use crate::standin::Seen;

/// Where a client learns its role, and below it the credentials.
pub(super) const LIST: &str = "/latest/meta-data/ram/security-credentials/";
/// Ends a request that carries a token.
pub(super) const WITH_TOKEN: &str = " +token";

/// A line of the agent's access log.
#[derive(Deserialize)]
struct Line {
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

/// How often the agent's log has exactly the known requests; anything else is an error. It knows neither
/// tokens nor a bare `?`.
pub(super) fn rounds(log: &str, role: &str, known: &[String]) -> Result<usize> {
    let known = known.iter().map(|request| request.trim_end_matches(WITH_TOKEN).trim_end_matches('?'));
    let known = known.collect::<Vec<_>>();
    let answered = answered(log, role)?;
    let whole = answered.chunks(known.len()).all(|round| round == known);
    ensure!(whole && !answered.is_empty(), "the agent answered {answered:?}, known are {known:?}");
    Ok(answered.len() / known.len())
}

/// What the agent answered, in its log's words; refusals included.
fn answered(log: &str, role: &str) -> Result<Vec<String>> {
    let mut requests = Vec::new();
    for line in log.lines() {
        let Line { message, method, path } = serde_json::from_str(line)?;
        if message.starts_with("request ") {
            let (method, path) = (method.unwrap_or_default(), path.unwrap_or_default());
            requests.push(format!("{method} {}", path.replace(role, "<role>")));
        }
    }
    Ok(requests)
}

/// On one line of a table.
pub(super) fn abridged(requests: &[String], rounds: usize) -> String {
    let times = if rounds > 1 { format!(" (×{rounds})") } else { String::new() };
    requests.join(", ").replace(LIST, "…/").replace("/latest/api/", "") + &times
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUND: &str = concat!(
        r#"{"message":"request answered","method":"PUT","path":"/latest/api/token"}"#,
        "\n",
        r#"{"message":"credentials issued"}"#,
        "\n",
        r#"{"message":"request answered","method":"GET","path":"/role/orders"}"#,
        "\n",
    );

    #[test]
    fn counts_whole_rounds_of_known_requests_only() {
        let known = ["PUT /latest/api/token?", "GET /role/<role>? +token"].map(str::to_owned);
        let refused = r#"{"message":"request refused","method":"GET","path":"/role/orders"}"#;

        assert_eq!(rounds(ROUND, "orders", &known).unwrap(), 1);
        assert_eq!(rounds(&ROUND.repeat(2), "orders", &known).unwrap(), 2);
        for wrong in [String::new(), format!("{ROUND}{refused}"), ROUND.replace("orders", "billing")] {
            assert!(rounds(&wrong, "orders", &known).is_err(), "{wrong}");
        }
    }
}
