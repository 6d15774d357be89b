//! Mappings in a file: the configuration file's, or a file of their own. Read at the start and whenever its
//! content changes. A change counts once two looks in a row have found it. Depends on `sections`; run by the
//! parent.

use std::{
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use kube2ram_service::telemetry::chain;

use super::sections::{Form, Sections, parse_all};

/// More than 10,000 mappings have.
const LIMIT_BYTES: u64 = 4 * 1024 * 1024;
/// After half a minute of changes a file is hardly being written once.
const UNSTABLE_LOOKS: u32 = 6;
const UNSTABLE: &str =
    "it changes at each look, so what is found may be incomplete: write it once, and less often";

/// A file with mappings, and what was last read of it.
#[derive(Debug)]
pub(super) struct MappingFile {
    path: PathBuf,
    form: Form,
    /// What the lists were last read from.
    content: Content,
    /// What the last look has found, if it is other content.
    next: Option<Content>,
    /// How many looks in a row have found new content.
    unstable: u32,
    sections: Sections,
    /// Why the file could not be read the last time.
    fault: Option<String>,
}

#[derive(Debug, PartialEq, Eq)]
enum Content {
    Missing,
    /// Nothing was read yet.
    Never,
    Text(String),
}

impl MappingFile {
    pub(super) fn new(path: PathBuf, form: Form) -> Self {
        let (content, sections) = (Content::Never, Sections::default());
        Self { path, form, content, next: None, unstable: 0, sections, fault: None }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn sections(&self) -> &Sections {
        &self.sections
    }

    /// Whether the file is not there, which is no fault.
    pub(super) fn is_missing(&self) -> bool {
        self.content == Content::Missing
    }

    /// Why the file cannot be read, or the first of its lists that cannot.
    pub(super) fn fault(&self) -> Option<String> {
        let broken = || self.sections.broken().iter().next();
        self.fault.clone().or_else(|| broken().map(|(section, error)| format!("{}: {error}", section.key())))
    }

    /// Takes what [`read`] has read. Returns whether there is news: other lists, or that they cannot be read,
    /// or can be read again.
    ///
    /// A file of mappings that is not there maps nobody: it was removed, or not written yet. Without its
    /// configuration file the server would not have started, so that one is only away for a moment.
    ///
    /// A program may be in the middle of writing the file, and the first half of a list can be a valid list.
    /// So other content counts when the next look finds it again. A file that changes at each look never
    /// counts, which is a fault after some looks. What is read first counts at once: without it there are no
    /// mappings at all.
    pub(super) fn take(&mut self, content: io::Result<String>) -> bool {
        let content = match content {
            Ok(text) => Content::Text(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.form == Form::Json => {
                Content::Missing
            }
            Err(error) => {
                self.next = None;
                let fault = Some(chain(&error));
                let is_news = self.fault != fault;
                self.fault = fault;
                return is_news;
            }
        };
        let fault_before = self.fault.take();
        let was_faulty = fault_before.is_some();
        let found_before = self.next.take();
        if self.content == content {
            self.unstable = 0;
            return was_faulty;
        }
        if self.content != Content::Never && found_before.as_ref() != Some(&content) {
            self.next = Some(content);
            self.unstable = self.unstable.saturating_add(1);
            self.fault = (self.unstable >= UNSTABLE_LOOKS).then(|| UNSTABLE.to_owned());
            return self.fault != fault_before;
        }
        self.unstable = 0;
        match &content {
            Content::Missing | Content::Never => self.sections.clear(),
            Content::Text(text) => {
                for (section, list) in parse_all(self.form, text) {
                    self.sections.take(section, list.map_err(|error| chain(&error)));
                }
            }
        }
        self.content = content;
        true
    }
}

/// Reads a file of mappings as a whole.
///
/// # Errors
/// When it is not there, is longer than 4 MiB, or is no text.
pub(super) fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(LIMIT_BYTES + 1).read_to_string(&mut text)?;
    if u64::try_from(text.len()).is_ok_and(|length| length <= LIMIT_BYTES) {
        return Ok(text);
    }
    Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is longer than 4 MiB"))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const USERS: &str = r#"{"mapUsers": [{"userarn": "a", "username": "x"}]}"#;

    fn json() -> MappingFile {
        MappingFile::new("mappings.json".into(), Form::Json)
    }

    fn missing() -> io::Result<String> {
        Err(io::ErrorKind::NotFound.into())
    }

    fn ok(text: &str) -> io::Result<String> {
        Ok(text.to_owned())
    }

    /// The same at two looks in a row. Whether the second was news.
    fn twice(file: &mut MappingFile, content: fn() -> io::Result<String>) -> bool {
        assert!(!file.take(content()), "one look is not enough");
        file.take(content())
    }

    #[test]
    fn a_change_is_seen_once() {
        let mut file = json();

        assert!(file.take(ok(USERS)) && !file.take(ok(USERS)));
        assert_eq!(file.sections().entries().len(), 1);
        assert!(twice(&mut file, || ok("{}")));
        assert!(!file.take(ok("{}")));
        assert!(file.sections().entries().is_empty());
    }

    /// A valid beginning of a list, and a file that is removed before it is written, as some editors do.
    #[test]
    fn a_file_that_is_being_written_does_not_count() {
        let config = "server:\n  mapUsers:\n  - {userarn: a, username: x}\n  - {userarn: b, username: y}\n";
        let beginning = "server:\n  mapUsers:\n  - {userarn: a, username: x}\n";
        let mut file = MappingFile::new("config.yaml".into(), Form::ConfigFile);
        assert!(file.take(ok(config)));
        assert!(!file.take(ok(beginning)) && !file.take(ok("server: [")) && !file.take(ok(config)));
        assert!(!file.take(ok(beginning)), "what was found before the last look does not count either");
        assert_eq!(file.sections().entries().len(), 2);
        assert!(file.take(ok(beginning)), "the allowed twin: somebody has removed one");
        assert_eq!(file.sections().entries().len(), 1);

        let mut file = json();
        assert!(file.take(ok(USERS)));
        assert!(!file.take(missing()) && !file.take(ok(USERS)));
        assert_eq!(file.sections().entries().len(), 1);
    }

    #[test]
    fn a_file_that_changes_at_each_look_is_a_fault_until_it_stays() {
        let mut file = json();
        assert!(file.take(ok(USERS)));
        let other = |n: u32| ok(&" ".repeat(n as usize + 1));

        let news: Vec<u32> = (1..=20).filter(|n| file.take(other(*n))).collect();

        assert_eq!(news, [UNSTABLE_LOOKS], "it is reported once");
        assert_eq!(file.fault().as_deref(), Some(UNSTABLE));
        assert_eq!(file.sections().entries().len(), 1);
        assert!(file.take(ok("{}")) || file.take(ok("{}")));
        assert_eq!(file.fault(), None);
        assert!(file.sections().entries().is_empty());
    }

    #[test]
    fn what_is_read_first_counts_at_once() {
        let mut file = json();
        assert!(file.take(Err(io::ErrorKind::PermissionDenied.into())));

        assert!(file.take(ok(USERS)));

        assert_eq!(file.sections().entries().len(), 1);
    }

    #[test]
    fn a_file_of_mappings_that_is_not_there_maps_nobody() {
        let mut file = json();
        assert!(file.take(missing()), "it was not known before");
        assert!(!file.take(missing()));
        assert!(twice(&mut file, || ok(USERS)));
        assert!(!file.is_missing());

        assert!(twice(&mut file, missing));

        assert!(file.is_missing() && file.fault().is_none());
        assert!(file.sections().entries().is_empty());
    }

    #[test]
    fn a_configuration_file_that_is_away_or_broken_keeps_what_it_had() {
        let config = "server: {mapUsers: [{userarn: a, username: x}]}";
        let mut file = MappingFile::new("config.yaml".into(), Form::ConfigFile);
        assert!(file.take(ok(config)));

        assert!(file.take(missing()));
        assert!(!file.take(missing()), "it is reported once");
        assert!(file.fault().is_some());
        assert_eq!(file.sections().entries().len(), 1);
        assert!(file.take(ok("server: [")), "that it is there again is news");
        assert!(file.take(ok("server: [")));
        assert!(!file.take(ok("server: [")), "it is reported once");
        assert!(file.fault().is_some());
        assert_eq!(file.sections().entries().len(), 1);
        assert!(!file.take(ok(config)));
        assert!(file.take(ok(config)), "that it can be read again is news");
        assert_eq!(file.fault(), None);
    }

    #[test]
    fn an_error_other_than_a_missing_file_keeps_what_there_was() {
        let mut file = json();
        assert!(file.take(ok(USERS)));

        assert!(file.take(Err(io::ErrorKind::PermissionDenied.into())));

        assert_eq!(file.sections().entries().len(), 1);
        assert!(file.take(ok(USERS)), "that it can be read again is news");
        assert_eq!(file.fault(), None);
    }

    #[test]
    fn a_file_is_read_up_to_a_limit() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f");

        assert_eq!(read(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        fs::write(&path, "x".repeat(4 * 1024 * 1024)).unwrap();
        assert_eq!(read(&path).unwrap().len(), 4 * 1024 * 1024);
        fs::write(&path, "x".repeat(4 * 1024 * 1024 + 1)).unwrap();
        assert_eq!(read(&path).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        fs::write(&path, [0xff]).unwrap();
        assert_eq!(read(&path).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
