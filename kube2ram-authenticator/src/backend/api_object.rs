//! Objects of the cluster, of whose metadata only what is used is read. Whatever is in the rest, such as a
//! time in `managedFields` that is beyond jiff's range, no object and no list of them is unreadable. Pure;
//! used by `follow` and `status_writer`.

use std::{borrow::Cow, collections::BTreeMap};

use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Resource,
    core::{ApiResource, DynamicObject, DynamicResourceScope, ObjectMeta},
};
use serde::Deserialize;
use serde_json::Value;

use super::sections::Section;

/// An object as the API server sends it.
#[derive(Clone, Debug, Deserialize)]
#[serde(from = "Value")]
pub(super) struct ApiObject(pub(super) DynamicObject);

/// Stands for a list that is no text: it cannot be read either, so the last one is kept.
const NO_LIST: &str = "x: [";

impl From<Value> for ApiObject {
    fn from(mut object: Value) -> Self {
        let metadata =
            object.as_object_mut().and_then(|fields| fields.remove("metadata")).unwrap_or_default();
        let text = |key: &str| metadata[key].as_str().map(str::to_owned);
        let annotations = metadata["annotations"].as_object().map(|all| {
            all.iter().filter_map(|(key, text)| Some((key.clone(), text.as_str()?.to_owned()))).collect()
        });
        let metadata = ObjectMeta {
            name: text("name"),
            namespace: text("namespace"),
            uid: text("uid"),
            resource_version: text("resourceVersion"),
            generation: metadata["generation"].as_i64(),
            annotations,
            ..ObjectMeta::default()
        };
        Self(DynamicObject { types: None, metadata, data: object })
    }
}

impl From<ApiObject> for ConfigMap {
    fn from(ApiObject(object): ApiObject) -> Self {
        let data = match &object.data["data"] {
            Value::Null => None,
            Value::Object(texts) => {
                let text = |text: &Value| text.as_str().unwrap_or(NO_LIST).to_owned();
                Some(texts.iter().map(|(key, value)| (key.clone(), text(value))).collect())
            }
            _ => {
                let none = Section::ALL.map(|section| (section.key().to_owned(), NO_LIST.to_owned()));
                Some(BTreeMap::from(none))
            }
        };
        Self { metadata: object.metadata, data, ..Self::default() }
    }
}

impl Resource for ApiObject {
    type DynamicType = ApiResource;
    type Scope = DynamicResourceScope;

    fn kind(of: &ApiResource) -> Cow<'_, str> {
        DynamicObject::kind(of)
    }

    fn group(of: &ApiResource) -> Cow<'_, str> {
        DynamicObject::group(of)
    }

    fn version(of: &ApiResource) -> Cow<'_, str> {
        DynamicObject::version(of)
    }

    fn plural(of: &ApiResource) -> Cow<'_, str> {
        DynamicObject::plural(of)
    }

    fn meta(&self) -> &ObjectMeta {
        &self.0.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.0.metadata
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(object: &Value) -> ApiObject {
        serde_json::from_str(&object.to_string()).unwrap()
    }

    #[test]
    fn whatever_is_odd_about_an_object_the_rest_is_read() {
        let ApiObject(object) = read(&json!({
            "metadata": {
                "name": "a", "uid": 1, "generation": "x", "annotations": { "k": "v", "odd": 1 },
                "creationTimestamp": "never", "managedFields": [{ "time": "9999-12-31T23:59:59Z" }],
            },
            "spec": { "arn": "acs:ram::1:user/a" },
        }));

        let ObjectMeta { name, uid, generation, annotations, .. } = object.metadata;
        assert_eq!((name.as_deref(), uid, generation), (Some("a"), None, None));
        assert_eq!(annotations, Some([("k".to_owned(), "v".to_owned())].into()));
        assert_eq!(object.data, json!({ "spec": { "arn": "acs:ram::1:user/a" } }));
        for odd in [json!(null), json!("x"), json!([1]), json!({ "metadata": "x" })] {
            assert_eq!(read(&odd).0.metadata, ObjectMeta::default(), "{odd}");
        }
    }

    #[test]
    fn data_that_is_no_text_is_neither_a_list_nor_the_absence_of_one() {
        let data = |data: Value| ConfigMap::from(read(&json!({ "metadata": {}, "data": data }))).data;
        let some = |key: &str, text: &str| (key.to_owned(), text.to_owned());

        assert_eq!(data(Value::Null), None);
        let texts = data(json!({ "mapUsers": "[]", "mapRoles": ["x"] }));
        assert_eq!(texts, Some([some("mapUsers", "[]"), some("mapRoles", NO_LIST)].into()));
        assert_eq!(data(json!("x")).unwrap().len(), Section::ALL.len());
    }
}
