//! The ECS metadata server as the agent itself uses it: region, account, node role and its credentials.
//! Source: ECS, "Instance metadata". Depends on `cloud::upstream`; called by `base` and, for discovery, by
//! `app`.

mod hardened;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::Full;
use secrecy::zeroize::Zeroize as _;

pub use self::hardened::HardenedMode;
use super::{
    endpoint::{EndpointError, Region},
    wire::{BODY_LIMIT_BYTES, Issued, WireError, parse_node_credentials},
};
use crate::upstream::{Upstream as _, UpstreamError, read_bounded};

/// Why the metadata server's answer is missing or unusable.
#[derive(Debug, thiserror::Error)]
pub enum MetadataError {
    /// The credentials document could not be parsed.
    #[error("cannot read the node role's credentials")]
    Credentials(#[source] WireError),
    /// A value is not of its documented form.
    #[error("malformed {0} from the metadata server")]
    Malformed(&'static str),
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

/// Asks the metadata server on behalf of the agent. Every answer is bounded in size and time, and parsed
/// strictly.
pub struct Metadata {
    upstream: Arc<HardenedMode>,
}

impl Metadata {
    /// Asks over `upstream`.
    pub fn new(upstream: Arc<HardenedMode>) -> Self {
        Self { upstream }
    }

    /// The node's region.
    ///
    /// # Errors
    /// See [`MetadataError`].
    pub async fn region_id(&self) -> Result<Region, MetadataError> {
        let text = self.text("/latest/meta-data/region-id").await?;
        Region::parse(text.trim()).map_err(MetadataError::Region)
    }

    /// The base ARN of the node's account: `acs:ram::<owner-account-id>:role/`.
    ///
    /// # Errors
    /// See [`MetadataError`].
    pub async fn base_arn(&self) -> Result<String, MetadataError> {
        Ok(format!("acs:ram::{}:role/", self.owner_account_id().await?))
    }

    /// The account that owns the node: digits.
    ///
    /// # Errors
    /// See [`MetadataError`].
    pub async fn owner_account_id(&self) -> Result<Box<str>, MetadataError> {
        let text = self.text("/latest/meta-data/owner-account-id").await?;
        let id = text.trim();
        let fits = (1..=32).contains(&id.len()) && id.bytes().all(|c| c.is_ascii_digit());
        if fits { Ok(id.into()) } else { Err(MetadataError::Malformed("account id")) }
    }

    /// The role attached to the node, also the default role of auto-discovery; `None` when there is none.
    ///
    /// # Errors
    /// See [`MetadataError`].
    pub async fn node_role_name(&self) -> Result<Option<Box<str>>, MetadataError> {
        let text = match self.text(CREDENTIALS).await {
            Err(MetadataError::Status { status: StatusCode::NOT_FOUND, .. }) => return Ok(None),
            result => result?,
        };
        let name = text.trim();
        // It becomes part of a path. The alphabet is RAM's own for role names.
        let legal = |c: u8| c.is_ascii_alphanumeric() || b".-_".contains(&c);
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
    pub async fn node_credentials(&self, role: &str) -> Result<Issued, MetadataError> {
        let body = self.get(&format!("{CREDENTIALS}{role}")).await?;
        let issued = parse_node_credentials(&body).map_err(MetadataError::Credentials);
        // Nobody else holds it.
        if let Ok(mut body) = body.try_into_mut() {
            body.zeroize();
        }
        issued
    }

    async fn text(&self, path: &str) -> Result<String, MetadataError> {
        let body = self.get(path).await?;
        String::from_utf8(body.into()).or(Err(MetadataError::Malformed("text")))
    }

    async fn get(&self, path: &str) -> Result<Bytes, MetadataError> {
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

const CREDENTIALS: &str = "/latest/meta-data/ram/security-credentials/";
const BODY_DEADLINE: Duration = Duration::from_millis(900);

#[cfg(test)]
mod tests;
