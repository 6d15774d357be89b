//! Alibaba Cloud: STS, request signing, the ECS metadata server.
//! `sign`, `wire`, `endpoint` and `refusal` are pure; `metadata`, `resolve`, `transport`, `base` and `sts`
//! talk to the network. Composed by `app`.

pub mod base;
mod dialect;
mod document;
pub mod endpoint;
pub mod metadata;
mod refusal;
mod resolve;
mod sign;
pub mod sts;
mod transport;
pub mod wire;

pub use self::dialect::DIALECT;
