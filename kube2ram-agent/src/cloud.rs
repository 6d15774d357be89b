//! The cloud behind the agent: a seam, because a second cloud will come. The home of reqwest.
//! Depends on `credentials` (implements its `Issuer`), `role`, `datapath` (the pass) and `clock`; composed by `app`.

pub mod alibaba;
#[cfg(test)]
mod testing;
pub mod upstream;
