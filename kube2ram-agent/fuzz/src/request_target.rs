//! A raw request target through the agent's parser and route table: what passes could mean nothing closed to
//! any server, and what is a credential route is exactly that.

use http::Method;
use kube2ram_agent::server::{
    MetadataPolicy,
    path::Target,
    route::{Route, route},
};
use kube2ram_cloud::{MetadataAddr, alibaba::DIALECT};

use super::model;

const METHODS: [Method; 6] =
    [Method::GET, Method::HEAD, Method::PUT, Method::POST, Method::DELETE, Method::OPTIONS];

/// Checks one target.
pub fn check(raw: &[u8]) {
    for method in METHODS {
        for policy in [MetadataPolicy::Open, MetadataPolicy::Standard, MetadataPolicy::Strict] {
            check_one(&method, raw, policy);
        }
    }
}

fn check_one(method: &Method, raw: &[u8], policy: MetadataPolicy) {
    let routed = routed(method, raw, policy);
    if let Some(expected) = plain(method, raw) {
        assert_eq!(routed.as_ref(), Some(&expected), "{method} {}", raw.escape_ascii());
    }
    let Some(routed) = routed else { return };
    let reads = matches!(*method, Method::GET | Method::HEAD);
    match &routed {
        Route::PassThrough(upstream) => {
            let upstream = upstream.as_str();
            let closed = policy != MetadataPolicy::Open;
            for target in [raw, upstream.as_bytes()] {
                assert!(
                    !model::could_mean(target, model::CREDENTIALS),
                    "{method} {} passes as {upstream}",
                    raw.escape_ascii()
                );
                assert!(
                    !(closed && model::could_mean(target, model::SENSITIVE)),
                    "{method} {} passes as {upstream}",
                    raw.escape_ascii()
                );
            }
            assert!(reads);
            assert_eq!(
                self::routed(method, upstream.as_bytes(), policy).as_ref(),
                Some(&routed),
                "reads anew"
            );
        }
        // For pods that may have the node's role: the identity document, and items that `strict` does not
        // list. Never the node's secrets.
        Route::NodeItem { target, .. } => {
            let upstream = target.as_str();
            for target in [raw, upstream.as_bytes()] {
                let is_closed = [model::CREDENTIALS, model::SECRETS];
                assert!(
                    !is_closed.iter().any(|items| model::could_mean(target, items)),
                    "{method} {} passes as {upstream}",
                    raw.escape_ascii()
                );
            }
            assert!(reads && policy != MetadataPolicy::Open);
            assert_eq!(
                self::routed(method, upstream.as_bytes(), policy).as_ref(),
                Some(&routed),
                "reads anew"
            );
        }
        Route::Credentials { requested } => {
            assert!(reads);
            assert_eq!(below_ram(raw).as_deref(), Some(&*format!("security-credentials/{requested}")));
        }
        // Never the real server's own.
        Route::Token => assert_eq!(method, Method::PUT),
        Route::RoleList => {
            assert!(reads);
            assert_eq!(below_ram(raw).as_deref(), Some("security-credentials"));
        }
        Route::CredentialDirectory => {
            assert!(reads);
            assert_eq!(below_ram(raw).as_deref(), Some(""));
        }
        _ => {}
    }
}

fn routed(method: &Method, raw: &[u8], policy: MetadataPolicy) -> Option<Route> {
    let target =
        Target::parse(raw, MetadataAddr::v4_only("100.100.100.200:80".parse().ok()?), &DIALECT).ok()?;
    Some(route(method, &target, policy, &DIALECT))
}

/// What the target names below `/<version>/meta-data/ram`, by the one reading that is allowed: escapes once,
/// then no empty segments and no dots. The fixed names are in lower case.
fn below_ram(raw: &[u8]) -> Option<String> {
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
    fixed("meta-data").and(fixed("ram"))?;
    match segments.next() {
        None => Some(String::new()),
        Some(name) => {
            let first = [name.to_ascii_lowercase()];
            Some(first.into_iter().chain(segments.map(str::to_owned)).collect::<Vec<_>>().join("/"))
        }
    }
}

/// What a client means that writes plainly, or the agent would be safe and useless.
fn plain(method: &Method, raw: &[u8]) -> Option<Route> {
    let raw = str::from_utf8(raw).ok()?;
    let raw = raw.strip_suffix('?').unwrap_or(raw);
    let rest = ["/latest/", "/2016-01-01/"].iter().find_map(|version| raw.strip_prefix(version))?;
    if !matches!(*method, Method::GET | Method::HEAD) {
        return None;
    }
    let below = rest
        .strip_prefix("meta-data/ram/security-credentials")
        .or_else(|| rest.strip_prefix("meta-data/Ram/security-credentials"))?;
    let is_word = |text: &str| {
        !text.is_empty() && text.bytes().all(|c| c.is_ascii_alphanumeric() || b"-_".contains(&c))
    };
    let role = match below {
        "" | "/" => return Some(Route::RoleList),
        _ => below.strip_prefix('/')?,
    };
    is_word(role).then(|| Route::Credentials { requested: role.into() })
}
