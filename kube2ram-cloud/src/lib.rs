//! What knows a cloud: how its roles are named, how their credentials are issued, what its metadata server is
//! asked and answers, how requests are signed. One module for each cloud, and one
//! [`Dialect`](dialect::Dialect) each: nothing outside of this crate names a cloud, but the place that
//! chooses one. The home of reqwest.

#![deny(unsafe_code)]

mod metadata_addr;
pub mod role;
pub mod credentials;
pub mod upstream;
pub mod dialect;
pub mod alibaba;
#[cfg(test)]
mod testing;

pub use self::metadata_addr::MetadataAddr;
