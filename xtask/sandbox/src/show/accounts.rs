//! The shop window of `--credentials-from=service-account`: pods of several ServiceAccounts on a node whose
//! own role may assume nothing. Depends on `sandbox`. Called by the parent.

use std::time::Duration;

use anyhow::{Context as _, Result};

use super::{Answer, Table, body, credentials_of};
use crate::{
    Cloud, Sandbox,
    client::{Credentials, Reply, assume_role},
    node::PodSpec,
    standin::Accounts,
};

/// What the node's role is refused with.
const REFUSED: &str = "refused";
const ALLOWED: &str = "allowed";

/// Two ServiceAccounts with a role of their own, and pods of them. Nothing is in a pod's specification but
/// for two: one chooses among its ServiceAccount's roles, and one takes a role that trusts another
/// ServiceAccount.
pub(super) fn populate(sandbox: &mut Sandbox) -> Result<()> {
    let cloud = sandbox.cloud();
    sandbox.accounts().deny_node();
    for (role, account) in [
        ("orders-role", "orders"),
        ("orders-archive-role", "orders"),
        ("billing-role", "billing"),
        (Accounts::NODE_ROLE, "nobody"),
    ] {
        sandbox.add_role_of_account(role, "shop", account);
    }
    let (key, alias) = (cloud.annotation("role"), cloud.account_annotation());
    // As the cloud's own webhook has it: a name, or an ARN.
    let billing = match cloud {
        Cloud::Alibaba => "billing-role".to_owned(),
        Cloud::Aws => cloud.role_arn("billing-role"),
    };
    sandbox.api().apply_service_account("shop", "orders", &[(&*key, "orders-role")])?;
    sandbox.api().apply_service_account("shop", "billing", &[(alias, &*billing)])?;
    let allow_list = cloud.annotation("allowed-roles");
    let allowed = r#"["orders-*", "billing-role"]"#;
    sandbox.api().apply_namespace("shop", &[(&*allow_list, allowed)])?;
    let pod = |name: &str| PodSpec::new(name).namespace("shop");
    for spec in [
        pod("orders").service_account("orders"),
        pod("orders-2").service_account("orders"),
        pod("archive").service_account("orders").role("orders-archive-role"),
        pod("billing").service_account("billing"),
        pod("thief").service_account("billing").role("orders-role"),
        pod("plain"),
    ] {
        sandbox.add_pod(&spec)?;
    }
    Ok(())
}

pub(super) fn ask(sandbox: &mut Sandbox, table: &mut Table) -> Result<()> {
    let list = sandbox.cloud().list();
    let role = |name: &str| format!("{list}{name}");
    let sandbox = &*sandbox;
    let curl = |pod: &str, target: &str| sandbox.pod(pod)?.curl(target);

    for (pod, why, expected) in [
        ("orders", "credentials", "orders-role"),
        ("orders-2", "credentials, the same ServiceAccount", "orders-role"),
        ("archive", "credentials, its own annotation", "orders-archive-role"),
        ("billing", "credentials, the webhook's annotation", "billing-role"),
    ] {
        table.add(pod, why, expected, || curl(pod, &role(expected)).map(credentials_of));
    }
    table.add("thief", "a role that trusts another ServiceAccount", "403", || {
        curl("thief", &role("orders-role")).map(body)
    });
    table.add("orders", "billing's credentials", "403", || curl("orders", &role("billing-role")).map(body));
    table.add("orders", "the node's credentials", "403", || {
        curl("orders", &role(Accounts::NODE_ROLE)).map(body)
    });
    table.add("plain (no role)", "which role?", "404", || curl("plain", list).map(body));

    let node = sandbox.host_curl(&role(Accounts::NODE_ROLE))?;
    for target in ["orders-role", "billing-role"] {
        let asked = format!("AssumeRole of {target}");
        table.add("the node's role", &asked, REFUSED, || assume(sandbox, &node, target));
    }
    table.add("all ServiceAccounts", "sessions of orders-role", "1", || {
        let sessions = sandbox.sts().assumed(&sandbox.cloud().role_arn("orders-role"));
        let issued = sessions.iter().filter(|call| call.outcome == "OK").count();
        Ok(answer(issued.to_string()))
    });
    Ok(())
}

/// What whoever has stolen the node's credentials would do.
fn assume(sandbox: &Sandbox, node: &Reply, role: &str) -> Result<Answer> {
    let credentials =
        serde_json::from_str::<Credentials>(&node.body).context("the node has no credentials")?;
    let arn = sandbox.cloud().role_arn(role);
    let params = [("RoleArn", &*arn), ("RoleSessionName", "stolen")];
    let reply = assume_role(&sandbox.sts().url(), &credentials, &params)?;
    Ok(answer(if reply.status == 403 { REFUSED } else { ALLOWED }.to_owned()))
}

fn answer(text: String) -> Answer {
    Answer { latency: Duration::ZERO, status: 200, text }
}
