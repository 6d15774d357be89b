//! Where a cloud's names and foreign crates may stand.

use super::{
    CRATES, Fault, Source,
    text::{code, has_word},
};

/// What is named after a cloud or belongs to one.
const CLOUD_NAMES: [&str; 21] = [
    "100.100.100.200",
    "acs",
    "ACS",
    "ActionTrail",
    "alibaba",
    "Alibaba",
    "aliyun",
    "aliyuncs",
    "ECS",
    "ECSws",
    "oidc:sub",
    "RAM",
    "sts.aliyuncs",
    "169.254.169.254",
    "amazonaws",
    "aws",
    "Aws",
    "AWS",
    "CloudTrail",
    "EC2",
    "EC2ws",
];
/// Where one is chosen, and what operators read of it. `app` gets the chosen one as a value and names none.
const CHOOSES_A_CLOUD: [&str; 1] = ["kube2ram-agent/src/args"];

/// Each foreign crate with few homes, and these: a directory or a file without its ending.
const HOMES: [(&str, &[&str]); 21] = [
    ("aya", &["kube2ram-agent/src/datapath"]),
    ("aya_log", &["kube2ram-agent/src/datapath"]),
    ("clap", &["kube2ram-agent/src/args", "kube2ram-authenticator/src/args"]),
    // The server is the listener's and the client is the upstream's. The others name the type of a body only:
    // those that take the listener's requests, and the one that passes the real server's answer on.
    (
        "hyper",
        &[
            "kube2ram-agent/src/server",
            "kube2ram-authenticator/src/serve",
            "kube2ram-authenticator/src/webhook",
            "kube2ram-cloud/src/upstream",
            "kube2ram-service/src/listener",
        ],
    ),
    ("hyper_util", &["kube2ram-cloud/src/upstream", "kube2ram-service/src/listener"]),
    ("json_event_parser", &["kube2ram-agent/src/kubernetes"]),
    (
        "k8s_openapi",
        &[
            "kube2ram-agent/src/kubernetes",
            "kube2ram-authenticator/src/backend",
            "kube2ram-service/src/kubernetes",
        ],
    ),
    (
        "kube",
        &[
            "kube2ram-agent/src/kubernetes",
            "kube2ram-authenticator/src/backend",
            "kube2ram-service/src/kubernetes",
        ],
    ),
    ("log", &["kube2ram-agent/src/datapath"]),
    ("percent_encoding", &["kube2ram-cloud/src"]),
    ("prometheus_client::encoding::text", &["kube2ram-service/src/admin"]),
    ("rcgen", &["kube2ram-authenticator/src/tls"]),
    ("regex", &["kube2ram-agent/src/policy"]),
    ("reqwest", &["kube2ram-cloud/src"]),
    ("ring", &["kube2ram-agent/src/app"]),
    (
        "serde_saphyr",
        &[
            "kube2ram-authenticator/src/backend",
            "kube2ram-authenticator/src/config",
            "kube2ram-authenticator/src/tls",
        ],
    ),
    ("socket2", &["kube2ram-agent/src/listeners"]),
    ("tokio_io_timeout", &["kube2ram-service/src/listener"]),
    ("tokio_rustls", &["kube2ram-authenticator/src/tls"]),
    ("tracing_subscriber", &["kube2ram-service/src/telemetry"]),
    ("x509_parser", &["kube2ram-authenticator/src/tls"]),
];

/// No cloud's name outside of its crate and of what chooses one. Comments may give examples.
pub(super) fn clouds(sources: &[Source]) -> Vec<Fault> {
    let is_bound = |source: &&Source| {
        let path = &source.path;
        (path.starts_with("kube2ram-agent/src/") || path.starts_with("kube2ram-service/src/"))
            && !source.is_test()
            && !CHOOSES_A_CLOUD.iter().any(|home| path.starts_with(home))
    };
    let mut faults = Vec::new();
    for source in sources.iter().filter(is_bound) {
        for (number, line) in source.product_lines() {
            if let Some(name) = CLOUD_NAMES.iter().find(|name| has_word(code(line), name)) {
                let advice = format!(
                    "{name:?} belongs to one cloud: read it from the Dialect (kube2ram-cloud/src/dialect.rs), or add it there"
                );
                faults.push(Fault::new(&source.path, number, advice));
            }
        }
    }
    faults
}

/// A foreign crate with few homes is used in them only.
pub(super) fn crates(sources: &[Source]) -> Vec<Fault> {
    let mut faults = Vec::new();
    let is_ours =
        |source: &&Source| CRATES.iter().any(|prefix| source.path.starts_with(prefix)) && !source.is_test();
    for source in sources.iter().filter(is_ours) {
        for (number, line) in source.product_lines() {
            for (name, homes) in HOMES {
                let path = format!("{name}::");
                let uses = code(line).match_indices(&path).any(|(at, _)| {
                    !code(line)[..at].ends_with(|c: char| c.is_alphanumeric() || matches!(c, '_' | ':'))
                });
                if uses && !homes.iter().any(|home| source.path.starts_with(home)) {
                    let homes = homes.join(", ");
                    let advice = format!(
                        "{name} is used in {homes} only: call what is there, or add a home in xtask/src/house/homes.rs with a reason"
                    );
                    faults.push(Fault::new(&source.path, number, advice));
                }
            }
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::{super::source, *};

    #[test]
    fn a_clouds_name_is_found_in_code_and_nowhere_else() {
        let text = "//! As in ECS.\nlet server = \"ECSws\";\nlet params = RAMP; // RAM\nif cloud == Cloud::Aws {\nuse kube2ram_cloud::aws::sts;\nlet awsome = laws;\n#[cfg(test)]\nmod tests {\n\"acs:ram\"";

        let faults = clouds(&[
            source("kube2ram-agent/src/server/reply.rs", text),
            source("kube2ram-agent/src/args/flags.rs", text),
            source("kube2ram-cloud/src/alibaba/sts.rs", text),
            source("kube2ram-agent/src/server/tests/tokens.rs", text),
        ]);

        assert_eq!(faults.iter().map(|fault| fault.line).collect::<Vec<_>>(), [2, 4, 5]);
    }

    #[test]
    fn a_crate_is_found_outside_of_its_homes() {
        let text = "use kube::Client;\nuse kube2ram_cloud::role;\nuse crate::kube::x;";

        let at = |path| crates(&[source(path, text)]).len();

        assert_eq!(at("kube2ram-agent/src/server.rs"), 1);
        assert_eq!(at("kube2ram-agent/src/kubernetes/cluster.rs"), 0);
        assert_eq!(at("xtask/src/main.rs"), 0);
        let body =
            |path| crates(&[source(path, "use hyper::body::Incoming;\nuse hyper_util::rt::TokioIo;")]).len();
        assert_eq!(body("kube2ram-agent/src/listeners.rs"), 2);
        assert_eq!(body("kube2ram-agent/src/server/pass_through.rs"), 1);
        assert_eq!(body("kube2ram-service/src/listener.rs"), 0);
    }
}
