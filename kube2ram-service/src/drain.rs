//! The signals that end listeners and their connections: at once, or after another agent has taken over the
//! listeners. Depends on no other module; created by `app` and `listeners`, followed by `server` and `admin`.

use tokio_util::sync::CancellationToken;

/// Two steps, the first of which may also be skipped. Clones share them.
#[derive(Clone, Debug)]
pub struct Drain {
    accepting: CancellationToken,
    draining: CancellationToken,
}

impl Drain {
    /// Nothing is to end yet.
    pub fn new() -> Self {
        let draining = CancellationToken::new();
        Self { accepting: draining.child_token(), draining }
    }

    /// A part that ends when the whole does, or before.
    #[must_use]
    pub fn child(&self) -> Self {
        Self { accepting: self.accepting.child_token(), draining: self.draining.child_token() }
    }

    /// Another agent accepts from now on. Connections stay until their client ends them; their next response
    /// has `Connection: close`.
    pub fn hand_over(&self) {
        self.accepting.cancel();
    }

    /// Accepting ends, and connections must end.
    pub fn close(&self) {
        self.accepting.cancel();
        self.draining.cancel();
    }

    /// Cancelled when nothing more is to be accepted.
    pub fn accepting(&self) -> &CancellationToken {
        &self.accepting
    }

    /// Cancelled when connections are to end.
    pub fn draining(&self) -> &CancellationToken {
        &self.draining
    }
}

impl Default for Drain {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_ends_alone_or_with_the_whole() {
        let whole = Drain::new();
        let (part, other) = (whole.child(), whole.child());
        let state = |drain: &Drain| (drain.accepting().is_cancelled(), drain.draining().is_cancelled());

        part.close();
        assert_eq!([&whole, &other, &part].map(state), [(false, false), (false, false), (true, true)]);
        whole.hand_over();
        assert_eq!([&whole, &other].map(state), [(true, false); 2]);
        whole.close();
        assert_eq!([&whole, &other].map(state), [(true, true); 2]);
    }
}
