//! The client: an exec credential plugin of kubectl, which prints a token. Looks for credentials as Alibaba
//! Cloud's own tools do, assumes a role if it is asked to, and signs. Sends nothing to the cluster. Depends
//! on
//! `token` and `files`; called by the command `token`.

mod cache;
mod choice;
mod environment;
mod exec;
mod ini;
mod obtain;
mod profiles;
mod source;

use std::{path::PathBuf, sync::Arc};

use jiff::{SignedDuration, Timestamp};
use kube2ram_cloud::{
    MetadataAddr, StsClientError,
    alibaba::{
        DIALECT,
        base::UriError,
        endpoint::{Endpoint, EndpointError, Region, global},
    },
    credentials::IssueError,
    role::{ExternalId, RoleArn, SessionName},
};

use self::{cache::Cache, obtain::Network, source::Source};
pub use self::{choice::Options, exec::Version, source::SourceError};
use crate::token::{ClusterId, presign};
use kube2ram_service::clock::Clock;

/// What the user asks for.
#[derive(Clone, Debug)]
pub struct Request {
    /// The cluster that the token is for.
    pub cluster: ClusterId,
    /// A role to assume with the credentials that are found.
    pub role: Option<AssumedRole>,
    /// The version of the API that the kubeconfig names, where kubectl does not name it itself.
    pub version: Version,
    /// Where credentials are looked for.
    pub options: Options,
    /// How STS is reached, where credentials take a call.
    pub sts: StsChoice,
    /// Where the credentials of assumed roles are kept; `None`: nowhere.
    pub cache: Option<PathBuf>,
}

/// A role that the user names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AssumedRole {
    /// Its ARN.
    pub role: RoleArn,
    /// What the trail of actions shows, and what a mapping may use in a user's name.
    pub session: SessionName,
    /// What the role's trust policy may require.
    pub external_id: Option<ExternalId>,
}

/// How STS is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StsChoice {
    /// The endpoint of no region.
    Global,
    /// This one only.
    Only(Endpoint),
    /// Those of a region, that of its VPC first.
    Region(Box<str>),
}

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// A role cannot be assumed.
    #[error("cannot assume {role}")]
    Assume {
        /// Its ARN.
        role: String,
        /// Why not.
        #[source]
        source: IssueError,
    },
    /// A source has no credentials to give.
    #[error("cannot get credentials {from}")]
    Base {
        /// From where.
        from: &'static str,
        /// Why not.
        #[source]
        source: kube2ram_cloud::BaseError,
    },
    /// A region is none, or has no endpoints.
    #[error("cannot find the endpoints of STS")]
    Endpoint(#[source] EndpointError),
    /// The credentials that were found have expired.
    #[error("the credentials {0} have expired: renew them")]
    Expired(&'static str),
    /// kubectl's own words are not understood.
    #[error("KUBERNETES_EXEC_INFO is not an ExecCredential of client.authentication.k8s.io/v1 or v1beta1")]
    ExecInfo,
    /// The role attached to the machine has no credentials to give.
    #[error("cannot get credentials of the role attached to this machine")]
    Metadata(#[source] kube2ram_cloud::MetadataError),
    /// No role is attached to this machine, and nothing else is configured.
    #[error(
        "found no credentials: set ALIBABA_CLOUD_ACCESS_KEY_ID and ALIBABA_CLOUD_ACCESS_KEY_SECRET, run `aliyun configure`, or attach a role to this machine"
    )]
    NoCredentials,
    /// A program has printed no credentials.
    #[error("the process_command of profile {profile:?} gave no credentials: {why}")]
    Process {
        /// Whose it is.
        profile: String,
        /// What it did.
        why: String,
    },
    /// What is configured is not understood.
    #[error("cannot use the configured credentials")]
    Source(#[source] SourceError),
    /// STS cannot be known by its certificate.
    #[error("cannot make a client for STS")]
    Sts(#[source] StsClientError),
    /// A URI has no credentials to give.
    #[error("cannot get credentials from a URI")]
    Uri(#[source] UriError),
    /// The token cannot be written.
    #[error("cannot write the token")]
    Write(#[source] serde_json::Error),
}

/// An ExecCredential with a token, as kubectl reads it from standard output. `variable` looks up the
/// environment; `home` is the user's home directory.
///
/// # Errors
/// See [`ClientError`].
///
/// # Cancel safety
/// Dropping the future loses nothing but credentials that were just issued.
pub async fn token(
    request: Request,
    variable: impl Fn(&str) -> Option<String>,
    home: Option<PathBuf>,
    clock: Arc<dyn Clock>,
) -> Result<String, ClientError> {
    // An error means that a test has installed it already.
    let _installed_before = rustls::crypto::ring::default_provider().install_default();
    let version = exec::version(variable("KUBERNETES_EXEC_INFO").as_deref(), request.version)?;
    let mut source =
        choice::choose(&request.options, &variable, home.as_deref()).map_err(ClientError::Source)?;
    if let Some(AssumedRole { role, session, external_id }) = request.role {
        source = Source::assumed(source, role, session, external_id, None);
    }
    let network = Network {
        sts: endpoints(&request.sts).map_err(ClientError::Endpoint)?,
        metadata: metadata(),
        clock: Arc::clone(&clock),
    };
    let cache = request.cache.map(Cache::at);
    let held = obtain::obtain(&source, &network, cache.as_ref()).await?;

    let now = clock.now();
    let token = presign(&request.cluster, &held.keys, now, USER_AGENT).map_err(ClientError::Write)?;
    exec::write(version, &token, expiry(now, held.expires_at)).map_err(ClientError::Write)
}

/// kubectl asks for another token then: before the server refuses this one, and before its keys end.
fn expiry(now: Timestamp, keys: Option<Timestamp>) -> Timestamp {
    let token = now.checked_add(TOKEN_LIFETIME).unwrap_or(now);
    keys.map_or(token, |keys| keys.min(token))
}

fn endpoints(choice: &StsChoice) -> Result<Vec<Endpoint>, EndpointError> {
    match choice {
        StsChoice::Global => Ok(vec![global()]),
        StsChoice::Only(endpoint) => Ok(vec![endpoint.clone()]),
        StsChoice::Region(region) => Region::parse(region)?.sts_endpoints(),
    }
}

/// In a pod, kube2ram answers there.
fn metadata() -> MetadataAddr {
    DIALECT.metadata
}

/// What ack-ram-tool promises. STS takes a token for 15 minutes.
const TOKEN_LIFETIME: SignedDuration = SignedDuration::from_mins(10);
/// What the trail of actions shows.
const USER_AGENT: &str = concat!("kube2ram-authenticator/", env!("CARGO_PKG_VERSION"));

#[cfg(test)]
mod tests;
