//! Requests by curl to a real API server.

use std::{
    fs,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use kube2ram_sandbox::{control_plane::ControlPlane as Processes, standin::Authority};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::tools;

pub(crate) const ADMIN: &str = Processes::ADMIN;
const DEADLINE: Duration = Duration::from_secs(120);

pub(crate) struct ControlPlane {
    pub(crate) authority: Authority,
    processes: Processes,
    directory: TempDir,
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) warnings: Vec<String>,
    pub(crate) body: Value,
}

impl ControlPlane {
    /// Starts both and waits until the API server is ready.
    pub(crate) fn start() -> Self {
        Self::of(Authority::new().unwrap())
    }

    /// The same, for clients that know this authority.
    pub(crate) fn of(authority: Authority) -> Self {
        Self::with_flags(authority, &[])
    }

    /// The same, with more flags of the API server.
    pub(crate) fn with_flags(authority: Authority, flags: &[String]) -> Self {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let programs = tools().join("kube-apiserver/bin");
        let processes = Processes::start(&programs, directory.path(), &authority, flags).unwrap();
        let plane = Self { authority, processes, directory };
        plane.await_ready();
        plane
    }

    fn await_ready(&self) {
        let deadline = Instant::now() + DEADLINE;
        // A namespace that the API server makes itself, late in its start.
        while self.get("/readyz").status != 200 || self.get("/api/v1/namespaces/kube-system").status != 200 {
            let log = self.processes.log();
            let end: Vec<_> = log.lines().rev().take(20).collect();
            assert!(Instant::now() < deadline, "the API server is not ready: {end:#?}");
            thread::sleep(Duration::from_millis(200));
        }
    }

    pub(crate) fn address(&self) -> (String, u16) {
        ("127.0.0.1".to_owned(), self.processes.port())
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        self.request(ADMIN, "GET", path, "application/json", &Value::Null)
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Answer {
        self.request(ADMIN, "POST", path, "application/json", body)
    }

    pub(crate) fn delete(&self, path: &str) -> Answer {
        self.request(ADMIN, "DELETE", path, "application/json", &json!({ "gracePeriodSeconds": 0 }))
    }

    pub(crate) fn patch(&self, token: &str, path: &str, body: &Value) -> Answer {
        self.request(token, "PATCH", path, "application/merge-patch+json", body)
    }

    /// Applies an object as `kubectl apply --server-side --validate=strict` does.
    pub(crate) fn apply(&self, object: &Value) -> Answer {
        let path = format!("{}?fieldManager=test&force=true&fieldValidation=Strict", path_of(object));
        self.request(ADMIN, "PATCH", &path, "application/apply-patch+yaml", object)
    }

    pub(crate) fn request(&self, token: &str, method: &str, path: &str, kind: &str, body: &Value) -> Answer {
        let headers = [("Authorization", format!("Bearer {token}")), ("Content-Type", kind.to_owned())];
        self.send(&headers, method, path, body)
    }

    /// The same, with these headers alone.
    pub(crate) fn send(&self, headers: &[(&str, String)], method: &str, path: &str, body: &Value) -> Answer {
        let body_file = self.directory.path().join("body.json");
        fs::write(&body_file, body.to_string()).unwrap();
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--http1.1", "--include", "--max-time", "30", "--request", method]);
        curl.arg("--cacert").arg(self.processes.ca());
        for (name, value) in headers {
            curl.arg("--header").arg(format!("{name}: {value}"));
        }
        if !body.is_null() {
            curl.arg("--data-binary").arg(format!("@{}", body_file.display()));
        }
        let output = curl.arg(format!("https://127.0.0.1:{}{path}", self.processes.port())).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let (mut head, mut rest) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        if head.contains(" 100 ") {
            (head, rest) = rest.split_once("\r\n\r\n").unwrap();
        }
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        let warnings = head.lines().filter_map(|line| line.strip_prefix("Warning: ")).map(str::to_owned);
        Answer {
            status,
            warnings: warnings.collect(),
            body: serde_json::from_str(rest).unwrap_or(Value::Null),
        }
    }

    /// A service account's token, bound to a pod when one is named, as the kubelet asks for it.
    pub(crate) fn token(&self, account: &str, pod: Option<&Value>) -> String {
        let mut spec = json!({ "audiences": ["https://kubernetes.default.svc"], "expirationSeconds": 3600 });
        if let Some(pod) = pod {
            let metadata = &pod["metadata"];
            spec["boundObjectRef"] = json!({
                "apiVersion": "v1", "kind": "Pod", "name": metadata["name"], "uid": metadata["uid"],
            });
        }
        let request =
            json!({ "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec });
        let path = format!("/api/v1/namespaces/kube-system/serviceaccounts/{account}/token");
        let answer = self.post(&path, &request);
        answer.body["status"]["token"].as_str().unwrap_or_else(|| panic!("{answer:?}")).to_owned()
    }
}

/// Where an object is.
pub(crate) fn path_of(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (api, kind) = (text(&object["apiVersion"]), text(&object["kind"]).to_lowercase());
    let plural = match kind.strip_suffix('y') {
        Some(stem) => format!("{stem}ies"),
        None if kind.ends_with('s') => format!("{kind}es"),
        None => format!("{kind}s"),
    };
    let prefix = if api.contains('/') { format!("/apis/{api}") } else { format!("/api/{api}") };
    let namespace = text(&object["metadata"]["namespace"]);
    let within = if namespace.is_empty() { String::new() } else { format!("/namespaces/{namespace}") };
    format!("{prefix}{within}/{plural}/{}", text(&object["metadata"]["name"]))
}
