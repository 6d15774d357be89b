//! A stand-in for the API server: lists, watches and patches of the status, of two resources; one connection
//! for each request. Its own code, on threads, so that it shares no assumption with what is tested.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex, MutexGuard},
    thread,
    time::Duration,
};

use serde_json::{Value, json};

/// What OpenAPI calls the definition of mappings.
const MAPPING: &str = "alibabacloud.k8s.ramauthenticator.v1alpha1.RAMIdentityMapping";

pub(super) struct ApiServer {
    url: String,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    version: u64,
    /// By resource and name.
    objects: BTreeMap<(String, String), Value>,
    /// Version, resource, one line of a watch.
    log: Vec<(u64, String, String)>,
    requests: Vec<String>,
    patches: Vec<Value>,
    /// Further items of lists.
    odd_items: Vec<Value>,
    /// With their namespaces.
    events: Vec<(String, Value)>,
    /// The status of every answer, if it is not the right one.
    fails_with: Option<u16>,
    forbids_patches: bool,
    /// The definition of mappings, as OpenAPI has it.
    schema: Option<Value>,
}

impl ApiServer {
    pub(super) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(Mutex::new(State { version: 1, ..State::default() }));
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, state) = (stream.unwrap(), Arc::clone(&shared));
                // A client that has gone away is no failure.
                thread::spawn(move || drop(serve(stream, &state)));
            }
        });
        Self { url, state }
    }

    pub(super) fn url(&self) -> String {
        self.url.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(super) fn put(&self, resource: &str, name: &str, object: Value) {
        self.state().put(resource, name, object);
    }

    /// Adds an item to all lists, as it is.
    pub(super) fn list_odd(&self, item: Value) {
        self.state().odd_items.push(item);
    }

    pub(super) fn delete(&self, resource: &str, name: &str) {
        let mut state = self.state();
        let object = state.objects.remove(&(resource.to_owned(), name.to_owned())).unwrap();
        state.log(resource, "DELETED", object);
    }

    pub(super) fn get(&self, resource: &str, name: &str) -> Value {
        self.state().objects[&(resource.to_owned(), name.to_owned())].clone()
    }

    pub(super) fn fail_with(&self, status: Option<u16>) {
        self.state().fails_with = status;
    }

    pub(super) fn forbid_patches(&self, forbid: bool) {
        self.state().forbids_patches = forbid;
    }

    /// Defines mappings with these fields of spec and status, and drops all others from now on.
    pub(super) fn publish_schema(&self, spec: &[&str], status: &[&str]) {
        let of = |fields: &[&str]| {
            let fields: serde_json::Map<_, _> =
                fields.iter().map(|field| ((*field).to_owned(), json!({ "type": "string" }))).collect();
            json!({ "type": "object", "properties": fields })
        };
        self.state().schema = Some(json!({ "components": { "schemas": {
            "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta": { "type": "object" },
            MAPPING: { "type": "object", "properties": { "spec": of(spec), "status": of(status) } },
        } } }));
    }

    pub(super) fn requests(&self) -> Vec<String> {
        self.state().requests.clone()
    }

    pub(super) fn events(&self) -> Vec<(String, Value)> {
        self.state().events.clone()
    }

    pub(super) fn patches(&self) -> Vec<Value> {
        self.state().patches.clone()
    }
}

impl State {
    fn put(&mut self, resource: &str, name: &str, mut object: Value) {
        object["metadata"]["name"] = name.into();
        object["metadata"]["resourceVersion"] = (self.version + 1).to_string().into();
        if resource == "ramidentitymappings" {
            self.prune(&mut object);
        }
        let before = self.objects.insert((resource.to_owned(), name.to_owned()), object.clone());
        self.log(resource, if before.is_some() { "MODIFIED" } else { "ADDED" }, object);
    }

    fn log(&mut self, resource: &str, kind: &str, mut object: Value) {
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        let line = json!({ "type": kind, "object": object }).to_string() + "\n";
        self.log.push((self.version, resource.to_owned(), line));
    }

    /// Drops what the definition does not have.
    fn prune(&self, object: &mut Value) {
        let Some(schema) = &self.schema else { return };
        for part in ["spec", "status"] {
            let known = &schema["components"]["schemas"][MAPPING]["properties"][part]["properties"];
            if let Some(fields) = object[part].as_object_mut() {
                fields.retain(|field, _| known[field].is_object());
            }
        }
    }

    /// A merge patch of the status; what is there already changes nothing.
    fn patch(&mut self, name: &str, patch: &Value) -> (u16, Value) {
        self.patches.push(patch.clone());
        if self.forbids_patches {
            return (403, status(403));
        }
        let key = ("ramidentitymappings".to_owned(), name.to_owned());
        let Some(mut object) = self.objects.get(&key).cloned() else { return (404, status(404)) };
        let before = object.clone();
        for (field, value) in patch["status"].as_object().unwrap() {
            object["status"][field] = value.clone();
        }
        self.prune(&mut object);
        if object != before {
            self.put("ramidentitymappings", name, object.clone());
        }
        (200, object)
    }
}

impl State {
    fn create_config_map(&mut self, object: Value) -> (u16, Value) {
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        if self.objects.contains_key(&("configmaps".to_owned(), name.clone())) {
            return (409, status(409));
        }
        self.put("configmaps", &name, object.clone());
        (201, object)
    }

    /// A merge patch of the data, of the version that it names.
    fn patch_config_map(&mut self, name: &str, patch: &Value) -> (u16, Value) {
        let Some(found) = self.objects.get(&("configmaps".to_owned(), name.to_owned())) else {
            return (404, status(404));
        };
        let mut object = found.clone();
        let version = &patch["metadata"]["resourceVersion"];
        if !version.is_null() && *version != object["metadata"]["resourceVersion"] {
            return (409, status(409));
        }
        for (key, value) in patch["data"].as_object().unwrap() {
            object["data"][key] = value.clone();
        }
        self.put("configmaps", name, object.clone());
        (200, object)
    }
}

fn serve(stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut head = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        if line.trim_end().is_empty() {
            break;
        }
        head.push(line.trim_end().to_owned());
    }
    let Some((method, target)) = head.first().and_then(|line| {
        let mut words = line.split(' ');
        Some((words.next()?.to_owned(), words.next()?.to_owned()))
    }) else {
        return Ok(());
    };
    let length = head.iter().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().unwrap())
    });
    let mut body = vec![0; length.unwrap_or(0)];
    reader.read_exact(&mut body)?;

    let mut locked = state.lock().unwrap();
    locked.requests.push(format!("{method} {target}"));
    let (path, query) = target.split_once('?').unwrap_or((target.as_str(), ""));
    let segments: Vec<&str> = path.trim_matches('/').split('/').collect();
    let is_watch = query.split('&').any(|pair| pair == "watch=true" || pair == "watch=1");
    let (code, answer) = match (&*method, &*segments) {
        _ if locked.fails_with.is_some() => {
            let code = locked.fails_with.unwrap();
            (code, status(code))
        }
        ("POST", ["apis", "events.k8s.io", "v1", "namespaces", namespace, "events"]) => {
            let event: Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(event["metadata"]["namespace"].as_str().unwrap_or("default"), *namespace);
            locked.events.push(((*namespace).to_owned(), event.clone()));
            (201, event)
        }
        ("PATCH", [.., "ramidentitymappings", name, "status"]) => {
            locked.patch(name, &serde_json::from_slice(&body).unwrap())
        }
        ("GET", [.., resource @ ("configmaps" | "ramidentitymappings")]) if is_watch => {
            let from = query.split('&').find_map(|pair| pair.strip_prefix("resourceVersion=")).unwrap();
            let (from, resource) = (from.parse().unwrap(), (*resource).to_owned());
            drop(locked);
            return watch(stream, state, from, &resource);
        }
        ("GET", [.., resource @ ("configmaps" | "ramidentitymappings")]) => {
            let of_resource = locked.objects.iter().filter(|((of, _), _)| of == resource);
            let items: Vec<_> = of_resource.map(|(_, object)| object).chain(&locked.odd_items).collect();
            let version = locked.version.to_string();
            (200, json!({ "metadata": { "resourceVersion": version }, "items": items }))
        }
        ("GET", [.., "configmaps", name]) => {
            match locked.objects.get(&("configmaps".to_owned(), (*name).to_owned())) {
                Some(object) => (200, object.clone()),
                None => (404, status(404)),
            }
        }
        ("PATCH", [.., "configmaps", name]) => {
            locked.patch_config_map(name, &serde_json::from_slice(&body).unwrap())
        }
        ("POST", [.., "kube-system", "configmaps"]) => {
            locked.create_config_map(serde_json::from_slice(&body).unwrap())
        }
        ("GET", ["openapi", "v3", "apis", "ramauthenticator.k8s.alibabacloud", "v1alpha1"]) => {
            locked.schema.clone().map_or_else(|| (404, status(404)), |schema| (200, schema))
        }
        _ => (404, status(404)),
    };
    drop(locked);
    let answer = answer.to_string();
    let mut stream = stream;
    write!(
        stream,
        "HTTP/1.1 {code} x\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{answer}",
        answer.len()
    )
}

/// Sends what happens until the client has gone away, or requests fail.
fn watch(mut stream: TcpStream, state: &Mutex<State>, mut from: u64, resource: &str) -> std::io::Result<()> {
    write!(
        stream,
        "HTTP/1.1 200 x\r\ncontent-type: application/json\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    )?;
    loop {
        let (lines, version, has_failed) = {
            let state = state.lock().unwrap();
            let news = state.log.iter().filter(|(version, of, _)| *version > from && of == resource);
            let lines: String = news.map(|(_, _, line)| line.as_str()).collect();
            (lines, state.version, state.fails_with.is_some())
        };
        if has_failed {
            return write!(stream, "0\r\n\r\n");
        }
        if !lines.is_empty() {
            write!(stream, "{:x}\r\n{lines}\r\n", lines.len())?;
            stream.flush()?;
        }
        from = version;
        thread::sleep(Duration::from_millis(2));
    }
}

fn status(code: u16) -> Value {
    let reason = match code {
        403 => "Forbidden",
        404 => "NotFound",
        409 => "Conflict",
        _ => "",
    };
    json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "the stand-in says no", "code": code,
        "reason": reason,
    })
}
