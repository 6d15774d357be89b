//! Makes a signed call as the SDK does by itself; each line of input asks once more: `new` with a new client,
//! `kept` with the one that lives as long as the process, `region` for the region that the SDK finds by
//! itself. Arguments: where STS is (host:port), the region. Prints JSON lines.

use std::{env, error::Error, time::Instant};

use aws_config::{BehaviorVersion, Region};
use aws_sdk_sts::{Client, config::Builder};
use serde_json::json;
use tokio::io::{AsyncBufReadExt, BufReader, stdin};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments = env::args().skip(1).collect::<Vec<_>>();
    let [sts, region] = arguments.as_slice() else { return Err("two arguments are needed".into()) };
    let version = version("aws-config");
    let mut kept: Option<Client> = None;
    // Not blocking: a pool notices that the server has closed a connection only while the runtime runs.
    let mut lines = BufReader::new(stdin()).lines();
    while let Some(line) = lines.next_line().await? {
        if line == "region" {
            let config = aws_config::load_defaults(BehaviorVersion::latest()).await;
            println!("{}", json!({ "Region": config.region().map(ToString::to_string), "Version": version }));
            continue;
        }
        let begun = Instant::now();
        let client = match &kept {
            Some(client) if line == "kept" => client.clone(),
            _ => new_client(sts, region).await,
        };
        if line == "kept" {
            kept = Some(client.clone());
        }
        let answer = client.get_caller_identity().send().await?;
        let millis = begun.elapsed().as_millis() as u64;
        println!("{}", json!({ "Arn": answer.arn(), "Millis": millis, "Version": version }));
    }
    Ok(())
}

async fn new_client(sts: &str, region: &str) -> Client {
    let region = Region::new(region.to_owned());
    let config = aws_config::defaults(BehaviorVersion::latest()).region(region).load().await;
    Client::from_conf(Builder::from(&config).endpoint_url(format!("http://{sts}")).build())
}

/// The locked version of a crate.
fn version(name: &str) -> Option<&'static str> {
    let package = format!("name = \"{name}\"\nversion = \"");
    include_str!("Cargo.lock").split(&package).nth(1)?.split('"').next()
}
