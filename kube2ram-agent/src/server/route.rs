//! Method + [`Target`] → [`Route`]: what the request is for. Pure; depends on `path`, called by `connection`.
//! No target that might be the node's credentials becomes a [`Route::PassThrough`]: the passed target is
//! rebuilt from the normalised path, so the real server cannot read it differently.

use http::Method;

mod items;

pub use self::items::MetadataPolicy;
use self::items::Readers;
use super::{
    node_role::NodeRole,
    path::{NormalPath, Target},
};
use kube2ram_cloud::dialect::{Dialect, Items, SECURITY_CREDENTIALS};

/// What a request asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Route {
    /// The credentials of a role, by the name the client wrote: `…/security-credentials/<requested>`.
    Credentials {
        /// As written, without a trailing slash.
        requested: Box<str>,
    },
    /// The directory that holds `security-credentials`.
    CredentialDirectory,
    /// Items that the real metadata server may answer only to pods that may have the node's role.
    NodeItem {
        /// What is asked for.
        target: NodeTarget,
        /// The refusal for the others.
        refusal: Refusal,
    },
    /// Anything that the real metadata server may answer.
    PassThrough(UpstreamTarget),
    /// Nothing that is served.
    Refuse(Refusal),
    /// The name of the caller's role: `…/security-credentials`.
    RoleList,
    /// A session token: `PUT /<version>/api/token`.
    Token,
}

/// Why a request is not served to any pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The method is not served here.
    Method {
        /// The `Allow` header.
        allow: &'static str,
    },
    /// Below the credential directory, but nothing that exists for the pod.
    NotFound,
    /// An item that the strict policy does not list.
    NotListed,
    /// An item that the policy closes.
    Sensitive,
}

/// A target that may be asked of the real metadata server for a holder of the node's role.
#[derive(Debug, PartialEq, Eq)]
pub struct NodeTarget(String);

impl NodeTarget {
    /// The target in origin-form.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Opens it to a holder of the node's role.
    pub fn open(self, _: NodeRole) -> UpstreamTarget {
        UpstreamTarget(self.0)
    }
}

/// A target that may be asked of the real metadata server: made by [`route`] for ordinary items, or with the
/// `NodeRole` token.
#[derive(Debug, PartialEq, Eq)]
pub struct UpstreamTarget(String);

impl UpstreamTarget {
    /// Opens a credential path of the real server to a holder of the node's role.
    pub fn of_node_role(_: NodeRole, path: &NormalPath) -> Self {
        Self(path.as_str().to_owned())
    }

    /// The target in origin-form.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

const TOKEN: &[&str] = &["api", "token"];
/// What can be done with an item.
pub(super) const READ: &str = "GET, HEAD";

/// Returns what a request asks for. Segments compare without regard to case, as the real server does for
/// `ram` at least (ossutil asks for `Ram`).
pub fn route(method: &Method, target: &Target, policy: MetadataPolicy, dialect: &Dialect) -> Route {
    // More than any item has.
    let mut segments = Vec::with_capacity(8);
    segments.extend(target.path.segments());
    let reads = matches!(*method, Method::GET | Method::HEAD);

    if let Some(below) = segments.get(1..)
        && starts_with(below, dialect.credentials)
    {
        return match reads {
            true if dialect.items.node_role.contains(&below) => Route::NodeItem {
                // Without the query, as everything below this directory.
                target: NodeTarget(target.path.as_str().to_owned()),
                refusal: Refusal::NotFound,
            },
            true => credential_route(&below[dialect.credentials.len()..]),
            false => Route::Refuse(Refusal::Method { allow: READ }),
        };
    }
    let bare: Vec<_> = segments.iter().map(|segment| bare(segment)).collect();
    if !segments.iter().all(|segment| segment.starts_with(is_name_char))
        || contains(&bare, dialect.credentials)
        || contains(&bare, &[SECURITY_CREDENTIALS])
    {
        return Route::Refuse(Refusal::NotFound);
    }
    // Never passed to the real server: its tokens are the node's, and a pod that reaches the real server by
    // another path could use them.
    if segments.len() == 1 + TOKEN.len() && starts_with(&segments[1..], TOKEN) {
        return match *method {
            Method::PUT => Route::Token,
            _ => Route::Refuse(Refusal::Method { allow: "PUT" }),
        };
    }
    let refusal = match items::readers(&segments, &bare, policy, &dialect.items) {
        Readers::All => None,
        Readers::Nobody(refusal) => return Route::Refuse(refusal),
        Readers::NodeRole(refusal) => Some(refusal),
    };
    if target.query_words().any(|word| names_closed(&word, &dialect.items)) {
        return Route::Refuse(refusal.unwrap_or(Refusal::NotFound));
    }
    if !reads {
        return Route::Refuse(refusal.unwrap_or(Refusal::Method { allow: READ }));
    }
    let path = target.path.as_str();
    let upstream = match &target.query {
        Some(query) => format!("{path}?{query}"),
        None => path.to_owned(),
    };
    match refusal {
        None => Route::PassThrough(UpstreamTarget(upstream)),
        Some(refusal) => Route::NodeItem { target: NodeTarget(upstream), refusal },
    }
}

fn credential_route(below: &[&str]) -> Route {
    match below {
        [] => Route::CredentialDirectory,
        [directory, role @ ..] if directory.eq_ignore_ascii_case(SECURITY_CREDENTIALS) => match role {
            [] => Route::RoleList,
            _ => Route::Credentials { requested: role.join("/").into() },
        },
        _ => Route::Refuse(Refusal::NotFound),
    }
}

/// Whether a word of a query would complete a closed path for a server that ignores queries and continues to
/// read behind the `?`.
fn names_closed(word: &str, items: &Items) -> bool {
    let word = bare(word);
    items::begins_closed(word, items) || items.last_names.iter().any(|name| word.eq_ignore_ascii_case(name))
}

/// Whether some server could take the path for one at or below `names`, at any depth. The segments are
/// [`bare`].
fn contains(segments: &[&str], names: &[&str]) -> bool {
    segments.windows(names.len()).any(|window| starts_with(window, names))
}

/// What is left of a segment when a server drops parameters (`ram,1`), suffixes (`ram.json`), a trailing dot
/// or blank (`ram.`, `ram+`) or a stream (`ram::$DATA`), as several do.
fn bare(segment: &str) -> &str {
    let segment = segment.trim_start_matches(|c: char| !c.is_ascii_alphanumeric());
    let end = segment.find(|c| !is_name_char(c));
    &segment[..end.unwrap_or(segment.len())]
}

/// What the name of an item begins with. To some servers a segment that begins otherwise is none (`+`, `,1`),
/// or one up (`..,1`), so that the names before and behind it meet.
fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_')
}

fn starts_with(segments: &[&str], names: &[&str]) -> bool {
    segments.len() >= names.len()
        && segments.iter().zip(names).all(|(segment, name)| segment.eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests;
