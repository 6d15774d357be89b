//! Values of flags: text → type, accepted as by the flag library of kube2iam and the Go kube2ram where that
//! matters. Depends on clap and url; used by the siblings. Errors continue clap's `invalid value '…' for '…':
//! `.

use std::{
    convert::Infallible,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddrV4},
    path::{Component, Path, PathBuf},
    time::Duration,
};

use clap::{Arg, ArgAction, ValueEnum, builder::PossibleValue};
use secrecy::SecretString;
use tracing::level_filters::LevelFilter;
use url::Url;

use crate::{
    policy::PatternFormat,
    server::{HostNetworkPods, MetadataPolicy},
};
use kube2ram_cloud::{Cloud, Endpoint, OidcProviderArn};
use kube2ram_service::command_line::boolean;
pub(super) use kube2ram_service::command_line::log_format;

/// Makes a flag a switch as Go's pflag has them: `--x`, or `--x=<boolean>`, but not `--x <boolean>`.
pub(super) fn switch(arg: Arg) -> Arg {
    arg.action(ArgAction::Set)
        .num_args(0..=1)
        .require_equals(true)
        .default_missing_value("true")
        .value_name("BOOL")
        .value_parser(boolean)
}

pub(super) fn duration(text: &str) -> Result<Duration, &'static str> {
    humantime::parse_duration(text).map_err(|_syntax| "give a number with a unit, such as 15m or 1h30m")
}

/// The alphabet and length of annotation keys: Kubernetes documentation, "Annotations: Syntax and character
/// set".
pub(super) fn annotation_key(text: &str) -> Result<Box<str>, &'static str> {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./".contains(&byte);
    let (prefix, name) = text.split_once('/').unwrap_or(("prefix", text));
    let lengths = (1..=253).contains(&prefix.len()) && (1..=63).contains(&name.len());
    if lengths && !name.contains('/') && text.bytes().all(legal) {
        return Ok(text.into());
    }
    Err("give an annotation key, such as example.com/role")
}

/// It becomes part of a field selector, in which a comma would begin another one.
pub(super) fn node_name(text: &str) -> Result<String, &'static str> {
    let legal = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte);
    if (1..=253).contains(&text.len()) && text.bytes().all(legal) {
        return Ok(text.to_owned());
    }
    Err("give the name of a Node: up to 253 of a-z, 0-9, '-' and '.'")
}

/// A cgroup below the root, as a relative path.
pub(super) fn host_cgroup(text: &str) -> Result<PathBuf, &'static str> {
    let path = Path::new(text);
    let is_name = |part: Component<'_>| matches!(part, Component::Normal(_));
    if !text.is_empty() && path.components().all(is_name) {
        return Ok(path.to_owned());
    }
    Err("give a cgroup relative to the root, such as system.slice")
}

pub(super) fn log_level(text: &str) -> Result<LevelFilter, &'static str> {
    match text.to_ascii_lowercase().as_str() {
        "trace" => Ok(LevelFilter::TRACE),
        "debug" => Ok(LevelFilter::DEBUG),
        "info" => Ok(LevelFilter::INFO),
        "warn" | "warning" => Ok(LevelFilter::WARN),
        // kube2iam and the Go kube2ram have levels above error, at which nothing is logged.
        "error" | "fatal" | "panic" => Ok(LevelFilter::ERROR),
        _ => Err("give trace, debug, info, warn or error"),
    }
}

/// The change of the log level.
#[derive(Clone, Copy, Debug)]
pub(super) enum LevelChange {
    Reset,
    To(LevelFilter),
}

pub(super) fn changed_log_level(text: &str) -> Result<LevelChange, &'static str> {
    match text {
        "reset" => Ok(LevelChange::Reset),
        _ => log_level(text)
            .map(LevelChange::To)
            .map_err(|_level| "give trace, debug, info, warn, error or reset"),
    }
}

impl ValueEnum for HostNetworkPods {
    fn value_variants<'a>() -> &'a [Self] {
        &[Self::Deny, Self::Pass]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(match self {
            Self::Deny => "deny",
            Self::Pass => "pass",
        }))
    }
}

impl ValueEnum for MetadataPolicy {
    fn value_variants<'a>() -> &'a [Self] {
        &[Self::Open, Self::Standard, Self::Strict]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(match self {
            Self::Open => PossibleValue::new("open"),
            // The Go kube2ram's name for it.
            Self::Standard => PossibleValue::new("standard").alias("closed"),
            Self::Strict => PossibleValue::new("strict"),
        })
    }
}

/// The names of a pod and its namespace: they become part of a path and a field selector.
pub(super) fn pod(text: &str) -> Result<(String, String), &'static str> {
    let is_name = |name: &str| {
        let legal = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte);
        (1..=253).contains(&name.len()) && name.bytes().all(legal) && !name.starts_with('.')
    };
    match text.split_once('/') {
        Some((namespace, name)) if is_name(namespace) && is_name(name) => {
            Ok((namespace.to_owned(), name.to_owned()))
        }
        _ => Err("give <namespace>/<pod>"),
    }
}

/// It is searched for as it stands.
pub(super) fn access_key_id(text: &str) -> Result<String, &'static str> {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    if (4..=128).contains(&text.len()) && text.bytes().all(legal) {
        return Ok(text.to_owned());
    }
    Err("give an AccessKeyId, such as STS.NUgYbaeEx… or ASIAIOSFODNN7EXAMPLE, complete")
}

pub(super) fn pattern_format(text: &str) -> Result<PatternFormat, &'static str> {
    match text.to_ascii_lowercase().as_str() {
        "glob" => Ok(PatternFormat::Glob),
        "regexp" => Ok(PatternFormat::Regexp),
        _ => Err("give glob or regexp"),
    }
}

pub(super) fn oidc_provider(text: &str) -> Result<OidcProviderArn, &'static str> {
    OidcProviderArn::parse(text).ok().ok_or("give acs:ram::<account>:oidc-provider/<name>")
}

/// A relative path would depend on the agent's working directory.
pub(super) fn file(text: &str) -> Result<PathBuf, &'static str> {
    let path = Path::new(text);
    if path.is_absolute() && path.file_name().is_some() && !text.ends_with('/') {
        return Ok(path.to_owned());
    }
    Err("give the absolute path of a file, such as /run/kube2ram/audit.jsonl")
}

pub(super) fn cloud(text: &str) -> Result<Cloud, &'static str> {
    Cloud::ALL.into_iter().find(|cloud| cloud.name() == text).ok_or("give alibaba or aws")
}

/// An IPv4 address, at port 80 unless one follows.
pub(super) fn metadata_addr(text: &str) -> Result<SocketAddrV4, &'static str> {
    let addr = text.parse::<Ipv4Addr>().map(|ip| SocketAddrV4::new(ip, 80)).or_else(|_| text.parse());
    match addr {
        Ok(addr) if addr.port() != 0 => Ok(addr),
        _ => Err("give an IPv4 address, or <address>:<port>"),
    }
}

/// An IPv6 address, or none.
#[derive(Clone, Copy, Debug)]
pub(super) struct Address6(pub(super) Option<Ipv6Addr>);

/// An address, or none.
#[derive(Clone, Copy, Debug)]
pub(super) struct Address(pub(super) Option<IpAddr>);

/// An address; an empty value means none, as from a template without an address.
pub(super) fn host_ip(text: &str) -> Result<Address, &'static str> {
    if text.is_empty() {
        return Ok(Address(None));
    }
    text.parse()
        .map(|address| Address(Some(address)))
        .map_err(|_no_address| "give an address of this node, such as 192.0.2.10")
}

/// An IPv6 address that a server can have; an empty value means none.
pub(super) fn metadata_addr6(text: &str) -> Result<Address6, &'static str> {
    if text.is_empty() {
        return Ok(Address6(None));
    }
    match text.parse::<Ipv6Addr>() {
        // `::1`, IPv4-mapped addresses and the like belong to this machine or to IPv4; a multicast address
        // belongs to no server.
        Ok(address) if address.segments()[..2] != [0, 0] && !address.is_multicast() => {
            Ok(Address6(Some(address)))
        }
        _ => Err("give an IPv6 address without brackets, or an empty value for none"),
    }
}

#[expect(clippy::unnecessary_wraps, reason = "clap's value parsers return results")]
pub(super) fn secret(text: &str) -> Result<SecretString, Infallible> {
    Ok(text.into())
}

pub(super) fn api_server(text: &str) -> Result<Url, &'static str> {
    let url = Url::parse(text).ok().filter(|url| matches!(url.scheme(), "https" | "http") && is_plain(url));
    url.ok_or("give https://<host>[:<port>]")
}

pub(super) fn sts_endpoint(text: &str) -> Result<Endpoint, &'static str> {
    Endpoint::parse(text).ok().ok_or("give https://<host>[:<port>]; http:// for loopback addresses only")
}

fn is_plain(url: &Url) -> bool {
    let credentials = !url.username().is_empty() || url.password().is_some();
    url.has_host() && !credentials && url.query().is_none() && url.fragment().is_none()
}
