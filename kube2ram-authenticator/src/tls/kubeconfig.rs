//! The file by which the API server calls the webhook (`--authentication-token-webhook-config-file`): a
//! kubeconfig. Written by `init` and at the server's start, and read by `init --check`. Pure; called by the
//! parent.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Deserialize;

/// The client certificate of the API server, as paths on its machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientFiles {
    /// PEM.
    pub certificate: PathBuf,
    /// PEM.
    pub key: PathBuf,
}

/// What the API server is to know.
pub(super) struct Kubeconfig<'a> {
    pub(super) ca_pem: &'a str,
    pub(super) hostname: &'a str,
    pub(super) port: u16,
    pub(super) client: Option<&'a ClientFiles>,
}

/// The parts of a file that decide whether the API server reaches this server.
#[derive(Debug, Deserialize)]
struct Written {
    clusters: Vec<NamedCluster>,
    contexts: Vec<NamedContext>,
    #[serde(rename = "current-context")]
    current_context: String,
    users: Vec<NamedUser>,
}

#[derive(Debug, Deserialize)]
struct NamedCluster {
    name: String,
    cluster: Cluster,
}

#[derive(Debug, Deserialize)]
struct Cluster {
    #[serde(rename = "certificate-authority-data")]
    certificate_authority_data: Option<String>,
    server: String,
}

#[derive(Debug, Deserialize)]
struct NamedContext {
    name: String,
    context: Context,
}

#[derive(Debug, Deserialize)]
struct Context {
    cluster: String,
    #[serde(default)]
    user: String,
}

#[derive(Debug, Deserialize)]
struct NamedUser {
    name: String,
    #[serde(default)]
    user: Option<User>,
}

#[derive(Debug, Default, Deserialize)]
struct User {
    #[serde(rename = "client-certificate")]
    client_certificate: Option<PathBuf>,
    #[serde(rename = "client-key")]
    client_key: Option<PathBuf>,
}

impl Kubeconfig<'_> {
    fn server(&self) -> String {
        let host = match self.hostname.parse() {
            Ok(IpAddr::V6(address)) => format!("[{address}]"),
            Ok(IpAddr::V4(_)) | Err(_) => self.hostname.to_owned(),
        };
        format!("https://{host}:{}/authenticate", self.port)
    }

    /// The file. Strings are quoted, as JSON's are YAML's.
    pub(super) fn text(&self) -> String {
        let quoted = |path: &Path| serde_json::Value::from(path.to_string_lossy()).to_string();
        let ca = STANDARD.encode(self.ca_pem);
        let user = self.client.map_or_else(
            || " {}\n".to_owned(),
            |ClientFiles { certificate, key }| {
                let (certificate, key) = (quoted(certificate), quoted(key));
                format!("\n      client-certificate: {certificate}\n      client-key: {key}\n")
            },
        );
        let server = serde_json::Value::from(self.server());
        format!(
            "apiVersion: v1\n\
             kind: Config\n\
             # kubeconfig of the API server, for --authentication-token-webhook-config-file.\n\
             clusters:\n\
             - name: ack-ram-authenticator\n\
             \x20 cluster:\n\
             \x20   certificate-authority-data: {ca}\n\
             \x20   server: {server}\n\
             users:\n\
             - name: apiserver\n\
             \x20 user:{user}\
             current-context: webhook\n\
             contexts:\n\
             - name: webhook\n\
             \x20 context:\n\
             \x20   cluster: ack-ram-authenticator\n\
             \x20   user: apiserver\n"
        )
    }

    /// What in a file would keep the API server from this server; nothing when it fits.
    pub(super) fn differences(&self, text: &str) -> Vec<String> {
        let written: Written = match serde_saphyr::from_str(text) {
            Ok(written) => written,
            Err(error) => {
                // What follows the first line shows the file.
                let error = error.to_string();
                let error = error.lines().next().unwrap_or_default();
                return vec![format!("it is not a kubeconfig: {error}")];
            }
        };
        let context = written.contexts.iter().find(|context| context.name == written.current_context);
        let Some(NamedContext { context, .. }) = context else {
            return vec![format!(
                "it has no context {:?}, which it names as current",
                written.current_context
            )];
        };
        let cluster = written.clusters.iter().find(|cluster| cluster.name == context.cluster);
        let Some(NamedCluster { cluster, .. }) = cluster else {
            return vec![format!("it has no cluster {:?}, which its context names", context.cluster)];
        };
        let mut differences = Vec::new();
        if cluster.server != self.server() {
            differences.push(format!("its server is {}, and this one is {}", cluster.server, self.server()));
        }
        match cluster.certificate_authority_data.as_deref().map(|data| STANDARD.decode(data)) {
            Some(Ok(ca)) if ca == self.ca_pem.as_bytes() => {}
            Some(Ok(_)) => differences.push("its certificate-authority-data is that of another CA".into()),
            Some(Err(_)) => differences.push("its certificate-authority-data is not base64".into()),
            None => differences.push("it has no certificate-authority-data".into()),
        }
        let user = written.users.iter().find(|user| user.name == context.user);
        let user = user.and_then(|user| user.user.as_ref());
        let shown =
            user.and_then(|user| Some((user.client_certificate.as_ref()?, user.client_key.as_ref()?)));
        let wanted = self.client.map(|ClientFiles { certificate, key }| (certificate, key));
        if shown != wanted {
            differences.push("its client certificate is not the one that was asked for".into());
        }
        differences
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kubeconfig(client: Option<&ClientFiles>) -> Kubeconfig<'_> {
        let ca_pem = "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n";
        Kubeconfig { ca_pem, hostname: "localhost", port: 21362, client }
    }

    fn client() -> ClientFiles {
        ClientFiles { certificate: "/etc/k8s/a \"b\".crt".into(), key: "/etc/k8s/a.key".into() }
    }

    #[test]
    fn what_it_writes_fits_itself() {
        let client = client();
        for client in [None, Some(&client)] {
            let kubeconfig = kubeconfig(client);

            let text = kubeconfig.text();

            assert_eq!(kubeconfig.differences(&text), Vec::<String>::new(), "{text}");
            assert!(text.contains("\n    server: \"https://localhost:21362/authenticate\"\n"), "{text}");
        }
    }

    #[test]
    fn names_everything_that_keeps_the_api_server_away() {
        let ours = kubeconfig(None);
        let text = ours.text();
        let ca = STANDARD.encode(ours.ca_pem);
        let client = client();

        for (text, difference) in [
            ("{".to_owned(), "not a kubeconfig"),
            ("a: b".to_owned(), "not a kubeconfig"),
            (text.replace("current-context: webhook", "current-context: other"), "no context"),
            (text.replace("- name: ack-ram-authenticator", "- name: other"), "no cluster"),
            (text.replace("21362", "21363"), "its server is https://localhost:21363/authenticate"),
            (text.replace(&ca, &STANDARD.encode("another")), "another CA"),
            (text.replace(&ca, "??"), "not base64"),
            (
                text.replace("certificate-authority-data", "certificate-authority"),
                "no certificate-authority-data",
            ),
            (kubeconfig(Some(&client)).text(), "client certificate"),
        ] {
            let differences = ours.differences(&text);
            assert!(
                differences.len() == 1 && differences[0].contains(difference),
                "{difference}: {differences:?}"
            );
        }
    }

    #[test]
    fn reads_the_predecessors_file() {
        let ours = kubeconfig(None);
        let theirs = format!(
            "clusters:\n  - name: ack-ram-authenticator\n    cluster:\n      certificate-authority-data: {}\n      \
             server: https://localhost:21362/authenticate\nusers:\n  - name: apiserver\ncurrent-context: webhook\n\
             contexts:\n- name: webhook\n  context:\n    cluster: ack-ram-authenticator\n    user: apiserver\n",
            STANDARD.encode(ours.ca_pem)
        );

        assert_eq!(ours.differences(&theirs), Vec::<String>::new());
    }

    #[test]
    fn an_address_of_ipv6_is_in_brackets() {
        let of = |hostname| Kubeconfig { hostname, ..kubeconfig(None) }.server();

        assert_eq!(of("::1"), "https://[::1]:21362/authenticate");
        assert_eq!(of("127.0.0.1"), "https://127.0.0.1:21362/authenticate");
    }
}
