//! Where mappings come from: files, a ConfigMap and objects of the cluster. Each backend reads its own, and
//! replaces its index as a whole whenever something changes. Depends on `mapping` and kube; made and run by
//! `main`. With its parts the home of kube and k8s_openapi.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, Client, core::ApiResource};
use kube2ram_service::{
    admin::Readiness,
    clock::Clock,
    kubernetes::{ClientConfig, ClientError, Events, client_config},
    telemetry::chain,
};
use prometheus_client::registry::Registry;
use tokio::{
    task::{JoinError, JoinSet},
    time::error::Elapsed,
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

pub mod add;
pub(crate) mod any_case;
mod api_object;
mod config_map;
mod crd;
mod file;
mod follow;
mod metrics;
mod mode;
mod notices;
mod sections;
mod status_writer;

use self::{
    api_object::ApiObject,
    config_map::AuthMap,
    crd::Objects,
    file::MappingFile,
    notices::{About, Notice, Said},
    sections::{Form, Sections},
    status_writer::StatusWriter,
};
pub use self::{
    metrics::Metrics,
    mode::{Mode, ModeError},
};
use crate::{
    identity::Map,
    mapping::{Index, Mappings, Report, Restrictions, State},
};

/// Which backends there are, and what they need.
#[derive(Debug)]
pub struct Settings {
    /// The backends in their order, with what each may map to.
    pub backends: Vec<(Mode, Restrictions)>,
    /// The configuration file, for [`Mode::MountedFile`].
    pub config_file: Option<PathBuf>,
    /// The file of mappings, for [`Mode::DynamicFile`].
    pub dynamic_file: Option<PathBuf>,
    /// How to reach the API server, for the other two.
    pub client: ClientConfig,
    /// The machine, as Events name it.
    pub instance: Box<str>,
    /// Where it is noted that a list cannot be read.
    pub readiness: Readiness,
}

/// Why the backends cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The API server cannot be asked.
    #[error("cannot use the backends of the cluster")]
    Client(#[source] ClientError),
    /// A backend has ended, which none does by itself.
    #[error("a backend of mappings has ended")]
    Ended(#[source] Option<JoinError>),
    /// A backend's file is not given.
    #[error(
        "the backend {0} has no file: give --config, or server.dynamicFilePath in the configuration file"
    )]
    FileMissing(Mode),
    /// A file cannot be read.
    #[error("cannot read the mappings of {path}: {fault}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        fault: String,
    },
    /// A backend of the cluster without a cluster.
    #[error("the backend {0} needs an API server")]
    NoCluster(Mode),
    /// The task that reads files failed.
    #[error("cannot read files")]
    Reader(#[source] JoinError),
    /// The API server refuses to list mappings.
    #[error("cannot list the mappings of the backend {mode}")]
    Request {
        /// The backend.
        mode: Mode,
        /// The API server's error.
        #[source]
        source: kube::Error,
    },
    /// The API server gives no list in time.
    #[error("the API server does not list the mappings of the backend {mode}")]
    Timeout {
        /// The backend.
        mode: Mode,
        /// That it took too long.
        #[source]
        source: Elapsed,
    },
}

/// The backends, and the mappings that they have read.
pub struct Backends {
    mappings: Arc<Mappings>,
    backends: Vec<Arc<Backend>>,
    /// For Events, if there is a cluster.
    client: Option<Client>,
    events: Arc<Events<Notice>>,
    instance: Box<str>,
}

/// One of them.
struct Backend {
    number: usize,
    mode: Mode,
    restrictions: Arc<Restrictions>,
    mappings: Arc<Mappings>,
    metrics: Metrics,
    clock: Arc<dyn Clock>,
    source: Source,
    events: Arc<Events<Notice>>,
    readiness: Readiness,
    /// What people were last shown of it.
    shown: Mutex<HashMap<Box<str>, State>>,
}

enum Source {
    Config(Api<ApiObject>, Mutex<AuthMap>),
    File(Mutex<MappingFile>),
    Objects(Api<ApiObject>, Mutex<Objects>, StatusWriter),
}

/// How often files are looked at; a change counts at the second look that finds it. A mounted ConfigMap takes
/// up to a minute anyway.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// How many refused mappings are logged by name at each change.
const LOGGED_MAX: usize = 20;
/// Who reports Events, and what their names begin with.
const EVENT_SOURCE: &str = "kube2ram-authenticator";

impl Backends {
    /// Prepares all backends, and reads those that are files. Nothing is asked of the API server before
    /// [`Self::run`].
    ///
    /// # Errors
    /// A file that is missing or malformed, and problems of the client's files and flags. An API server that
    /// does not answer is no error.
    pub async fn connect(
        settings: Settings,
        clock: Arc<dyn Clock>,
        registry: &mut Registry,
    ) -> Result<Self, BackendError> {
        let Settings { backends, config_file, dynamic_file, client, instance, readiness } = settings;
        let modes: Vec<Mode> = backends.iter().map(|(mode, _)| *mode).collect();
        let metrics = Metrics::new(registry, &modes);
        let mappings = Arc::new(Mappings::new(modes.len()));
        let client = match modes.iter().any(|mode| mode.is_of_cluster()) {
            true => Some(connected(client).await.map_err(BackendError::Client)?),
            false => None,
        };
        let of_events = metrics.clone();
        let observe = move |result| of_events.event(result);
        let events = Arc::new(Events::new(EVENT_SOURCE, Arc::clone(&clock), observe));
        let mut made = Vec::new();
        for (number, (mode, restrictions)) in backends.into_iter().enumerate() {
            let cluster = || client.clone().ok_or(BackendError::NoCluster(mode));
            let source = match mode {
                Mode::AckConfigMap => {
                    let resource = ApiResource::erase::<ConfigMap>(&());
                    let api = Api::namespaced_with(cluster()?, config_map::NAMESPACE, &resource);
                    Source::Config(api, Mutex::default())
                }
                Mode::Crd => {
                    let api = Api::all_with(cluster()?, &crd::resource());
                    Source::Objects(api, Mutex::default(), StatusWriter::default())
                }
                Mode::DynamicFile => file_source(mode, dynamic_file.as_ref(), Form::Json)?,
                Mode::MountedFile => file_source(mode, config_file.as_ref(), Form::ConfigFile)?,
            };
            let backend = Arc::new(Backend {
                number,
                mode,
                restrictions: Arc::new(restrictions),
                mappings: Arc::clone(&mappings),
                metrics: metrics.clone(),
                clock: Arc::clone(&clock),
                source,
                events: Arc::clone(&events),
                readiness: readiness.clone(),
                shown: Mutex::default(),
            });
            if let Source::File(file) = &backend.source {
                backend.look(file).await?;
                let file = locked(file);
                // An operator reads this about the configuration file. A program writes the other file: until
                // that can be read, the backend is not known.
                if let Some(fault) = file.fault().filter(|_| mode == Mode::MountedFile) {
                    return Err(BackendError::File { path: file.path().to_owned(), fault });
                }
            }
            made.push(backend);
        }
        Ok(Self { mappings, backends: made, client, events, instance })
    }

    /// The mappings, for whoever asks for them.
    pub fn map(&self) -> Arc<dyn Map> {
        Arc::<Mappings>::clone(&self.mappings)
    }

    /// The index of each backend, in their order; `None` of one that is not known yet.
    pub fn indexes(&self) -> Vec<(Mode, Option<Arc<Index>>)> {
        let indexes = self.mappings.indexes();
        self.backends.iter().map(|backend| backend.mode).zip(indexes.iter().cloned()).collect()
    }

    /// Reads all backends of the cluster once, for people.
    ///
    /// # Errors
    /// [`BackendError::Request`] and [`BackendError::Timeout`].
    pub async fn read_once(&self) -> Result<(), BackendError> {
        for backend in &self.backends {
            backend.read_once().await?;
        }
        Ok(())
    }

    /// What became of each entry of a backend in its newest index.
    pub fn reports(&self, mode: Mode) -> HashMap<Box<str>, State> {
        let backend = self.backends.iter().find(|backend| backend.mode == mode);
        backend.map(|backend| locked(&backend.shown).clone()).unwrap_or_default()
    }

    /// Follows all backends until `shutdown`. Call it once.
    ///
    /// # Errors
    /// [`BackendError::Ended`]: the mappings would not change any more, so the process must end.
    ///
    /// # Cancel safety
    /// Dropping the future ends all backends; the mappings stay as they are.
    pub async fn run(&self, shutdown: CancellationToken) -> Result<(), BackendError> {
        let mut running = JoinSet::new();
        for backend in &self.backends {
            let backend = Arc::clone(backend);
            running.spawn(async move { backend.run().await });
        }
        if let Some(client) = self.client.clone() {
            let (events, instance) = (Arc::clone(&self.events), self.instance.clone());
            running.spawn(async move { events.post_all(&client, |notice| notice.event(&instance)).await });
        }
        match shutdown.run_until_cancelled(running.join_next()).await {
            None => Ok(()),
            Some(ended) => Err(BackendError::Ended(ended.and_then(Result::err))),
        }
    }
}

impl Backend {
    fn publish_sections(&self, sections: &Sections) -> Vec<Said> {
        let (index, reports) =
            Index::new(&sections.entries(), sections.accounts(), Arc::clone(&self.restrictions));
        self.publish(index, &reports, sections.broken().len())
    }

    /// Whether mappings of this backend were ever published. Before, a list that cannot be read would count
    /// as empty, and whoever is in it as nobody, or as whom a later backend maps.
    fn is_loaded(&self) -> bool {
        self.mappings.indexes().get(self.number).is_some_and(Option::is_some)
    }

    /// Returns what is to be said of the ConfigMap.
    fn publish_config_map(&self, sections: &Sections) -> Vec<Said> {
        let mut said = Vec::new();
        for (section, error) in sections.broken() {
            self.metrics.failed(self.mode);
            let (backend, list) = (self.mode.name(), section.key());
            warn!(
                backend,
                list, error, "a list of mappings cannot be read: what was last read of it is used"
            );
            said.push(Said::of_list(list, error));
        }
        if self.is_loaded() || sections.broken().is_empty() {
            said.extend(self.publish_sections(sections));
        }
        self.show_broken(&sections.broken().keys().map(|section| section.key()).collect::<Vec<_>>());
        said
    }

    /// Shows which lists cannot be read: how many in the metrics, and their names next to readiness. The
    /// server stays ready: without it, what was last read of them would be lost as well.
    fn show_broken(&self, lists: &[&str]) {
        self.metrics.broken(self.mode, lists.len());
        let fate = if self.is_loaded() { "what was last read is used" } else { "nothing was read before" };
        let note = format!("{} cannot be read; {fate}", lists.join(", "));
        self.readiness.note(self.mode.name(), (!lists.is_empty()).then_some(note));
    }

    /// Says something about an object, once.
    fn tell(&self, about: About, said: Said) {
        self.events.warn(Notice { about, said });
    }

    /// Puts an index in place. Returns what is new about entries that map nobody.
    fn publish(&self, index: Index, reports: &[Report], broken: usize) -> Vec<Said> {
        self.metrics.published(self.mode, reports, broken, self.clock.now());
        info!(backend = self.mode.name(), mappings = index.len(), "mappings read");
        self.mappings.replace(self.number, Arc::new(index));
        let states = reports.iter().map(|report| (report.label.clone(), report.state.clone())).collect();
        let before = std::mem::replace(&mut *locked(&self.shown), states);
        let news = reports.iter().filter(|report| before.get(&report.label) != Some(&report.state));
        let news = news.filter(|report| report.state != State::Mapped { warnings: Vec::new() });
        let mut said = Vec::new();
        for report in news.take(LOGGED_MAX) {
            said.extend(Said::of(report));
            let (backend, mapping) = (self.mode.name(), &*report.label);
            match &report.state {
                State::Conflict(other) => {
                    warn!(backend, mapping, other, "two mappings give different users: both map nobody");
                }
                State::Mapped { warnings } => {
                    warn!(
                        backend,
                        mapping,
                        warning = warnings.join("; "),
                        "a mapping may be more than it seems"
                    );
                }
                State::Refused(error) => {
                    warn!(backend, mapping, error = chain(error), "a mapping is refused: it maps nobody");
                }
            }
        }
        said
    }
}

async fn connected(config: ClientConfig) -> Result<Client, ClientError> {
    let config = client_config(config).await?;
    Client::try_from(config).map_err(ClientError::Client)
}

fn file_source(mode: Mode, path: Option<&PathBuf>, form: Form) -> Result<Source, BackendError> {
    let path = path.ok_or(BackendError::FileMissing(mode))?;
    Ok(Source::File(Mutex::new(MappingFile::new(path.clone(), form))))
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
