//! A raw request target through the agent's parser and route table, on each cloud: what passes could mean
//! nothing closed to any server, and what is a credential route is exactly that.

use std::fmt;

use http::Method;
use kube2ram_agent::server::{
    MetadataPolicy,
    path::Target,
    route::{Route, route},
};
use kube2ram_cloud::Cloud;

use super::model::{self, Tree};

const METHODS: [Method; 6] =
    [Method::GET, Method::HEAD, Method::PUT, Method::POST, Method::DELETE, Method::OPTIONS];

/// Checks one target.
pub fn check(raw: &[u8]) {
    for cloud in Cloud::ALL {
        for method in METHODS {
            for policy in [MetadataPolicy::Open, MetadataPolicy::Standard, MetadataPolicy::Strict] {
                Request { cloud, policy, method: &method, raw }.check();
            }
        }
    }
}

/// A target, and all else that its route depends on.
struct Request<'r> {
    cloud: Cloud,
    policy: MetadataPolicy,
    method: &'r Method,
    raw: &'r [u8],
}

impl fmt::Display for Request<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cloud, policy, method, raw } = self;
        write!(f, "{cloud:?} {policy:?} {method} {}", raw.escape_ascii())
    }
}

impl Request<'_> {
    fn check(&self) {
        let Self { cloud, policy, method, raw } = *self;
        let tree = Tree::of(cloud);
        let routed = self.route();
        let reads = matches!(*method, Method::GET | Method::HEAD);
        if let Some(expected) = plain(raw, tree).filter(|_| reads) {
            assert_eq!(routed.as_ref(), Some(&expected), "{self}");
        }
        if reads && tree.needed.iter().any(|item| item.as_bytes() == raw) {
            let passes = matches!(&routed, Some(Route::PassThrough(to)) if to.as_str().as_bytes() == raw);
            assert!(passes, "{self} is not passed on");
        }
        let Some(routed) = routed else { return };
        let below = below(raw, tree);
        match &routed {
            Route::PassThrough(upstream) => {
                let sensitive = if policy == MetadataPolicy::Open { None } else { Some(tree.sensitive) };
                self.check_passed(upstream.as_str(), [Some(tree.credentials), sensitive], &routed);
                let listed =
                    policy != MetadataPolicy::Strict || model::is_listed(upstream.as_str(), tree.listed);
                assert!(reads && listed, "{self} passes");
            }
            // For pods that may have the node's role: the identity, items that `strict` does not list, and
            // one below the credential directory, whose query is not passed on. Never the node's secrets.
            Route::NodeItem { target, .. } => {
                let is_own = tree.node_item.is_some_and(|item| below.as_deref() == Some(item));
                let (raw, credentials) = match is_own {
                    true => (target.as_str().as_bytes(), None),
                    false => (raw, Some(tree.credentials)),
                };
                let passed = Request { raw, ..*self };
                passed.check_passed(target.as_str(), [credentials, Some(tree.secrets)], &routed);
                assert!(reads && (is_own || policy != MetadataPolicy::Open), "{self} may pass");
            }
            Route::Credentials { requested } => {
                let expected = format!("security-credentials/{requested}");
                assert!(reads && below.as_deref() == Some(&*expected), "{self} is not {expected}");
            }
            // Never the real server's own.
            Route::Token => assert_eq!(method, Method::PUT),
            Route::RoleList => {
                assert!(reads && below.as_deref() == Some("security-credentials"), "{self} is no list");
            }
            Route::CredentialDirectory => {
                assert!(reads && below.as_deref() == Some(""), "{self} is no directory");
            }
            Route::Refuse(_) => {}
        }
    }

    fn route(&self) -> Option<Route> {
        let (dialect, tree) = (self.cloud.dialect(), Tree::of(self.cloud));
        let target = Target::parse(self.raw, tree.metadata, dialect).ok()?;
        Some(route(self.method, &target, self.policy, dialect))
    }

    /// What the real server is asked is nothing that is closed, and the same request once more.
    fn check_passed(&self, upstream: &str, closed: [Option<&[&[&str]]>; 2], routed: &Route) {
        for target in [self.raw, upstream.as_bytes()] {
            let is_closed = closed.into_iter().flatten().any(|items| model::could_mean(target, items));
            assert!(!is_closed, "{self} passes as {upstream}");
        }
        let again = Request { raw: upstream.as_bytes(), ..*self };
        assert_eq!(again.route().as_ref(), Some(routed), "{self} is read again as another request");
    }
}

/// What the target names below `/<version>/meta-data/<directory>`, by the one reading that is allowed:
/// escapes once, then no empty segments and no dots. The fixed names are in lower case.
fn below(raw: &[u8], tree: &Tree) -> Option<String> {
    let raw = str::from_utf8(raw).ok()?;
    let origin_form = match raw.get(..7) {
        Some(scheme) if scheme.eq_ignore_ascii_case("http://") => {
            raw[7..].split_once('/').map_or("", |(_, path)| path)
        }
        _ => raw,
    };
    let path = origin_form.split('?').next()?;
    let mut text = String::new();
    let mut rest = path;
    while let Some((before, escaped)) = rest.split_once('%') {
        text.push_str(before);
        text.push(char::from(u8::from_str_radix(escaped.get(..2)?, 16).ok()?));
        rest = &escaped[2..];
    }
    text.push_str(rest);
    let mut segments = text.split('/').filter(|segment| !segment.is_empty() && *segment != ".").skip(1);
    let mut fixed = |name: &str| segments.next().filter(|segment| segment.eq_ignore_ascii_case(name));
    fixed("meta-data").and(fixed(tree.directory))?;
    match segments.next() {
        None => Some(String::new()),
        Some(name) => {
            let first = [name.to_ascii_lowercase()];
            Some(first.into_iter().chain(segments.map(str::to_owned)).collect::<Vec<_>>().join("/"))
        }
    }
}

/// What a client means that writes plainly, or the agent would be safe and useless.
fn plain(raw: &[u8], tree: &Tree) -> Option<Route> {
    let raw = str::from_utf8(raw).ok()?;
    let raw = raw.strip_suffix('?').unwrap_or(raw);
    let rest = ["/latest/", "/2016-01-01/"].iter().find_map(|version| raw.strip_prefix(version))?;
    let directory = tree.spellings.iter().find_map(|spelling| rest.strip_prefix(spelling))?;
    let role = match directory.strip_prefix("/security-credentials")? {
        "" | "/" => return Some(Route::RoleList),
        below => below.strip_prefix('/')?,
    };
    let is_legal = |c: u8| c.is_ascii_alphanumeric() || tree.role_marks.contains(&c);
    let is_role = !role.is_empty() && !role.starts_with('.') && role.bytes().all(is_legal);
    is_role.then(|| Route::Credentials { requested: role.into() })
}
