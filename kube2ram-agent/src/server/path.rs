//! Raw request target → [`Target`]: the one spelling of a path that both this agent and the real metadata
//! server understand alike. Pure; called by `connection`, read by `route`; takes the address from `datapath`.
//! What has two readings is refused, for a path that slips past the route table reaches the node's own
//! credentials (CVE-2022-23551 was a backslash).

use kube2ram_cloud::{
    MetadataAddr,
    dialect::{Dialect, SECURITY_CREDENTIALS},
};

/// An absolute path without escapes, empty segments or dot segments, of which every byte means itself to any
/// server (RFC 3986 `pchar` without `;`, `~` and `%`). A trailing slash is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NormalPath(String);

impl NormalPath {
    /// The path as it is sent upstream.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The segments; none of them is empty.
    pub fn segments(&self) -> impl Iterator<Item = &str> {
        segments(&self.0)
    }
}

/// A request target that has one meaning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The path.
    pub path: NormalPath,
    /// The query, still escaped; `None` also for a bare `?`, which credentials-go sends on every request.
    pub query: Option<Box<str>>,
}

/// Why a target is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// An absolute-form target names another server.
    #[error("authority is not the metadata service")]
    Authority,
    /// A byte that servers read differently: a backslash, `;`, `#`, `~` (Windows' short names), a control or
    /// non-ASCII byte and the like.
    #[error("ambiguous byte")]
    Byte,
    /// A `..` segment, escaped or not.
    #[error("dot-dot segment")]
    DotDot,
    /// A `%` that starts no escape, or an escape of a byte that would be ambiguous unescaped.
    #[error("ambiguous escape")]
    Escape,
    /// Neither origin-form nor absolute-form.
    #[error("neither a path nor a URL")]
    Form,
}

impl Target {
    /// Parses a raw request target in origin-form or absolute-form (RFC 9112 §3.2).
    ///
    /// Escapes are decoded once; empty and `.` segments are dropped. Behind `…/security-credentials/` an
    /// escaped slash is a slash, because some clients escape the whole role ARN and no reading of it leaves
    /// that directory.
    ///
    /// # Errors
    /// [`TargetError`]; all variants are answered with 400.
    pub fn parse(raw: &[u8], metadata: MetadataAddr, dialect: &Dialect) -> Result<Self, TargetError> {
        let raw = str::from_utf8(raw).map_err(|_not_utf8| TargetError::Byte)?;
        let raw = origin_form(raw, metadata)?;
        let (path, query) = raw.split_once('?').map_or((raw, None), |(path, query)| (path, Some(query)));
        let target = Self {
            path: normalise(path, dialect)?,
            query: query.filter(|query| !query.is_empty()).map(Box::from),
        };
        target.check_query()?;
        Ok(target)
    }

    /// The query's words, unescaped: what stands between any of its separators.
    pub(super) fn query_words(&self) -> impl Iterator<Item = String> {
        let words = |query: &str| -> Vec<String> {
            let unescaped: String = unescaped(query).filter_map(Result::ok).map(char::from).collect();
            unescaped.split(QUERY_SEPARATORS).map(str::to_owned).collect()
        };
        self.query.as_deref().map(words).unwrap_or_default().into_iter()
    }

    /// A server that knows no queries must not find another meaning behind the `?`.
    fn check_query(&self) -> Result<(), TargetError> {
        let Some(query) = self.query.as_deref() else { return Ok(()) };
        if !query.bytes().all(is_query_byte) {
            return Err(TargetError::Byte);
        }
        for byte in unescaped(query) {
            if !matches!(byte?, b' '..=b'~') {
                return Err(TargetError::Escape);
            }
        }
        if self.query_words().any(|word| word == "..") {
            return Err(TargetError::DotDot);
        }
        Ok(())
    }
}

const QUERY_SEPARATORS: [char; 7] = ['/', '\\', '?', '&', '=', '#', ';'];

/// The bytes of a query, unescaped once. An error where the result would contain an escape again, or a short
/// name of Windows.
fn unescaped(query: &str) -> impl Iterator<Item = Result<u8, TargetError>> {
    let mut bytes = query.bytes();
    std::iter::from_fn(move || {
        Some(match bytes.next()? {
            b'%' => unescape(bytes.next(), bytes.next())
                .filter(|byte| !matches!(byte, b'%' | b'~'))
                .ok_or(TargetError::Escape),
            byte => Ok(byte),
        })
    })
}

fn origin_form(raw: &str, metadata: MetadataAddr) -> Result<&str, TargetError> {
    const SCHEME: &str = "http://";
    if raw.starts_with('/') {
        return Ok(raw);
    }
    if !raw.get(..SCHEME.len()).is_some_and(|scheme| scheme.eq_ignore_ascii_case(SCHEME)) {
        return Err(TargetError::Form);
    }
    let rest = &raw[SCHEME.len()..];
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let MetadataAddr { v4, v6 } = metadata;
    let without_port = |host: &dyn std::fmt::Display| v4.port() == 80 && authority == host.to_string();
    let is_v4 = authority == v4.to_string() || without_port(v4.ip());
    let is_v6 = metadata.socket_v6().is_some_and(|v6| authority == v6.to_string())
        || v6.is_some_and(|v6| without_port(&format_args!("[{v6}]")));
    if !is_v4 && !is_v6 {
        return Err(TargetError::Authority);
    }
    Ok(if path.is_empty() { "/" } else { path })
}

fn normalise(raw: &str, dialect: &Dialect) -> Result<NormalPath, TargetError> {
    if is_normal(raw) { Ok(NormalPath(raw.to_owned())) } else { rebuild(raw, dialect) }
}

/// What nearly every client sends: nothing to decode, nothing to drop. What this is not sure of is left to
/// [`rebuild`].
fn is_normal(raw: &str) -> bool {
    let mut before = None;
    raw.starts_with('/')
        && raw.bytes().all(|byte| {
            let follows_slash = before.replace(byte) == Some(b'/');
            if follows_slash {
                is_path_byte(byte) && byte != b'.'
            } else {
                byte == b'/' || is_path_byte(byte)
            }
        })
}

fn rebuild(raw: &str, dialect: &Dialect) -> Result<NormalPath, TargetError> {
    let decoded = decode(raw, dialect)?;
    let mut path = String::with_capacity(decoded.len());
    for segment in segments(&decoded) {
        if segment == ".." {
            return Err(TargetError::DotDot);
        }
        path.push('/');
        path.push_str(segment);
    }
    if path.is_empty() || decoded.ends_with('/') || decoded.ends_with("/.") {
        path.push('/');
    }
    Ok(NormalPath(path))
}

fn decode(raw: &str, dialect: &Dialect) -> Result<String, TargetError> {
    let mut decoded = String::with_capacity(raw.len());
    let mut bytes = raw.bytes();
    while let Some(byte) = bytes.next() {
        let unescaped = match byte {
            b'%' => unescape(bytes.next(), bytes.next()).ok_or(TargetError::Escape)?,
            _ => byte,
        };
        let legal = match (unescaped, byte) {
            (b'/', b'%') => in_role_directory(&decoded, dialect),
            (b'/', _) => true,
            _ => is_path_byte(unescaped),
        };
        if !legal {
            return Err(if byte == b'%' { TargetError::Escape } else { TargetError::Byte });
        }
        decoded.push(char::from(unescaped));
    }
    Ok(decoded)
}

fn unescape(high: Option<u8>, low: Option<u8>) -> Option<u8> {
    let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
    u8::try_from(digit(high)? * 16 + digit(low)?).ok()
}

/// Whether `path` is `/<version>/<credential directory>/security-credentials/<something>`.
fn in_role_directory(path: &str, dialect: &Dialect) -> bool {
    let mut segments = segments(path).skip(1);
    let directory = dialect.credentials.iter().chain([&SECURITY_CREDENTIALS]);
    directory
        .into_iter()
        .all(|name| segments.next().is_some_and(|segment| segment.eq_ignore_ascii_case(name)))
        && segments.next().is_some()
}

fn segments(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|segment| !matches!(*segment, "" | "."))
}

const fn is_path_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
        || matches!(byte, b'-' | b'.' | b'_' | b'!' | b'$' | b'&' | b'\'' | b'(' | b')')
        || matches!(byte, b'*' | b'+' | b',' | b'=' | b':' | b'@')
}

const fn is_query_byte(byte: u8) -> bool {
    is_path_byte(byte) || matches!(byte, b'%' | b'/' | b';' | b'?')
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube2ram_cloud::alibaba::DIALECT;

    fn parse(raw: &str) -> Result<Target, TargetError> {
        let metadata = MetadataAddr {
            v4: "100.100.100.200:80".parse().unwrap(),
            v6: Some("fd00:100::100:200".parse().unwrap()),
        };
        Target::parse(raw.as_bytes(), metadata, &DIALECT)
    }

    #[track_caller]
    fn path(raw: &str) -> String {
        parse(raw).unwrap().path.as_str().to_owned()
    }

    #[test]
    fn gives_one_spelling_to_equivalent_paths() {
        assert_eq!(path("/"), "/");
        assert_eq!(path("/."), "/");
        assert_eq!(path("/a/b"), "/a/b");
        assert_eq!(path("/a/b/"), "/a/b/");
        assert_eq!(path("//a///b//"), "/a/b/");
        assert_eq!(path("/./a/./b/."), "/a/b/");
        assert_eq!(path("/%61/b%2Dc/%2e"), "/a/b-c/");
        assert_eq!(
            path("/network/interfaces/macs/00:16:3e:0f:11:22/"),
            "/network/interfaces/macs/00:16:3e:0f:11:22/"
        );
    }

    #[test]
    fn accepts_the_metadata_servers_own_url_only() {
        assert_eq!(path("http://100.100.100.200/a"), "/a");
        assert_eq!(path("HTTP://100.100.100.200:80/a"), "/a");
        assert_eq!(path("http://100.100.100.200"), "/");
        assert_eq!(path("http://[fd00:100::100:200]/a"), "/a");
        assert_eq!(path("http://[fd00:100::100:200]:80/a"), "/a");
        assert_eq!(parse("http://[fd00:100::100:201]/a"), Err(TargetError::Authority));
        assert_eq!(parse("http://[fd00:100::100:200]:8080/a"), Err(TargetError::Authority));
        assert_eq!(parse("http://fd00:100::100:200/a"), Err(TargetError::Authority));
        assert_eq!(parse("http://100.100.100.200.example/a"), Err(TargetError::Authority));
        assert_eq!(parse("http://x@100.100.100.200/a"), Err(TargetError::Authority));
        assert_eq!(parse("http://100.100.100.200:8080/a"), Err(TargetError::Authority));
        assert_eq!(parse("https://100.100.100.200/a"), Err(TargetError::Form));
    }

    #[test]
    fn refuses_what_has_two_readings() {
        for (raw, expected) in [
            ("", TargetError::Form),
            ("*", TargetError::Form),
            ("100.100.100.200:80", TargetError::Form),
            ("\t/a", TargetError::Form),
            (" /a", TargetError::Form),
            ("/a\\b", TargetError::Byte),
            ("/a;x", TargetError::Byte),
            ("/a#", TargetError::Byte),
            ("/a?b#c", TargetError::Byte),
            ("/a?b\\c", TargetError::Byte),
            ("/a~1", TargetError::Byte),
            ("/a?b~1", TargetError::Byte),
            ("/a?%7e1", TargetError::Escape),
            ("/a?b%252f", TargetError::Escape),
            ("/a?b%c0%af", TargetError::Escape),
            ("/a?b%0a", TargetError::Escape),
            ("/a?b%2", TargetError::Escape),
            ("/a?b/../c", TargetError::DotDot),
            ("/a?b%2f..%5cc", TargetError::DotDot),
            ("/a b", TargetError::Byte),
            ("/a\0", TargetError::Byte),
            ("/a\u{ff0f}b", TargetError::Byte),
            ("/a%2fb", TargetError::Escape),
            ("/a%5Cb", TargetError::Escape),
            ("/a%252fb", TargetError::Escape),
            ("/a%00", TargetError::Escape),
            ("/a%3fb", TargetError::Escape),
            ("/a%c0%afb", TargetError::Escape),
            ("/a%", TargetError::Escape),
            ("/a%2", TargetError::Escape),
            ("/a%+1", TargetError::Escape),
            ("/a%u002f", TargetError::Escape),
            ("/a/../b", TargetError::DotDot),
            ("/a/%2e%2E/b", TargetError::DotDot),
            ("/..", TargetError::DotDot),
        ] {
            assert_eq!(parse(raw), Err(expected), "{raw:?}");
        }
    }

    #[test]
    fn unescapes_a_slash_only_inside_the_role_directory() {
        let role = path("/latest/meta-data/RAM/security-credentials/acs:ram::1:role%2Fa%2fb");

        assert_eq!(role, "/latest/meta-data/RAM/security-credentials/acs:ram::1:role/a/b");
        for refused in [
            "/latest/meta-data/ram%2fsecurity-credentials/a",
            "/latest/meta-data/ram/security-credentials%2fa",
            "/latest/x/ram/security-credentials/a%2fb",
        ] {
            assert_eq!(parse(refused), Err(TargetError::Escape), "{refused}");
        }
    }

    #[test]
    fn keeps_the_query_apart() {
        assert_eq!(parse("/a?audience=x%20y").unwrap().query.as_deref(), Some("audience=x%20y"));
        assert_eq!(parse("/a?").unwrap().query, None);
        assert_eq!(
            parse("/a?audience=https://x/y%2Fz").unwrap().query.as_deref(),
            Some("audience=https://x/y%2Fz")
        );
    }

    proptest::proptest! {
        #[test]
        fn a_path_that_is_taken_as_it_is_has_no_other_spelling(raw in "/?[/.a%2E:~;-]{0,12}") {
            if is_normal(&raw) {
                proptest::prop_assert_eq!(rebuild(&raw, &DIALECT), Ok(NormalPath(raw)));
            }
        }
    }
}
