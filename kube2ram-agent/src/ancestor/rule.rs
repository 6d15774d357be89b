//! A rule that leads the metadata server's address elsewhere, and the command that removes it. Pure. Made by `legacy` and `nf_tables`.

use std::{fmt, net::Ipv4Addr};

/// A rule, told as far as it was understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub(super) place: Place,
    pub(super) chain: String,
    pub(super) metadata: Ipv4Addr,
    /// All that it says, in the words of iptables; `None` when there is something that was not understood.
    pub(super) words: Option<Vec<String>>,
    pub(super) to: Destination,
}

/// Which tool's a rule is, and what tells it from others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// The nat table of `iptables-nft`.
    Iptables { table: String, handle: u64 },
    /// The nat table of `iptables-legacy`: its number in the chain, from 1.
    Legacy { number: usize },
    /// Any other table of nf_tables.
    Nft { family: &'static str, table: String, handle: u64 },
}

/// Where a rule leads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Destination {
    /// `None`: an address of the node.
    pub(super) addr: Option<Ipv4Addr>,
    pub(super) port: Option<u16>,
}

impl Rule {
    /// The port that it leads to.
    pub(super) fn port(&self) -> Option<u16> {
        self.to.port
    }

    /// The shell command that removes this rule and no other. By what it says where that was understood as a whole, because numbers change when somebody
    /// changes the chain; handles do not.
    pub fn removal(&self) -> String {
        let iptables = |program: &str, words: &[String]| {
            let words: Vec<_> = words.iter().map(|word| shell(word)).collect();
            format!("{program} -t nat -D {} {}", shell(&self.chain), words.join(" "))
        };
        let nft = |family: &str, table: &str, handle: u64| {
            format!("nft delete rule {family} {} {} handle {handle}", shell(table), shell(&self.chain))
        };
        match (&self.place, &self.words) {
            (Place::Iptables { .. }, Some(words)) => iptables("iptables-nft", words),
            (Place::Iptables { table, handle }, None) => nft("ip", table, *handle),
            (Place::Legacy { .. }, Some(words)) => iptables("iptables-legacy", words),
            (Place::Legacy { number }, None) => iptables("iptables-legacy", &[number.to_string()]),
            (Place::Nft { family, table, handle }, _) => nft(family, table, *handle),
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let chain = &self.chain;
        match &self.place {
            Place::Iptables { .. } => write!(f, "iptables-nft, nat {chain}")?,
            Place::Legacy { .. } => write!(f, "iptables-legacy, nat {chain}")?,
            Place::Nft { family, table, .. } => write!(f, "nft, {family} {table} {chain}")?,
        }
        write!(f, ": {} leads to ", self.metadata)?;
        match self.to {
            Destination { addr: None, port: None } => write!(f, "another place"),
            Destination { addr: Some(addr), port: None } => write!(f, "{addr}"),
            Destination { addr: None, port: Some(port) } => write!(f, "port {port} of the node"),
            Destination { addr: Some(addr), port: Some(port) } => write!(f, "{addr}:{port}"),
        }
    }
}

/// A word as a shell takes it.
fn shell(word: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-./:+,=@%".contains(&byte);
    if !word.is_empty() && word.bytes().all(is_plain) || word == "!" {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(place: Place, words: Option<&str>) -> Rule {
        Rule {
            place,
            chain: "PREROUTING".to_owned(),
            metadata: Ipv4Addr::new(100, 100, 100, 200),
            words: words.map(|words| words.split(' ').map(str::to_owned).collect()),
            to: Destination { addr: Some(Ipv4Addr::new(10, 0, 0, 1)), port: Some(8181) },
        }
    }

    #[test]
    fn each_tool_has_its_command() {
        let (table, handle) = ("nat".to_owned(), 7);
        let of_iptables = Place::Iptables { table: table.clone(), handle };
        let of_nft = Place::Nft { family: "inet", table, handle };
        let words = Some("-d 100.100.100.200/32 ! -i lo -j DNAT");
        let rows = [
            (
                rule(of_iptables.clone(), words),
                "iptables-nft -t nat -D PREROUTING -d 100.100.100.200/32 ! -i lo -j DNAT",
            ),
            (rule(of_iptables, None), "nft delete rule ip nat PREROUTING handle 7"),
            (
                rule(Place::Legacy { number: 3 }, words),
                "iptables-legacy -t nat -D PREROUTING -d 100.100.100.200/32 ! -i lo -j DNAT",
            ),
            (rule(Place::Legacy { number: 3 }, None), "iptables-legacy -t nat -D PREROUTING 3"),
            (rule(of_nft, words), "nft delete rule inet nat PREROUTING handle 7"),
        ];

        for (rule, command) in rows {
            assert_eq!(rule.removal(), command);
        }
    }

    #[test]
    fn words_are_the_shells_whatever_they_hold() {
        let table = "nat; reboot '".to_owned();

        let removal = rule(Place::Nft { family: "ip", table, handle: 1 }, None).removal();

        assert_eq!(removal, r"nft delete rule ip 'nat; reboot '\''' PREROUTING handle 1");
        assert_eq!(shell("cali+"), "cali+");
        assert_eq!(shell(""), "''");
    }

    #[test]
    fn tells_where_it_leads() {
        let mut rule = rule(Place::Legacy { number: 1 }, None);
        assert_eq!(
            rule.to_string(),
            "iptables-legacy, nat PREROUTING: 100.100.100.200 leads to 10.0.0.1:8181"
        );
        rule.to.addr = None;
        assert!(rule.to_string().ends_with("leads to port 8181 of the node"));
    }
}
