//! How the modules of a crate depend on each other: there is no way from one back to itself.

use std::collections::{BTreeMap, BTreeSet};

use super::{CRATES, Fault, Source, text::code};

/// Dependencies of a crate's modules at its top, by what their code names after `crate::`. `#[cfg(test)]`
/// modules are left out.
pub(super) fn cycles(sources: &[Source]) -> Vec<Fault> {
    CRATES.iter().filter_map(|krate| cycle(sources, krate)).collect()
}

fn cycle(sources: &[Source], krate: &str) -> Option<Fault> {
    let mut uses: BTreeMap<&str, BTreeMap<String, (String, usize)>> = BTreeMap::new();
    for source in sources.iter().filter(|source| source.path.starts_with(krate) && !source.is_test()) {
        let module = source.path[krate.len()..].split(['/', '.']).next().unwrap_or_default();
        if matches!(module, "lib" | "main") {
            continue;
        }
        for (number, name) in named(source) {
            if name != module {
                let place = (source.path.clone(), number);
                uses.entry(module).or_default().entry(name).or_insert(place);
            }
        }
    }
    let mut done = BTreeSet::new();
    let way = uses.keys().find_map(|module| way_back(module, &uses, &mut Vec::new(), &mut done))?;
    let [from, to, ..] = way.as_slice() else { return None };
    let (path, line) = uses.get(from.as_str())?.get(to)?;
    let advice = format!(
        "modules depend on each other in a circle: {}; move what both need below them, or pass it in",
        way.join(" → ")
    );
    Some(Fault::new(path, *line, advice))
}

/// The modules that a file's code names after `crate::`, with the line of each.
fn named(source: &Source) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut depth = 0_usize;
    for (number, line) in source.product_lines() {
        let mut rest = code(line);
        // Within `use crate::{ … }`, names at the first level are modules.
        if depth == 0 {
            while let Some(at) = rest.find("crate::") {
                let is_ours = !rest[..at].ends_with(|c: char| c.is_alphanumeric() || matches!(c, '_' | '$'));
                rest = &rest[at + "crate::".len()..];
                if !is_ours {
                    continue;
                }
                if let Some(tree) = rest.strip_prefix('{') {
                    depth = 1;
                    rest = tree;
                    break;
                }
                found.extend(name(rest).map(|name| (number, name)));
            }
        }
        if depth > 0 {
            let mut at_start = true;
            for (at, c) in rest.char_indices() {
                match c {
                    '{' => depth += 1,
                    '}' => depth -= 1,
                    ',' => at_start = true,
                    c if c.is_alphanumeric() && at_start && depth == 1 => {
                        found.extend(name(&rest[at..]).map(|name| (number, name)));
                        at_start = false;
                    }
                    c if !c.is_whitespace() => at_start = false,
                    _ => {}
                }
                if depth == 0 {
                    break;
                }
            }
        }
    }
    found
}

/// A module's name at the beginning of a path; types and macros begin otherwise.
fn name(path: &str) -> Option<String> {
    let name: String = path.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect();
    let is_module = !path[name.len()..].starts_with(['(', '!']) && !name.is_empty();
    is_module.then_some(name)
}

/// The way from `module` over others back to one that is on the way already.
fn way_back<'a>(
    module: &'a str,
    uses: &'a BTreeMap<&str, BTreeMap<String, (String, usize)>>,
    way: &mut Vec<&'a str>,
    done: &mut BTreeSet<&'a str>,
) -> Option<Vec<String>> {
    if let Some(at) = way.iter().position(|other| *other == module) {
        return Some(way[at..].iter().chain([&module]).map(|name| (*name).to_owned()).collect());
    }
    if !done.insert(module) {
        return None;
    }
    way.push(module);
    let found = uses
        .get(module)
        .into_iter()
        .flat_map(|uses| uses.keys())
        .find_map(|other| way_back(other, uses, way, done));
    way.pop();
    found
}

#[cfg(test)]
mod tests {
    use super::{super::source, *};

    #[test]
    fn names_the_way_round_and_where_it_begins() {
        let sources = [
            source("kube2ram-agent/src/a.rs", "use std::fmt;\nuse crate::{\n    b::{c, D},\n    e,\n};\n"),
            source("kube2ram-agent/src/b/part.rs", "fn f() { crate::d::g() }\n"),
            source("kube2ram-agent/src/d.rs", "// crate::b\nuse crate::e::F;\n"),
            source("kube2ram-agent/src/e.rs", "#[cfg(test)]\nmod tests {\n    use crate::a;\n}\n"),
        ];
        assert_eq!(cycles(&sources), []);

        let mut round = Vec::from(sources);
        round.push(source("kube2ram-agent/src/e/part.rs", "use crate::a::X;\n"));
        let faults = cycles(&round);

        assert_eq!(faults.len(), 1);
        assert!(faults[0].advice.contains("a → b → d → e → a"), "{faults:?}");
        assert_eq!((faults[0].path.as_str(), faults[0].line), ("kube2ram-agent/src/a.rs", 3));
    }
}
