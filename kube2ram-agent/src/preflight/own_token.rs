//! The agent's own ServiceAccount token, as far as the node shows it: whether it is bound to a node, which
//! impersonating the node requires. The API server has the last word; see the status. Pure but for reading
//! the file; called by the parent.

use std::fs;

use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;

use super::Outcome;

/// Where the kubelet mounts it (Kubernetes, "Managing Service Accounts").
const PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";

/// That it is not as it should be keeps no agent from running: pods must be redirected in any case.
pub(super) fn check() -> Outcome {
    match fs::read_to_string(PATH) {
        Ok(token) => check_binding(&token.into()),
        Err(error) => Outcome::Amiss(format!(
            "cannot read {PATH}: {error}. Run this command in the agent's pod, whose token is to be checked"
        )),
    }
}

fn check_binding(token: &SecretString) -> Outcome {
    match node_of(token.expose_secret()) {
        Some(Some(node)) => Outcome::Met(format!("bound to node {node}")),
        Some(None) => Outcome::Amiss(
            "the agent's own token is bound to no node, so the agent cannot ask for tokens of ServiceAccounts as its node. Constrained impersonation is in Kubernetes 1.36 and later: upgrade the cluster, or give the agent --token-requests-as=agent, together with the admission policies that confine it"
                .to_owned(),
        ),
        None => Outcome::Amiss(format!("{PATH} holds no token of a ServiceAccount: check the volumes of the agent's pod")),
    }
}

/// The node that a token is bound to, by its claims; `None` if it is no token. Nothing is verified.
fn node_of(token: &str) -> Option<Option<String>> {
    let claims = decode(token.trim().split('.').nth(1)?)?;
    let claims: Claims = serde_json::from_slice(&claims).ok()?;
    Some(claims.kubernetes.node.map(|node| node.name))
}

/// The claims of a ServiceAccount's token (KEP-4193).
#[derive(Deserialize)]
struct Claims {
    #[serde(rename = "kubernetes.io")]
    kubernetes: Kubernetes,
}

#[derive(Deserialize)]
struct Kubernetes {
    node: Option<Node>,
}

#[derive(Deserialize)]
struct Node {
    name: String,
}

/// Base64url without padding (RFC 4648, section 5); `None` for anything else.
fn decode(text: &str) -> Option<Vec<u8>> {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut bytes = Vec::with_capacity(text.len());
    let (mut bits, mut count) = (0_u32, 0_u32);
    for c in text.bytes() {
        let value = ALPHABET.iter().position(|&letter| letter == c)?;
        bits = bits << 6 | u32::try_from(value).ok()?;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push(u8::try_from(bits >> count & 0xff).ok()?);
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The claims are those of the payload; neither header nor signature counts here.
    fn token(payload: &str) -> SecretString {
        format!("e30.{payload}.c2ln").into()
    }

    /// `{"kubernetes.io":{"namespace":"k","node":{"name":"n1","uid":"u"}}}`
    const BOUND: &str =
        "eyJrdWJlcm5ldGVzLmlvIjp7Im5hbWVzcGFjZSI6ImsiLCJub2RlIjp7Im5hbWUiOiJuMSIsInVpZCI6InUifX19";
    /// `{"kubernetes.io":{"namespace":"k"}}`
    const UNBOUND: &str = "eyJrdWJlcm5ldGVzLmlvIjp7Im5hbWVzcGFjZSI6ImsifX0";

    #[test]
    fn a_token_that_is_bound_to_no_node_is_reported_with_the_remedy() {
        assert_eq!(check_binding(&token(BOUND)), Outcome::Met("bound to node n1".to_owned()));

        let Outcome::Amiss(text) = check_binding(&token(UNBOUND)) else { panic!("it is not bound") };

        assert!(text.contains("1.36") && text.contains("--token-requests-as=agent"), "{text}");
        assert!(!text.contains(UNBOUND));
    }

    #[test]
    fn what_is_no_token_is_reported_and_not_shown() {
        for text in ["", "hush", "e30.e30.x", "e30.!.x", "e30.eyJ.x", "..", "e30.W10.x"] {
            let Outcome::Amiss(reported) = check_binding(&text.into()) else { panic!("{text}") };

            assert!(reported.contains("holds no token") && !reported.contains("hush"), "{reported}");
        }
    }

    #[test]
    fn decodes_the_vectors_of_rfc_4648_without_padding() {
        for (text, bytes) in [
            ("", &b""[..]),
            ("Zg", b"f"),
            ("Zm8", b"fo"),
            ("Zm9v", b"foo"),
            ("Zm9vYg", b"foob"),
            ("Zm9vYmE", b"fooba"),
            ("Zm9vYmFy", b"foobar"),
            ("-_8", &[0xfb, 0xff]),
        ] {
            assert_eq!(decode(text).unwrap(), bytes, "{text}");
        }
        assert_eq!(decode("Zg=="), None);
    }
}
