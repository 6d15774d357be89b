//! Credentials of assumed roles in files of the user, so that not each run of kubectl assumes a role. Never
//! anything that lasts: no user's keys. Without a directory that is this user's alone nothing is kept.
//! Depends on `files`; called by `obtain`.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use jiff::{SignedDuration, Timestamp};
use kube2ram_cloud::BaseCredentials;
use rustix::process::geteuid;
use secrecy::{ExposeSecret as _, SecretString, zeroize::Zeroizing};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::task::spawn_blocking;
use tracing::debug;

use super::source::keys;
use crate::files::{self, Lock, Mode};

/// A directory of files.
pub(super) struct Cache(PathBuf);

/// The file of one role, session and source.
pub(super) struct Entry {
    directory: PathBuf,
    path: PathBuf,
    /// What the file must name: another source must not be taken for this one.
    source: String,
}

/// What is kept.
#[derive(Clone, Debug)]
pub(super) struct Kept {
    pub(super) keys: BaseCredentials,
    pub(super) expires_at: Timestamp,
}

#[derive(Serialize)]
struct Written<'a> {
    source: &'a str,
    access_key_id: &'a str,
    access_key_secret: &'a str,
    security_token: &'a str,
    expires_at: Timestamp,
}

#[derive(Deserialize)]
struct Read {
    source: String,
    access_key_id: String,
    access_key_secret: SecretString,
    security_token: SecretString,
    expires_at: Timestamp,
}

impl Cache {
    /// In this directory, which is made when something is kept.
    pub(super) fn at(directory: PathBuf) -> Self {
        Self(directory)
    }

    /// The entry of a source, by its identity.
    pub(super) fn entry(&self, source: String) -> Entry {
        let digest = hex(&Sha256::digest(source.as_bytes()));
        // The identity may hold a secret, such as one in a URI: only its digest is written.
        Entry { directory: self.0.clone(), path: self.0.join(format!("{digest}.json")), source: digest }
    }
}

impl Entry {
    /// What is kept and lasts for a while yet.
    pub(super) fn read(&self, now: Timestamp) -> Option<Kept> {
        if !is_ours(&self.directory) {
            return None;
        }
        let content = files::read(&self.path, FILE_LIMIT_BYTES).ok().flatten()?;
        let read: Read = serde_json::from_slice(&content).ok()?;
        let is_fresh = read.expires_at.duration_since(now) > MIN_LEFT;
        let keys = keys(&read.access_key_id, read.access_key_secret, Some(read.security_token)).ok()?;
        (is_fresh && read.source == self.source).then_some(Kept { keys, expires_at: read.expires_at })
    }

    /// Waits until no other process fetches for this directory. `None` where nothing can be kept.
    pub(super) async fn lock(&self) -> Option<Lock> {
        let directory = self.directory.clone();
        let locked = spawn_blocking(move || {
            files::make_directory(&directory)?;
            Lock::take(&directory)
        });
        match locked.await {
            Ok(Ok(lock)) => is_ours(&self.directory).then_some(lock),
            Ok(Err(error)) => {
                debug!(%error, "cannot use the directory for credentials of assumed roles");
                None
            }
            Err(_panicked) => None,
        }
    }

    /// Keeps credentials; best effort.
    pub(super) fn write(&self, kept: &Kept) {
        let Some(security_token) = &kept.keys.security_token else { return };
        let written = Written {
            source: &self.source,
            access_key_id: &kept.keys.access_key_id,
            access_key_secret: kept.keys.access_key_secret.expose_secret(),
            security_token: security_token.expose_secret(),
            expires_at: kept.expires_at,
        };
        let outcome = serde_json::to_vec(&written)
            .map_err(Into::into)
            .map(Zeroizing::new)
            .and_then(|json| files::replace(&self.path, &json, Mode::Secret));
        if let Err(error) = outcome {
            debug!(%error, "cannot keep the credentials of an assumed role");
        }
    }
}

/// Whether nobody else can read or write in a directory.
fn is_ours(directory: &Path) -> bool {
    fs::symlink_metadata(directory).is_ok_and(|metadata| {
        metadata.is_dir() && metadata.uid() == geteuid().as_raw() && metadata.mode() & 0o077 == 0
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

const FILE_LIMIT_BYTES: usize = 64 * 1024;
/// A token that is signed now is good for minutes.
const MIN_LEFT: SignedDuration = SignedDuration::from_mins(10);

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use jiff::ToSpan as _;

    use super::*;

    fn now() -> Timestamp {
        "2026-01-02T03:04:05Z".parse().unwrap()
    }

    fn kept() -> Kept {
        let keys = keys("STS.id", "hush".into(), Some("tok".into())).unwrap();
        Kept { keys, expires_at: now() + 1.hours() }
    }

    async fn written(cache: &Cache, source: &str) -> Entry {
        let entry = cache.entry(source.into());
        let _lock = entry.lock().await.unwrap();
        entry.write(&kept());
        entry
    }

    #[tokio::test]
    async fn keeps_credentials_for_their_source_until_shortly_before_their_end() {
        let home = tempfile::tempdir().unwrap();
        let cache = Cache::at(home.path().join("a/b"));
        assert!(cache.entry("role x".into()).read(now()).is_none());

        let entry = written(&cache, "role x").await;

        let read = entry.read(now()).unwrap();
        assert_eq!((&*read.keys.access_key_id, read.expires_at), ("STS.id", now() + 1.hours()));
        assert_eq!(read.keys.security_token.unwrap().expose_secret(), "tok");
        assert!(entry.read(now() + 49.minutes()).is_some());
        assert!(entry.read(now() + 51.minutes()).is_none());
        assert!(cache.entry("role y".into()).read(now()).is_none());
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&entry.directory), mode(&entry.path)), (0o700, 0o600));
    }

    #[tokio::test]
    async fn takes_nothing_from_where_others_could_have_written() {
        let home = tempfile::tempdir().unwrap();
        let cache = Cache::at(home.path().join("cache"));
        let entry = written(&cache, "role x").await;
        assert!(entry.read(now()).is_some(), "the allowed twin");

        fs::set_permissions(&entry.directory, fs::Permissions::from_mode(0o770)).unwrap();
        assert!(entry.read(now()).is_none() && entry.lock().await.is_none());
        fs::set_permissions(&entry.directory, fs::Permissions::from_mode(0o700)).unwrap();
        fs::copy(&entry.path, cache.entry("role y".into()).path).unwrap();
        assert!(cache.entry("role y".into()).read(now()).is_none(), "of another source");
        fs::write(&entry.path, "{").unwrap();

        assert!(entry.read(now()).is_none());
    }

    #[tokio::test]
    async fn a_users_keys_are_never_kept() {
        let home = tempfile::tempdir().unwrap();
        let cache = Cache::at(home.path().join("cache"));
        let entry = cache.entry("keys".into());
        let _lock = entry.lock().await.unwrap();
        let keys = keys("LTAI.id", "hush".into(), None).unwrap();

        entry.write(&Kept { keys, ..kept() });

        assert_eq!(fs::read_dir(&entry.directory).unwrap().count(), 0);
    }
}
