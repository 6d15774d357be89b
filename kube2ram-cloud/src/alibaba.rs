//! Alibaba Cloud: STS, request signing, the ECS metadata server. `sign`, `wire`, `endpoint` and `refusal` are
//! pure; `metadata`, `base`, `sts` and `caller_identity` talk to the network, by what all clouds share.
//! Composed by `app`, and by the authenticator.

pub mod base;
pub mod caller_identity;
mod dialect;
mod document;
pub mod endpoint;
pub mod metadata;
mod refusal;
mod sign;
pub mod sts;
pub mod wire;

pub use self::dialect::DIALECT;
