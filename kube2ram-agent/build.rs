//! Embeds the eBPF programs if they were built; never builds them, so that a host build needs no BPF
//! toolchain.
#![expect(
    clippy::expect_used,
    reason = "cargo sets these variables, and a build script has nobody to return an error to"
)]

use std::{env, fs, path::PathBuf};

fn main() {
    println!("cargo::rerun-if-env-changed=KUBE2RAM_EBPF_DIR");
    println!("cargo::rerun-if-env-changed=KUBE2RAM_REQUIRE_EBPF");
    let path = |name| PathBuf::from(env::var_os(name).expect("set by cargo"));
    let objects = env::var_os("KUBE2RAM_EBPF_DIR")
        .map_or_else(|| path("CARGO_MANIFEST_DIR").join("../target/ebpf"), PathBuf::from);
    for name in ["kube2ram.bpf.o", "kube2ram-debug.bpf.o", "kube2ram-boot-guard.bpf.o"] {
        let (from, to) = (objects.join(name), path("OUT_DIR").join(name));
        println!("cargo::rerun-if-changed={}", from.display());
        let object = fs::read(&from).unwrap_or_else(|error| {
            if env::var_os("KUBE2RAM_REQUIRE_EBPF").is_some() {
                println!(
                    "cargo::error=cannot read {}: {error}; run `cargo xtask build-ebpf`",
                    from.display()
                );
            }
            Vec::new() // such an agent refuses to start, and logs the reason
        });
        fs::write(to, object).expect("OUT_DIR is writable");
    }
}
