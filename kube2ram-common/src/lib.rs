//! What the eBPF programs and the agent of kube2ram share: struct layouts, names, and the verdict.
//!
//! `no_std`, data and pure functions only. The eBPF programs run the same [`verdict`] that host tests run.
#![no_std]
#![deny(unsafe_code)]

pub mod abi;
pub mod connection;
pub mod names;
pub mod verdict;
