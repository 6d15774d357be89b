//! Obtains credentials as the SDK does by itself; each line of input asks once more: `new` with a new chain,
//! `kept` with the one that lives as long as the process. Prints JSON lines.

use reqsign_aliyun_oss::DefaultCredentialProvider;
use reqsign_core::{Context, OsEnv, ProvideCredential};
use reqsign_file_read_tokio::TokioFileRead;
use reqsign_http_send_reqwest::ReqwestHttpSend;
use tokio::io::{AsyncBufReadExt, BufReader, stdin};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let context = Context::new()
        .with_file_read(TokioFileRead)
        .with_http_send(ReqwestHttpSend::new(reqwest::Client::new()))
        .with_env(OsEnv);
    // Not blocking: a pool notices that the server has closed a connection only while the runtime runs.
    let mut lines = BufReader::new(stdin()).lines();
    let kept = DefaultCredentialProvider::new();
    while let Some(line) = lines.next_line().await? {
        let new = DefaultCredentialProvider::new();
        let chain = if line == "kept" { &kept } else { &new };
        let given = chain.provide_credential(&context).await?;
        let given = given.ok_or("the chain has no credentials")?;
        let answer = serde_json::json!({
            "AccessKeyId": given.access_key_id,
            "AccessKeySecret": given.access_key_secret,
            "SecurityToken": given.security_token,
            "Version": version("reqsign-aliyun-oss"),
        });
        println!("{answer}");
    }
    Ok(())
}

/// The locked version of a crate.
fn version(name: &str) -> Option<&'static str> {
    let package = format!("name = \"{name}\"\nversion = \"");
    include_str!("Cargo.lock").split(&package).nth(1)?.split('"').next()
}
