//! The role attached to the node, whose credentials the metadata server has. Depends on `metadata`; called by
//! `renewal`.

use async_trait::async_trait;

use super::{BaseError, BaseSource, Origin};
use crate::{metadata::Client, sts::transport::Transport, wire::Issued};

#[async_trait]
impl Origin for Client {
    fn source(&self) -> BaseSource {
        BaseSource::NodeRole
    }

    async fn ask(&self, _: &Transport) -> Result<(Box<str>, Issued), BaseError> {
        // The name too: a role can be replaced while the node runs.
        let role = self.node_role_name().await.map_err(BaseError::Metadata)?;
        let role = role.ok_or(BaseError::NoNodeRole)?;
        let issued = self.node_credentials(&role).await.map_err(BaseError::Metadata)?;
        Ok((role, issued))
    }
}
