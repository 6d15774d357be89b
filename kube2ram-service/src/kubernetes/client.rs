//! Where the API server is and how the agent logs in to it.
//! Depends on kube alone; called by whatever talks to the API server.

use std::{io, path::PathBuf, time::Duration};

use kube::{
    Config,
    config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError},
};
use secrecy::SecretString;

use super::watch::WATCH_TIMEOUT;

/// How to reach the API server.
#[derive(Debug)]
pub enum ClientConfig {
    /// By kubeconfig files, merged as kubectl merges those of `KUBECONFIG`. Some may be missing.
    Files {
        /// The files; the first one that has a value decides.
        paths: Vec<PathBuf>,
        /// The context, if not the current one.
        context: Option<String>,
    },
    /// By the service account that is mounted into the agent's pod.
    InCluster,
    /// By the current context of a kubeconfig file.
    Kubeconfig(PathBuf),
    /// By an address. `http://` is for test stands: it is refused together with a token or `insecure`.
    Server {
        /// `https://host[:port]`.
        url: String,
        /// A bearer token.
        token: Option<SecretString>,
        /// Whether any certificate is accepted. An attacker on the path can then give any pod any role.
        insecure: bool,
    },
}

/// Why the client for the API server cannot be created.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The client could not be made, for example because of a broken certificate.
    #[error("cannot create a client for the API server")]
    Client(#[source] kube::Error),
    /// The pod's service account is not mounted, or the agent does not run in a pod.
    #[error("cannot use the pod's service account: run in a cluster, or set --kubeconfig or --api-server")]
    InCluster(#[source] InClusterError),
    /// The kubeconfig is missing or malformed.
    #[error("cannot use kubeconfig {path}")]
    Kubeconfig {
        /// Its path.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: KubeconfigError,
    },
    /// A token or `--insecure` was given for an `http://` address: the token would travel in the clear.
    #[error("--api-token and --insecure need an https:// --api-server")]
    Plaintext,
    /// The address is not an `http(s)://` URL.
    #[error("--api-server {url:?} is not an http:// or https:// URL")]
    Url {
        /// As given.
        url: String,
        /// Why it does not parse, unless its scheme is what is wrong.
        #[source]
        source: Option<http::uri::InvalidUri>,
    },
}

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// A watch whose peer has vanished without a reset is silent. A working watch ends within `WATCH_TIMEOUT`, so
/// this timeout ends only dead connections.
///
/// TCP's keepalive would cost no new watches. But it does not see an API server that hangs while its kernel
/// answers, nor a load balancer that keeps the connection and has lost the server behind it; and kube builds
/// the connector. A new watch is served from the API server's cache, one per agent and 45 seconds; in this
/// time a kubelet writes its lease to etcd four times.
const READ_TIMEOUT: Duration = Duration::from_secs(WATCH_TIMEOUT.as_secs() + 5);

/// What a client is made of, all of whose waits are bounded. It repeats nothing: its users do. Nothing is
/// asked of the API server, which may be away.
///
/// # Errors
/// Whatever is wrong with `config`.
pub async fn client_config(config: ClientConfig) -> Result<Config, ClientError> {
    let mut config = match config {
        ClientConfig::Files { paths, context } => from_files(paths, context).await?,
        ClientConfig::InCluster => Config::incluster().map_err(ClientError::InCluster)?,
        ClientConfig::Kubeconfig(path) => {
            let failed = |source| ClientError::Kubeconfig { path: path.clone(), source };
            from_file(Kubeconfig::read_from(&path).map_err(failed)?).await.map_err(failed)?
        }
        ClientConfig::Server { url, token, insecure } => at_server(url, token, insecure)?,
    };
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    config.write_timeout = Some(WRITE_TIMEOUT);
    config.read_timeout = Some(READ_TIMEOUT);
    // Else the time that a pooled connection lay idle counts too.
    config.reset_reader_on_write = true;
    // It would sleep for as long as any answer asks, and nobody would see that the API server is overloaded.
    config.default_retry = false;
    Ok(config)
}

async fn from_files(paths: Vec<PathBuf>, context: Option<String>) -> Result<Config, ClientError> {
    let mut merged: Option<Kubeconfig> = None;
    // Of errors that concern no single file.
    let all: PathBuf =
        paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(":").into();
    let is_last = |path: &PathBuf| Some(path) == paths.last();
    for path in &paths {
        let failed = |source| ClientError::Kubeconfig { path: path.clone(), source };
        match Kubeconfig::read_from(path) {
            Ok(file) => {
                let before = merged.unwrap_or_default();
                merged = Some(before.merge(file).map_err(failed)?);
            }
            Err(KubeconfigError::ReadConfig(error, _))
                if error.kind() == io::ErrorKind::NotFound && !(merged.is_none() && is_last(path)) => {}
            Err(error) => return Err(failed(error)),
        }
    }
    let mut file = merged.unwrap_or_default();
    file.current_context = context.or(file.current_context);
    from_file(file).await.map_err(|source| ClientError::Kubeconfig { path: all, source })
}

async fn from_file(file: Kubeconfig) -> Result<Config, KubeconfigError> {
    let names_proxy = names_proxy(&file);
    let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
    Ok(with_proxy_of_file(config, names_proxy))
}

/// Whether the file has a proxy for the cluster of its current context.
fn names_proxy(file: &Kubeconfig) -> bool {
    let context = file.contexts.iter().find(|named| Some(&named.name) == file.current_context.as_ref());
    let Some(context) = context.and_then(|named| named.context.as_ref()) else { return false };
    let cluster = file.clusters.iter().find(|named| named.name == context.cluster);
    cluster.and_then(|named| named.cluster.as_ref()).is_some_and(|cluster| cluster.proxy_url.is_some())
}

/// kube treats the variable HTTPS_PROXY like the file's setting, and then refuses it. A proxy in the file
/// stays refused.
fn with_proxy_of_file(mut config: Config, names_proxy: bool) -> Config {
    config.proxy_url = config.proxy_url.filter(|_| names_proxy);
    config
}

fn at_server(url: String, token: Option<SecretString>, insecure: bool) -> Result<Config, ClientError> {
    let parsed: http::Uri = match url.parse() {
        Ok(parsed) => parsed,
        Err(source) => return Err(ClientError::Url { url, source: Some(source) }),
    };
    let plaintext = match parsed.scheme_str() {
        Some("http") => true,
        Some("https") => false,
        _ => return Err(ClientError::Url { url, source: None }),
    };
    if plaintext && (insecure || token.is_some()) {
        return Err(ClientError::Plaintext);
    }
    let mut config = Config::new(parsed);
    config.auth_info.token = token;
    config.accept_invalid_certs = insecure;
    if plaintext || insecure {
        // No certificate is checked, so the machine needs no trust store (a scratch image has none).
        config.root_cert = Some(Vec::new());
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use kube::Client;

    use super::*;

    fn server(url: &str, token: Option<&str>, insecure: bool) -> Result<Config, ClientError> {
        at_server(url.to_owned(), token.map(SecretString::from), insecure)
    }

    #[test]
    fn a_token_and_insecure_go_with_https_only() {
        assert!(server("https://api:6443", Some("t"), true).is_ok());
        assert!(server("http://127.0.0.1:8001", None, false).is_ok());
        assert!(matches!(server("http://api", Some("t"), false), Err(ClientError::Plaintext)));
        assert!(matches!(server("http://api", None, true), Err(ClientError::Plaintext)));
    }

    #[tokio::test]
    async fn a_client_repeats_nothing_by_itself() {
        let server = ClientConfig::Server { url: "http://api".to_owned(), token: None, insecure: false };

        assert!(!client_config(server).await.unwrap().default_retry);
    }

    #[test]
    fn certificates_are_checked_unless_insecure_is_asked_for() {
        assert!(!server("https://api", Some("t"), false).unwrap().accept_invalid_certs);
        assert!(server("https://api", Some("t"), true).unwrap().accept_invalid_certs);
    }

    #[test]
    fn refuses_what_is_not_a_url() {
        for url in ["", "api:6443", "ftp://api", "https://a b"] {
            assert!(matches!(server(url, None, false), Err(ClientError::Url { .. })), "{url}");
        }
    }

    #[tokio::test]
    async fn a_context_goes_before_the_current_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config");
        let text = "clusters: [{name: a, cluster: {server: 'https://a'}}, {name: b, cluster: {server: 'https://b'}}]\n\
                    contexts: [{name: a, context: {cluster: a, user: u}}, {name: b, context: {cluster: b, user: u}}]\n\
                    users: [{name: u, user: {}}]\ncurrent-context: a\n";
        std::fs::write(&path, text).unwrap();
        let server = async |config| client_config(config).await.map(|config| config.cluster_url.to_string());

        let current = server(ClientConfig::Kubeconfig(path.clone())).await.unwrap();
        let files = |context: &str| ClientConfig::Files {
            paths: vec![path.clone()],
            context: Some(context.to_owned()),
        };
        let other = server(files("b")).await.unwrap();
        let none = server(files("c")).await;

        assert_eq!((&*current, &*other), ("https://a/", "https://b/"));
        assert!(matches!(none, Err(ClientError::Kubeconfig { .. })));
    }

    #[tokio::test]
    async fn several_kubeconfigs_are_merged_and_some_may_be_missing() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let cluster = "clusters: [{name: a, cluster: {server: 'https://a'}}]\n";
        std::fs::write(path("clusters"), cluster).unwrap();
        let rest = "contexts: [{name: a, context: {cluster: a, user: u}}]\nusers: [{name: u, user: {}}]\n\
                    current-context: a\n";
        std::fs::write(path("rest"), rest).unwrap();
        let of = async |names: &[&str]| {
            let paths = names.iter().map(|name| path(name)).collect();
            client_config(ClientConfig::Files { paths, context: None }).await
        };

        let merged = of(&["missing", "clusters", "rest", "another"]).await.unwrap();

        assert_eq!(merged.cluster_url.to_string(), "https://a/");
        for incomplete in [&["missing"][..], &["missing", "another"], &["clusters"]] {
            assert!(matches!(of(incomplete).await, Err(ClientError::Kubeconfig { .. })), "{incomplete:?}");
        }
    }

    #[test]
    fn a_proxy_of_the_environment_is_not_taken_for_the_kubeconfigs() {
        let file = |cluster: &str, other: &str| {
            let text = format!(
                "clusters: [{{name: other, cluster: {{server: 'https://b'{other}}}}}, {{name: c, cluster: {{server: 'https://api'{cluster}}}}}]\n\
                 contexts: [{{name: now, context: {{cluster: c}}}}, {{name: then, context: {{cluster: other}}}}]\n\
                 current-context: now"
            );
            Kubeconfig::from_yaml(&text).unwrap()
        };
        let proxied = || {
            let mut config = Config::new("https://api".parse().unwrap());
            config.proxy_url = Some("http://proxy:3128".parse().unwrap());
            config
        };

        let of = |file: &Kubeconfig| with_proxy_of_file(proxied(), names_proxy(file)).proxy_url;

        let proxy = ", proxy-url: 'http://proxy:3128'";
        assert_eq!(of(&file("", "")), None);
        assert_eq!(of(&file("", proxy)), None, "of another context's cluster");
        assert!(of(&file(proxy, "")).is_some());
        let refused = Client::try_from(proxied()).err().expect("no proxy is compiled in");
        assert!(refused.to_string().contains("proxy"), "{refused}");
    }

    #[tokio::test]
    async fn names_the_kubeconfig_that_is_missing() {
        let missing = ClientConfig::Kubeconfig("/nowhere/config".into());

        let error = client_config(missing).await.err().unwrap();

        assert_eq!(error.to_string(), "cannot use kubeconfig /nowhere/config");
    }
}
