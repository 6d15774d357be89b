//! AWS: STS, request signing, the EC2 metadata server. `sign`, `xml`, `wire`, `endpoint` and `refusal` are
//! pure; `metadata`, `base`, `sts` and `exchange` talk to the network, by what all clouds share. Composed by
//! `app`.

pub mod base;
mod dialect;
mod document;
pub mod endpoint;
pub(crate) mod exchange;
pub mod metadata;
mod refusal;
mod sign;
pub mod sts;
pub mod wire;
mod xml;

pub use self::dialect::DIALECT;
