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
use kube::{Api, Client, api::ListParams, core::DynamicObject, runtime::watcher};
use kube2ram_service::{
    clock::Clock,
    kubernetes::{ClientConfig, ClientError, client_config, follow},
    telemetry::chain,
};
use prometheus_client::registry::Registry;
use tokio::{
    sync::Notify,
    task::{JoinError, JoinSet, spawn_blocking},
    time::{error::Elapsed, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

pub(crate) mod any_case;
mod config_map;
mod crd;
mod file;
mod metrics;
mod mode;
mod sections;
mod status_writer;

use self::{
    config_map::AuthMap,
    crd::Objects,
    file::MappingFile,
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
    /// What people were last shown of it.
    shown: Mutex<HashMap<Box<str>, State>>,
}

enum Source {
    Config(Api<ConfigMap>, Mutex<AuthMap>),
    File(Mutex<MappingFile>),
    Objects(Api<DynamicObject>, Mutex<Objects>, StatusWriter),
}

/// How often files are looked at; a change counts at the second look that finds it. A mounted ConfigMap takes
/// up to a minute anyway.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Changes that come at once make one index.
const SETTLE: Duration = Duration::from_millis(100);
/// Bounds a list that somebody waits for.
const LIST_TIMEOUT: Duration = Duration::from_secs(15);
/// How many refused mappings are logged by name at each change.
const LOGGED_MAX: usize = 20;

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
        let Settings { backends, config_file, dynamic_file, client } = settings;
        let modes: Vec<Mode> = backends.iter().map(|(mode, _)| *mode).collect();
        let metrics = Metrics::new(registry, &modes);
        let mappings = Arc::new(Mappings::new(modes.len()));
        let client = match modes.iter().any(|mode| mode.is_of_cluster()) {
            true => Some(connected(client).await.map_err(BackendError::Client)?),
            false => None,
        };
        let mut made = Vec::new();
        for (number, (mode, restrictions)) in backends.into_iter().enumerate() {
            let cluster = || client.clone().ok_or(BackendError::NoCluster(mode));
            let source = match mode {
                Mode::AckConfigMap => {
                    Source::Config(Api::namespaced(cluster()?, config_map::NAMESPACE), Mutex::default())
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
        Ok(Self { mappings, backends: made })
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
        match shutdown.run_until_cancelled(running.join_next()).await {
            None => Ok(()),
            Some(ended) => Err(BackendError::Ended(ended.and_then(Result::err))),
        }
    }
}

impl Backend {
    /// Follows this backend for ever.
    async fn run(&self) {
        match &self.source {
            Source::Config(api, map) => self.follow_config_map(api, map).await,
            Source::File(file) => loop {
                sleep(LOOK_EVERY).await;
                if let Err(error) = self.look(file).await {
                    self.metrics.failed(self.mode);
                    error!(backend = self.mode.name(), error = chain(&error), "cannot look at the mappings");
                }
            },
            Source::Objects(api, objects, writer) => {
                let patch = |name: &str| locked(objects).patch(name, self.clock.now());
                tokio::join!(
                    self.follow_objects(api, objects, writer),
                    writer.run(api, &self.metrics, patch)
                );
            }
        }
    }

    async fn follow_config_map(&self, api: &Api<ConfigMap>, map: &Mutex<AuthMap>) {
        // Not from a cache: a mapping that was removed must not come back because the server restarts.
        let config = watcher::Config::default().fields(&format!("metadata.name={}", config_map::NAME));
        let take = |event| {
            if locked(map).take(event) {
                self.publish_config_map(locked(map).sections());
            }
        };
        follow(api.clone(), config, take, |_| self.metrics.failed(self.mode)).await;
    }

    async fn follow_objects(
        &self,
        api: &Api<DynamicObject>,
        objects: &Mutex<Objects>,
        writer: &StatusWriter,
    ) {
        let changed = Notify::new();
        let take = |event| {
            if locked(objects).take(event) {
                changed.notify_one();
            }
        };
        let watch = follow(api.clone(), watcher::Config::default(), take, |_| self.metrics.failed(self.mode));
        let publish = async {
            loop {
                changed.notified().await;
                self.publish_objects(objects, writer);
                sleep(SETTLE).await;
            }
        };
        tokio::select! {
            () = watch => {}
            () = publish => {}
        }
    }

    fn publish_objects(&self, objects: &Mutex<Objects>, writer: &StatusWriter) {
        let entries = locked(objects).entries();
        let (index, reports) = Index::new(&entries, &[], Arc::clone(&self.restrictions));
        self.publish(index, &reports, 0);
        // An object that changed meanwhile is published once more.
        let names = locked(objects).report(reports);
        writer.want(names);
    }

    fn publish_sections(&self, sections: &Sections) {
        let (index, reports) =
            Index::new(&sections.entries(), sections.accounts(), Arc::clone(&self.restrictions));
        self.publish(index, &reports, sections.broken().len());
    }

    /// Whether mappings of this backend were ever published. Before, a list that cannot be read would count
    /// as empty, and whoever is in it as nobody, or as whom a later backend maps.
    fn is_loaded(&self) -> bool {
        self.mappings.indexes().get(self.number).is_some_and(Option::is_some)
    }

    fn publish_config_map(&self, sections: &Sections) {
        for (section, error) in sections.broken() {
            self.metrics.failed(self.mode);
            let (backend, list) = (self.mode.name(), section.key());
            warn!(
                backend,
                list, error, "a list of mappings cannot be read: what was last read of it is used"
            );
        }
        if self.is_loaded() || sections.broken().is_empty() {
            self.publish_sections(sections);
        }
        self.metrics.broken(self.mode, sections.broken().len());
    }

    fn publish(&self, index: Index, reports: &[Report], broken: usize) {
        self.metrics.published(self.mode, reports, broken, self.clock.now());
        info!(backend = self.mode.name(), mappings = index.len(), "mappings read");
        self.mappings.replace(self.number, Arc::new(index));
        let states = reports.iter().map(|report| (report.label.clone(), report.state.clone())).collect();
        let before = std::mem::replace(&mut *locked(&self.shown), states);
        let news = reports.iter().filter(|report| before.get(&report.label) != Some(&report.state));
        let news = news.filter(|report| report.state != State::Mapped { warnings: Vec::new() });
        for report in news.take(LOGGED_MAX) {
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
    }

    /// Looks at the file, and uses it if it has changed.
    async fn look(&self, file: &Mutex<MappingFile>) -> Result<(), BackendError> {
        let path = locked(file).path().to_owned();
        let content = spawn_blocking(move || file::read(&path)).await.map_err(BackendError::Reader)?;
        let mut file = locked(file);
        if !file.take(content) {
            return Ok(());
        }
        let (backend, path) = (self.mode.name(), file.path().display());
        if file.is_missing() {
            warn!(backend, %path, "the file of mappings is not there: until it is, it maps nobody");
        }
        let fault = file.fault();
        if let Some(error) = &fault {
            self.metrics.failed(self.mode);
            warn!(backend, %path, error, "the file of mappings cannot be read: what was last read is used");
        }
        if self.is_loaded() || fault.is_none() {
            self.publish_sections(file.sections());
        }
        // All of its lists, if it cannot be read at all.
        let broken = file.sections().broken().len();
        self.metrics.broken(self.mode, if fault.is_some() { broken.max(1) } else { broken });
        Ok(())
    }

    async fn read_once(&self) -> Result<(), BackendError> {
        let mode = self.mode;
        let late = |source| BackendError::Timeout { mode, source };
        let refused = |source| BackendError::Request { mode, source };
        match &self.source {
            Source::Config(api, map) => {
                let found = timeout(LIST_TIMEOUT, api.get_opt(config_map::NAME)).await.map_err(late)?;
                let data = found.map_err(refused)?.and_then(config_map::data_of);
                let mut map = locked(map);
                map.set(data);
                self.publish_config_map(map.sections());
            }
            Source::File(_) => {}
            Source::Objects(api, objects, _) => {
                let params = ListParams::default();
                let found = timeout(LIST_TIMEOUT, api.list(&params)).await.map_err(late)?;
                let mut objects = locked(objects);
                let _starts = objects.take(watcher::Event::Init);
                for object in found.map_err(refused)? {
                    let _listed = objects.take(watcher::Event::InitApply(object));
                }
                let _is_complete = objects.take(watcher::Event::InitDone);
                let (index, reports) = Index::new(&objects.entries(), &[], Arc::clone(&self.restrictions));
                self.publish(index, &reports, 0);
            }
        }
        Ok(())
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
