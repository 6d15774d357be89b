use super::*;
use crate::netlink::{HEADER, encode};

const V4: Ipv4Addr = Ipv4Addr::new(100, 100, 100, 200);
const V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x100, 0, 0, 0, 0, 0x100, 0x200);
const TARGET: Target = Target { v4: V4, v6: Some(V6), has_ipvs: true };

/// The attributes as the kernel would report them.
fn told(attributes: Vec<Attribute>) -> Vec<Vec<u8>> {
    vec![encode(&[message(Family::Ipv4, 0, 0, attributes)], 0)[HEADER + NFGENMSG..].to_vec()]
}

fn all(chain: Chain, address: IpAddr, has_ipvs: bool) -> Vec<Vec<u8>> {
    rules(chain, address, has_ipvs).into_iter().flat_map(told).collect()
}

/// The replies of a kernel that has the target's tables.
fn replies(target: Target) -> Vec<Vec<Vec<u8>>> {
    let of_table = |address| {
        let of_chain = move |chain| [told(base_chain(chain)), all(chain, address, target.has_ipvs)];
        [told(table())].into_iter().chain(CHAINS.into_iter().flat_map(of_chain))
    };
    target.addresses().flat_map(of_table).collect()
}

#[test]
fn only_the_whole_tables_are_the_tables() {
    let whole = replies(TARGET);
    let with = |at: usize, reply: Vec<Vec<u8>>| {
        let mut replies = whole.clone();
        replies[at] = reply;
        is_installed(TARGET, &replies)
    };

    assert_eq!(whole.len(), queries(TARGET).len());
    assert!(is_installed(TARGET, &whole));
    assert!(!is_installed(TARGET, &whole[..9]));
    let dormant = [table_name(), vec![Attribute::number(2, 1)]].concat();
    for (first, address) in [(0, V4.into()), (5, V6.into())] {
        assert!(!with(first, told(dormant.clone())), "{address}");
        let first_too_many = [told(rule_place(FORWARD)), all(FORWARD, address, true)].concat();
        assert!(!with(first + 2, first_too_many), "a rule before ours, {address}");
        let reversed = all(POSTROUTING, address, true).into_iter().rev().collect();
        assert!(!with(first + 4, reversed), "another order, {address}");
    }
    for at in 0..whole.len() {
        assert!(!with(at, vec![]), "{at}");
    }
    for rule in 0..whole[9].len() {
        let mut without = whole[9].clone();
        without.remove(rule);
        assert!(!with(9, without), "without rule {rule} of IPv6");
    }
    // Each family's rules in the other one's table.
    assert!(!with(2, all(FORWARD, V6.into(), true)) && !with(7, all(FORWARD, V4.into(), true)));
}

#[test]
fn the_tables_of_one_target_are_those_of_no_other() {
    let other_v6 = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
    let mut targets = TARGET.and_less();
    targets.push(Target { v4: Ipv4Addr::new(100, 100, 100, 201), ..TARGET });
    targets.push(Target { v6: Some(other_v6), ..TARGET });

    for (at, installed) in targets.iter().enumerate() {
        for (wanted_at, wanted) in targets.iter().enumerate() {
            assert_eq!(
                is_installed(*wanted, &replies(*installed)),
                at == wanted_at,
                "{installed:?} {wanted:?}"
            );
        }
    }
}

#[test]
fn without_what_a_kernel_may_not_have_the_ipv4_rules_stay() {
    let without_ipvs = Target { has_ipvs: false, ..TARGET };
    let without_v6 = Target { v6: None, ..TARGET };
    let least = Target { v6: None, has_ipvs: false, ..TARGET };

    assert_eq!(TARGET.and_less(), [TARGET, without_ipvs, without_v6, least]);
    assert_eq!(without_ipvs.and_less(), [without_ipvs, least]);
    assert_eq!(without_v6.and_less(), [without_v6, least]);
    assert_eq!(least.and_less(), [least]);
}

#[test]
fn ipv4s_table_is_the_same_with_and_without_ipv6() {
    let of_family = |target, family: Family| {
        let messages = install(target, false).into_iter();
        messages.filter(|message| message.head[0] == family as u8).collect::<Vec<_>>()
    };
    let plain = |mut messages: Vec<Message>| {
        messages.iter_mut().for_each(|message| message.flags &= !NLM_F_ACK);
        messages
    };
    let without = Target { v6: None, ..TARGET };

    assert_eq!(plain(of_family(TARGET, Family::Ipv4)), plain(of_family(without, Family::Ipv4)));
    assert_eq!(of_family(without, Family::Ipv6), []);
}

#[test]
fn one_transaction_has_both_tables_and_one_acknowledgement() {
    for (target, is_stale) in [(TARGET, false), (TARGET, true), (Target { v6: None, ..TARGET }, true)] {
        let messages = install(target, is_stale);

        let edges = messages.iter().filter(|message| message.kind < NFNL_SUBSYS_NFTABLES << 8).count();
        assert_eq!(edges, 2, "{target:?}");
        let asks: Vec<_> = messages.iter().map(|message| message.flags & NLM_F_ACK != 0).collect();
        assert_eq!(asks.iter().position(|asks| *asks), Some(asks.len() - 2), "{target:?}");
        // The IPv4 table comes before the other one goes.
        let last = &messages[messages.len() - 2];
        let deletes = last.kind & 0xff == NFT_MSG_DELTABLE && last.head[0] == Family::Ipv6 as u8;
        assert_eq!(deletes, is_stale && target.v6.is_none(), "{target:?}");
    }
}
