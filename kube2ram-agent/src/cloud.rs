//! The cloud behind the agent: a seam, because a second cloud will come. The home of reqwest.

pub mod alibaba;
pub mod upstream;
