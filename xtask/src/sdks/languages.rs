//! The languages whose SDKs are tried, how these are installed, and the clients. Depends on the languages'
//! package managers. Called by the parent.

use std::{path::Path, process::Command};

use anyhow::Result;

use super::{Client, Language, Trial};
use crate::command::{cargo, run};

const ALIBABA: &str = "alibaba";
const AWS: &str = "aws";

pub(super) const LANGUAGES: [Language; 10] = [
    Language {
        cloud: ALIBABA,
        name: "python",
        tools: &["python3"],
        install: pip,
        clients: &[
            Client {
                name: "python-alibabacloud-credentials",
                command: &["./venv/bin/python", "./client.py", "alibabacloud-credentials"],
                trial: Trial::Credentials { refresh: "900" },
            },
            Client {
                name: "python-aliyun-python-sdk-core",
                command: &["./venv/bin/python", "./client.py", "aliyun-python-sdk-core"],
                trial: Trial::Credentials { refresh: "clock" },
            },
            // 15 % of their whole life, that is of 24 s.
            Client {
                name: "python-oss2",
                command: &["./venv/bin/python", "./client.py", "oss2"],
                trial: Trial::Credentials { refresh: "4" },
            },
        ],
    },
    Language {
        cloud: ALIBABA,
        name: "node",
        tools: &["node", "npm"],
        install: npm,
        clients: &[
            Client {
                name: "node-credentials",
                command: &["node", "./client.js"],
                trial: Trial::Credentials { refresh: "3600" },
            },
            Client { name: "node-http", command: &["node", "./get.js"], trial: Trial::Addresses },
        ],
    },
    Language {
        cloud: ALIBABA,
        name: "go",
        tools: &["go"],
        install: |here| {
            go(here, &["-o", "client", "."])?;
            go(here, &["-o", "get", "get.go"])
        },
        clients: &[
            Client {
                name: "go-credentials-go",
                command: &["./client"],
                trial: Trial::Credentials { refresh: "180" },
            },
            Client { name: "go-net-http", command: &["./get"], trial: Trial::Addresses },
        ],
    },
    Language {
        cloud: ALIBABA,
        name: "java",
        tools: JAVA,
        install: maven,
        clients: &[
            Client {
                name: "java-credentials-java",
                command: &["java", "-classpath", CLASSPATH, "Client"],
                trial: Trial::Credentials { refresh: "900" },
            },
            Client {
                name: "java-net-http",
                command: &["java", "-classpath", "./target/classes", "Get"],
                trial: Trial::Addresses,
            },
        ],
    },
    Language {
        cloud: ALIBABA,
        name: "rust",
        tools: &[],
        install: cargo_build,
        clients: &[Client {
            name: "rust-reqsign-aliyun-oss",
            command: &["./target/debug/client"],
            trial: Trial::Credentials { refresh: "always" },
        }],
    },
    Language {
        cloud: AWS,
        name: "aws-python",
        tools: &["python3"],
        install: pip,
        // With 15 min left. But it uses credentials that last less than 20 min beyond their end, so they
        // cannot be made short.
        clients: &[Client {
            name: "python-boto3",
            command: &["./venv/bin/python", "./client.py"],
            trial: Trial::Credentials { refresh: "clock" },
        }],
    },
    Language {
        cloud: AWS,
        name: "aws-node",
        tools: &["node", "npm"],
        install: npm,
        clients: &[
            Client {
                name: "node-aws-sdk-v3",
                command: &["node", "./client.js", "v3"],
                trial: Trial::Credentials { refresh: "300" },
            },
            Client {
                name: "node-aws-sdk-v2",
                command: &["node", "./client.js", "v2"],
                trial: Trial::Credentials { refresh: "15" },
            },
        ],
    },
    Language {
        cloud: AWS,
        name: "aws-go",
        tools: &["go"],
        install: |here| {
            go(here, &["-tags", "v2", "-o", "v2", "."])?;
            go(here, &["-tags", "v1", "-o", "v1", "."])
        },
        clients: &[
            // 5 min, but for credentials that last less than 15 min: these it uses to their end.
            Client { name: "go-aws-sdk-v2", command: &["./v2"], trial: Trial::Credentials { refresh: "0" } },
            Client {
                name: "go-aws-sdk-v1",
                command: &["./v1"],
                trial: Trial::Credentials { refresh: "300" },
            },
        ],
    },
    Language {
        cloud: AWS,
        name: "aws-java",
        tools: JAVA,
        install: maven,
        // At half of their life, but after 5 min at the earliest; or 1 s before their end.
        clients: &[Client {
            name: "java-aws-sdk-v2",
            command: &["java", "-classpath", CLASSPATH, "Client"],
            trial: Trial::Credentials { refresh: "1" },
        }],
    },
    Language {
        cloud: AWS,
        name: "aws-rust",
        tools: &[],
        install: cargo_build,
        // Up to 10 s, at random.
        clients: &[Client {
            name: "rust-aws-config",
            command: &["./target/debug/client"],
            trial: Trial::Credentials { refresh: "10" },
        }],
    },
];

const CLASSPATH: &str = "./target/classes:./target/dependency/*";
const JAVA: &[&str] = &["java", "javac", "mvn"];

fn pip(here: &Path) -> Result<()> {
    run(Command::new("python3").current_dir(here).args(["-m", "venv", "venv"]))?;
    let pip = here.join("venv/bin/pip");
    run(Command::new(pip)
        .current_dir(here)
        .args(["install", "--quiet", "--no-deps", "--disable-pip-version-check"])
        .args(["--requirement", "requirements.txt"]))
}

fn npm(here: &Path) -> Result<()> {
    run(Command::new("npm").current_dir(here).args([
        "ci",
        "--silent",
        "--ignore-scripts",
        "--no-audit",
        "--no-fund",
    ]))
}

fn go(here: &Path, arguments: &[&str]) -> Result<()> {
    run(Command::new("go").current_dir(here).args(["build", "-buildvcs=false"]).args(arguments))
}

fn maven(here: &Path) -> Result<()> {
    run(Command::new("mvn").current_dir(here).args([
        "--quiet",
        "--batch-mode",
        "compile",
        "dependency:copy-dependencies",
    ]))
}

fn cargo_build(here: &Path) -> Result<()> {
    run(cargo().current_dir(here).args(["build", "--quiet", "--locked", "--target-dir", "target"]))
}
