//! How each kind of backend is followed: files by looking at them, objects of the cluster by a watch. Spawned
//! by the parent, which has the rest of [`Backend`].

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, api::ListParams, runtime::watcher::Event};
use kube2ram_service::{
    kubernetes::{FollowConfig, follow},
    telemetry::chain,
};
use tokio::{
    sync::Notify,
    task::spawn_blocking,
    time::{sleep, timeout},
};
use tracing::{error, warn};

use super::{
    Backend, BackendError, LOOK_EVERY, Source,
    api_object::ApiObject,
    config_map::{self, AuthMap},
    crd::{
        Objects,
        schema::{self, Drops},
    },
    file::{self, MappingFile},
    locked,
    notices::About,
    status_writer::StatusWriter,
};
use crate::mapping::Index;

/// Changes that come at once make one index.
const SETTLE: Duration = Duration::from_millis(100);
/// Bounds a list that somebody waits for.
const LIST_TIMEOUT: Duration = Duration::from_secs(15);
/// How often the schema of the objects is looked at.
const SCHEMA_EVERY: Duration = Duration::from_mins(10);
/// How often, while it cannot be read.
const SCHEMA_RETRY: Duration = Duration::from_secs(10);

impl Backend {
    /// Follows this backend for ever.
    pub(super) async fn run(&self) {
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

    async fn follow_config_map(&self, api: &Api<ApiObject>, map: &Mutex<AuthMap>) {
        // Not from a cache: a mapping that was removed must not come back because the server restarts.
        let fields = Some(format!("metadata.name={}", config_map::NAME));
        let config = FollowConfig { fields, ..FollowConfig::default() };
        let take = |event: Event<ApiObject>| {
            let mut map = locked(map);
            if map.take(of_event(event, ConfigMap::from)) {
                let said = self.publish_config_map(map.sections());
                // Without the ConfigMap there is nothing to say about it.
                if let Some(uid) = map.uid() {
                    said.into_iter().for_each(|said| self.tell(About::ConfigMap(uid.into()), said));
                }
            }
        };
        follow(api.clone(), config, take, |_| {}, |_| self.metrics.failed(self.mode)).await;
    }

    async fn follow_objects(&self, api: &Api<ApiObject>, objects: &Mutex<Objects>, writer: &StatusWriter) {
        let changed = Notify::new();
        let has_status = AtomicBool::new(true);
        let named = |ApiObject(object)| {
            if object.metadata.name.is_none() {
                self.metrics.failed(self.mode);
                let (backend, uid) = (self.mode.name(), object.metadata.uid.as_deref());
                warn!(backend, uid, "the API server sent an object without a name: it maps nobody");
            }
            object
        };
        let take = |event: Event<ApiObject>| {
            if locked(objects).take(of_event(event, named)) {
                changed.notify_one();
            }
        };
        let failed = |_: &str| self.metrics.failed(self.mode);
        let watch = follow(api.clone(), FollowConfig::default(), take, |_| {}, failed);
        let publish = async {
            loop {
                changed.notified().await;
                let names = self.publish_objects(objects);
                // Where the API server drops what is written, every status is to be written again.
                writer.want(if has_status.load(Ordering::Relaxed) { names } else { Vec::new() });
                sleep(SETTLE).await;
            }
        };
        let schema = async {
            let client = api.clone().into_client();
            let mut known = Drops::default();
            loop {
                let found = schema::drops(&client).await;
                let drops = found.unwrap_or(known);
                if drops.ids && !known.ids {
                    warn!(backend = self.mode.name(), "{}", schema::DROPS_IDS);
                }
                has_status.store(!drops.conditions, Ordering::Relaxed);
                if drops.conditions != known.conditions && locked(objects).is_listed() {
                    changed.notify_one();
                }
                known = drops;
                sleep(if found.is_some() { SCHEMA_EVERY } else { SCHEMA_RETRY }).await;
            }
        };
        tokio::select! {
            () = watch => {}
            () = publish => {}
            () = schema => {}
        }
    }

    /// Returns the names of the objects whose status is to be written.
    fn publish_objects(&self, objects: &Mutex<Objects>) -> Vec<Box<str>> {
        let entries = locked(objects).entries();
        let (index, reports) = Index::new(&entries, &[], Arc::clone(&self.restrictions));
        for said in self.publish(index, &reports, 0) {
            let uid = locked(objects).uid(&said.label);
            if let Some(uid) = uid {
                self.tell(About::Mapping(said.label.clone(), uid), said);
            }
        }
        // An object that changed meanwhile is published once more.
        locked(objects).report(reports)
    }

    /// Looks at the file, and uses it if it has changed.
    pub(super) async fn look(&self, file: &Mutex<MappingFile>) -> Result<(), BackendError> {
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
            // Nobody can be told by an Event: a file is no object of the cluster.
            let _logged = self.publish_sections(file.sections());
        }
        let mut broken: Vec<_> = file.sections().broken().keys().map(|section| section.key()).collect();
        if fault.is_some() && broken.is_empty() {
            broken.push("the file");
        }
        self.show_broken(&broken);
        Ok(())
    }

    pub(super) async fn read_once(&self) -> Result<(), BackendError> {
        let mode = self.mode;
        let late = |source| BackendError::Timeout { mode, source };
        let refused = |source| BackendError::Request { mode, source };
        match &self.source {
            Source::Config(api, map) => {
                let found = timeout(LIST_TIMEOUT, api.get_opt(config_map::NAME)).await.map_err(late)?;
                let data = found.map_err(refused)?.map(ConfigMap::from).and_then(config_map::data_of);
                let mut map = locked(map);
                map.set(data);
                let _logged = self.publish_config_map(map.sections());
            }
            Source::File(_) => {}
            Source::Objects(api, objects, _) => {
                let params = ListParams::default();
                let found = timeout(LIST_TIMEOUT, api.list(&params)).await.map_err(late)?;
                let mut objects = locked(objects);
                let _starts = objects.take(Event::Init);
                for ApiObject(object) in found.map_err(refused)? {
                    let _listed = objects.take(Event::InitApply(object));
                }
                let _is_complete = objects.take(Event::InitDone);
                let (index, reports) = Index::new(&objects.entries(), &[], Arc::clone(&self.restrictions));
                let _logged = self.publish(index, &reports, 0);
            }
        }
        Ok(())
    }
}

/// The event with its object in another form.
fn of_event<A, B>(event: Event<A>, of: impl FnOnce(A) -> B) -> Event<B> {
    match event {
        Event::Apply(object) => Event::Apply(of(object)),
        Event::Delete(object) => Event::Delete(of(object)),
        Event::Init => Event::Init,
        Event::InitApply(object) => Event::InitApply(of(object)),
        Event::InitDone => Event::InitDone,
    }
}
