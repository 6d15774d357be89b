use proptest::prelude::*;

use super::*;
use kube2ram_cloud::{Cloud, MetadataAddr, alibaba::DIALECT};

mod aws;
mod model;

use self::model::{confusing, could_mean, could_mean_credentials};

/// The route of a raw request, as far as it does not depend on the caller. `None` is 400.
fn routed(method: Method, raw: &[u8]) -> Option<Route> {
    let target =
        Target::parse(raw, MetadataAddr::v4_only("100.100.100.200:80".parse().unwrap()), &DIALECT).ok()?;
    Some(route(&method, &target, MetadataPolicy::Standard, &DIALECT))
}

fn get(raw: &str) -> Option<Route> {
    routed(Method::GET, raw.as_bytes())
}

fn credentials(requested: &str) -> Option<Route> {
    Some(Route::Credentials { requested: requested.into() })
}

fn passes(target: &str) -> Option<Route> {
    Some(Route::PassThrough(UpstreamTarget(target.to_owned())))
}

/// Passes only for pods that may have the node's role.
fn node_item(target: &str, refusal: Refusal) -> Option<Route> {
    Some(Route::NodeItem { target: NodeTarget(target.to_owned()), refusal })
}

fn refuses(refusal: Refusal) -> Option<Route> {
    Some(Route::Refuse(refusal))
}

/// The rows of docs/predecessors.md that the route decides.
#[test]
fn routes_as_the_predecessors_did_or_better() {
    const LIST: &str = "/latest/meta-data/ram/security-credentials";
    for (row, raw, expected) in [
        ("4.1", LIST.to_owned(), Some(Route::RoleList)),
        ("4.2", format!("{LIST}/"), Some(Route::RoleList)),
        ("4.2 bare ?", format!("{LIST}/?"), Some(Route::RoleList)),
        ("4.3", "/2016-01-01/meta-data/ram/security-credentials/".into(), Some(Route::RoleList)),
        ("4.3 any version", "/x/meta-data/ram/security-credentials/".into(), Some(Route::RoleList)),
        ("4.4", "//latest//meta-data/ram/security-credentials/".into(), Some(Route::RoleList)),
        ("4.6", format!("{LIST}/my-role"), credentials("my-role")),
        ("4.6 bare ?", format!("{LIST}/my-role?"), credentials("my-role")),
        ("4.6 Ram", "/latest/meta-data/Ram/security-credentials/my-role".into(), credentials("my-role")),
        ("4.7", format!("{LIST}/acs:ram::1:role/my-role"), credentials("acs:ram::1:role/my-role")),
        ("4.8", format!("{LIST}/acs:ram::1:role%2Fmy-role"), credentials("acs:ram::1:role/my-role")),
        ("4.10", format!("{LIST}/my-role/"), credentials("my-role")),
        ("4.10 path", format!("{LIST}/team/my-role"), credentials("team/my-role")),
        ("4.17", "/latest/meta-data/instance-id".into(), passes("/latest/meta-data/instance-id")),
        ("4.17 list", "/latest/meta-data/".into(), passes("/latest/meta-data/")),
        ("4.17 root", "/".into(), passes("/")),
        ("4.17 query", "/latest/x?a=b".into(), passes("/latest/x?a=b")),
        ("ram", "/latest/meta-data/ram".into(), Some(Route::CredentialDirectory)),
        ("ram/", "/latest/meta-data/RAM/".into(), Some(Route::CredentialDirectory)),
    ] {
        assert_eq!(get(&raw), expected, "row {row}: {raw}");
    }
}

#[test]
fn serves_only_methods_that_read_and_the_token_request() {
    for (row, method, raw, expected) in [
        ("4.18", Method::PUT, "/latest/api/token", Some(Route::Token)),
        ("4.18 bare ?", Method::PUT, "/latest/api/token?", Some(Route::Token)),
        ("4.18 version", Method::PUT, "/2016-01-01/api/token", Some(Route::Token)),
        ("4.18 case", Method::PUT, "/latest/API/Token/", Some(Route::Token)),
        ("4.23 HEAD", Method::HEAD, "/latest/meta-data/ram/security-credentials/", Some(Route::RoleList)),
        ("4.23 HEAD", Method::HEAD, "/latest/meta-data/instance-id", passes("/latest/meta-data/instance-id")),
    ] {
        assert_eq!(routed(method, raw.as_bytes()), expected, "row {row}");
    }
    let refused = refuses(Refusal::Method { allow: "GET, HEAD" });
    for (method, raw) in [
        (Method::POST, "/latest/meta-data/ram/security-credentials/"),
        (Method::POST, "/latest/meta-data/ram/security-credentials/my-role"),
        (Method::PUT, "/latest/meta-data/ram/security-credentials/my-role"),
        (Method::OPTIONS, "/latest/meta-data/ram"),
        (Method::PUT, "/latest/api/token/x"),
        (Method::PUT, "/a/b/api/token"),
        (Method::PUT, "/latest/meta-data/instance-id"),
        (Method::DELETE, "/latest/meta-data/instance-id"),
        (Method::TRACE, "/"),
    ] {
        assert_eq!(routed(method.clone(), raw.as_bytes()), refused, "{method} {raw}");
    }
    for method in [Method::GET, Method::HEAD, Method::POST, Method::DELETE] {
        let refused = refuses(Refusal::Method { allow: "PUT" });
        assert_eq!(routed(method, b"/latest/api/token"), refused);
    }
}

#[test]
fn closes_sensitive_items_at_any_depth_and_in_any_case() {
    for raw in [
        "/latest/meta-data/all",
        "/latest/Meta-Data/ALL/",
        "/meta-data/all",
        "/latest/user-data",
        "/2016-01-01/User-Data/",
        "/user-data",
        "/latest/vendor-data",
        "/latest/dynamic/Instance-Identity/document",
        "/latest/dynamic/instance-identity.json",
        "/x/latest/dynamic/instance-identity/document",
        "/dynamic/instance-identity/document",
        "/latest/dynamic/instance-identity/user-data",
        "/latest/dynamic/instance-identity/meta-data/all",
    ] {
        assert_eq!(get(raw), refuses(Refusal::Sensitive), "{raw}");
    }
    for raw in ["/latest/meta-data/allx", "/latest/dynamic/", "/latest/user-datum"] {
        assert_eq!(get(raw), passes(raw), "{raw}");
    }
}

#[test]
fn the_identity_document_and_its_siblings_are_for_who_may_have_the_nodes_role() {
    let routed = |method: Method, raw: &str, policy| {
        let metadata = MetadataAddr::v4_only("100.100.100.200:80".parse().unwrap());
        Some(route(&method, &Target::parse(raw.as_bytes(), metadata, &DIALECT).unwrap(), policy, &DIALECT))
    };

    for policy in [MetadataPolicy::Standard, MetadataPolicy::Strict] {
        for (raw, target) in [
            ("/latest/dynamic/instance-identity/document", "/latest/dynamic/instance-identity/document"),
            (
                "/2016-01-01/dynamic/instance-identity/pkcs7?audience=x",
                "/2016-01-01/dynamic/instance-identity/pkcs7?audience=x",
            ),
            ("/latest//dynamic/%69nstance-identity/", "/latest/dynamic/instance-identity/"),
        ] {
            assert_eq!(routed(Method::GET, raw, policy), node_item(target, Refusal::Sensitive), "{raw}");
            assert_eq!(routed(Method::POST, raw, policy), refuses(Refusal::Sensitive), "{raw}");
        }
        let query = "/latest/dynamic/instance-identity/document?x=/user-data";
        assert_eq!(routed(Method::GET, query, policy), refuses(Refusal::Sensitive));
    }
    let vsc = "/latest/meta-data/instance/vsc-options/enabled";
    assert_eq!(routed(Method::GET, vsc, MetadataPolicy::Standard), passes(vsc));
    assert_eq!(routed(Method::GET, vsc, MetadataPolicy::Strict), node_item(vsc, Refusal::NotListed));
    let document = "/latest/dynamic/instance-identity/document";
    assert_eq!(routed(Method::GET, document, MetadataPolicy::Open), passes(document));
}

#[test]
fn strict_policy_opens_a_list_in_its_own_spelling() {
    let strict = |raw: &str| {
        let target = Target::parse(
            raw.as_bytes(),
            MetadataAddr::v4_only("100.100.100.200:80".parse().unwrap()),
            &DIALECT,
        )
        .unwrap();
        Some(route(&Method::GET, &target, MetadataPolicy::Strict, &DIALECT))
    };

    for raw in [
        "/",
        "/latest/",
        "/latest/meta-data/",
        "/latest/meta-data/instance-id",
        "/2016-01-01/meta-data/region-id",
        "/latest/meta-data/instance/spot/termination-time",
        "/latest/meta-data/network/interfaces/macs/",
        "/latest/meta-data/network/interfaces/macs/00:16:3e:0f:11:22/private-ipv4s",
    ] {
        assert_eq!(strict(raw), passes(raw), "{raw}");
    }
    for raw in [
        "/latest/meta-data/Instance-Id",
        "/latest/meta-data/instance-id/x",
        "/latest/meta-data/instance/",
        "/latest/meta-data/instance/spot/",
        "/latest/meta-data/network/",
        "/latest/meta-data/public-keys/",
        "/latest/meta-data/eipv4",
        "/latest/maintenance/active-system-events",
        "/latest/dynamic/",
        "/x/latest/meta-data/instance-id",
        "/latest/latest",
        "/latest/x/instance-id",
    ] {
        assert_eq!(strict(raw), node_item(raw, Refusal::NotListed), "{raw}");
    }
    for raw in ["/latest/user-data", "/user-data", "/latest/meta-data/all"] {
        assert_eq!(strict(raw), refuses(Refusal::Sensitive), "{raw}");
    }
    assert_eq!(strict("/latest/meta-data/ram/security-credentials/"), Some(Route::RoleList));
}

#[test]
fn open_policy_opens_everything_but_credentials() {
    let open = |raw: &str| {
        let target = Target::parse(
            raw.as_bytes(),
            MetadataAddr::v4_only("100.100.100.200:80".parse().unwrap()),
            &DIALECT,
        )
        .unwrap();
        route(&Method::GET, &target, MetadataPolicy::Open, &DIALECT)
    };

    assert_eq!(Some(open("/latest/user-data")), passes("/latest/user-data"));
    assert_eq!(open("/latest/meta-data/all"), Route::Refuse(Refusal::Sensitive));
    assert_eq!(open("/latest/meta-data/ram/x"), Route::Refuse(Refusal::NotFound));
}

/// Section 4b of docs/predecessors.md: spellings of the credential paths that must be intercepted or refused.
fn confusing_spellings() -> Vec<(&'static str, Option<Route>)> {
    vec![
        ("/latest/meta-data/ram\\security-credentials/", None),
        ("/latest/meta-data\\ram\\security-credentials\\", None),
        ("/latest/meta-data/\\ram/security-credentials/", None),
        ("/latest\\\\\\meta-data\\ram\\\\security-credentials/", None),
        ("/latest/meta-data/RAM/security-credentials/", Some(Route::RoleList)),
        ("/latest/meta-data/Ram/security-credentials/", Some(Route::RoleList)),
        ("/LATEST/Meta-Data/ram/Security-Credentials/x", credentials("x")),
        ("/latest/meta-data/ram/security-credentials;x/", None),
        ("/latest/meta-data/ram;x/security-credentials/", None),
        ("/latest/meta-data/ram/%73ecurity-credentials/", Some(Route::RoleList)),
        ("/latest/meta-data/%72%61%6d/security-credentials/", Some(Route::RoleList)),
        ("/latest/meta-data/ram/%2573ecurity-credentials/", None),
        ("/latest/meta-data/ram%2fsecurity-credentials%2f", None),
        ("/latest/meta-data%2fram/security-credentials/", None),
        ("/latest/meta-data/ram%5csecurity-credentials", None),
        ("/latest/meta-data/ram/security-credentials%00", None),
        ("/latest/meta-data/ram/security-credentials\0", None),
        ("/latest/meta-data/ram%00/security-credentials", None),
        ("/latest/meta-data/x/../ram/security-credentials/", None),
        ("/latest/meta-data/x/%2e%2e/ram/security-credentials/", None),
        ("/latest/./meta-data/ram/security-credentials/", Some(Route::RoleList)),
        ("/latest/meta-data/./ram/%2e/security-credentials/", Some(Route::RoleList)),
        ("//latest/meta-data/ram/security-credentials/", Some(Route::RoleList)),
        ("/latest/meta-data//ram//security-credentials//", Some(Route::RoleList)),
        ("/latest/meta-data/ram/security-credentials/?x", Some(Route::RoleList)),
        ("/latest/meta-data/ram/security-credentials#", None),
        ("/latest/meta-data/ram#/security-credentials", None),
        ("/latest/meta-data/ram%23", None),
        ("/latest/meta-data/ram%3f", None),
        ("http://100.100.100.200/latest/meta-data/ram/security-credentials/", Some(Route::RoleList)),
        ("HTTP://100.100.100.200:80/latest/meta-data/ram/security-credentials/x", credentials("x")),
        ("http://example.com/latest/meta-data/ram/security-credentials/", None),
        ("\t/latest/meta-data/ram/security-credentials/", None),
        (" /latest/meta-data/ram/security-credentials/", None),
        ("/ latest/meta-data/ram/security-credentials/", None),
        ("latest/meta-data/ram/security-credentials/", None),
        ("/latest/meta-data/ram/other", refuses(Refusal::NotFound)),
        ("/latest/meta-data/ram/security-credentialsx", refuses(Refusal::NotFound)),
        ("/meta-data/ram/security-credentials/", refuses(Refusal::NotFound)),
        ("/a/b/meta-data/ram/security-credentials/", refuses(Refusal::NotFound)),
        ("/latest/meta-data/meta-data/ram/", refuses(Refusal::NotFound)),
        ("/latest/security-credentials/x", refuses(Refusal::NotFound)),
    ]
}

#[test]
fn never_passes_a_confusing_spelling_of_a_credential_path() {
    for (raw, expected) in confusing_spellings() {
        assert_eq!(get(raw), expected, "{raw:?}");
        assert!(could_mean_credentials(raw.as_bytes()), "the model must see through {raw:?}");
    }
    assert_eq!(get("/latest/meta-data/rambling"), passes("/latest/meta-data/rambling"));
}

/// Found by the fuzzer's model: spellings that are no credential path here, but might be one for another
/// server.
fn spellings_of_other_servers() -> Vec<(&'static str, Option<Route>)> {
    vec![
        ("/latest/meta-data/ram.", refuses(Refusal::NotFound)),
        ("/latest/meta-data/ram./security-credentials./x", refuses(Refusal::NotFound)),
        ("/latest/meta-data/ram.json", refuses(Refusal::NotFound)),
        ("/latest/meta-data/ram,1.1/x", refuses(Refusal::NotFound)),
        ("/latest/meta-data/ram+/x", refuses(Refusal::NotFound)),
        ("/latest/meta-data/ram::$DATA", refuses(Refusal::NotFound)),
        ("/latest/META-D~1/RAM/SECURI~1/x", None),
        ("/latest/meta-data?/ram", refuses(Refusal::NotFound)),
        ("/latest/x?y=%2Fsecurity-credentials%2Fx", refuses(Refusal::NotFound)),
        ("/latest/x?/../meta-data/ram", None),
        ("/latest/user-data.txt", refuses(Refusal::Sensitive)),
        ("/latest/?/user-data", refuses(Refusal::NotFound)),
    ]
}

#[test]
fn passes_nothing_that_is_closed_but_for_a_suffix_a_parameter_or_a_query() {
    for (raw, expected) in spellings_of_other_servers() {
        assert_eq!(get(raw), expected, "{raw:?}");
    }
    assert_eq!(get("/latest/meta-data/all."), refuses(Refusal::Sensitive));
    for raw in ["/latest/meta-data/x.ram", "/latest/meta-data/network/x.json", "/latest/x?a=https://b/c%20d"]
    {
        assert_eq!(get(raw), passes(raw), "{raw}");
    }
}

/// Some servers drop a blank, a parameter or dots: then the segments around them are neighbours.
#[test]
fn passes_no_segment_that_begins_otherwise_than_a_name() {
    for cloud in Cloud::ALL {
        let dialect = cloud.dialect();
        let directory = dialect.credentials.join("/");
        for policy in [MetadataPolicy::Open, MetadataPolicy::Standard, MetadataPolicy::Strict] {
            let routed = |raw: &str| {
                let target = Target::parse(raw.as_bytes(), dialect.metadata, dialect).unwrap();
                route(&Method::GET, &target, policy, dialect)
            };
            for odd in ["+", ",1", ":x", "...", ".,1", ".+", ".x", "..,1", "..+", "+..", "..:x", "%2e%2e,1"] {
                for raw in [
                    format!("/latest/{}", directory.replace('/', &format!("/{odd}/"))),
                    format!("/latest/{odd}"),
                ] {
                    assert_eq!(routed(&raw), Route::Refuse(Refusal::NotFound), "{cloud:?} {raw}");
                }
                let role = format!("/latest/{directory}/security-credentials/x{odd}");
                assert!(
                    matches!(routed(&role), Route::Credentials { .. }),
                    "a role may be called so: {role}"
                );
            }
        }
        for plain in ["/latest/meta-data/-", "/latest/meta-data/_x/00:16:3e:0f:11:22/a.,b"] {
            let target = Target::parse(plain.as_bytes(), dialect.metadata, dialect).unwrap();
            assert_eq!(Some(route(&Method::GET, &target, MetadataPolicy::Standard, dialect)), passes(plain));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn never_passes_what_could_mean_credentials(raw in prop_oneof![confusing(), prop::collection::vec(any::<u8>(), 0..64)]) {
        if let Some(Route::PassThrough(target)) = routed(Method::GET, &raw) {
            prop_assert!(!could_mean_credentials(&raw), "passed {:?} as {:?}", raw.escape_ascii().to_string(), target);
            prop_assert!(!could_mean_credentials(target.as_str().as_bytes()));
        }
    }

    #[test]
    fn passes_a_target_that_reads_the_same_again(raw in confusing()) {
        if let Some(Route::PassThrough(target)) = routed(Method::GET, &raw) {
            prop_assert!(target.as_str().parse::<http::Uri>().is_ok());
            prop_assert_eq!(get(target.as_str()), passes(target.as_str()));
        }
    }
}

/// The other cloud's table, by the same rules. No flag chooses it yet.
#[test]
fn aws_credentials_are_closed_in_every_spelling_and_the_unsigned_document_is_open() {
    use kube2ram_cloud::aws;
    let routed = |raw: &str, policy| {
        let target = Target::parse(raw.as_bytes(), aws::DIALECT.metadata, &aws::DIALECT).unwrap();
        Some(route(&Method::GET, &target, policy, &aws::DIALECT))
    };
    let (open, standard, strict) = (MetadataPolicy::Open, MetadataPolicy::Standard, MetadataPolicy::Strict);

    for policy in [open, standard, strict] {
        let list = "/latest/meta-data/iam/security-credentials/";
        assert_eq!(routed(list, policy), Some(Route::RoleList));
        assert_eq!(routed("/2021-07-15/meta-data//IAM/security-credentials/r", policy), credentials("r"));
        for closed in [
            "/latest/meta-data/iam/Info",
            "/latest/meta-data/IAM/info",
            "/latest/meta-data/iam/info.json",
            "/latest/meta-data/iam/info/x",
            "/latest/x/meta-data/iam/info",
            "/meta-data/iam/info",
            "/latest/meta-data/iam/security-credentials-extended/r",
            "/latest/meta-data/security-credentials-extended/r",
            "/latest/meta-data/identity-credentials/ec2/security-credentials/ec2-instance",
            "/latest/meta-data/Identity-Credentials-X/ec2",
            "/latest//meta-data/identity-credentials.json",
            "/latest/x/iam/security-credentials/r",
            "/meta-data/iam/security-credentials/r",
        ] {
            let route = routed(closed, policy).unwrap();
            assert!(matches!(route, Route::Refuse(_)), "{closed} {policy:?}: {route:?}");
        }
        let info = "/latest/meta-data/iam/info";
        for raw in [info, "/latest//meta-data/iam/%69nfo?x=/iam/security-credentials/r"] {
            assert_eq!(routed(raw, policy), node_item(info, Refusal::NotFound), "{raw} {policy:?}");
        }
        let target = Target::parse(info.as_bytes(), aws::DIALECT.metadata, &aws::DIALECT).unwrap();
        let posted = route(&Method::POST, &target, policy, &aws::DIALECT);
        assert_eq!(Some(posted), refuses(Refusal::Method { allow: READ }));
        let document = "/latest/dynamic/instance-identity/document";
        assert_eq!(routed(document, policy), passes(document), "{policy:?}");
        let region = "/latest/meta-data/placement/region";
        assert_eq!(routed(region, policy), passes(region), "{policy:?}");
    }
    for policy in [standard, strict] {
        assert_eq!(routed("/latest/user-data", policy), refuses(Refusal::Sensitive));
        let signature = "/latest/dynamic/instance-identity/pkcs7";
        assert_eq!(routed(signature, policy), node_item(signature, Refusal::Sensitive));
        assert_eq!(
            routed("/latest/dynamic/instance-identity/Document", policy),
            node_item("/latest/dynamic/instance-identity/Document", Refusal::Sensitive)
        );
    }
}
