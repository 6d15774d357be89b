//! Rung 2: rules as the tools make them, each time in a network namespace of the test's own; the command that is told is run as it stands.

use std::{process::Command, thread};

use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::*;

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

fn rules() -> Vec<Rule> {
    let rule = |leftover| match leftover {
        Leftover::Rule(rule) => Some(rule),
        Leftover::Agent(_) => None,
    };
    leftovers(METADATA).unwrap().into_iter().filter_map(rule).collect()
}

/// What the ancestors add, for `--host-interface` as people set it; and what others add.
const BY_IPTABLES: [(&str, &str); 9] = [
    (
        "-A PREROUTING -p tcp -d 100.100.100.200 --dport 80 -j DNAT --to-destination 10.0.0.1:8181 -i docker0",
        "-D",
    ),
    (
        "-A PREROUTING -p tcp -d 100.100.100.200/32 --dport 80 -j DNAT --to-destination 10.0.0.1:8181 -i cali+",
        "-D",
    ),
    (
        "-A PREROUTING -p tcp -d 100.100.100.200 --dport 80 -j DNAT --to-destination 10.0.0.1:8181 ! -i eth0",
        "-D",
    ),
    ("-I PREROUTING -p tcp -d 100.100.100.200 --dport 80 -j REDIRECT --to-ports 8181", "-D"),
    ("-A OUTPUT -d 100.100.100.200 -j DNAT --to-destination 127.0.0.1", "-D"),
    (
        "-A OUTPUT -s 10.1.2.3 -o eth0 -p tcp -d 100.100.100.200 --dport 80:81 -j DNAT --to-destination 127.0.0.1:8181",
        "",
    ),
    // What is not understood as a whole is told by its place.
    (
        "-A PREROUTING -p tcp -d 100.100.100.200 --dport 80 -m comment --comment 'kube iam' -j DNAT --to-destination 10.0.0.1:8181",
        "",
    ),
    (
        "-A PREROUTING -p tcp -d 100.100.100.200 --dport 80 -j DNAT --to-destination 10.0.0.1-10.0.0.2:8181",
        "",
    ),
    ("-A PREROUTING -s 10.0.0.0/8 -p udp -d 100.100.100.200 --sport 9 -j DNAT --to-destination 10.0.0.1", ""),
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
        let before = shell(&format!("{iptables}-save -t nat | grep ^-A"));
        assert_eq!(rules(), []);

        for (rule, word) in BY_IPTABLES {
            shell(&format!("{iptables} -t nat {rule}"));
            let found = rules();

            assert_eq!(found.len(), 1, "{rule}: {found:?}");
            let removal = found[0].removal();
            assert!(
                removal.contains(word) && (word.is_empty() || removal.starts_with(iptables)),
                "{rule}: {removal}"
            );
            shell(&removal);

            assert_eq!(rules(), [], "{rule}: {removal}");
            assert_eq!(shell(&format!("{iptables}-save -t nat | grep ^-A")), before, "{rule}: {removal}");
        }
        // All at once: none hides another, and numbers go down as rules go.
        for (rule, _) in BY_IPTABLES {
            shell(&format!("{iptables} -t nat {rule}"));
        }
        assert_eq!(rules().len(), BY_IPTABLES.len());
        for left in (0..BY_IPTABLES.len()).rev() {
            shell(&rules()[0].removal());
            assert_eq!(rules().len(), left);
        }
        assert_eq!(shell(&format!("{iptables}-save -t nat | grep ^-A")), before);
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
fn removes_the_rules_of_nft() {
    isolated(|| {
        let rows = [
            ("ip", "ip daddr 100.100.100.200 tcp dport 80 counter dnat to 10.0.0.1:8181", "10.0.0.1:8181"),
            ("ip", "iifname cali* ip saddr 10.0.0.7 ip daddr 100.100.100.200 dnat to 10.0.0.1", "10.0.0.1"),
            ("inet", "ip daddr 100.100.100.200 tcp dport 80 redirect to :8181", "port 8181 of the node"),
            (
                "inet",
                "ip daddr 100.100.100.200 tcp dport { 80, 443 } dnat ip to 10.0.0.1:8181",
                "10.0.0.1:8181",
            ),
        ];
        for family in ["ip", "inet"] {
            shell(&format!("nft 'add table {family} mine'"));
            shell(&format!(
                "nft 'add chain {family} mine pre {{ type nat hook prerouting priority dstnat; }}'"
            ));
            shell(&format!("nft 'add rule {family} mine pre ip daddr 10.96.0.9 dnat ip to 100.100.100.200'"));
        }
        let before = shell("nft list ruleset");

        for (family, rule, to) in rows {
            shell(&format!("nft 'add rule {family} mine pre {rule}'"));
            let found = rules();

            assert_eq!(found.len(), 1, "{rule}: {found:?}");
            assert!(found[0].to_string().ends_with(&format!("leads to {to}")), "{}", found[0]);
            shell(&found[0].removal());

            assert_eq!(shell("nft list ruleset"), before, "{rule}");
        }
        assert_eq!(rules(), []);
    });
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn looking_makes_no_table() {
    isolated(|| {
        assert_eq!(rules(), []);

        let tables = std::fs::read_to_string("/proc/thread-self/net/ip_tables_names").unwrap_or_default();
        assert_eq!((tables.as_str(), shell("nft list tables").as_str()), ("", ""));
    });
}

#[test]
fn a_leftover_says_what_to_do() {
    let agent = Leftover::Agent(8181).to_string();

    assert!(agent.contains("port 8181") && agent.contains("Delete its DaemonSet"), "{agent}");
}
