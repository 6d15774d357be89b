//! Rung 2: the table in the kernel, each time in a network namespace of the test's own.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::thread::{UnshareFlags, unshare_unsafe};
use tokio::time::advance;

use super::*;
use crate::netlink::Attribute;

const METADATA: MetadataAddr =
    MetadataAddr::v4_only(SocketAddrV4::new(Ipv4Addr::new(100, 100, 100, 200), 80));

fn guard() -> ForwardGuard {
    ForwardGuard::new(METADATA, &mut Registry::default())
}

/// Runs a test on a thread of its own, in a network namespace that goes away with it.
fn isolated(test: impl FnOnce() + Send + 'static) {
    let inside = std::thread::spawn(|| {
        #[expect(unsafe_code, reason = "a namespace for this thread alone")]
        // SAFETY: no file descriptors are unshared.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
        test();
    });
    inside.join().unwrap();
}

fn nft(arguments: &str) -> String {
    let output = Command::new("nft").args(arguments.split(' ')).output().expect("nft");
    assert!(output.status.success(), "nft {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn nft_reads_what_was_meant() {
    isolated(|| {
        assert!(guard().check());

        assert_eq!(
            nft("list ruleset"),
            "table ip kube2ram {\n\tchain forward {\n\t\ttype filter hook forward priority raw; policy accept;\n\
             \t\tip daddr 100.100.100.200 counter packets 0 bytes 0 drop\n\t}\n\n\tchain postrouting {\n\
             \t\ttype filter hook postrouting priority raw; policy accept;\n\
             \t\tip daddr 100.100.100.200 meta skuid != 4294967295 accept\n\
             \t\tip daddr 100.100.100.200 iif != 0 counter packets 0 bytes 0 drop\n\t}\n}\n"
        );
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn two_rules_more_where_ipvs_is_and_only_there() {
    isolated(|| {
        let mut guard = guard();
        guard.ipvs = Path::new("/proc/self/stat");
        assert!(guard.check());
        assert!(nft("list ruleset").contains(
            "priority raw; policy accept;\n\t\tip daddr 100.100.100.200 ct direction original ct original ip daddr != 100.100.100.200 ct status ! dnat \
             counter packets 0 bytes 0 drop\n\t\tip daddr 100.100.100.200 ct state untracked counter packets 0 bytes 0 drop\n\t\t\
             ip daddr 100.100.100.200 meta skuid"
        ));
        nft("flush chain ip kube2ram postrouting");
        assert!(guard.check());
        assert_eq!(guard.metrics.repairs.get(), 1);

        guard.ipvs = Path::new("/nonexistent");
        assert!(guard.check());

        assert!(!nft("list ruleset").contains("ct original"));
        // Nobody has changed anything.
        assert_eq!(guard.metrics.repairs.get(), 1);
    });
}

/// Whether the kernel has nft_ct, as far as [`install_with_tracking_if_there`] lets it.
static HAS_TRACKING: AtomicBool = AtomicBool::new(false);

/// Asks for an expression that no kernel has instead of connection tracking's.
fn install_with_tracking_if_there(target: Target) -> Vec<Message> {
    fn without(attribute: Attribute) -> Attribute {
        match attribute {
            Attribute::Nest(kind, inner) => Attribute::Nest(kind, inner.into_iter().map(without).collect()),
            Attribute::Value(kind, value) if value == *b"ct\0" => Attribute::text(kind, "none-such"),
            value @ Attribute::Value(..) => value,
        }
    }
    let mut messages = ruleset::install(target);
    if !HAS_TRACKING.load(Ordering::Relaxed) {
        for message in &mut messages {
            message.attributes = std::mem::take(&mut message.attributes).into_iter().map(without).collect();
        }
    }
    messages
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn rules_against_ipvs_come_as_soon_as_the_kernel_can_make_them() {
    isolated(|| {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let mut guard = guard();
            guard.ipvs = Path::new("/proc/self/stat");
            guard.install = install_with_tracking_if_there;
            assert!(guard.check());
            let without = nft("list ruleset");
            assert!(without.contains("meta skuid") && !without.contains("ct original"), "{without}");
            let (repairs, state) = (guard.metrics.repairs.clone(), guard.state());
            let running = tokio::spawn(guard.run_with(None));
            tokio::task::yield_now().await;
            let next_check = async || {
                for wait in [PAUSE, CHECK_INTERVAL] {
                    advance(wait).await;
                    tokio::task::yield_now().await;
                }
                nft("list ruleset")
            };

            for _ in 0..2 {
                assert_eq!(next_check().await, without, "asked for in vain");
                assert!(!state.read().has_ipvs && state.read().is_in_force == Some(true));
            }
            HAS_TRACKING.store(true, Ordering::Relaxed);

            assert!(next_check().await.contains("ct original"));
            assert!(state.read().has_ipvs);
            assert_eq!(repairs.get(), 0, "nobody has changed anything");
            running.abort();
        });
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn makes_anew_what_was_removed_or_changed() {
    isolated(|| {
        let mut guard = guard();
        assert!(guard.check());
        let whole = nft("list ruleset");
        let changes = [
            "delete table ip kube2ram",
            "flush ruleset",
            "flush chain ip kube2ram forward",
            "flush chain ip kube2ram postrouting",
            "insert rule ip kube2ram forward accept",
            "insert rule ip kube2ram postrouting accept",
            "delete chain ip kube2ram postrouting",
            "add table ip kube2ram { flags dormant; }",
        ];

        for (repairs, change) in changes.into_iter().enumerate() {
            nft(change);
            assert_ne!(nft("list ruleset"), whole, "{change}");

            assert!(guard.check(), "{change}");

            assert_eq!(nft("list ruleset"), whole, "{change}");
            assert_eq!(guard.metrics.repairs.get(), repairs as u64 + 1, "{change}");
        }
        // Nothing to do is not a repair, nor are others' tables.
        nft("add table ip other");
        assert!(guard.check());
        assert_eq!(guard.metrics.repairs.get(), changes.len() as u64);
        assert!(nft("list tables").contains("ip other"));
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn another_metadata_address_replaces_the_rule() {
    isolated(|| {
        assert!(guard().check());

        assert!(ForwardGuard::new(METADATA, &mut Registry::default()).check());

        let ruleset = nft("list ruleset");
        assert!(ruleset.contains("daddr 127.0.0.1") && !ruleset.contains("100.100.100.200"), "{ruleset}");
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn repairs_in_time_what_it_did_not_hear_of() {
    isolated(|| {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let mut guard = guard();
            assert!(guard.check());
            let running = tokio::spawn(guard.run_with(None));
            tokio::task::yield_now().await;
            nft("delete table ip kube2ram");

            for wait in [PAUSE, CHECK_INTERVAL] {
                advance(wait).await;
                tokio::task::yield_now().await;
            }

            assert!(nft("list ruleset").contains("table ip kube2ram"));
            running.abort();
        });
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn hears_of_a_change_and_repairs_it_long_before_it_looks() {
    isolated(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let mut guard = guard();
            assert!(guard.check());
            let whole = nft("list ruleset");
            let repairs = guard.metrics.repairs.clone();
            let running = tokio::spawn(guard.run());

            for (before, change) in
                ["flush ruleset", "insert rule ip kube2ram forward accept"].iter().enumerate()
            {
                tokio::task::yield_now().await;
                nft(change);
                let repaired = async {
                    while repairs.get() == before as u64 {
                        sleep(Duration::from_millis(1)).await;
                    }
                };
                tokio::time::timeout(Duration::from_secs(5), repaired).await.expect(change);

                assert_eq!(nft("list ruleset"), whole, "{change}");
            }
            // Others' changes are none of its business, and their number is not bounded.
            nft("add table ip other");
            running.abort();
        });
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn removal_leaves_nothing_and_can_be_repeated() {
    isolated(|| {
        assert!(guard().check());

        assert!(remove().unwrap());
        assert_eq!(nft("list ruleset"), "");
        assert!(!remove().unwrap());
    });
}
