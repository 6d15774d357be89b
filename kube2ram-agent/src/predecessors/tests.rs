//! What is read of bytes; and rung 2: rules as the tools make them, each time in a network namespace of the
//! test's own. The command that is told is run as it stands.

use std::{net::TcpListener, process::Command, thread};

use proptest::prelude::*;
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::*;
use crate::server::RequestError;

const METADATA: Ipv4Addr = Ipv4Addr::new(100, 100, 100, 200);

/// Runs a test on its own thread, in a network namespace that ends with the thread.
fn isolated(test: impl FnOnce() + Send + 'static) {
    let inside = thread::spawn(|| {
        #[expect(unsafe_code, reason = "a namespace for this thread alone")]
        // SAFETY: no file descriptors are unshared.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
        test();
    });
    inside.join().unwrap();
}

fn shell(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn warnings() -> Vec<String> {
    leftovers(METADATA).unwrap()
}

fn removal(warning: &str) -> &str {
    warning.rsplit_once("is removed: ").unwrap().1
}

/// What the predecessors add, for `--host-interface` as people set it; and what others add. With where it
/// leads.
const BY_IPTABLES: [(&str, &str); 6] = [
    (
        "-A PREROUTING -p tcp -d 100.100.100.200 --dport 80 -j DNAT --to-destination 10.0.0.1:8181 -i docker0",
        "10.0.0.1:8181",
    ),
    (
        "-A PREROUTING -p tcp -d 100.100.100.200/32 --dport 80 -j DNAT --to-destination 10.0.0.1:8182 -i cali+",
        "10.0.0.1:8182",
    ),
    (
        "-A PREROUTING -p tcp -d 100.100.100.200 --dport 80 -j DNAT --to-destination 10.0.0.1:8183 ! -i eth0",
        "10.0.0.1:8183",
    ),
    (
        "-I PREROUTING -p tcp -d 100.100.100.200 --dport 80 -j REDIRECT --to-ports 8181",
        "port 8181 of the node",
    ),
    (
        "-A OUTPUT -s 10.1.2.3 -o eth0 -p tcp -d 100.100.100.200 --dport 80:81 -j DNAT --to-destination 127.0.0.1:8181",
        "127.0.0.1:8181",
    ),
    (
        "-A PREROUTING -p tcp -d 100.100.100.200 --dport 80 -m comment --comment 'kube iam' -j DNAT --to-destination 10.0.0.1:8184",
        "10.0.0.1:8184",
    ),
];

/// Rules that lead the metadata server nowhere else.
const HARMLESS: [&str; 5] = [
    "-A PREROUTING -p tcp -d 100.100.100.201 --dport 80 -j DNAT --to-destination 10.0.0.1:8181",
    "-A PREROUTING -p tcp ! -d 100.100.100.200 --dport 80 -j DNAT --to-destination 10.0.0.1:8181",
    "-A PREROUTING -d 100.100.100.200 -j ACCEPT",
    "-A PREROUTING -d 10.96.0.9 -j DNAT --to-destination 100.100.100.200",
    "-A POSTROUTING -d 100.100.100.200 -j SNAT --to-source 10.0.0.1",
];

fn removes_what_it_finds(iptables: &'static str) {
    isolated(move || {
        for rule in HARMLESS {
            shell(&format!("{iptables} -t nat {rule}"));
        }
        let save = format!("{iptables}-save -t nat | grep ^-A");
        let before = shell(&save);
        assert_eq!(warnings(), [""; 0]);

        for (rule, to) in BY_IPTABLES {
            shell(&format!("{iptables} -t nat {rule}"));

            let found = warnings();

            assert_eq!(found.len(), 1, "{rule}: {found:?}");
            let named = format!("{iptables}, table nat: 100.100.100.200 leads to {to}. ");
            assert!(found[0].starts_with(&named), "{rule}: {found:?}");
            shell(removal(&found[0]));
            assert_eq!((warnings(), shell(&save)), (vec![], before.clone()), "{rule}: {found:?}");
        }
        // All at once: none hides another, and one command removes them all. Running it again does nothing.
        for (rule, _) in BY_IPTABLES {
            shell(&format!("{iptables} -t nat {rule}"));
        }
        let found = warnings();
        assert_eq!(found.len(), BY_IPTABLES.len());
        for warning in &found {
            shell(removal(warning));
            assert_eq!((warnings(), shell(&save)), (vec![], before.clone()));
        }
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn removes_the_rules_of_iptables_nft() {
    removes_what_it_finds("iptables-nft");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn removes_the_rules_of_iptables_legacy() {
    removes_what_it_finds("iptables-legacy");
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn removes_the_rules_of_nft_in_the_table_of_iptables() {
    isolated(|| {
        shell(
            "nft 'add table ip nat; add chain ip nat PREROUTING { type nat hook prerouting priority dstnat; }'",
        );
        shell("nft 'add rule ip nat PREROUTING ip daddr 10.96.0.9 dnat to 100.100.100.200'");
        let before = shell("nft list ruleset");

        for rule in [
            "ip daddr 100.100.100.200 tcp dport 80 counter dnat to 10.0.0.1:8181",
            "iifname cali* ip saddr 10.0.0.7 ip daddr 100.100.100.200 dnat to 10.0.0.1",
            "ip daddr 100.100.100.200 tcp dport { 80, 443 } redirect to :8181",
        ] {
            shell(&format!("nft 'add rule ip nat PREROUTING {rule}'"));

            let found = warnings();

            assert_eq!(found.len(), 1, "{rule}: {found:?}");
            assert!(found[0].contains("leads to another place"), "{}", found[0]);
            shell(removal(&found[0]));
            assert_eq!((warnings(), shell("nft list ruleset")), (vec![], before.clone()), "{rule}");
        }
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn looking_makes_no_table() {
    isolated(|| {
        assert_eq!(warnings(), [""; 0]);

        let tables = fs::read_to_string("/proc/thread-self/net/ip_tables_names").unwrap_or_default();
        assert_eq!((tables.as_str(), shell("nft list tables").as_str()), ("", ""));
    });
}

/// Answers once, and returns its port.
fn server(answer: &'static str) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.read_exact(&mut [0; 20]).unwrap();
        stream.write_all(answer.as_bytes()).unwrap();
    });
    port
}

#[test]
fn a_predecessors_agent_is_known_by_its_health() {
    let healthy = "HTTP/1.0 200 OK\r\n\r\n{\"hostIP\":\"10.0.0.42\",\"instanceId\":\"i-0\"}\n";
    for (answer, is_one) in [
        (healthy, true),
        ("HTTP/1.0 500 Internal Server Error\r\n\r\nHealthcheck not yet performed\n", true),
        ("HTTP/1.0 200 OK\r\n\r\nok", false),
        ("", false),
    ] {
        assert_eq!(is_predecessors(server(answer)), is_one, "{answer}");
    }
}

/// An entry of a legacy table with a DNAT of revision 0.
fn entry(destination: Ipv4Addr, inverted: bool) -> Vec<u8> {
    let mut entry = vec![0; 168];
    entry[4..8].copy_from_slice(&destination.octets());
    entry[12..16].fill(255);
    entry[83] = if inverted { 0x10 } else { 0 };
    entry[88..90].copy_from_slice(&112u16.to_ne_bytes());
    entry[90..92].copy_from_slice(&168u16.to_ne_bytes());
    entry[114..118].copy_from_slice(b"DNAT");
    entry[152..156].copy_from_slice(&[10, 0, 0, 1]);
    entry[160..162].copy_from_slice(&8181u16.to_be_bytes());
    entry
}

#[test]
fn an_entry_is_found_by_its_destination_alone() {
    let other = Ipv4Addr::new(100, 100, 100, 201);
    let table = [entry(other, false), entry(METADATA, true), entry(METADATA, false)].concat();

    let rules = legacy_rules_in(&table, METADATA);

    let to = "10.0.0.1:8181".parse().ok();
    assert_eq!(rules.iter().map(|rule| rule.to).collect::<Vec<_>>(), [to]);
}

proptest! {
    #[test]
    fn reads_any_bytes(bytes: Vec<u8>, cut in 0usize..168, at in 84usize..92, value: u8) {
        prop_assert_eq!(nft_rule(&bytes, "PREROUTING", METADATA), None);
        let mut entry = entry(METADATA, false);
        prop_assert!(legacy_rules_in(&entry[..cut], METADATA).is_empty());
        // Its offsets and lengths among others: it may become a shorter one.
        entry[at] = value;
        prop_assert!(legacy_rules_in(&entry[..cut], METADATA).len() <= 1);
        prop_assert!(legacy_rules_in(&[&entry[..], &bytes].concat(), METADATA).len() <= 1);
    }

    #[test]
    fn reads_any_expressions(name in "cmp|target|nat|redir", bytes: Vec<u8>, first in "DNAT|REDIRECT|x", second: u32) {
        let data = vec![Attribute::text(1, &first), Attribute::number(2, second), Attribute::Value(3, bytes)];
        let expression = vec![Attribute::text(1, &name), Attribute::Nest(2, data)];
        let rule = vec![Attribute::Value(3, vec![0; 8]), Attribute::Nest(4, vec![Attribute::Nest(1, expression)])];
        let whole = crate::netlink::encode(&[Message::dump(0, vec![0; 4], rule)], 0);

        prop_assert_eq!(nft_rule(&whole[crate::netlink::HEADER..], "PREROUTING", METADATA), None);
    }
}

/// A predecessor whose health check fails is still found where its rule leads.
#[test]
fn where_a_rule_leads_whatever_listens_counts_but_kube2ram_itself() {
    for (answer, is_another) in [
        (
            "HTTP/1.0 500 Internal Server Error\r\n\r\nError getting instance id, got status: 403 Forbidden\n",
            true,
        ),
        ("", true),
        ("HTTP/1.1 403 Forbidden\r\n\r\nthe kernel has no record of the caller\n", false),
    ] {
        assert_eq!(is_someone_elses(server(answer)), is_another, "{answer}");
    }
    let nobody = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
    assert!(!is_someone_elses(nobody));
    assert_eq!(RequestError::Unvouched.told().1, OURS);
}
