//! Rung 2: the tables in the kernel, each time in a network namespace of the test's own.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddrV4},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
};

use super::*;
use crate::netlink::Attribute;
use rustix::thread::{UnshareFlags, unshare_unsafe};

mod forwarding;

const METADATA: MetadataAddr = MetadataAddr {
    v4: SocketAddrV4::new(Ipv4Addr::new(100, 100, 100, 200), 80),
    v6: Some(Ipv6Addr::new(0xfd00, 0x100, 0, 0, 0, 0, 0x100, 0x200)),
};
const V4_ONLY: MetadataAddr = MetadataAddr::v4_only(METADATA.v4);

/// What earlier versions made, and what is there without an IPv6 address.
const IPV4: &str = "table ip kube2ram {\n\tchain forward {\n\t\ttype filter hook forward priority raw; policy accept;\n\
                    \t\tip daddr 100.100.100.200 counter packets 0 bytes 0 drop\n\t}\n\n\tchain postrouting {\n\
                    \t\ttype filter hook postrouting priority raw; policy accept;\n\
                    \t\tip daddr 100.100.100.200 meta skuid != 4294967295 accept\n\
                    \t\tip daddr 100.100.100.200 iif != 0 counter packets 0 bytes 0 drop\n\t}\n}\n";
const IPV6: &str = "table ip6 kube2ram {\n\tchain forward {\n\t\ttype filter hook forward priority raw; policy accept;\n\
                    \t\tip6 daddr fd00:100::100:200 counter packets 0 bytes 0 drop\n\t}\n\n\tchain postrouting {\n\
                    \t\ttype filter hook postrouting priority raw; policy accept;\n\
                    \t\tip6 daddr fd00:100::100:200 meta l4proto 58 ip6 hoplimit 255 accept\n\
                    \t\tip6 daddr fd00:100::100:200 meta skuid != 4294967295 accept\n\
                    \t\tip6 daddr fd00:100::100:200 iif != 0 counter packets 0 bytes 0 drop\n\t}\n}\n";

fn guard() -> ForwardGuard {
    guard_of(METADATA)
}

/// On a machine with IPv6 and without IPVS, whatever this one has.
fn guard_of(metadata: MetadataAddr) -> ForwardGuard {
    let mut guard = ForwardGuard::new(metadata, &mut Registry::default());
    (guard.ipvs, guard.ipv6) = (Path::new("/nonexistent"), Path::new("/proc/self/stat"));
    guard
}

/// Runs a test on its own thread, in a network namespace that ends with the thread.
fn isolated(test: impl FnOnce() + Send + 'static) {
    let inside = std::thread::spawn(|| {
        #[expect(unsafe_code, reason = "a namespace for this thread alone")]
        // SAFETY: no file descriptors are unshared.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
        test();
    });
    inside.join().unwrap();
}

/// The numbers of protocols, because their names depend on the machine's /etc/protocols.
fn nft(arguments: &str) -> String {
    let output =
        Command::new("nft").arg("--numeric-protocol").args(arguments.split(' ')).output().expect("nft");
    assert!(output.status.success(), "nft {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn nft_reads_what_was_meant() {
    isolated(|| {
        assert!(guard().check());

        assert_eq!(nft("list ruleset"), format!("{IPV4}{IPV6}"));
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn two_rules_more_for_each_family_where_ipvs_is_and_only_there() {
    isolated(|| {
        let mut guard = guard();
        guard.ipvs = Path::new("/proc/self/stat");
        assert!(guard.check());
        assert!(nft("list ruleset").contains(
            "priority raw; policy accept;\n\t\tip daddr 100.100.100.200 ct direction original ct original ip daddr != 100.100.100.200 ct status ! dnat \
             counter packets 0 bytes 0 drop\n\t\tip daddr 100.100.100.200 ct state untracked counter packets 0 bytes 0 drop\n\t\t\
             ip daddr 100.100.100.200 meta skuid"
        ));
        assert!(nft("list ruleset").contains(
            "ip6 hoplimit 255 accept\n\t\tip6 daddr fd00:100::100:200 ct direction original ct original ip6 daddr != fd00:100::100:200 \
             ct status ! dnat counter packets 0 bytes 0 drop\n\t\tip6 daddr fd00:100::100:200 ct state untracked counter packets 0 bytes 0 drop\n\t\t\
             ip6 daddr fd00:100::100:200 meta skuid"
        ));
        nft("flush chain ip6 kube2ram postrouting");
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
fn install_with_tracking_if_there(target: Target, is_stale: bool) -> Vec<Message> {
    fn without(attribute: Attribute) -> Attribute {
        match attribute {
            Attribute::Nest(kind, inner) => Attribute::Nest(kind, inner.into_iter().map(without).collect()),
            Attribute::Value(kind, value) if value == *b"ct\0" => Attribute::text(kind, "none-such"),
            value @ Attribute::Value(..) => value,
        }
    }
    let mut messages = ruleset::install(target, is_stale);
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
            let mut checks = state.subscribe();
            let running = tokio::spawn(guard.run_with(None, CancellationToken::new()));
            checks.changed().await.unwrap();
            // The clock goes on by itself while nothing but it is waited for.
            let mut next_check = async || {
                checks.changed().await.unwrap();
                nft("list ruleset")
            };

            for _ in 0..2 {
                assert_eq!(next_check().await, without, "asked for in vain");
                assert!(!state.read().has_ipvs && state.read().is_active == Some(true));
                assert!(state.read().has_ipv6, "it needs no connection tracking");
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
fn restores_what_was_removed_or_changed() {
    isolated(|| {
        let mut guard = guard();
        assert!(guard.check());
        let whole = nft("list ruleset");
        let changes = [
            "delete table ip kube2ram",
            "delete table ip6 kube2ram",
            "flush ruleset",
            "flush chain ip kube2ram forward",
            "flush chain ip kube2ram postrouting",
            "insert rule ip kube2ram forward accept",
            "insert rule ip kube2ram postrouting accept",
            "delete chain ip kube2ram postrouting",
            "add table ip kube2ram { flags dormant; }",
            "flush chain ip6 kube2ram forward",
            "insert rule ip6 kube2ram forward accept",
            "insert rule ip6 kube2ram postrouting accept",
            "delete chain ip6 kube2ram postrouting",
            "add table ip6 kube2ram { flags dormant; }",
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
        nft("add table inet kube2ram");
        assert!(guard.check());
        assert_eq!(guard.metrics.repairs.get(), changes.len() as u64);
        assert!(nft("list tables").contains("ip other") && nft("list tables").contains("inet kube2ram"));
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn another_metadata_address_replaces_the_rule() {
    isolated(|| {
        assert!(guard().check());

        let other = MetadataAddr {
            v4: SocketAddrV4::new(Ipv4Addr::LOCALHOST, 80),
            v6: Some(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
        };
        assert!(guard_of(other).check());

        let ruleset = nft("list ruleset");
        assert!(ruleset.contains("daddr 127.0.0.1") && !ruleset.contains("100.100.100.200"), "{ruleset}");
        assert!(ruleset.contains("daddr fd00:ec2::254") && !ruleset.contains("100:200"), "{ruleset}");
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_update_adds_the_ipv6_table_and_leaves_the_ipv4_rules_as_they_were() {
    isolated(|| {
        assert!(guard_of(V4_ONLY).check());
        assert_eq!(nft("list ruleset"), IPV4);

        let mut guard = guard();
        assert!(guard.check());

        assert_eq!(nft("list ruleset"), format!("{IPV4}{IPV6}"));
        assert!(guard.state().read().has_ipv6 && guard.state().read().repairs == 0);
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn without_an_ipv6_address_no_ipv6_table_is_left() {
    isolated(|| {
        assert!(guard().check());

        let mut guard = guard_of(V4_ONLY);
        assert!(guard.check());

        assert_eq!(nft("list ruleset"), IPV4);
        assert!(!guard.state().read().has_ipv6);
        nft("add table ip6 kube2ram");
        assert!(guard.check());
        assert_eq!(nft("list ruleset"), IPV4);
    });
}

/// Whether the kernel has nf_tables for IPv6, as far as [`install_with_ipv6_if_there`] lets it.
static HAS_IPV6: AtomicBool = AtomicBool::new(false);

/// Asks for a table of a family that no kernel has instead of one of IPv6's.
fn install_with_ipv6_if_there(target: Target, is_stale: bool) -> Vec<Message> {
    let mut messages = ruleset::install(target, is_stale);
    if !HAS_IPV6.load(Ordering::Relaxed) {
        for message in messages.iter_mut().filter(|message| message.head[0] == Family::Ipv6 as u8) {
            message.head[0] = 99;
        }
    }
    messages
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn the_ipv4_rules_stay_where_the_kernel_cannot_make_ipv6s() {
    isolated(|| {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let mut guard = guard();
            guard.install = install_with_ipv6_if_there;

            assert!(!guard.check(), "not for each address");

            assert_eq!(nft("list ruleset"), IPV4);
            let (metrics, state) =
                ((guard.metrics.active.clone(), guard.metrics.repairs.clone()), guard.state());
            let failure = state.read().failure.unwrap();
            assert!(failure.starts_with("no rules for IPv6 (those for IPv4 are active): "), "{failure}");
            assert!(!state.read().has_ipv6 && metrics.0.get() == 0);
            nft("flush ruleset");
            assert!(!guard.check());
            assert_eq!((nft("list ruleset"), metrics.1.get()), (IPV4.to_owned(), 1), "repaired all the same");

            guard.ipv6 = Path::new("/nonexistent");
            assert!(guard.check(), "nothing is forwarded by IPv6");
            assert_eq!((state.read().failure, metrics.0.get()), (None, 1));
            guard.ipv6 = Path::new("/proc/self/stat");

            HAS_IPV6.store(true, Ordering::Relaxed);
            assert!(!guard.check(), "not asked yet");
            tokio::time::advance(CHECK_INTERVAL).await;
            assert!(guard.check());

            assert_eq!(nft("list ruleset"), format!("{IPV4}{IPV6}"));
            assert_eq!((state.read().failure, metrics.0.get(), metrics.1.get()), (None, 1, 1));
        });
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_refusal_does_not_remove_the_ipv6_table_that_is_there() {
    isolated(|| {
        assert!(guard().check());
        nft("flush chain ip kube2ram forward");

        let mut guard = guard();
        guard.install = |target, is_stale| {
            let mut messages = ruleset::install(target, is_stale);
            messages
                .iter_mut()
                .filter(|message| message.head[0] == 10)
                .for_each(|message| message.head[0] = 99);
            messages
        };
        assert!(!guard.check());

        assert_eq!(nft("list ruleset"), format!("{IPV6}{IPV4}"));
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn repairs_in_time_what_it_was_not_notified_of() {
    isolated(|| {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let guard = guard();
            let mut checks = guard.state().subscribe();
            let started = Instant::now();
            let running = tokio::spawn(guard.run_with(None, CancellationToken::new()));
            checks.changed().await.unwrap();
            nft("delete table ip kube2ram");

            checks.changed().await.unwrap();

            assert!(nft("list ruleset").contains("table ip kube2ram"));
            assert!(started.elapsed() <= PAUSE + CHECK_INTERVAL);
            running.abort();
        });
    });
}

#[tokio::test(start_paused = true)]
async fn a_check_that_does_not_end_is_reported_and_waited_for() {
    let (active, state) = (Gauge::<i64>::default(), State::default());
    active.set(1);
    state.update(|standing| standing.is_active = Some(true));
    let (end, ended) = tokio::sync::oneshot::channel();
    let checking = tokio::spawn(async { ended.await.unwrap() });
    let mut waiting = std::pin::pin!(in_time(checking, &active, &state));

    assert!(timeout(LATE * 2, &mut waiting).await.is_err());
    let standing = state.read();
    assert_eq!((active.get(), standing.is_active), (0, Some(false)));
    assert_eq!(standing.failure.unwrap(), "netfilter has not answered for 5 s");

    end.send(7).unwrap();
    assert_eq!(waiting.await, Some(7));
}

#[tokio::test(start_paused = true)]
async fn nothing_is_written_after_a_stop() {
    let stop = CancellationToken::new();
    stop.cancel();
    let guard = guard();
    let state = guard.state();

    guard.run_with(None, stop).await;

    assert_eq!(state.read().is_active, None);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn is_notified_of_a_change_and_repairs_it_long_before_it_looks() {
    isolated(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let mut guard = guard();
            assert!(guard.check());
            let whole = nft("list ruleset");
            let repairs = guard.metrics.repairs.clone();
            let running = tokio::spawn(guard.run(CancellationToken::new()));

            for (before, change) in
                ["flush ruleset", "insert rule ip kube2ram forward accept", "delete table ip6 kube2ram"]
                    .iter()
                    .enumerate()
            {
                tokio::task::yield_now().await;
                nft(change);
                let repaired = async {
                    while repairs.get() == before as u64 {
                        sleep(Duration::from_millis(1)).await;
                    }
                };
                timeout(Duration::from_secs(5), repaired).await.expect(change);

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
        for table in ["ip kube2ram", "ip6 kube2ram"] {
            nft(&format!("add table {table}"));
            assert!(remove().unwrap(), "{table} alone");
            assert_eq!(nft("list ruleset"), "");
        }
    });
}
