//! Rung 2: agents that follow one another on a node, as a rolling update with a surge starts and ends them,
//! and as they crash. Pods never reach the metadata server, and an upgrade costs them nothing. Needs root;
//! depends on the agent's binary and on `kube2ram-sandbox`.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

mod crashes;
mod layouts;
mod support;

use std::time::{Duration, Instant};

use crate::support::{Lab, POD_LISTENERS, PODS};

const ROUNDS: usize = 20;

#[test]
#[ignore = "needs root: cargo xtask test"]
fn twenty_upgrades_cost_no_request() {
    let mut lab = Lab::with_agent("upgrades");
    let load = lab.load();
    let began = Instant::now();

    for _ in 0..ROUNDS {
        lab.upgrade();
    }
    let took = began.elapsed();
    let report = load.end();

    println!(
        "{ROUNDS} upgrades under the load of {} pods in {took:.1?}: {} requests, the slowest took {} µs",
        PODS.len(),
        report.ok,
        report.slowest_us
    );
    let bad = (report.wrong, report.refused, report.cut, report.failed, report.resent);
    assert_eq!((bad, &report.refusals), ((0, 0, 0, 0, 0), &Vec::new()), "{:?}", report.samples);
    assert!(report.ok > 1000, "{report:?}");
    assert_eq!(lab.leaks(), []);
    let log = lab.agent().unwrap().log();
    assert_eq!(log.matches("another agent serves; waiting for connections").count(), ROUNDS);
    assert!(!log.contains("did not take over") && !log.contains("drain deadline reached"), "{log}");
    lab.agent().unwrap().await_metric("kube2ram_pod_listeners", POD_LISTENERS).unwrap();
    lab.assert_served();
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn twenty_kills_refuse_pods_until_the_next_start_and_let_none_through() {
    let mut lab = Lab::with_agent("kills");
    let load = lab.load();
    let mut starts = Vec::new();

    for _ in 0..ROUNDS {
        lab.agent().unwrap().kill().unwrap();
        let began = Instant::now();
        lab.agent().unwrap().start().unwrap();
        starts.push(began.elapsed());
        lab.assert_served();
    }
    let mut report = load.end();

    starts.sort();
    report.outages_us.sort_unstable();
    let middle = |outages: &[u64]| outages.get(outages.len() / 2).copied().unwrap_or_default();
    println!(
        "{ROUNDS} kills: {} requests, {} refused, {} cut, {} resent, {} told to ask again; start to ready {:?} (median); outage of a client {} µs (median), {} µs (longest)",
        report.ok,
        report.refused,
        report.cut,
        report.resent,
        report.refusals.len(),
        starts[ROUNDS / 2],
        middle(&report.outages_us),
        report.outages_us.last().unwrap()
    );
    assert_eq!((report.wrong, report.failed), (0, 0), "{:?}", report.samples);
    // It listens before it knows the pods, and has whoever cannot be answered in time ask again.
    assert!(report.refusals.iter().all(|status| *status == 503), "{:?}", report.samples);
    assert!(report.refused > 0 && report.ok > 1000, "{report:?}");
    let longest = Duration::from_micros(*report.outages_us.last().unwrap());
    assert!(longest < starts[ROUNDS - 1] + Duration::from_secs(3), "{longest:?}, {starts:?}");
    assert_eq!(lab.leaks(), []);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn of_two_that_start_at_once_one_serves_and_the_other_follows() {
    let mut lab = Lab::without_agent("twins");
    let mut twin = lab.surge().unwrap();
    lab.agent().unwrap().spawn().unwrap();
    twin.spawn().unwrap();

    lab.agent().unwrap().await_ready().unwrap();
    twin.await_ready().unwrap();

    let log = lab.agent().unwrap().log();
    assert_eq!(
        (log.matches(" serving agent=").count(), log.matches("standing by until").count()),
        (1, 1),
        "{log}"
    );
    lab.assert_served();
    let first = lab.agent().unwrap();
    first.terminate().unwrap();
    lab.assert_served();
    assert_eq!(lab.leaks(), []);
}
