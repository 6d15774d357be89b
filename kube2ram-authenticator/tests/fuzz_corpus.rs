//! The fuzz targets without the fuzzer: what must hold of any input, held against the committed corpus.

use std::{collections::BTreeMap, fs, panic::catch_unwind, path::Path};

#[expect(
    unreachable_pub,
    clippy::expect_used,
    reason = "a library of its own for the fuzzer; a module, of tests, here"
)]
#[path = "../fuzz/src/lib.rs"]
mod fuzz;

#[test]
fn every_target_holds_on_its_whole_corpus_and_takes_some_of_it() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let mut failed = Vec::new();
    for fuzz::Target { name, check } in fuzz::TARGETS {
        let directory = corpus.join(name);
        let inputs =
            fs::read_dir(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
        let mut outcomes = BTreeMap::from([(true, 0), (false, 0)]);
        for input in inputs {
            let path = input.unwrap().path();
            let input = fs::read(&path).unwrap();
            match catch_unwind(|| check(&input)) {
                Ok(accepted) => *outcomes.entry(accepted).or_default() += 1,
                Err(_) => failed.push(path),
            }
        }
        assert!(outcomes.values().all(|&count| count >= 4), "{name}, by whether accepted: {outcomes:?}");
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

/// A target that is built but not listed would never be replayed.
#[test]
fn every_target_of_the_fuzzer_is_replayed() {
    let manifest = include_str!("../fuzz/Cargo.toml");
    for fuzz::Target { name, .. } in fuzz::TARGETS {
        assert!(manifest.contains(&format!("path = \"fuzz_targets/{name}.rs\"")), "{name}");
    }
    assert_eq!(manifest.matches("[[bin]]").count(), fuzz::TARGETS.len());
}
