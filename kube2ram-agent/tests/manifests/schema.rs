//! The API server's own schemas (OpenAPI v3, of k8s.io/kubernetes), read strictly: an unknown field is an
//! error, as with `kubectl --validate=strict`.

use std::fs;

use serde_json::{Value, json};

use super::support::{VARIANTS, charted, deploy, kustomized, parse, single_file, tools};

struct Schemas(Vec<Value>);

impl Schemas {
    fn load() -> Self {
        let directory = tools().join("openapi");
        let files =
            fs::read_dir(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
        let read = |path| serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        Self(files.map(|entry| read(entry.unwrap().path())).collect())
    }

    /// What is wrong with an object.
    fn errors(&self, object: &Value) -> Vec<String> {
        let api_version = object["apiVersion"].as_str().unwrap_or_default();
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        let kind = json!({ "group": group, "kind": object["kind"], "version": version });
        let is_of = |schema: &Value| {
            let kinds = schema["x-kubernetes-group-version-kind"].as_array();
            kinds.is_some_and(|kinds| kinds.contains(&kind))
        };
        for file in &self.0 {
            let schemas = &file["components"]["schemas"];
            if let Some(schema) = schemas.as_object().unwrap().values().find(|schema| is_of(schema)) {
                let mut errors = Vec::new();
                check(object, schema, schemas, "", &mut errors);
                return errors;
            }
        }
        vec![format!("no schema of {kind}")]
    }
}

fn check(value: &Value, schema: &Value, schemas: &Value, path: &str, errors: &mut Vec<String>) {
    if let Some(reference) = schema["$ref"].as_str() {
        return check(value, &schemas[reference.rsplit('/').next().unwrap()], schemas, path, errors);
    }
    for part in schema["allOf"].as_array().into_iter().flatten() {
        check(value, part, schemas, path, errors);
    }
    if let Some(options) = schema["oneOf"].as_array()
        && !options.iter().any(|option| is_of_type(value, option))
    {
        errors.push(format!("{path}: {value} is of none of the types"));
    }
    if let Some(allowed) = schema["enum"].as_array()
        && !allowed.contains(value)
    {
        errors.push(format!("{path}: {value} is none of {allowed:?}"));
    }
    if !is_of_type(value, schema) {
        errors.push(format!("{path}: {value} is no {}", schema["type"]));
        return;
    }
    match value {
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                check(item, &schema["items"], schemas, &format!("{path}[{index}]"), errors);
            }
        }
        Value::Object(fields) if schema["type"] == "object" => {
            for (name, field) in fields {
                let path = format!("{path}.{name}");
                match (&schema["properties"][name], &schema["additionalProperties"]) {
                    (Value::Null, Value::Null) => errors.push(format!("{path}: unknown field")),
                    (Value::Null, any) => check(field, any, schemas, &path, errors),
                    (known, _) => check(field, known, schemas, &path, errors),
                }
            }
            for name in schema["required"].as_array().into_iter().flatten() {
                if fields.get(name.as_str().unwrap()).is_none() {
                    errors.push(format!("{path}: {name} is missing"));
                }
            }
        }
        _ => {}
    }
}

fn is_of_type(value: &Value, schema: &Value) -> bool {
    match schema["type"].as_str() {
        Some("array") => value.is_array(),
        Some("boolean") => value.is_boolean(),
        Some("integer") => value.is_i64() || value.is_u64(),
        Some("number") => value.is_number(),
        Some("object") => value.is_object(),
        Some("string") => value.is_string(),
        _ => true,
    }
}

fn assert_valid(schemas: &Schemas, yaml: &str, what: &str) {
    let objects = parse(yaml);
    assert!(!objects.is_empty(), "{what}");
    for object in objects {
        let errors = schemas.errors(&object);
        assert!(errors.is_empty(), "{what}, {} {}: {errors:#?}", object["kind"], object["metadata"]["name"]);
    }
}

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn every_rendering_is_what_the_api_server_knows() {
    let schemas = Schemas::load();

    assert_valid(&schemas, &single_file(), "kube2ram.yaml");
    assert_valid(&schemas, &charted(&[]), "the chart");
    for variant in VARIANTS {
        assert_valid(&schemas, &kustomized(Some(variant)), variant);
        assert_valid(&schemas, &charted(&[variant]), variant);
    }
}

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn so_is_every_example() {
    let schemas = Schemas::load();

    for entry in fs::read_dir(deploy().join("examples")).unwrap() {
        let path = entry.unwrap().path();
        assert_valid(&schemas, &fs::read_to_string(&path).unwrap(), &path.display().to_string());
    }
}

#[test]
#[ignore = "needs kustomize and Helm: cargo xtask test"]
fn what_it_does_not_know_is_reported() {
    let schemas = Schemas::load();
    let wrong = |pointer: &str, field: &str, value: Value| {
        let mut object =
            parse(&single_file()).into_iter().find(|object| object["kind"] == "DaemonSet").unwrap();
        object.pointer_mut(pointer).unwrap()[field] = value;
        schemas.errors(&object).join("; ")
    };

    let container = "/spec/template/spec/containers/0";
    assert!(wrong(container, "livenesProbe", json!({})).contains("livenesProbe: unknown field"));
    assert!(wrong("/spec/template/spec", "hostPID", json!("true")).contains("hostPID: \"true\" is no"));
    assert!(wrong(container, "args", json!("--debug")).contains("args: \"--debug\" is no"));
    assert!(wrong("/spec", "selector", json!(null)).contains("selector"));
    assert!(wrong("", "kind", json!("DeamonSet")).contains("no schema"));
    assert_eq!(wrong("/spec", "minReadySeconds", json!(5)), "", "the twin");
}
