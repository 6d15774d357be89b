//! The configuration file, with the keys of ack-ram-authenticator's, and what it and the flags come to. Reads
//! that file, and does no other I/O. Depends on `backend` and `mapping` for their types; called by `main`,
//! with the flags of `args`.
//!
//! A flag goes before the file, and the file before the default.

use std::{
    collections::BTreeMap,
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use serde::{Deserialize, de::IgnoredAny};

use crate::{
    backend::{Mode, ModeError, any_case::AnyCase},
    mapping::Restrictions,
};
use kube2ram_cloud::alibaba::endpoint::Region;
use kube2ram_service::kubernetes::ClientConfig;

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The address to listen on is none.
    #[error("server.address {0:?} is not an IP address, such as 127.0.0.1")]
    Address(Box<str>),
    /// The backends are none.
    #[error("cannot use the backends")]
    Backends(#[source] ModeError),
    /// A token could be used in other clusters.
    #[error("cluster ID cannot be empty: set clusterID in the configuration file, or give --cluster-id")]
    ClusterId,
    /// The file is not readable.
    #[error("cannot read the configuration file {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The region is none.
    #[error("the region {0:?} is not the id of one, such as cn-hangzhou")]
    Region(Box<str>),
    /// The list of reserved prefixes names an unknown backend.
    #[error("cannot use server.reservedPrefixConfig")]
    ReservedPrefixes(#[source] ModeError),
    /// A key that the file must not have: it may be misspelt, and would have no effect.
    #[error("the configuration file has the unknown key {0}")]
    UnknownKey(Box<str>),
    /// The file is not the YAML that was expected.
    #[error("cannot read the configuration file {path}")]
    Yaml {
        /// The file.
        path: PathBuf,
        /// Where and what.
        #[source]
        source: Box<serde_saphyr::Error>,
    },
}

/// The configuration file. Field names are in lower case here, and in any case in the file.
#[derive(Debug, Default, Deserialize)]
pub struct ConfigFile {
    clusterid: Option<String>,
    defaultrole: Option<IgnoredAny>,
    server: Option<ServerSection>,
    #[serde(flatten)]
    unknown: BTreeMap<String, IgnoredAny>,
}

#[derive(Debug, Default, Deserialize)]
struct ServerSection {
    address: Option<String>,
    backendmode: Option<Names>,
    bind: Option<IgnoredAny>,
    dynamicfilepath: Option<PathBuf>,
    dynamicfileuseridstrict: Option<bool>,
    generatekubeconfig: Option<PathBuf>,
    hostname: Option<String>,
    kubeconfig: Option<PathBuf>,
    kubeconfigpregenerated: Option<bool>,
    // The backend `MountedFile` reads the lists, again and again.
    #[serde(rename = "mapaccounts")]
    _map_accounts: Option<IgnoredAny>,
    #[serde(rename = "maproles")]
    _map_roles: Option<IgnoredAny>,
    #[serde(rename = "mapusers")]
    _map_users: Option<IgnoredAny>,
    master: Option<IgnoredAny>,
    port: Option<u16>,
    region: Option<String>,
    reservedprefixconfig: Option<Vec<ReservedPrefixes>>,
    scrubbedaccounts: Option<IgnoredAny>,
    statedir: Option<PathBuf>,
    trustsessionnames: Option<bool>,
    useridstrict: Option<bool>,
    #[serde(flatten)]
    unknown: BTreeMap<String, IgnoredAny>,
}

/// What a backend may not map to, besides what none may.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ReservedPrefixes {
    backendmode: String,
    usernameprefixreservelist: Option<Vec<Box<str>>>,
    groupprefixreservelist: Option<Vec<Box<str>>>,
    allowsystemusernames: Option<bool>,
}

/// A name, or a list of names.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Names {
    Many(Vec<String>),
    One(String),
}

/// What the flags say, for every command that asks for it. `None` where a flag was not given.
#[derive(Clone, Debug, Default)]
pub struct Given {
    /// `--address`.
    pub address: Option<IpAddr>,
    /// `--client-certificate` and `--client-key`.
    pub client_files: Option<(PathBuf, PathBuf)>,
    /// `--backend-mode`.
    pub backend_modes: Vec<String>,
    /// `--cluster-id`.
    pub cluster_id: Option<String>,
    /// `--config`.
    pub config: Option<PathBuf>,
    /// `--dynamic-file`.
    pub dynamic_file: Option<PathBuf>,
    /// `--generate-kubeconfig`.
    pub generate_kubeconfig: Option<PathBuf>,
    /// `--hostname`.
    pub hostname: Option<String>,
    /// `--kubeconfig`.
    pub kubeconfig: Option<PathBuf>,
    /// `--kubeconfig-pregenerated`.
    pub kubeconfig_pregenerated: Option<bool>,
    /// `--port`.
    pub port: Option<u16>,
    /// `--region`, or the variable STS_REGION.
    pub region: Option<String>,
    /// `--state-dir`.
    pub state_dir: Option<PathBuf>,
    /// `--trust-session-names`.
    pub trust_session_names: Option<bool>,
}

/// What the flags and the file come to.
#[derive(Debug)]
pub struct Config {
    /// The backends in their order, with what each may map to.
    pub backends: Vec<(Mode, Restrictions)>,
    /// What a token must be for.
    pub cluster_id: Box<str>,
    /// The file that was read.
    pub config_file: Option<PathBuf>,
    /// The file of mappings, for [`Mode::DynamicFile`].
    pub dynamic_file: Option<PathBuf>,
    /// The kubeconfig for the backends of the cluster; the pod's service account without one.
    pub kubeconfig: Option<PathBuf>,
    /// Whether the API server's kubeconfig was made by `init`, and is left as it is.
    pub kubeconfig_pregenerated: bool,
    /// One line for each setting that was given and does nothing, or is an example's.
    pub notices: Vec<String>,
    /// The region whose STS is asked; the global one without.
    pub region: Option<Region>,
    /// How the API server reaches the webhook.
    pub webhook: Webhook,
}

/// How the API server reaches the webhook.
#[derive(Debug)]
pub struct Webhook {
    /// The address to listen on.
    pub address: IpAddr,
    /// The certificate that the API server shows and its key, on its machine.
    pub client_files: Option<(PathBuf, PathBuf)>,
    /// Where the API server's kubeconfig is written.
    pub generate_kubeconfig: PathBuf,
    /// The name by which the API server reaches the webhook.
    pub hostname: String,
    /// The port to listen on.
    pub port: u16,
    /// Where the CA and its key are.
    pub state_dir: PathBuf,
}

/// ack-ram-authenticator's, so that its manifests and API server flags stay as they are.
const PORT: u16 = 21362;
const STATE_DIR: &str = "/var/ack-ram-authenticator";
const GENERATE_KUBECONFIG: &str = "/etc/kubernetes/ack-ram-authenticator/kubeconfig.yaml";
/// The cluster ids of ack-ram-authenticator's examples and of ours: several clusters may have them.
const EXAMPLE_IDS: [&str; 3] =
    ["<your-cluster-id>", "c0123456789abcdef0123456789abcdef", "my-dev-cluster.example.com"];
/// Where its `init` writes.
const INIT_STATE_DIR: &str = ".";
const INIT_KUBECONFIG: &str = "ack-ram-authenticator.kubeconfig";
const HOSTNAME: &str = "localhost";
const ADDRESS: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

impl ConfigFile {
    /// Reads a file.
    ///
    /// # Errors
    /// [`ConfigError::Read`], [`ConfigError::Yaml`] and [`ConfigError::UnknownKey`].
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text =
            fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(&text, path)
    }

    /// Reads the text of the file at `path`.
    ///
    /// # Errors
    /// [`ConfigError::Yaml`] and [`ConfigError::UnknownKey`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let options = serde_saphyr::options! { with_snippet: false };
        let read = serde_saphyr::from_str_with_options::<AnyCase<Option<Self>>>(text, options);
        let failed =
            |source: serde_saphyr::Error| ConfigError::Yaml { path: path.to_owned(), source: source.into() };
        let file = read.map_err(failed)?.0.unwrap_or_default();
        let of_server = file.server.iter().flat_map(|server| server.unknown.keys());
        let unknown = file.unknown.keys().cloned().chain(of_server.map(|key| format!("server.{key}")));
        match unknown.min() {
            None => Ok(file),
            Some(key) => Err(ConfigError::UnknownKey(key.into())),
        }
    }
}

impl Config {
    /// What the flags and the file that they name come to.
    ///
    /// # Errors
    /// Whatever is wrong with either.
    pub fn load(given: Given) -> Result<Self, ConfigError> {
        let file = match &given.config {
            Some(path) => ConfigFile::read(path)?,
            None => ConfigFile::default(),
        };
        Self::try_new(given, file)
    }

    /// What the flags and the file come to.
    ///
    /// # Errors
    /// Whatever is wrong with either, or with both.
    pub fn try_new(given: Given, file: ConfigFile) -> Result<Self, ConfigError> {
        let cluster_id = given.cluster_id.clone().or(file.clusterid).filter(|id| !id.is_empty());
        let server = file.server.unwrap_or_default();
        let mut notices = notices(file.defaultrole.is_some(), &server);
        if let Some(id) = cluster_id.as_deref().filter(|id| EXAMPLE_IDS.contains(id)) {
            notices.push(format!(
                "the cluster ID {id} is that of an example: a token for another cluster with it is valid here, too. \
                 Choose one that no other cluster has"
            ));
        }
        let webhook = Webhook::try_new(&given, &server, STATE_DIR, GENERATE_KUBECONFIG)?;
        let modes = match (&*given.backend_modes, &server.backendmode) {
            ([], None) => vec![Mode::MountedFile],
            ([], Some(Names::One(names))) => parsed(names.split_whitespace())?,
            ([], Some(Names::Many(names))) => parsed(names.iter().map(String::as_str))?,
            (names, _) => parsed(names.iter().map(String::as_str))?,
        };
        let trusts_session_names = given.trust_session_names.or(server.trustsessionnames).unwrap_or_default();
        let mut backends: Vec<(Mode, Restrictions)> = modes
            .into_iter()
            .map(|mode| {
                let needs_user_id = server.useridstrict.unwrap_or_default()
                    || mode == Mode::DynamicFile && server.dynamicfileuseridstrict.unwrap_or_default();
                (mode, Restrictions { trusts_session_names, needs_user_id, ..Restrictions::default() })
            })
            .collect();
        let region = given.region.or(server.region).filter(|region| !region.is_empty());
        let region = region
            .map(|id| Region::parse(&id).map_err(|_malformed| ConfigError::Region(id.as_str().into())))
            .transpose()?;
        for reserved in server.reservedprefixconfig.into_iter().flatten() {
            let mode = Mode::parse(&reserved.backendmode).map_err(ConfigError::ReservedPrefixes)?;
            for (_, allowed) in backends.iter_mut().filter(|(other, _)| *other == mode) {
                reserved.add_to(allowed);
            }
        }
        Ok(Self {
            backends,
            cluster_id: cluster_id.ok_or(ConfigError::ClusterId)?.into(),
            config_file: given.config,
            dynamic_file: given.dynamic_file.or(server.dynamicfilepath),
            kubeconfig: given.kubeconfig.or(server.kubeconfig).filter(|path| !path.as_os_str().is_empty()),
            kubeconfig_pregenerated: given
                .kubeconfig_pregenerated
                .or(server.kubeconfigpregenerated)
                .unwrap_or_default(),
            notices,
            region,
            webhook,
        })
    }

    /// How the backends of the cluster reach the API server.
    pub fn client(&self) -> ClientConfig {
        match &self.kubeconfig {
            Some(path) => ClientConfig::Kubeconfig(path.clone()),
            None => ClientConfig::InCluster,
        }
    }
}

impl Webhook {
    /// For `init`, which needs nothing else of the configuration.
    ///
    /// # Errors
    /// Whatever is wrong with the file.
    pub fn load(given: &Given) -> Result<Self, ConfigError> {
        match &given.config {
            Some(path) => {
                let server = ConfigFile::read(path)?.server.unwrap_or_default();
                Self::try_new(given, &server, STATE_DIR, GENERATE_KUBECONFIG)
            }
            None => Self::try_new(given, &ServerSection::default(), INIT_STATE_DIR, INIT_KUBECONFIG),
        }
    }

    fn try_new(
        given: &Given,
        server: &ServerSection,
        state_dir: &str,
        kubeconfig: &str,
    ) -> Result<Self, ConfigError> {
        let address = match (given.address, &server.address) {
            (Some(address), _) => address,
            (None, Some(text)) if !text.is_empty() => {
                text.parse().map_err(|_no_address| ConfigError::Address(text.as_str().into()))?
            }
            (None, _) => ADDRESS,
        };
        let path = |flag: &Option<PathBuf>, file: &Option<PathBuf>, default: &str| {
            flag.as_ref().or(file.as_ref()).cloned().unwrap_or_else(|| default.into())
        };
        let hostname = given.hostname.as_ref().or(server.hostname.as_ref()).filter(|name| !name.is_empty());
        Ok(Self {
            address,
            client_files: given.client_files.clone(),
            generate_kubeconfig: path(&given.generate_kubeconfig, &server.generatekubeconfig, kubeconfig),
            hostname: hostname.cloned().unwrap_or_else(|| HOSTNAME.to_owned()),
            port: given.port.or(server.port).unwrap_or(PORT),
            state_dir: path(&given.state_dir, &server.statedir, state_dir),
        })
    }
}

impl ReservedPrefixes {
    /// What no backend may map to stays reserved, unless the entry allows it.
    fn add_to(&self, allowed: &mut Restrictions) {
        if self.allowsystemusernames.unwrap_or_default() {
            allowed.reserved_usernames.retain(|prefix| &**prefix != "system:");
        }
        let lists = [
            (&mut allowed.reserved_usernames, &self.usernameprefixreservelist),
            (&mut allowed.reserved_groups, &self.groupprefixreservelist),
        ];
        for (reserved, more) in lists {
            // Every name begins with an empty prefix.
            reserved.extend(more.iter().flatten().filter(|prefix| !prefix.is_empty()).cloned());
        }
    }
}

fn parsed<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<Vec<Mode>, ConfigError> {
    Mode::parse_all(names).map_err(ConfigError::Backends)
}

/// ack-ram-authenticator takes these keys, too, and does nothing with them.
fn notices(has_default_role: bool, server: &ServerSection) -> Vec<String> {
    let given = [
        ("defaultRole", has_default_role),
        ("server.bind", server.bind.is_some()),
        ("server.master", server.master.is_some()),
        ("server.scrubbedAccounts", server.scrubbedaccounts.is_some()),
    ];
    let given = given.into_iter().filter(|(_, is_given)| *is_given);
    given.map(|(key, _)| format!("{key} in the configuration file has no effect")).collect()
}

#[cfg(test)]
mod tests;
