//! Where the metadata server is. Pure; a cloud's [`Dialect`](crate::dialect::Dialect) has the usual address,
//! and the agent's flags the one in use.

use std::{
    fmt,
    net::{Ipv6Addr, SocketAddrV4, SocketAddrV6},
};

/// The addresses of the metadata server, which serves the same at both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MetadataAddr {
    /// IPv4, and the port of both.
    pub v4: SocketAddrV4,
    /// IPv6; `None` where the platform has none.
    pub v6: Option<Ipv6Addr>,
}

impl fmt::Display for MetadataAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.socket_v6() {
            Some(v6) => write!(f, "{} and {v6}", self.v4),
            None => self.v4.fmt(f),
        }
    }
}

impl MetadataAddr {
    /// One with an IPv4 address alone.
    pub const fn v4_only(v4: SocketAddrV4) -> Self {
        Self { v4, v6: None }
    }

    /// The IPv6 address with the port.
    pub fn socket_v6(&self) -> Option<SocketAddrV6> {
        self.v6.map(|address| SocketAddrV6::new(address, self.v4.port(), 0, 0))
    }
}
