//! Values of flags: text → type. Depends on clap; used by `flags`. Errors continue clap's
//! `invalid value '…' for '…': `.

use std::time::Duration;

use clap::{Arg, ArgAction};
use http::Uri;
use kube2ram_cloud::{
    alibaba::endpoint::{Endpoint, Region},
    role::{ArnStyle, ExternalId, RoleArn, SessionName},
};
pub(super) use kube2ram_service::command_line::{boolean, log_format};
use tracing::level_filters::LevelFilter;

/// Makes a flag a switch as Go's pflag has them: `--x`, or `--x=<boolean>`, but not `--x <boolean>`.
pub(super) fn switch(arg: Arg) -> Arg {
    arg.action(ArgAction::Set)
        .num_args(0..=1)
        .require_equals(true)
        .default_missing_value("true")
        .value_name("BOOL")
        .value_parser(boolean)
}

pub(super) fn log_level(text: &str) -> Result<LevelFilter, &'static str> {
    match text.to_ascii_lowercase().as_str() {
        "trace" => Ok(LevelFilter::TRACE),
        "debug" => Ok(LevelFilter::DEBUG),
        "info" => Ok(LevelFilter::INFO),
        "warn" | "warning" => Ok(LevelFilter::WARN),
        "error" => Ok(LevelFilter::ERROR),
        _ => Err("give trace, debug, info, warn or error"),
    }
}

pub(super) fn duration(text: &str) -> Result<Duration, &'static str> {
    // Go writes zero without a unit.
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    humantime::parse_duration(text).map_err(|_syntax| "give a number with a unit, such as 30s or 1m")
}

pub(super) fn region(text: &str) -> Result<Region, &'static str> {
    Region::parse(text).ok().ok_or("give the id of a region, such as cn-hangzhou")
}

pub(super) fn api_server(text: &str) -> Result<Uri, &'static str> {
    let url = text.parse::<Uri>().ok().filter(|url| url.scheme_str() == Some("https"));
    url.ok_or("give https://<host>[:<port>]")
}

pub(super) fn sts_endpoint(text: &str) -> Result<Endpoint, &'static str> {
    Endpoint::parse(text).ok().ok_or("give https://<host>[:<port>]; http:// for loopback addresses only")
}

pub(super) fn role(text: &str) -> Result<RoleArn, String> {
    match RoleArn::parse(text) {
        Ok(role) if role.style() == ArnStyle::Acs => Ok(role),
        Ok(_) => Err("give acs:ram::<account>:role/<name>".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

pub(super) fn session_name(text: &str) -> Result<SessionName, String> {
    SessionName::parse(text).map_err(|error| error.to_string())
}

pub(super) fn external_id(text: &str) -> Result<ExternalId, String> {
    ExternalId::parse(text).map_err(|error| error.to_string())
}
