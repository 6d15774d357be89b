//! Mappings in the ConfigMap `kube-system/alibabacloud-auth`, kept by a watch. Depends on `sections`; run by
//! the parent. With `crd` and the parent the home of kube.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::runtime::watcher::Event;
use kube2ram_service::telemetry::chain;

use super::sections::{Form, Section, Sections, parse};

/// The namespace and the name of ack-ram-authenticator's.
pub(super) const NAMESPACE: &str = "kube-system";
pub(super) const NAME: &str = "alibabacloud-auth";

/// The ConfigMap as the watch has shown it.
#[derive(Debug, Default)]
pub(super) struct AuthMap {
    sections: Sections,
    /// What a list has shown so far.
    incoming: Option<BTreeMap<String, String>>,
    /// The ConfigMap's UID, for Events; `None` without one.
    uid: Option<String>,
}

impl AuthMap {
    pub(super) fn sections(&self) -> &Sections {
        &self.sections
    }

    /// Takes an event of the watch. Returns whether the lists are to be used from now on; they are known
    /// after the first time. Without the ConfigMap they are empty.
    pub(super) fn take(&mut self, event: Event<ConfigMap>) -> bool {
        match &event {
            Event::Apply(object) | Event::InitApply(object) if is_ours(object) => {
                self.uid.clone_from(&object.metadata.uid);
            }
            Event::Delete(object) if is_ours(object) => self.uid = None,
            _ => {}
        }
        match event {
            Event::Init => {
                self.incoming = None;
                false
            }
            Event::InitApply(object) => {
                self.incoming = data_of(object).or(self.incoming.take());
                false
            }
            Event::InitDone => {
                let data = self.incoming.take();
                self.set(data);
                true
            }
            Event::Apply(object) => data_of(object).map(|data| self.set(Some(data))).is_some(),
            Event::Delete(object) => data_of(object).map(|_| self.set(None)).is_some(),
        }
    }

    /// The ConfigMap's UID.
    pub(super) fn uid(&self) -> Option<&str> {
        self.uid.as_deref()
    }

    /// Takes the ConfigMap's data; `None` if there is no such ConfigMap.
    pub(super) fn set(&mut self, data: Option<BTreeMap<String, String>>) {
        let Some(data) = data else { return self.sections.clear() };
        for section in Section::ALL {
            let text = data.get(section.key()).map_or("", String::as_str);
            let list = parse(Form::Yaml, section, text).map_err(|error| chain(&error));
            self.sections.take(section, list);
        }
    }
}

/// The data of the ConfigMap; `None` of any other one.
pub(super) fn data_of(object: ConfigMap) -> Option<BTreeMap<String, String>> {
    is_ours(&object).then(|| object.data.unwrap_or_default())
}

fn is_ours(object: &ConfigMap) -> bool {
    let metadata = &object.metadata;
    metadata.name.as_deref() == Some(NAME)
        && metadata.namespace.as_deref().is_none_or(|namespace| namespace == NAMESPACE)
}

#[cfg(test)]
mod tests {
    use kube::core::ObjectMeta;

    use super::*;

    const USERS: &str = "- userarn: acs:ram::1:user/alice\n  username: alice\n";

    fn config_map(name: &str, data: &[(&str, &str)]) -> ConfigMap {
        ConfigMap {
            metadata: ObjectMeta { name: Some(name.into()), ..ObjectMeta::default() },
            data: Some(data.iter().map(|(key, text)| ((*key).to_owned(), (*text).to_owned())).collect()),
            ..ConfigMap::default()
        }
    }

    fn ours(data: &[(&str, &str)]) -> ConfigMap {
        config_map(NAME, data)
    }

    fn listed(data: &[(&str, &str)]) -> AuthMap {
        let mut map = AuthMap::default();
        assert!(!map.take(Event::Init) && !map.take(Event::InitApply(ours(data))));
        assert!(map.take(Event::InitDone));
        map
    }

    #[test]
    fn is_known_when_the_first_list_is_complete() {
        let map = listed(&[("mapUsers", USERS), ("mapAccounts", "- 1\n"), ("other", "text")]);

        assert_eq!(map.sections().entries().len(), 1);
        assert_eq!(map.sections().accounts().len(), 1);
    }

    #[test]
    fn a_cluster_without_the_config_map_has_no_mappings() {
        let mut map = AuthMap::default();
        assert!(!map.take(Event::Init));

        assert!(map.take(Event::InitDone));

        assert!(map.sections().entries().is_empty() && map.sections().broken().is_empty());
    }

    #[test]
    fn a_deleted_config_map_maps_nobody() {
        let mut map = listed(&[("mapUsers", USERS)]);

        assert!(map.take(Event::Delete(ours(&[]))));

        assert!(map.sections().entries().is_empty());
        // Also one that was deleted while the watch was away.
        let mut map = listed(&[("mapUsers", USERS)]);
        assert!(!map.take(Event::Init));
        assert_eq!(map.sections().entries().len(), 1, "until the list is complete");
        assert!(map.take(Event::InitDone));
        assert!(map.sections().entries().is_empty());
    }

    #[test]
    fn a_key_that_cannot_be_read_keeps_its_last_list_and_no_other() {
        let mut map = listed(&[("mapUsers", USERS), ("mapAccounts", "- 1\n")]);

        assert!(map.take(Event::Apply(ours(&[("mapUsers", "x: ["), ("mapAccounts", "")]))));

        assert_eq!(map.sections().entries().len(), 1);
        assert!(map.sections().accounts().is_empty());
        assert_eq!(map.sections().broken().len(), 1);
        assert!(map.take(Event::Apply(ours(&[]))), "a key that was removed is an empty list");
        assert!(map.sections().entries().is_empty() && map.sections().broken().is_empty());
    }

    /// As in ack-ram-authenticator: keys of data are case-sensitive, those of entries are not.
    #[test]
    fn a_key_in_another_case_is_another_key() {
        let map = listed(&[("mapusers", USERS), ("MaPuSeRs", USERS)]);

        assert!(map.sections().entries().is_empty());
    }

    #[test]
    fn another_config_map_is_ignored() {
        let mut map = listed(&[("mapUsers", USERS)]);

        assert!(!map.take(Event::Apply(config_map("other", &[]))));
        assert!(!map.take(Event::Delete(config_map("other", &[]))));

        assert_eq!(map.sections().entries().len(), 1);
    }
}
