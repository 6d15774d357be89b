//! Environment → arguments: every flag is also the variable `KUBE2RAM_<FLAG>`.
//! Depends on clap; called by the parent, which puts these before the command line's arguments.

use std::ffi::{OsStr, OsString};

use clap::{Arg, Command};

const PREFIX: &str = "KUBE2RAM_";

/// Variables that the manifests of kube2iam and the Go kube2ram set from the downward API, and the one that
/// ACK's webhook sets.
const OTHER_NAMES: [(&str, &str); 3] =
    [("host-ip", "HOST_IP"), ("node", "NODE_NAME"), ("oidc-provider-arn", OIDC_PROVIDER)];
const OIDC_PROVIDER: &str = "ALIBABA_CLOUD_OIDC_PROVIDER_ARN";

/// Variables that name the agent's own credentials, of all clouds.
const OWN_CREDENTIALS: [&str; 15] = [
    "ACCESS_KEY_ID",
    "ACCESS_KEY_SECRET",
    "ALIBABA_CLOUD_ACCESS_KEY_ID",
    "ALIBABA_CLOUD_ACCESS_KEY_SECRET",
    "ALIBABA_CLOUD_OIDC_TOKEN_FILE",
    "ALIBABA_CLOUD_ROLE_ARN",
    "ALIBABA_CLOUD_ROLE_SESSION_NAME",
    "ALIBABA_CLOUD_SECURITY_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_ROLE_ARN",
    "AWS_ROLE_SESSION_NAME",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    // It stays in use as a flag's.
    OIDC_PROVIDER,
];

/// The arguments that the environment stands for. Empty variables count as unset.
pub(super) fn args(command: &Command, env: &dyn Fn(&str) -> Option<OsString>) -> Vec<OsString> {
    let value_of = |name: &str| env(name).filter(|value| !value.is_empty() && !is_service_link(value));
    let arg_of = |arg: &Arg| {
        let flag = arg.get_long()?;
        let other = OTHER_NAMES.iter().find(|(name, _)| *name == flag);
        let value =
            names(arg).find_map(|name| value_of(&variable_of(name))).or_else(|| value_of(other?.1))?;
        let mut arg = OsString::from(format!("--{flag}="));
        arg.push(value);
        Some(arg)
    };
    command.get_arguments().filter_map(arg_of).collect()
}

/// A flag's name, and its other names.
fn names(arg: &Arg) -> impl Iterator<Item = &str> {
    arg.get_long().into_iter().chain(arg.get_visible_aliases().unwrap_or_default())
}

/// The first variable that looks like a flag's but is none, in the order of the environment: with a misspelt
/// variable the flag would silently keep its default. `variables` may hold any others.
pub(super) fn unknown(
    command: &Command,
    variables: impl IntoIterator<Item = (OsString, OsString)>,
) -> Option<String> {
    let flags: Vec<_> = command.get_arguments().flat_map(names).map(variable_of).collect();
    let is_misspelt = |(name, value): (OsString, OsString)| {
        let name = name.into_string().ok()?;
        let rest = name.strip_prefix(PREFIX)?;
        let is_known = flags.contains(&name) || value.is_empty();
        (!is_known && !is_service_link(&value) && !is_of_service(rest)).then_some(name)
    };
    variables.into_iter().find_map(is_misspelt)
}

/// One line about the variables that name a proxy for other programs, if one is set: its author may rely on
/// it.
pub(super) fn proxy_notice(env: &dyn Fn(&str) -> Option<OsString>) -> Option<String> {
    const PROXIES: [&str; 6] =
        ["HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"];
    let is_set = |name: &&str| env(name).is_some_and(|value| !value.is_empty());
    let set: Vec<_> = PROXIES.into_iter().filter(is_set).collect();
    (!set.is_empty()).then(|| {
        format!(
            "{} has no effect: the agent uses no proxy, which would see its signed requests; where STS cannot be reached without one, \
             give --sts-endpoint",
            set.join(", ")
        )
    })
}

/// Whether a variable is about the agent's own credentials.
pub fn is_of_own_credentials(name: &str) -> bool {
    OWN_CREDENTIALS.contains(&name)
}

/// One line about the variables that name the agent's own credentials, if one is set, for an agent that signs
/// nothing: its author may rely on it.
pub(super) fn own_credentials_notice(env: &dyn Fn(&str) -> Option<OsString>) -> Option<String> {
    let is_set = |name: &&str| env(name).is_some_and(|value| !value.is_empty());
    let set: Vec<_> =
        OWN_CREDENTIALS.into_iter().filter(|name| *name != OIDC_PROVIDER).filter(is_set).collect();
    (!set.is_empty()).then(|| {
        format!(
            "{} has no effect with --credentials-from=service-account: the agent exchanges tokens of ServiceAccounts, and signs nothing",
            set.join(", ")
        )
    })
}

/// The known variable with the most similar name, if one is similar.
pub(super) fn similar(command: &Command, name: &str) -> Option<String> {
    let known = command.get_arguments().flat_map(names).map(variable_of);
    known
        .map(|known| (distance(&known, name), known))
        .min()
        .filter(|(far, _)| *far <= 3)
        .map(|(_, known)| known)
}

fn variable_of(flag: &str) -> String {
    format!("{PREFIX}{}", flag.replace('-', "_").to_uppercase())
}

/// How many characters have to be inserted, removed or replaced (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row.last().copied().unwrap_or_default()
}

/// The rest of a service link's name (kubelet, `envvars.FromServices`): of a Service `kube2ram`, or of
/// `kube2ram-…`.
fn is_of_service(rest: &str) -> bool {
    let is_part = |part: &str| {
        let mut words = part.split('_');
        let is_number = words.next().is_some_and(|port| port.parse::<u16>().is_ok());
        let is_protocol = words.next().is_some_and(|word| ["TCP", "UDP", "SCTP"].contains(&word));
        is_number && is_protocol && words.next().is_none_or(|word| ["PROTO", "PORT", "ADDR"].contains(&word))
    };
    let after = |word: &str| {
        rest.split_once(word).map(|(before, part)| (before.is_empty() || before.ends_with('_'), part))
    };
    rest == "SERVICE_HOST"
        || rest.ends_with("_SERVICE_HOST")
        || after("SERVICE_PORT")
            .is_some_and(|(is_word, part)| is_word && (part.is_empty() || part.starts_with('_')))
        || after("PORT_").is_some_and(|(is_word, part)| is_word && is_part(part))
}

/// The kubelet sets variables for the Services of a container's namespace. A Service `kube2ram-metrics`
/// becomes `KUBE2RAM_METRICS_PORT=tcp://…`, which is not meant for the agent.
fn is_service_link(value: &OsStr) -> bool {
    let starts_with = |scheme: &str| value.as_encoded_bytes().starts_with(scheme.as_bytes());
    ["tcp://", "udp://", "sctp://"].into_iter().any(starts_with)
}
