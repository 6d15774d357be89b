//! Roles by ServiceAccount in the chart: which rights and policies come with which values.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{
    rendered::{lets_create_tokens, variables},
    support::{Objects, helm, notes, objects, template},
};

/// Of the agent, by its variables: `credentials-from` and `token-requests-as`.
fn way(objects: &Objects) -> (String, String) {
    let env = variables(&template(objects)["containers"][0]);
    let of = |name: &str| env.get(name).cloned().unwrap_or_default();
    (of("KUBE2RAM_CREDENTIALS_FROM"), of("KUBE2RAM_TOKEN_REQUESTS_AS"))
}

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn roles_by_service_account_are_rendered_for_clusters_that_have_what_confines_them() {
    let set = "credentialsFrom=service-account,oidcProviderArn=acs:ram::1:oidc-provider/a";
    let render = |version: &str, more: &str| {
        helm(&[&format!("--kube-version={version}"), "--set", &format!("{set},{more}")])
    };
    for (version, mode, next) in [
        ("1.34.9", "node", "tokenRequests: agent"),
        ("1.29.9", "node", "tokenRequests: agent"),
        ("1.29.9", "agent", "tokenRequests: namespaces"),
    ] {
        let refused = render(version, &format!("tokenRequests={mode}")).unwrap_err();
        assert!(refused.contains(next), "{version} {mode}: {refused}");
    }
    for (version, mode) in [
        ("1.36.0", "node"),
        ("1.36.1-aliyun.1", "node"),
        // With the feature gate.
        ("1.35.0", "node"),
        ("1.30.0-aliyun.1", "agent"),
        ("1.30.0", "namespaces"),
        ("1.25.0", "namespaces"),
    ] {
        let objects = objects(&render(version, &format!("tokenRequests={mode}")).unwrap());
        let by = if mode == "node" { "node" } else { "agent" };
        assert_eq!(way(&objects), ("service-account".to_owned(), by.to_owned()), "{mode}");
        let policies = objects.keys().filter(|name| name.starts_with("ValidatingAdmissionPolicy ")).count();
        let expected = if mode == "node" || version == "1.25.0" { 0 } else { 2 };
        assert_eq!(policies, expected, "{version} {mode}");
    }

    let without_provider = helm(&["--set=credentialsFrom=service-account"]).unwrap_err();
    assert!(without_provider.contains("oidcProviderArn"), "{without_provider}");
    helm(&["--set=credentialsFrom=service-account,cloud=aws"]).unwrap();
    let own_role = render(
        "1.36.0",
        "oidc.enabled=true,oidc.roleArn=acs:ram::1:role/a,oidc.providerArn=acs:ram::1:oidc-provider/a",
    );
    assert!(own_role.unwrap_err().contains("oidc.enabled: false"));
}

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn the_policies_on_tokens_go_by_the_releases_names_and_label() {
    let set =
        "credentialsFrom=service-account,tokenRequests=agent,oidcProviderArn=acs:ram::1:oidc-provider/a";
    let policy = |more: &str| {
        let objects = objects(&helm(&["--set", &format!("{set}{more}")]).unwrap());
        objects["ValidatingAdmissionPolicy /kube2ram-token-requests"].to_string()
    };

    let own = policy(",serviceAccount.name=identities,optInLabel=example.com/roles");

    let same = r#"request.userInfo.username == \"system:serviceaccount:kube-system:identities\""#;
    assert!(own.contains(same), "strangers of that name are not judged: {own}");
    assert!(own.contains(r#"labels[\"example.com/roles\"]"#), "{own}");
    assert!(own.contains("kubectl label namespace <namespace> example.com/roles=true"), "{own}");
    assert!(
        notes(&["--set", set])
            .contains("kubectl label namespace default kube2ram/service-account-tokens=true")
    );
}

/// The names of what gives rights, and of what confines them.
fn of_rights(objects: &Objects) -> BTreeSet<&str> {
    let is_of_rights = |name: &&str| name.starts_with("Cluster") || name.starts_with("ValidatingAdmission");
    objects.keys().map(String::as_str).filter(is_of_rights).collect()
}

fn rules(objects: &Objects) -> Vec<&Value> {
    objects.values().flat_map(|object| object["rules"].as_array().into_iter().flatten()).collect()
}

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn rights_of_the_former_way_and_of_the_next_one_can_be_kept_while_nodes_change() {
    let ways = [
        "credentialsFrom=node,cloud=aws",
        "credentialsFrom=service-account,cloud=aws,tokenRequests=node",
        "credentialsFrom=service-account,cloud=aws,tokenRequests=agent",
        "credentialsFrom=service-account,cloud=aws,tokenRequests=namespaces",
    ];
    let render = |set: &str| objects(&helm(&["--set", set]).unwrap());
    for from in ways {
        let former = render(from);
        let Some((_, kept)) = from.split_once("tokenRequests=") else { continue };
        for to in ways {
            let (next, both) = (render(to), render(&format!("{to},tokenRights={{{kept}}}")));

            assert_eq!(way(&both), way(&next), "{from} to {to}: rights alone are added");
            let needed: BTreeSet<_> = of_rights(&former).union(&of_rights(&next)).copied().collect();
            assert_eq!(of_rights(&both), needed, "{from} to {to}");
            for rule in rules(&former).into_iter().chain(rules(&next)) {
                assert!(rules(&both).contains(&rule), "{from} to {to}: {rule}");
            }
        }
    }
}

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn the_policies_can_be_there_before_the_right_and_change_no_agent() {
    let usual = objects(&helm(&[]).unwrap());

    let first = objects(&helm(&["--set", "tokenRights={namespaces}"]).unwrap());

    let added: Vec<_> = of_rights(&first).difference(&of_rights(&usual)).copied().collect();
    assert_eq!(
        added,
        [
            "ValidatingAdmissionPolicy /kube2ram-token-pods",
            "ValidatingAdmissionPolicy /kube2ram-token-requests",
            "ValidatingAdmissionPolicyBinding /kube2ram-token-pods",
            "ValidatingAdmissionPolicyBinding /kube2ram-token-requests",
        ]
    );
    for name in added {
        let label = &first[name]["metadata"]["labels"]["app.kubernetes.io/component"];
        assert_eq!(label, "token-policies", "{name}: kubectl apply selects it");
    }
    assert!(!rules(&first).into_iter().any(lets_create_tokens));
    assert_eq!(template(&first), template(&usual));
    let refused = helm(&["--set", "tokenRights={kubelet}"]).unwrap_err();
    assert!(refused.contains("tokenRights") && refused.contains("schema"), "{refused}");
}
