//! HTTP clients that hide nothing: one connection per request, raw bytes on demand, IPv4-mapped sockets, and
//! STS requests signed with given credentials. Depends on the stand-ins' signatures. Called by `show` and
//! tests, and inside pods by the binary's `client`.

mod dial;
mod hold;
mod http;
mod load;
mod repeat;
mod storm;
mod sts;

#[cfg(test)]
pub(crate) use self::sts::call_v4;
pub use self::{
    dial::Dial,
    hold::{Hold, Holder},
    http::{Family, Reply, Request, raw},
    load::{Load, LoadReport},
    repeat::Repeat,
    storm::{Storm, StormReport},
    sts::{Credentials, assume_role, caller_identity},
};
