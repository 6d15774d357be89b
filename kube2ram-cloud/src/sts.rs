//! The transport to STS, as far as the clouds agree: endpoints in their order, STS's clock, bounded answers,
//! refusals with remedies. Depends on `endpoint` and `wire`; called by `base`, `issuer` and each cloud's
//! `base` and `refusal`.

pub(crate) mod refusal;
mod resolve;
pub(crate) mod transport;

pub use self::transport::{StsClient, StsClientError};
