use serde_json::Value;

use super::{super::object::testing::pod_update, *};
use crate::kubernetes::object::PodUpdate;

const TOKEN: &str = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJzZWNyZXQifQ.c2lnbmF0dXJl_-";

fn answer(token: &Value) -> String {
    json!({
        "kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1",
        "status": {"token": token, "expirationTimestamp": "2026-01-01T00:10:00Z"},
    })
    .to_string()
}

fn refusal(code: u16, kind: &str, message: &str) -> Refusal {
    let reason = if code == 404 { "NotFound" } else { "" };
    let (reason, kind, message) = (reason.into(), kind.into(), message.into());
    Refusal { code, reason, kind, message, retry_after: None }
}

#[test]
fn reads_the_token_and_when_it_expires_and_prints_neither() {
    let read = token(answer(&TOKEN.into()).as_bytes()).unwrap();

    assert_eq!(read.token.expose_secret(), TOKEN);
    assert_eq!(read.expires_at, "2026-01-01T00:10:00Z".parse().unwrap());
    assert!(!format!("{read:?}").contains("eyJ"));
}

#[test]
fn refuses_what_is_no_token() {
    let long = format!("{}.b.c", "a".repeat(TOKEN_LIMIT_BYTES - 4));
    assert!(token(answer(&long.as_str().into()).as_bytes()).is_some());

    let too_long = format!("a{long}");
    for odd in
        ["", "a", "a.b", "a.b.c.d", "..", "a..c", "a.b.c\n", "a.b. c", "a.b.c=", "a.b.é", too_long.as_str()]
    {
        assert!(token(answer(&odd.into()).as_bytes()).is_none(), "{odd:?}");
    }
    for odd in [json!(null), json!(1), json!([TOKEN])] {
        assert!(token(answer(&odd).as_bytes()).is_none(), "{odd}");
    }
    let undated = json!({"status": {"token": TOKEN}}).to_string();
    let misdated = json!({"status": {"token": TOKEN, "expirationTimestamp": "soon"}}).to_string();
    let longer = answer(&TOKEN.into()) + "x";
    for odd in [undated.as_str(), misdated.as_str(), longer.as_str(), "", "{}", r#"{"status":"a.b.c"}"#] {
        assert!(token(odd.as_bytes()).is_none(), "{odd:?}");
    }
}

#[test]
fn asks_for_one_audience_and_binds_the_token_to_the_pod_and_its_uid() {
    let PodUpdate::Live(known) = pod_update(1, "web-0") else { unreachable!() };

    let body: Value =
        serde_json::from_slice(&body(&known.pod, "sts.example", Duration::from_secs(600))).unwrap();

    assert_eq!(
        body["spec"],
        json!({
            "audiences": ["sts.example"],
            "expirationSeconds": 600,
            "boundObjectRef": {
                "apiVersion": "v1", "kind": "Pod", "name": "web-0", "uid": "00000000-0000-4000-8000-000000000001",
            },
        })
    );
}

/// As the API server wraps the message of the manifests' policy.
const NOT_OPTED_IN: &str = "serviceaccounts \"web\" is forbidden: ValidatingAdmissionPolicy 'kube2ram-token-requests' with binding 'kube2ram-token-requests' denied request: the namespace has not opted in to tokens for agents: kubectl label namespace <namespace> kube2ram/service-account-tokens=true";

#[test]
fn the_policy_says_what_is_looked_for() {
    let (_, message) = NOT_OPTED_IN.split_once("denied request: ").unwrap();
    let manifest =
        include_str!("../../../../deploy/kustomize/components/service-accounts-by-policy/admission.yaml");
    assert!(manifest.contains(message), "{message}");
    let (start, _) = message.split_once(": ").unwrap();
    let template = include_str!("../../../../deploy/helm/kube2ram/templates/service-accounts.yaml");
    assert!(template.contains(start), "{start}");
}

/// The messages are those of Kubernetes 1.36.
#[test]
fn tells_apart_what_a_refusal_is_about() {
    use Cause::{Account, Configuration, NotOptedIn, Other, Overload, Pod, Terminating};
    use Missing::{Audience, Impersonation, Lifetime, Right};
    for (code, kind, message, expected) in [
        (404, "serviceaccounts", r#"serviceaccounts "web" not found"#, Account),
        (404, "pods", r#"pods "web-0" not found"#, Pod),
        (404, "pod", r#"pod "web-0" not found"#, Pod),
        (409, "Pod", "the UID in the bound object reference (u) does not match the UID in record", Pod),
        (
            400,
            "",
            r#"cannot bind token for serviceaccount "web" to pod running with different serviceaccount name."#,
            Pod,
        ),
        (
            403,
            "serviceaccounts",
            "User \"system:node:n\" cannot create resource: no relationship found between node 'n' and this object",
            Pod,
        ),
        (403, "", "the UID in the bound object reference (u) does not match the UID in record", Pod),
        (
            403,
            "users",
            r#"User "system:serviceaccount:k:k" cannot impersonate resource "users""#,
            Configuration(Impersonation),
        ),
        (
            403,
            "users",
            r#"users "system:node:n" is forbidden: User "u" cannot impersonate:associated-node resource "users""#,
            Configuration(Impersonation),
        ),
        (403, "", r#"audience "sts.example" not found in pod spec volume"#, Configuration(Audience)),
        (
            403,
            "serviceaccounts",
            r#"serviceaccounts "web" is forbidden: unable to create new content in namespace shop because it is being terminated"#,
            Terminating,
        ),
        (403, "serviceaccounts", NOT_OPTED_IN, NotOptedIn),
        // Users choose the names.
        (
            403,
            "serviceaccounts",
            "serviceaccounts \"impersonate\" is forbidden: User \"system:node:n\" cannot create resource \"serviceaccounts/token\" in the namespace \"audience\": no relationship found between node 'n' and this object",
            Pod,
        ),
        (
            403,
            "serviceaccounts",
            r#"serviceaccounts "impersonate" is forbidden: User "u" cannot create resource "serviceaccounts/token" in the namespace "audience""#,
            Configuration(Right),
        ),
        (
            403,
            "serviceaccounts",
            r#"serviceaccounts "being-terminated" is forbidden: User "u" cannot create resource "serviceaccounts/token" in the namespace "opted-in""#,
            Configuration(Right),
        ),
        (403, "", "ValidatingAdmissionPolicy 'p' denied request: audience is not ours", Configuration(Right)),
        (403, "", r#"cannot create resource "serviceaccounts/token""#, Configuration(Right)),
        (403, "", "", Configuration(Right)),
        (400, "", "", Configuration(Lifetime)),
        (422, "", "may not specify a duration less than 10 minutes", Configuration(Lifetime)),
        (422, "", "ValidatingAdmissionPolicy 'p' denied request: no params found for policy binding", Other),
        (429, "", "", Overload),
        (401, "", "Unauthorized", Other),
        (500, "", "", Other),
        (503, "", "", Other),
        (302, "", "", Other),
    ] {
        assert_eq!(cause(&refusal(code, kind, message)), expected, "{code} {message}");
    }
    // A proxy's, which proves nothing.
    let refusal = Refusal { reason: "".into(), ..refusal(404, "", "404 page not found") };
    assert_eq!(cause(&refusal), Other);
}

#[test]
fn messages_are_bounded() {
    let error = issue_error(IssueErrorKind::Token, "NoToken", &"é".repeat(1000));

    assert_eq!(error.message.len(), MESSAGE_LIMIT);
}
