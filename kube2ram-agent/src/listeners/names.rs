//! Ids and addresses of listeners. Pure; called by `listeners`.

use std::net::Ipv4Addr;

use crate::datapath::ListenerId;

/// Counts listeners. An id is never given twice before a reboot, if the first of each agent is the time since boot in nanoseconds.
#[derive(Debug)]
pub(super) struct Names {
    next: u64,
}

/// 127.64.0.0/10: nobody's custom, and far from what distributions and resolvers use of 127.0.0.0/8.
const FIRST_ADDR: u32 = u32::from_be_bytes([127, 64, 0, 0]);
const ADDRS: u64 = 1 << 22;

impl Names {
    pub(super) fn starting_at(next: u64) -> Self {
        Self { next }
    }

    /// The next id, and an address that no open listener has. There must be fewer of them than 2²².
    pub(super) fn next(&mut self, is_taken: impl Fn(Ipv4Addr) -> bool) -> (ListenerId, Ipv4Addr) {
        loop {
            let id = self.next;
            self.next += 1;
            let addr = Ipv4Addr::from(FIRST_ADDR + (id % ADDRS) as u32);
            if !is_taken(addr) {
                return (ListenerId(id), addr);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn gives_no_address_that_is_taken_even_around_the_end() {
        let mut names = Names::starting_at(ADDRS - 2);
        let mut taken = HashSet::new();

        for _ in 0..4 {
            let (_, addr) = names.next(|addr| taken.contains(&addr));
            assert!(taken.insert(addr));
        }
        let mut again = Names::starting_at(2 * ADDRS - 2);
        let (id, addr) = again.next(|addr| taken.contains(&addr));

        assert!(
            taken.contains(&Ipv4Addr::new(127, 127, 255, 255))
                && taken.contains(&Ipv4Addr::new(127, 64, 0, 1))
        );
        assert_eq!((id, addr), (ListenerId(2 * ADDRS + 2), Ipv4Addr::new(127, 64, 0, 2)));
    }
}
