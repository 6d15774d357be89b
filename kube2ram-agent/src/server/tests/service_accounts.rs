//! Roles by ServiceAccount, as pods and owners see them.

use http::StatusCode;

use super::harness::*;
use crate::{
    kubernetes::About,
    pod::Pod,
    role::CredentialsFrom::{self, Node, ServiceAccount},
    server::HostNetworkPods,
};
use kube2ram_cloud::{Cloud, credentials::IssueErrorKind};

const ALIAS: &str = "pod-identity.alibabacloud.com/role-name";
const WAYS: [CredentialsFrom; 2] = [Node, ServiceAccount];

async fn start(from: CredentialsFrom) -> Harness {
    Harness::start_from(from, Some(ALIAS), None, |_| {}).await
}

/// A pod whose ServiceAccount has these annotations; `None`: they are not known.
fn pod_of(annotations: &[(&str, &str)], account: Option<&[(&str, &str)]>) -> Pod {
    Pod { account_annotations: account.map(|account| pod(account).annotations.into()), ..pod(annotations) }
}

fn is_of(harness: &Harness, pod: Pod) {
    *harness.world.pod.lock().unwrap() = Ok(pod);
    harness.world.notices.lock().unwrap().clear();
}

#[tokio::test]
async fn a_pod_is_served_the_role_of_its_service_account_and_its_own_before_that() {
    for from in WAYS {
        let harness = start(from).await;
        for (own, account, role) in [
            (&[][..], &[(ALIAS, "alias")][..], "alias"),
            (&[], &[(ROLE_KEY, "accounts"), (ALIAS, "alias")], "accounts"),
            (&[(ROLE_KEY, "own")], &[(ROLE_KEY, "accounts"), (ALIAS, "alias")], "own"),
        ] {
            is_of(&harness, pod_of(own, Some(account)));

            assert_eq!(harness.get(LIST).await.body(), role, "{from:?}");
            let answer = harness.get(&format!("{LIST}{role}")).await;

            assert_eq!(answer.status(), StatusCode::OK);
            assert!(answer.body().contains(&format!("STS.acs:ram::123456789012:role/{role}")), "{answer:?}");
            let other = harness.get(&format!("{LIST}other")).await;
            assert_eq!(other.status(), StatusCode::FORBIDDEN, "{from:?}");
        }
        is_of(&harness, pod_of(&[], Some(&[])));
        assert_eq!(harness.get(LIST).await.status(), StatusCode::NOT_FOUND, "{from:?}");
    }
}

#[tokio::test]
async fn a_pod_whose_service_account_is_not_known_waits_and_has_neither_role() {
    for from in WAYS {
        let harness = start(from).await;
        for (own, host_network) in [(&[][..], false), (&[(ROLE_KEY, "own")], false), (&[], true)] {
            is_of(&harness, Pod { host_network, ..pod_of(own, None) });

            for target in [LIST.to_owned(), format!("{LIST}own")] {
                let answer = harness.get(&target).await;

                assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE, "{from:?} {own:?}");
                assert_eq!(answer.headers()["retry-after"], "1");
                assert_eq!(answer.body(), "the caller's pod is not known yet\n");
            }
            assert!(harness.notice_reasons().is_empty(), "it is known in a moment");
        }
        assert!(harness.upstream_heads().is_empty());
    }
}

#[tokio::test]
async fn a_host_network_pod_of_an_annotated_service_account_is_not_passed_the_nodes_role() {
    let harness = start(ServiceAccount).await;
    let host_network = |account| Pod { host_network: true, ..pod_of(&[], Some(account)) };
    is_of(&harness, host_network(&[(ALIAS, "alias")]));

    assert_eq!(harness.get(LIST).await.body(), "alias");
    assert!(harness.upstream_heads().is_empty());

    is_of(&harness, host_network(&[]));
    assert_eq!(harness.get(LIST).await.body(), UPSTREAM_BODY);
    let deny = |config: &mut crate::server::Config| config.host_network_pods = HostNetworkPods::Deny;
    let harness = Harness::start_from(ServiceAccount, Some(ALIAS), None, deny).await;
    is_of(&harness, host_network(&[]));
    assert_eq!(harness.get(LIST).await.status(), StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn what_cannot_be_used_is_reported_with_the_object_that_has_it() {
    let harness = start(ServiceAccount).await;
    for (own, account, body, words) in [
        (
            &[][..],
            &[(ALIAS, "")][..],
            "the pod's service account's annotation pod-identity.alibabacloud.com/role-name is malformed\n",
            "pod-identity.alibabacloud.com/role-name of ServiceAccount team-a/web is empty",
        ),
        (
            &[(ROLE_KEY, "")],
            &[(ALIAS, "alias")],
            "the pod's annotation ram.aliyuncs.com/role is malformed\n",
            "the value of ram.aliyuncs.com/role is empty",
        ),
        (
            &[("external-id", "tenant:7")],
            &[(ALIAS, "alias")],
            "the pod's annotation external-id cannot be used with this agent\n",
            "oidc:sub",
        ),
    ] {
        is_of(&harness, pod_of(own, Some(account)));

        let denied = harness.get(&format!("{LIST}alias")).await;

        assert_eq!((denied.status(), &**denied.body()), (StatusCode::FORBIDDEN, body));
        assert_eq!(harness.notice_reasons(), ["MalformedAnnotation"]);
        let message = harness.world.notices.lock().unwrap()[0].message.clone();
        assert!(message.contains(words), "{message}");
    }
    // The external id is what the other way takes.
    let by_node = start(Node).await;
    is_of(&by_node, pod_of(&[("external-id", "tenant:7")], Some(&[(ALIAS, "alias")])));
    assert_eq!(by_node.get(&format!("{LIST}alias")).await.status(), StatusCode::OK);
}

#[tokio::test]
async fn the_clusters_configuration_is_an_event_of_the_node_and_a_missing_token_one_of_the_pod() {
    for dialect in Cloud::ALL.map(Cloud::dialect) {
        let list = format!("/latest/{}/security-credentials/", dialect.credentials.join("/"));
        for (kind, about_node, reason) in [
            (IssueErrorKind::ClusterConfiguration, true, "ClusterConfigurationBroken"),
            (IssueErrorKind::Token, false, "CredentialsUnavailable"),
        ] {
            let configure = |config: &mut crate::server::Config| config.dialect = dialect;
            let harness = Harness::start_from(ServiceAccount, Some(ALIAS), None, configure).await;
            is_of(&harness, pod_of(&[], Some(&[(ALIAS, "alias")])));
            *harness.world.refusal.lock().unwrap() = Some(kind);

            let failed = harness.get(&format!("{list}alias")).await;

            assert_eq!(failed.status(), StatusCode::SERVICE_UNAVAILABLE, "{kind:?}");
            assert!(failed.headers().contains_key("retry-after"), "{kind:?}");
            assert!(!failed.body().contains("SomeCode"), "{}", failed.body());
            assert_eq!(harness.notice_reasons(), [reason]);
            let notice = harness.world.notices.lock().unwrap()[0].clone();
            assert_eq!(notice.about == About::Node, about_node, "{notice:?}");
            assert!(notice.message.contains("(SomeCode): "), "{notice:?}");
            assert!(notice.message.ends_with((dialect.exchange_advice)(kind)), "{notice:?}");
            // One event of the node for all pods: it names none of them.
            assert!(!about_node || !notice.message.contains("alias"), "{notice:?}");
        }
    }
}
