//! Session tokens as pods get them: version 2 of the metadata service, by the agent alone.

use crate::support::{INSTANCE_ID, LIST, Lab, TOKEN, TOKEN_HEADER, TTL_HEADER, owner, pod, url, url6};

#[test]
#[ignore = "needs root: cargo xtask test"]
fn a_token_comes_with_its_lifetime_and_is_required_where_the_flag_is_set() {
    let lab = Lab::with_agent("aws-tokens", &[pod("orders"), pod("billing")], &["--require-token"]);
    let put = |pod: &str, url: &str, headers: &[(&str, &str)]| lab.request(pod, "PUT", url, headers).unwrap();
    let get = |target: &str, token: Option<&str>| {
        let header = token.map(|token| (TOKEN_HEADER, token));
        lab.request("orders", "GET", &url(target), header.as_slice()).unwrap()
    };

    let token = put("orders", &url(TOKEN), &[(TTL_HEADER, "300")]);
    // Rust's SDK takes an answer without the header for none, Python's and Node's fail on a newline.
    assert_eq!((token.status, &*token.headers[TTL_HEADER]), (200, "300"));
    assert!(!token.body.is_empty() && token.body.trim() == token.body);
    let foreign = put("billing", &url(TOKEN), &[(TTL_HEADER, "300")]).body;
    for target in [LIST, &format!("{LIST}orders-role"), INSTANCE_ID] {
        assert_eq!(get(target, None).status, 401, "{target}: the real server's status");
        assert_eq!(get(target, Some(&foreign)).status, 401, "{target}: another pod's");
        assert_ne!(get(target, Some(&token.body)).status, 401, "{target}");
    }
    assert_eq!(get(LIST, Some(&token.body)).body, "orders-role");
    let by_ipv6 = put("orders", &url6(TOKEN), &[(TTL_HEADER, "21600")]);
    assert_eq!((by_ipv6.status, &*by_ipv6.headers[TTL_HEADER]), (200, "21600"));
    assert_eq!(get(INSTANCE_ID, Some(&by_ipv6.body)).status, 200);

    for ttl in [None, Some("0"), Some("21601"), Some("x")] {
        let header = ttl.map(|seconds| (TTL_HEADER, seconds));
        let refused = put("orders", &url(TOKEN), header.as_slice());
        assert_eq!((refused.status, refused.headers.contains_key(TTL_HEADER)), (400, false), "{ttl:?}");
    }
    let proxied = [(TTL_HEADER, "60"), ("X-Forwarded-For", "10.0.0.1")];
    assert_eq!(put("orders", &url(TOKEN), &proxied).status, 403);
    assert_eq!(lab.ask("orders", TOKEN).status, 405);
    // The tokens of pods are the agent's own.
    let seen = lab.metadata().seen();
    assert!(seen.iter().all(|seen| !format!("{seen:?}").contains(&token.body)));
    assert_eq!(lab.leaks(), []);
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn without_the_flag_clients_of_version_1_are_served() {
    let lab = Lab::with_agent("aws-version-1", &[pod("orders")], &[]);

    assert_eq!(lab.ask("orders", LIST).body, "orders-role");
    let reply = lab.ask_until_ready("orders", &format!("{LIST}orders-role"));
    assert_eq!(owner(&reply), "orders-role");
    assert_eq!(reply.headers["server"], "EC2ws");
    assert_eq!(lab.leaks(), []);
}
