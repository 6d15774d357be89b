//! `add` over real connections: what is written, and what is not when somebody else was faster.

use super::{
    super::add::{AddError, Addition, Edit, prepare},
    *,
};

async fn edit(api: &ApiServer, name: &str) -> Edit {
    let client = ClientConfig::Server { url: api.url(), token: None, insecure: false };
    let addition = Addition {
        is_role: false,
        arn: format!("acs:ram::{ACCOUNT}:user/{name}"),
        username: name.to_owned(),
        groups: Vec::new(),
        user_id: None,
    };
    prepare(client, None, &addition).await.unwrap()
}

fn data(api: &ApiServer) -> Value {
    api.get(CONFIG_MAPS, "alibabacloud-auth")["data"].clone()
}

fn is_conflict(written: &Result<(), AddError>) -> bool {
    matches!(written, Err(AddError::Request { what: "write", source: kube::Error::Api(status) }) if status.code == 409)
}

fn lines(name: &str) -> String {
    format!("- userarn: \"acs:ram::{ACCOUNT}:user/{name}\"\n  username: \"{name}\"\n")
}

#[tokio::test]
async fn a_mapping_is_added_and_other_keys_stay() {
    let api = ApiServer::start();
    let mut there = config_map(&lines("alice"));
    there["data"]["mapAccounts"] = "- \"1\"\n".into();
    there["data"]["other"] = "kept".into();
    api.put(CONFIG_MAPS, "alibabacloud-auth", there);

    edit(&api, "bob").await.write().await.unwrap();

    let expected = json!({
        "mapUsers": lines("alice") + &lines("bob"), "mapAccounts": "- \"1\"\n", "other": "kept",
    });
    assert_eq!(data(&api), expected);
}

#[tokio::test]
async fn a_config_map_is_created_once() {
    let api = ApiServer::start();
    let (first, second) = (edit(&api, "alice").await, edit(&api, "bob").await);

    first.write().await.unwrap();

    let written = second.write().await;
    assert!(is_conflict(&written), "{written:?}");
    assert_eq!(data(&api), json!({ "mapUsers": lines("alice") }));
}

#[tokio::test]
async fn nothing_is_written_over_what_somebody_else_has_changed() {
    let api = ApiServer::start();
    api.put(CONFIG_MAPS, "alibabacloud-auth", config_map(&lines("alice")));
    let (first, second) = (edit(&api, "bob").await, edit(&api, "carol").await);

    first.write().await.unwrap();

    let written = second.write().await;
    assert!(is_conflict(&written), "{written:?}");
    assert_eq!(data(&api), json!({ "mapUsers": lines("alice") + &lines("bob") }));
}
