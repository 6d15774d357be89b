//! The files of an OCI image layout (image-spec 1.1): one index with an image for each architecture. Pure;
//! called by `image`.
//!
//! Written as JSON values rather than with oci-spec's types, whose annotations are hash maps: the same image
//! would get another digest each time.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::{layer, name::Name};
use crate::musl::Arch;

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// An image's labels.
pub(crate) struct Facts {
    /// The program.
    pub(crate) title: &'static str,
    pub(crate) version: &'static str,
    pub(crate) description: &'static str,
    pub(crate) licenses: &'static str,
    /// RFC 3339.
    pub(crate) created: String,
    /// The commit, where the sources are exactly those of one.
    pub(crate) revision: Option<String>,
    /// Where the sources are to be had.
    pub(crate) source: Option<String>,
}

impl Facts {
    fn annotations(&self) -> BTreeMap<String, &str> {
        let given = [
            ("created", Some(&*self.created)),
            ("description", Some(self.description)),
            ("licenses", Some(self.licenses)),
            ("revision", self.revision.as_deref()),
            ("source", self.source.as_deref()),
            ("title", Some(self.title)),
            ("version", Some(self.version)),
        ];
        let given = given.into_iter().filter_map(|(key, value)| Some((key, value?)));
        given.map(|(key, value)| (format!("org.opencontainers.image.{key}"), value)).collect()
    }
}

/// An uncompressed tar archive, and in a few words what it brings.
pub(crate) struct Layer {
    pub(crate) tar: Vec<u8>,
    pub(crate) brings: &'static str,
}

/// The image of one architecture.
pub(crate) struct Image {
    pub(crate) arch: Arch,
    pub(crate) entrypoint: String,
    /// Who runs it.
    pub(crate) user: &'static str,
    pub(crate) layers: Vec<Layer>,
}

/// All files by their paths.
pub(crate) struct Layout {
    pub(crate) files: BTreeMap<String, Vec<u8>>,
    /// Of the index: what a registry calls the image.
    pub(crate) digest: String,
    /// What a node downloads, in bytes.
    pub(crate) sizes: Vec<(Arch, usize)>,
}

impl Layout {
    pub(crate) fn new(facts: &Facts, name: &Name, images: &[Image]) -> Result<Self> {
        let mut layout = Self { files: BTreeMap::new(), digest: String::new(), sizes: Vec::new() };
        let manifests = images.iter().map(|image| layout.image(facts, image)).collect::<Result<Vec<_>>>()?;
        let annotations = facts.annotations();
        let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": manifests, "annotations": annotations });
        let mut descriptor = layout.document(INDEX, &index)?;
        layout.digest = descriptor["digest"].as_str().unwrap_or_default().to_owned();
        descriptor["annotations"] = json!({
            // What skopeo and podman choose by, and what containerd and kind call it.
            "org.opencontainers.image.ref.name": name.tag(),
            "io.containerd.image.name": name.complete(),
        });
        let top = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [descriptor] });
        layout.files.insert("index.json".to_owned(), serde_json::to_vec(&top)?);
        let version = json!({ "imageLayoutVersion": "1.0.0" });
        layout.files.insert("oci-layout".to_owned(), serde_json::to_vec(&version)?);
        Ok(layout)
    }

    /// The descriptor of an image, for the index.
    fn image(&mut self, facts: &Facts, image: &Image) -> Result<Value> {
        let (mut layers, mut diff_ids, mut history, mut size) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for Layer { tar, brings } in &image.layers {
            let compressed = layer::gzip(tar)?;
            size += compressed.len();
            layers.push(self.blob(LAYER, compressed));
            diff_ids.push(digest(tar));
            history.push(
                json!({ "created": facts.created, "created_by": "cargo xtask image", "comment": brings }),
            );
        }
        let annotations = facts.annotations();
        let config = json!({
            "architecture": image.arch.name(),
            "os": "linux",
            "created": facts.created,
            "config": { "User": image.user, "Entrypoint": [image.entrypoint], "WorkingDir": "/", "Labels": annotations },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
            "history": history,
        });
        let config = self.document(CONFIG, &config)?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config,
            "layers": layers,
            "annotations": annotations,
        });
        self.sizes.push((image.arch, size));
        let mut descriptor = self.document(MANIFEST, &manifest)?;
        descriptor["platform"] = json!({ "architecture": image.arch.name(), "os": "linux" });
        Ok(descriptor)
    }

    fn document(&mut self, media_type: &str, document: &Value) -> Result<Value> {
        Ok(self.blob(media_type, serde_json::to_vec(document)?))
    }

    /// Keeps the bytes under their digest, and describes them.
    fn blob(&mut self, media_type: &str, bytes: Vec<u8>) -> Value {
        let digest = digest(&bytes);
        let descriptor = json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() });
        self.files.insert(format!("blobs/{}", digest.replace(':', "/")), bytes);
        descriptor
    }
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

#[cfg(test)]
mod tests;
