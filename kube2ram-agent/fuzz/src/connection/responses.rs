//! The agent's answers, one after the other. Strict: data that is not a complete response is a failure.

use super::framing::Framing;

/// The statuses of the responses.
pub(super) fn statuses(mut answer: &[u8], framing: &Framing<'_>) -> Vec<u16> {
    let mut statuses = Vec::new();
    while !answer.is_empty() {
        let end = answer.windows(4).position(|four| four == b"\r\n\r\n").expect("a whole head");
        let head = str::from_utf8(&answer[..end]).expect("a head in ASCII");
        let (line, headers) = head.split_once("\r\n").unwrap_or((head, ""));
        let status = line.strip_prefix("HTTP/1.").and_then(|line| line.get(2..5)).expect("a status line");
        let length = headers
            .split("\r\n")
            .filter_map(|header| header.split_once(": "))
            .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
            .map_or(0, |(_, value)| value.parse().expect("a length"));
        let body = &answer[end + 4..];
        // The method of an ambiguous request is not known. It is the last one, so its answer ends with the
        // data.
        let is_head = match framing.requests.get(statuses.len()) {
            Some(request) => request.method == "HEAD",
            None => body.is_empty(),
        };
        let length = if is_head { 0 } else { length };
        statuses.push(status.parse().expect("a status"));
        answer = body.get(length..).expect("a whole body");
    }
    statuses
}
