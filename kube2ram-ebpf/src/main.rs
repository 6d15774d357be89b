//! The kernel half of kube2ram: sends a pod's connect(2) to the metadata server to the agent instead, and tells the agent who called.
//!
//! On the BPF target this is the object; on the host it is a program that only says so, which keeps `cargo build`, `cargo test` and clippy on the
//! workspace independent of the BPF toolchain while clippy still reads the code.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(
    not(target_arch = "bpf"),
    expect(dead_code, reason = "the programs are entry points of the object only")
)]

mod context;
mod maps;
mod pods;
mod socket;

mod connect;
mod handshake;
mod peer_name;
mod share;

mod egress;
mod message;
mod task;

#[cfg(not(target_arch = "bpf"))]
#[expect(clippy::print_stderr, reason = "a hint for whoever runs the host build")]
fn main() {
    eprintln!("this is the kernel half of kube2ram; build it with `cargo xtask build-ebpf`");
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
