//! Configuration files: an accepted file never allows more than it says.

use std::path::Path;

use kube2ram_authenticator::{
    backend::Mode,
    config::{Config, ConfigFile, Given},
};

/// Checks a file, together with no flags at all.
pub fn check(data: &[u8]) -> bool {
    let Ok(text) = str::from_utf8(data) else { return false };
    let Ok(file) = ConfigFile::parse(text, Path::new("config.yaml")) else { return false };
    let Ok(config) = Config::try_new(Given::default(), file) else { return false };
    assert!(!config.cluster_id.is_empty());
    assert!(!config.backends.is_empty());
    assert!(!config.webhook.hostname.is_empty());
    for (place, (mode, restrictions)) in config.backends.iter().enumerate() {
        assert!(config.backends[..place].iter().all(|(other, _)| other != mode), "{mode} twice");
        let is_reserved = restrictions.reserved_usernames.iter().any(|prefix| &**prefix == "system:");
        assert!(is_reserved || says(text, "allowsystemusernames"));
        assert!(!restrictions.trusts_session_names || says(text, "trustsessionnames"));
        let of_file = *mode == Mode::DynamicFile && says(text, "dynamicfileuseridstrict");
        assert!(!restrictions.needs_user_id || of_file || says(text, "useridstrict"));
        // Every name begins with an empty prefix.
        let lists = restrictions.reserved_usernames.iter().chain(&restrictions.reserved_groups);
        assert!(lists.into_iter().all(|prefix| !prefix.is_empty()));
    }
    true
}

/// Whether a key is in the text, in any case; YAML can write it with escapes, too.
fn says(text: &str, key: &str) -> bool {
    text.contains('\\') || text.to_lowercase().contains(key)
}
