//! The eBPF programs of kube2ram: they redirect a pod's connect(2) to the metadata server to the agent, and
//! record the calling task for the agent.
//!
//! On the BPF target this crate is the object. On the host it is a program that only prints a hint: `cargo
//! build`, `cargo test` and clippy on the workspace then need no BPF toolchain, and clippy still reads the
//! code.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![expect(dead_code, reason = "two objects are made of the same modules, and neither on the host")]

mod context;
mod socket;

#[cfg(feature = "boot-guard")]
mod boot_guard;

#[cfg(not(feature = "boot-guard"))]
mod maps;
#[cfg(not(feature = "boot-guard"))]
mod pods;

#[cfg(not(feature = "boot-guard"))]
mod connect;
#[cfg(not(feature = "boot-guard"))]
mod handshake;
#[cfg(not(feature = "boot-guard"))]
mod peer_name;
#[cfg(not(feature = "boot-guard"))]
mod record;
#[cfg(not(feature = "boot-guard"))]
mod share;
#[cfg(not(feature = "boot-guard"))]
mod target;

#[cfg(not(feature = "boot-guard"))]
mod egress;
#[cfg(not(feature = "boot-guard"))]
mod message;
#[cfg(not(feature = "boot-guard"))]
mod socket_option;
#[cfg(not(feature = "boot-guard"))]
mod task;
#[cfg(not(feature = "boot-guard"))]
mod wire;

#[cfg(not(target_arch = "bpf"))]
#[expect(clippy::print_stderr, reason = "a hint for whoever runs the host build")]
fn main() {
    eprintln!("this is the eBPF programs of kube2ram; build it with `cargo xtask build-ebpf`");
}

/// Never reached: the verifier refuses a program that could loop here.
#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The helpers that we call are for GPL-compatible programs only.
#[cfg_attr(target_arch = "bpf", unsafe(link_section = "license"))]
#[cfg_attr(target_arch = "bpf", unsafe(no_mangle))]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
