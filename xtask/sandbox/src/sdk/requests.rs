//! The requests that a client makes, in one form whether the metadata server saw them or the agent logged
//! them. Pure. Called by `sdk`.

use std::fmt::{self, Display, Formatter};

use anyhow::{Result, ensure};
use serde::Deserialize;

use crate::{Cloud, standin::Seen};

/// Ends a request that carries a token.
const WITH_TOKEN: &str = " +token";

/// What a client is known to send.
#[derive(Debug)]
pub(super) struct Known {
    /// For credentials.
    pub(super) credentials: Vec<String>,
    /// For the region; empty when it looks for none.
    pub(super) region: Vec<String>,
}

/// As a fixture has them.
impl Display for Known {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for request in &self.credentials {
            writeln!(f, "{request}")?;
        }
        if !self.region.is_empty() {
            writeln!(f)?;
        }
        for request in &self.region {
            writeln!(f, "{request}")?;
        }
        Ok(())
    }
}

impl Known {
    /// Whether it asks for session tokens and sends them.
    pub(super) fn has_tokens(&self) -> bool {
        self.credentials.iter().any(|request| request.ends_with(WITH_TOKEN))
    }

    /// Those for credentials when it has a session token already.
    pub(super) fn by_a_kept_token(&self) -> Vec<String> {
        self.credentials.iter().filter(|request| !request.starts_with("PUT ")).cloned().collect()
    }

    /// On one line of a table.
    pub(super) fn abridged(&self, cloud: Cloud, rounds: usize) -> String {
        let times = if rounds > 1 { format!(" (×{rounds})") } else { String::new() };
        self.credentials.join(", ").replace(cloud.list(), "…/").replace("/latest/api/", "") + &times
    }
}

/// A line of the agent's access log.
#[derive(Deserialize)]
struct Line {
    message: String,
    method: Option<String>,
    path: Option<String>,
}

/// What pods sent to the metadata server. The role's name becomes `<role>`.
pub(super) fn seen(seen: &[Seen], cloud: Cloud, role: &str) -> Vec<String> {
    let requests = seen.iter().map(|request| {
        let token = if request.headers.contains_key(cloud.token_header()) { WITH_TOKEN } else { "" };
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
    let rounds = answered.len().checked_div(known.len()).unwrap_or_default();
    ensure!(
        answered == known.repeat(rounds) && (rounds > 0 || known.is_empty()),
        "the agent answered {answered:?}, known are {known:?}"
    );
    Ok(rounds)
}

/// What the agent answered, in its log's words; refusals included.
pub(super) fn answered(log: &str, role: &str) -> Result<Vec<String>> {
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

    fn known() -> Vec<String> {
        ["PUT /latest/api/token?", "GET /role/<role>? +token"].map(str::to_owned).into()
    }

    #[test]
    fn counts_whole_rounds_of_known_requests_only() {
        let refused = r#"{"message":"request refused","method":"GET","path":"/role/orders"}"#;

        assert_eq!(rounds(ROUND, "orders", &known()).unwrap(), 1);
        assert_eq!(rounds(&ROUND.repeat(2), "orders", &known()).unwrap(), 2);
        for wrong in [String::new(), format!("{ROUND}{refused}"), ROUND.replace("orders", "billing")] {
            assert!(rounds(&wrong, "orders", &known()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_client_without_known_requests_must_send_none() {
        assert_eq!(rounds("", "orders", &[]).unwrap(), 0);
        assert!(rounds(ROUND, "orders", &[]).is_err());
    }

    #[test]
    fn only_the_request_for_a_token_is_spared_by_a_kept_one() {
        let known = Known { credentials: known(), region: Vec::new() };

        assert_eq!(known.by_a_kept_token(), ["GET /role/<role>? +token"]);
        assert!(known.has_tokens());
    }

    #[test]
    fn a_fixture_has_the_region_after_an_empty_line() {
        let mut known = Known { credentials: known(), region: Vec::new() };
        assert_eq!(known.to_string(), "PUT /latest/api/token?\nGET /role/<role>? +token\n");

        known.region = vec!["GET /region +token".to_owned()];
        assert_eq!(
            known.to_string(),
            "PUT /latest/api/token?\nGET /role/<role>? +token\n\nGET /region +token\n"
        );
    }
}
