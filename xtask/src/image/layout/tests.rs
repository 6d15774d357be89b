use super::*;

fn facts() -> Facts {
    Facts {
        title: "it",
        version: "1.2.3",
        description: "for tests",
        licenses: "Apache-2.0",
        created: "1970-01-02T00:00:00Z".to_owned(),
        revision: Some("abc".to_owned()),
        source: None,
    }
}

fn images() -> [Image; 2] {
    Arch::ALL.map(|arch| Image {
        arch,
        entrypoint: "/bin/it".to_owned(),
        user: "64532:64532",
        layers: vec![
            Layer { tar: b"the same for both".to_vec(), brings: "certificates" },
            Layer { tar: arch.name().as_bytes().to_vec(), brings: "the program" },
        ],
    })
}

fn layout(facts: &Facts) -> Layout {
    Layout::new(facts, &"kube2ram:1.2.3".parse().unwrap(), &images()).unwrap()
}

/// Follows a descriptor, and checks it on the way.
fn follow<'a>(layout: &'a Layout, descriptor: &Value) -> &'a [u8] {
    let path = format!("blobs/{}", descriptor["digest"].as_str().unwrap().replace(':', "/"));
    let bytes = &layout.files[&path];
    assert_eq!(descriptor["size"], bytes.len());
    assert_eq!(descriptor["digest"], digest(bytes));
    bytes
}

fn read(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap()
}

#[test]
fn every_descriptor_leads_to_what_it_describes() {
    let layout = layout(&facts());

    let top = read(&layout.files["index.json"]);
    assert_eq!(top["manifests"][0]["digest"], layout.digest);
    let index = read(follow(&layout, &top["manifests"][0]));
    assert_eq!(index["mediaType"], INDEX);
    for (position, arch) in Arch::ALL.into_iter().enumerate() {
        let descriptor = &index["manifests"][position];
        assert_eq!(descriptor["platform"], json!({ "architecture": arch.name(), "os": "linux" }));
        let manifest = read(follow(&layout, descriptor));
        let config = read(follow(&layout, &manifest["config"]));
        assert_eq!(config["architecture"], arch.name());
        assert_eq!(config["config"]["Entrypoint"], json!(["/bin/it"]));
        assert_eq!(config["config"]["User"], "64532:64532");
        assert_eq!(config["config"]["Labels"]["org.opencontainers.image.title"], "it");
        for (position, contents) in ["the same for both", arch.name()].into_iter().enumerate() {
            let compressed = follow(&layout, &manifest["layers"][position]);
            assert_eq!(compressed, layer::gzip(contents.as_bytes()).unwrap());
            assert_eq!(config["rootfs"]["diff_ids"][position], digest(contents.as_bytes()));
        }
    }
}

#[test]
fn what_two_architectures_share_is_there_once() {
    let layout = layout(&facts());

    let blobs = layout.files.keys().filter(|path| path.starts_with("blobs/sha256/")).count();

    // An index; each a manifest, a configuration and a program; the certificates.
    assert_eq!(blobs, 1 + 2 * 3 + 1);
    assert_eq!(layout.files.len(), blobs + 2);
}

#[test]
fn the_same_facts_give_the_same_digest_and_others_another() {
    let other = Facts { revision: Some("abd".to_owned()), ..facts() };

    assert_eq!(layout(&facts()).digest, layout(&facts()).digest);
    assert_ne!(layout(&facts()).digest, layout(&other).digest);
}

#[test]
fn the_name_is_outside_of_the_digest() {
    let named = Layout::new(&facts(), &"registry.example/other:tag".parse().unwrap(), &images()).unwrap();

    assert_eq!(named.digest, layout(&facts()).digest);
    let annotations = &read(&named.files["index.json"])["manifests"][0]["annotations"];
    assert_eq!(annotations["org.opencontainers.image.ref.name"], "tag");
    assert_eq!(annotations["io.containerd.image.name"], "registry.example/other:tag");
}

#[test]
fn what_is_not_known_is_left_out() {
    let (known, unknown) = (facts(), Facts { revision: None, ..facts() });

    assert_eq!(known.annotations()["org.opencontainers.image.revision"], "abc");
    assert!(!unknown.annotations().contains_key("org.opencontainers.image.revision"));
    assert!(!known.annotations().contains_key("org.opencontainers.image.source"));
}
