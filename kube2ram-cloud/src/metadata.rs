//! The metadata server as the agent itself uses it, as far as the clouds agree: text items, the node's role
//! and its credentials. Depends on `upstream`; called by each cloud's `metadata`, and by `base` for the
//! node's role.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::Full;
use secrecy::zeroize::Zeroize as _;

use crate::{
    endpoint::EndpointError,
    upstream::{Upstream, UpstreamError, read_bounded},
    wire::{BODY_LIMIT_BYTES, Issued, WireError},
};

/// Why the metadata server's answer is missing or unusable.
#[derive(Debug, thiserror::Error)]
pub enum MetadataError {
    /// The credentials document could not be parsed.
    #[error("cannot read the node role's credentials")]
    Credentials(#[source] WireError),
    /// A value is not of its documented form.
    #[error("malformed {0} from the metadata server")]
    Malformed(&'static str),
    /// The instance profile's document was not understood.
    #[error("cannot read the node's instance profile")]
    Profile(#[source] WireError),
    /// The region id could not be parsed.
    #[error("cannot use the region id of the metadata server")]
    Region(#[source] EndpointError),
    /// Another status than 200.
    #[error("the metadata server answers {status} to {path}")]
    Status {
        /// What was asked for.
        path: String,
        /// The answer.
        status: StatusCode,
    },
    /// No answer.
    #[error("cannot fetch {path} from the metadata server")]
    Upstream {
        /// What was asked for.
        path: String,
        /// Why.
        #[source]
        source: UpstreamError,
    },
}

/// Where the credentials of the node's role are, and how they are written.
pub(crate) struct NodeRole {
    /// Ends in `/`.
    pub(crate) directory: &'static str,
    /// What a role's name may hold besides letters and digits.
    pub(crate) marks: &'static [u8],
    pub(crate) parse: fn(&[u8]) -> Result<Issued, WireError>,
}

/// Asks the metadata server on behalf of the agent. Every answer is bounded in size and time, and parsed
/// strictly.
pub(crate) struct Client {
    upstream: Arc<dyn Upstream>,
    node_role: &'static NodeRole,
}

impl Client {
    /// Asks over `upstream`.
    pub(crate) fn new(upstream: Arc<dyn Upstream>, node_role: &'static NodeRole) -> Self {
        Self { upstream, node_role }
    }

    /// The role attached to the node, also the default role of auto-discovery; `None` when there is none.
    ///
    /// # Errors
    /// See [`MetadataError`].
    pub(crate) async fn node_role_name(&self) -> Result<Option<Box<str>>, MetadataError> {
        let NodeRole { directory, marks, .. } = self.node_role;
        let text = match self.text(directory).await {
            Err(MetadataError::Status { status: StatusCode::NOT_FOUND, .. }) => return Ok(None),
            result => result?,
        };
        let name = text.trim();
        // It becomes part of a path. The alphabet is the cloud's own for role names.
        let legal = |c: u8| c.is_ascii_alphanumeric() || marks.contains(&c);
        match name.len() {
            0 => Ok(None),
            1..=64 if name.bytes().all(legal) && !name.starts_with('.') => Ok(Some(name.into())),
            _ => Err(MetadataError::Malformed("role name")),
        }
    }

    /// The credentials of the role attached to the node, as [`node_role_name`](Self::node_role_name) told it.
    ///
    /// # Errors
    /// See [`MetadataError`]; [`Status`](MetadataError::Status) 404 when the role has been detached or
    /// replaced.
    pub(crate) async fn node_credentials(&self, role: &str) -> Result<Issued, MetadataError> {
        let body = self.get(&[self.node_role.directory, role].concat()).await?;
        let issued = (self.node_role.parse)(&body).map_err(MetadataError::Credentials);
        // Nobody else holds it.
        if let Ok(mut body) = body.try_into_mut() {
            body.zeroize();
        }
        issued
    }

    pub(crate) async fn text(&self, path: &str) -> Result<String, MetadataError> {
        let body = self.get(path).await?;
        String::from_utf8(body.into()).or(Err(MetadataError::Malformed("text")))
    }

    pub(crate) async fn get(&self, path: &str) -> Result<Bytes, MetadataError> {
        let failed = |source| MetadataError::Upstream { path: path.to_owned(), source };
        let request = Request::get(path)
            .body(Full::default())
            .map_err(|error| failed(UpstreamError::Exchange(error.into())))?;
        let response = self.upstream.send(request).await.map_err(failed)?;
        match response.status() {
            StatusCode::OK => {
                read_bounded(response.into_body(), BODY_LIMIT_BYTES, BODY_DEADLINE).await.map_err(failed)
            }
            status => Err(MetadataError::Status { path: path.to_owned(), status }),
        }
    }
}

const BODY_DEADLINE: Duration = Duration::from_millis(900);
