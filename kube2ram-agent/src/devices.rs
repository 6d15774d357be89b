//! The network devices of a namespace: which of them lead past the node's own network stack, and behind which
//! a program decides where packets go. Depends on `netlink` and `datapath`; called by `listeners` and
//! `wire_guard`.

mod links;
mod routed;

pub(crate) use self::{
    links::{Device, Links, WayOut},
    routed::programmed,
};
