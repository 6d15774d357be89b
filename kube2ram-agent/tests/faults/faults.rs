//! Faults at every step of a first start, of an upgrade and of an uninstall.

use std::{
    thread,
    time::{Duration, Instant},
};

use kube2ram_sandbox::standin::Accounts;

use crate::{
    node::{Node, Start},
    steps::{Fault, Step},
};

/// A kill and an error at every step that changes something, and an error at those between. Of equal ones in
/// a row between, the first is enough: they change nothing, so that what the fault leaves is what the one
/// before it left.
fn plan(steps: &[Step]) -> Vec<(Step, Fault)> {
    const ERRORS: [&str; 2] = ["EPERM", "ENOMEM"];
    let mut plan = Vec::new();
    let mut before = None;
    for (index, step) in steps.iter().enumerate() {
        if step.changes() {
            plan.push((step.clone(), Fault::Kill));
        }
        if step.changes() || before != Some(step.command()) {
            plan.push((step.clone(), Fault::Error(ERRORS[index % ERRORS.len()])));
        }
        before = Some(step.command());
    }
    plan
}

/// Nothing more has arrived than had before, and nothing does while the pod tries again.
fn assert_tight(node: &Node, before: usize, why: &str) {
    node.tries_again();
    let leaks = node.leaks();
    assert!(leaks.len() == before, "{why}: {:?}", &leaks[before..]);
}

/// After a run that went on in spite of the fault: nothing is missing.
fn assert_whole(node: &mut Node, links: usize, why: &str) {
    // What could not be attached is tried again.
    let deadline = Instant::now() + Duration::from_secs(60);
    while node.links().len() != links {
        assert!(Instant::now() < deadline, "{why}: {:?}", node.links());
        thread::sleep(Duration::from_millis(20));
    }
    // Steps are counted by thread: the call of this number of a thread that serves pods fails as well, and
    // may be the one that identifies the caller.
    let roles: Vec<_> = (0..3).map(|_| node.role()).collect();
    assert!(roles.iter().any(|role| role == crate::node::ROLE), "{why}: {roles:?}");
    node.kill();
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_first_start_denies_from_its_first_program_on_and_the_next_one_completes_it() {
    let mut node = Node::new("faults-first", "off");
    let steps = node.steps(|node, strace| assert_eq!(node.start(strace), Start::Ready));
    node.kill();
    let links = node.links().len();
    let (began, plan) = (Instant::now(), plan(&steps));
    let (mut survived, mut open) = (0, 0);

    for (step, fault) in &plan {
        let why = format!("{fault:?} at {step:?}");
        node.uninstall_plainly(&why);
        assert_eq!(node.role(), Accounts::NODE_ROLE, "{why}: nothing is active");

        // A kill may come when it is ready already, from a thread that serves.
        if node.start(&step.inject(*fault)) == Start::Ready && *fault != Fault::Kill {
            survived += 1;
            assert_whole(&mut node, links, &why);
        }
        node.kill();

        let is_tight = node.denies();
        open += usize::from(!is_tight);
        let before = node.leaks_so_far();
        if is_tight {
            assert_tight(&node, before, &why);
        }
        if step.changes() {
            node.start_plainly(&why);
            let before = node.leaks_so_far();
            node.kill();
            assert_tight(&node, before, &why);
        }
    }
    println!(
        "first start: {} faults in {} steps, {survived} survived, {open} before the first program; {:?}",
        plan.len(),
        steps.len(),
        began.elapsed()
    );
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_upgrade_denies_throughout_and_the_next_start_completes_it() {
    let mut node = Node::new("faults-upgrade", "off");
    node.start_plainly("at first");
    node.kill();
    let links = node.links().len();
    let before = node.leaks_so_far();
    let steps = node.steps(|node, strace| assert_eq!(node.start(strace), Start::Ready));
    node.kill();
    let (began, plan) = (Instant::now(), plan(&steps));
    let mut survived = 0;

    for (step, fault) in &plan {
        let why = format!("{fault:?} at {step:?}");
        // A kill may come when it is ready already, from a thread that serves.
        if node.start(&step.inject(*fault)) == Start::Ready && *fault != Fault::Kill {
            survived += 1;
            assert_whole(&mut node, links, &why);
        }
        node.kill();
        assert!(node.denies(), "{why}");
        assert_tight(&node, before, &why);
        if step.changes() {
            node.start_plainly(&why);
            node.kill();
        }
    }
    node.start_plainly("at the end");
    assert_tight(&node, before, "at the end");
    println!(
        "upgrade: {} faults in {} steps, {survived} survived; {:?}",
        plan.len(),
        steps.len(),
        began.elapsed()
    );
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn an_uninstall_denies_until_its_last_program_can_be_repeated_and_undone() {
    let mut node = Node::new("faults-uninstall", "off");
    node.start_plainly("at first");
    node.kill();
    let steps = node.steps(|node, strace| assert!(node.uninstall(strace).status.success()));
    let (began, plan) = (Instant::now(), plan(&steps));
    let mut tight = 0;

    for (index, (step, fault)) in plan.iter().enumerate() {
        let why = format!("{fault:?} at {step:?}");
        node.start_plainly(&why);
        node.kill();
        let before = node.leaks_so_far();

        node.uninstall(&step.inject(*fault));

        if node.denies() {
            tight += 1;
            assert_tight(&node, before, &why);
        }
        // Either of the two may come next.
        if index % 2 == 0 {
            node.uninstall_plainly(&why);
            assert_eq!(node.role(), Accounts::NODE_ROLE, "{why}");
        }
    }
    node.start_plainly("at the end");
    assert!(tight > 20, "{tight} of {}", plan.len());
    println!(
        "uninstall: {} faults in {} steps, {tight} before the last program went; {:?}",
        plan.len(),
        steps.len(),
        began.elapsed()
    );
}
