//! Rung 2: STS by its name, with the resolver settings of the manifest, in its container. `cargo xtask test
//! --image` runs these with the program of the image, whose C library resolves in another way than this
//! machine's.

use std::{collections::BTreeSet, net::Ipv4Addr};

use kube2ram_sandbox::standin::{Loss, NameServer};

use super::{
    node::{LIST, Node, STS, eventually},
    support::{objects, single_file, template},
};

const FIRST: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 53);
const SECOND: Ipv4Addr = Ipv4Addr::new(127, 0, 1, 53);

/// A node whose name servers know STS, and whose search domain knows every name.
fn node(name: &str, losses: &[(Ipv4Addr, Loss)]) -> (Node, Vec<NameServer>) {
    let mut node = Node::new(name);
    let sts = STS.map(|name| (name, node.node().ip()));
    // Nobody listens there: whoever takes that answer has no credentials.
    let records = [sts.as_slice(), &[("*.corp.example", Ipv4Addr::new(127, 0, 0, 66))]].concat();
    let servers =
        losses.iter().map(|(addr, loss)| NameServer::start(*addr, &records, *loss).unwrap()).collect();
    let lines = losses.iter().map(|(addr, _)| format!("nameserver {addr}\n")).collect::<String>();
    node.surroundings.resolv_conf = format!("{lines}search corp.example\noptions ndots:5\n");
    node.surroundings.hosts = "127.0.0.1 localhost\n".to_owned();
    (node, servers)
}

/// Everything gets its role, and no other name was asked for than these: none of a search domain.
fn assert_resolved(node: &mut Node, servers: &[NameServer], names: &[&str]) {
    let manifest = template(&objects(&single_file())).clone();

    let agent = node.start(&manifest).unwrap();

    // A look-up may take longer than a pod waits; what was begun goes on.
    eventually("STS is found", || node.ask("orders", &format!("{LIST}orders-role")).status == 200);
    node.assert_served();
    let asked: BTreeSet<_> = servers.iter().flat_map(|server| server.asked().into_keys()).collect();
    let is_expected = asked.contains(STS[0]) && asked.iter().all(|name| names.contains(&name.as_str()));
    assert!(is_expected, "{asked:?}: {}", agent.container.log());
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_lost_datagram_and_a_wildcard_search_domain_keep_no_pod_from_its_role() {
    let (mut node, servers) = node("names-lost", &[(FIRST, Loss::First)]);

    // No detour to a public endpoint.
    assert_resolved(&mut node, &servers, &STS[..1]);

    assert!(servers[0].asked()[STS[0]] > 2, "A and AAAA were lost once: {:?}", servers[0].asked());
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_first_name_server_that_is_dead_keeps_no_pod_from_its_role() {
    let (mut node, servers) = node("names-dead", &[(FIRST, Loss::All), (SECOND, Loss::None)]);

    // glibc waits a second for the first one, which leaves half a second to connect in: a busy machine takes
    // the detour.
    assert_resolved(&mut node, &servers, &STS);

    assert!(servers.iter().all(|server| !server.asked().is_empty()), "both were asked");
}
