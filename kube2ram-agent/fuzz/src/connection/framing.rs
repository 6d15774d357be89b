//! An independent and strict reader of HTTP/1 requests (RFC 9112): where each begins and ends, as far as that
//! is unambiguous.

/// One request.
pub(super) struct Request<'s> {
    pub(super) method: &'s str,
    pub(super) target: &'s [u8],
    /// Bytes of its body on the wire, framing included.
    pub(super) body: usize,
}

/// A stream, read.
pub(super) struct Framing<'s> {
    /// The requests of which the whole head is there, in order.
    pub(super) requests: Vec<Request<'s>>,
    /// Whether there is more, which two servers might read in two ways.
    pub(super) ends_in_doubt: bool,
}

/// The kind of a body.
enum Length {
    Chunked,
    Doubtful,
    Known(usize),
}

impl<'s> Framing<'s> {
    /// Reads a stream.
    pub(super) fn of(stream: &'s [u8]) -> Self {
        let mut framing = Self { requests: Vec::new(), ends_in_doubt: false };
        let mut rest = stream;
        loop {
            // Empty lines before a request are to be ignored (§2.2).
            while let Some(after) = rest.strip_prefix(b"\n").or(rest.strip_prefix(b"\r\n")) {
                rest = after;
            }
            let Some((head, after)) = head(rest) else {
                // An unfinished head may be refused before its end.
                framing.ends_in_doubt = !rest.is_empty();
                return framing;
            };
            let Some((method, target, length)) = request(&head) else {
                framing.ends_in_doubt = true;
                return framing;
            };
            let body = match length {
                Length::Known(length) => Some(length).filter(|length| *length <= after.len()),
                Length::Chunked => chunked(after),
                Length::Doubtful => {
                    framing.ends_in_doubt = true;
                    return framing;
                }
            };
            framing.requests.push(Request { method, target, body: body.unwrap_or(after.len()) });
            // Data in a tunnel is not a request, and data behind a truncated or malformed body may be
            // refused, but is not a request.
            let Some(body) = body.filter(|_| method != "CONNECT") else {
                framing.ends_in_doubt = true;
                return framing;
            };
            rest = &after[body..];
        }
    }
}

/// The lines of the head at the start, and what follows. A line feed alone ends a line as well (§2.2).
fn head(stream: &[u8]) -> Option<(Vec<&[u8]>, &[u8])> {
    let (mut lines, mut rest) = (Vec::new(), stream);
    loop {
        let end = rest.iter().position(|byte| *byte == b'\n')?;
        let line = rest[..end].strip_suffix(b"\r").unwrap_or(&rest[..end]);
        rest = &rest[end + 1..];
        if line.is_empty() {
            return Some((lines, rest));
        }
        lines.push(line);
    }
}

fn request<'s>(head: &[&'s [u8]]) -> Option<(&'s str, &'s [u8], Length)> {
    let (line, headers) = head.split_first()?;
    let mut words = line.split(|byte| *byte == b' ');
    let (method, target, version) = (words.next()?, words.next()?, words.next()?);
    let well_formed = !method.is_empty() && method.iter().all(|byte| is_token(*byte)) && !target.is_empty();
    let minor = match version {
        b"HTTP/1.0" => 0,
        b"HTTP/1.1" => 1,
        _ => return None,
    };
    if !well_formed || words.next().is_some() {
        return None;
    }
    Some((str::from_utf8(method).ok()?, target, length(headers, minor)?))
}

/// `None` when a header is malformed.
fn length(headers: &[&[u8]], minor: u8) -> Option<Length> {
    let (mut lengths, mut codings) = (Vec::new(), Vec::new());
    for header in headers {
        let colon = header.iter().position(|byte| *byte == b':')?;
        let (name, value) = (&header[..colon], header[colon + 1..].trim_ascii());
        if name.is_empty() || !name.iter().all(|byte| is_token(*byte)) {
            return None;
        }
        match name.to_ascii_lowercase().as_slice() {
            b"content-length" => lengths.push(value),
            b"transfer-encoding" => codings.push(value),
            _ => {}
        }
    }
    Some(match (lengths.as_slice(), codings.as_slice()) {
        ([], []) => Length::Known(0),
        // Said twice, the same length may count once (RFC 9110 §8.6); hyper has it so.
        ([first, others @ ..], []) if others.iter().all(|other| decimal(other) == decimal(first)) => {
            decimal(first).map_or(Length::Doubtful, Length::Known)
        }
        ([], [coding]) if coding.eq_ignore_ascii_case(b"chunked") && minor == 1 => Length::Chunked,
        _ => Length::Doubtful,
    })
}

fn decimal(text: &[u8]) -> Option<usize> {
    let digits = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    str::from_utf8(text).ok().filter(|_| digits)?.parse().ok()
}

/// How long a chunked body is, extensions and trailers included (§7.1). `None` when it is cut off or
/// malformed.
fn chunked(stream: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        let line = line(stream.get(at..)?)?;
        let size = line.split(|byte| *byte == b';').next()?.trim_ascii_end();
        let digits = !size.is_empty() && size.iter().all(u8::is_ascii_hexdigit);
        let size = usize::from_str_radix(str::from_utf8(size).ok().filter(|_| digits)?, 16).ok()?;
        at += line.len() + 2;
        if size == 0 {
            break;
        }
        at = at.checked_add(size)?;
        stream.get(at..)?.strip_prefix(b"\r\n")?;
        at += 2;
    }
    loop {
        let trailer = line(stream.get(at..)?)?;
        at += trailer.len() + 2;
        if trailer.is_empty() {
            return Some(at);
        }
        let name = &trailer[..trailer.iter().position(|byte| *byte == b':')?];
        if name.is_empty() || !name.iter().all(|byte| is_token(*byte)) {
            return None;
        }
    }
}

fn line(stream: &[u8]) -> Option<&[u8]> {
    Some(&stream[..stream.windows(2).position(|pair| pair == b"\r\n")?])
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(stream: &str) -> (Vec<String>, bool) {
        let framing = Framing::of(stream.as_bytes());
        let line =
            |request: &Request<'_>| format!("{} {}", request.method, str::from_utf8(request.target).unwrap());
        (framing.requests.iter().map(line).collect(), framing.ends_in_doubt)
    }

    #[test]
    fn finds_where_requests_begin() {
        let second = "GET /b HTTP/1.0\r\n\r\n";
        for (first, expected, doubt) in [
            ("GET /a HTTP/1.1\r\nHost: x\r\n\r\n", &["GET /a", "GET /b"][..], false),
            ("\r\nGET /a HTTP/1.1\n\n", &["GET /a", "GET /b"], false),
            ("PUT /a HTTP/1.1\r\nContent-Length: 4\r\n\r\nGET ", &["PUT /a", "GET /b"], false),
            ("PUT /a HTTP/1.1\r\nContent-Length: 400\r\n\r\n", &["PUT /a"], true),
            (
                "PUT /a HTTP/1.1\r\nTransfer-Encoding: Chunked\r\n\r\n3\r\nGET\r\n0\r\n\r\n",
                &["PUT /a", "GET /b"],
                false,
            ),
            (
                "PUT /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3;x\r\nGET\r\n0\r\nA: b\r\n\r\n",
                &["PUT /a", "GET /b"],
                false,
            ),
            ("PUT /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n", &[], true),
            ("PUT /a HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 0\r\n\r\n", &[], true),
            ("PUT /a HTTP/1.1\r\nContent-Length: +1\r\n\r\n", &[], true),
            ("PUT /a HTTP/1.1\r\nTransfer-Encoding : chunked\r\n\r\n", &[], true),
            ("PUT /a HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", &[], true),
            ("GET /a HTTP/1.1\r\nA: b\r\n c\r\n\r\n", &[], true),
            ("GET /a b HTTP/1.1\r\n\r\n", &[], true),
            ("GET /a HTTP/1.1\r\nHost", &[], true),
        ] {
            let (requests, ends_in_doubt) = read(&format!("{first}{second}"));
            assert_eq!(requests, expected, "{first:?}");
            assert_eq!(ends_in_doubt, doubt, "{first:?}");
        }
        assert_eq!(read(""), (vec![], false));
    }
}
