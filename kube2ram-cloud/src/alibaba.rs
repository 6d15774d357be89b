//! Alibaba Cloud: STS, request signing, the ECS metadata server. `sign`, `wire`, `endpoint`, `provider_arn`
//! and `refusal` are pure; `metadata`, `base`, `sts`, `exchange` and `caller_identity` talk to the network,
//! by what all clouds share. Composed by `app`, and by the authenticator.

pub mod base;
pub mod caller_identity;
mod dialect;
mod document;
pub mod endpoint;
pub(crate) mod exchange;
pub mod metadata;
mod provider_arn;
mod refusal;
mod sign;
pub mod sts;
pub mod wire;

pub use self::{dialect::DIALECT, provider_arn::OidcProviderArn};
