//! Alibaba Cloud: STS, request signing, the ECS metadata server.
//! `sign`, `wire` and `endpoint` are pure; `metadata`, `base` and `sts` talk to the network. Composed by `app`.

pub mod base;
pub mod endpoint;
pub mod metadata;
mod sign;
pub mod sts;
pub mod wire;
