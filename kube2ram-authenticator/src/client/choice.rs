//! Which source of credentials is used: the first that is configured, in the order of ack-ram-tool. Reads
//! files of the user, and writes none. Depends on `environment`, `profiles` and `ini`; called by the parent.

use std::path::{Path, PathBuf};

use secrecy::{SecretString, zeroize::Zeroizing};
use serde::Deserialize;

use super::{
    environment::{self, Variable, first, is_set},
    ini, profiles,
    source::{Source, SourceError, keys},
};
use crate::files;

/// Where credentials are looked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Only the role attached to the machine.
    pub node_role: bool,
    /// Not in the environment.
    pub ignore_environment: bool,
    /// Not in the file of aliyun-cli.
    pub ignore_profiles: bool,
    /// By this profile; else by the one that the environment or the file names.
    pub profile: Option<String>,
    /// The file of aliyun-cli; else `~/.aliyun/config.json`.
    pub profile_file: Option<PathBuf>,
}

/// Chooses. Without any configuration it is the role attached to the machine.
pub(super) fn choose(
    options: &Options,
    variable: Variable<'_>,
    home: Option<&Path>,
) -> Result<Source, SourceError> {
    if options.node_role {
        return Ok(Source::NodeRole { name: environment::node_role(variable) });
    }
    if !options.ignore_environment {
        if let Some(source) = environment::source(variable)? {
            return Ok(source);
        }
        if let Some(name) = environment::node_role(variable) {
            return Ok(Source::NodeRole { name: Some(name) });
        }
    }
    let of_environment = || Some(first(variable, &PROFILES)?.1);
    let profile = options.profile.clone().or_else(of_environment);
    if !options.ignore_profiles && !is_set(variable, &["ALIBABACLOUD_IGNORE_PROFILE"]) {
        let named = || Some(PathBuf::from(first(variable, &["ALIBABACLOUD_PROFILE_PATH"])?.1));
        let usual = || Some(home?.join(".aliyun/config.json"));
        let path = options.profile_file.clone().or_else(named).or_else(usual);
        if let Some(source) = path.map(|path| of_profiles(path, profile.as_deref())).transpose()?.flatten() {
            return Ok(source);
        }
    }
    let named = || Some(PathBuf::from(first(variable, &["ALIBABA_CLOUD_CREDENTIALS_FILE"])?.1));
    let usual = || Some(home?.join(".alibabacloud/credentials"));
    if let Some(path) = named().or_else(usual)
        && let Some(text) = read(&path)?
        && let Some(source) = ini::source(&path, &text, profile.as_deref())?
    {
        return Ok(source);
    }
    if let Some(path) = home.map(|home| home.join(".acs/credentials"))
        && let Some(text) = read(&path)?
    {
        return of_acs(path, &text);
    }
    Ok(Source::NodeRole { name: None })
}

fn of_profiles(path: PathBuf, profile: Option<&str>) -> Result<Option<Source>, SourceError> {
    match read(&path)? {
        Some(text) => profiles::source(&path, &text, profile),
        None => Ok(None),
    }
}

/// The file that the predecessor's first client has read.
fn of_acs(path: PathBuf, text: &str) -> Result<Source, SourceError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Document {
        acs_access_key_id: String,
        acs_access_key_secret: SecretString,
        #[serde(default)]
        acs_access_security_token: Option<SecretString>,
    }

    let form = "JSON with AcsAccessKeyId and AcsAccessKeySecret";
    // serde_json's error quotes values.
    let document: Document = serde_json::from_str(text).or(Err(SourceError::Form { path, form }))?;
    let Document { acs_access_key_id, acs_access_key_secret, acs_access_security_token } = document;
    let keys = keys(&acs_access_key_id, acs_access_key_secret, acs_access_security_token)?;
    Ok(Source::Keys { keys, until: None })
}

/// `None` when there is no such file.
fn read(path: &Path) -> Result<Option<Zeroizing<String>>, SourceError> {
    let content = files::read(path, FILE_LIMIT_BYTES)
        .map_err(|source| SourceError::Read { path: path.to_owned(), source })?;
    let Some(content) = content else { return Ok(None) };
    match str::from_utf8(&content) {
        Ok(text) => Ok(Some(Zeroizing::new(text.to_owned()))),
        Err(_) => Err(SourceError::Form { path: path.to_owned(), form: "UTF-8" }),
    }
}

const PROFILES: [&str; 3] = ["ALIBABACLOUD_PROFILE", "ALIBABA_CLOUD_PROFILE", "ALICLOUD_PROFILE"];
/// More than a user has of profiles.
const FILE_LIMIT_BYTES: usize = 1024 * 1024;

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    struct Home(tempfile::TempDir);

    impl Home {
        fn new(files: &[(&str, &str)]) -> Self {
            let home = tempfile::tempdir().unwrap();
            for (path, text) in files {
                let path = home.path().join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            Self(home)
        }

        fn choose(&self, options: &Options, variables: &[(&str, &str)]) -> Result<Source, SourceError> {
            let value = |name: &str| {
                variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
            };
            choose(options, &value, Some(self.0.path()))
        }

        fn text(&self, options: &Options, variables: &[(&str, &str)]) -> String {
            self.choose(options, variables).unwrap().to_string()
        }
    }

    const CLI: (&str, &str) = (
        ".aliyun/config.json",
        r#"{"current":"default","profiles":[
            {"name":"default","mode":"AK","access_key_id":"of-cli","access_key_secret":"s"},
            {"name":"other","mode":"AK","access_key_id":"of-other","access_key_secret":"s"}]}"#,
    );
    const SDK: (&str, &str) = (
        ".alibabacloud/credentials",
        "[default]\ntype = access_key\naccess_key_id = of-sdk\naccess_key_secret = s\n",
    );
    const ACS: (&str, &str) = (".acs/credentials", r#"{"AcsAccessKeyId":"of-acs","AcsAccessKeySecret":"s"}"#);
    const ENVIRONMENT: [(&str, &str); 2] = [("ACCESS_KEY_ID", "of-env"), ("ACCESS_KEY_SECRET", "s")];

    #[test]
    fn takes_the_first_that_is_configured() {
        let options = Options::default();

        for (files, variables, expected) in [
            (&[CLI, SDK, ACS][..], &ENVIRONMENT[..], "keys \"of-env\""),
            (&[CLI, SDK, ACS][..], &[][..], "keys \"of-cli\""),
            (&[SDK, ACS][..], &[][..], "keys \"of-sdk\""),
            (&[ACS][..], &[][..], "keys \"of-acs\""),
            (&[][..], &[][..], "node role None"),
            (&[CLI][..], &[("ALIBABA_CLOUD_ECS_METADATA", "worker")][..], "node role Some(\"worker\")"),
        ] {
            assert_eq!(Home::new(files).text(&options, variables), expected);
        }
    }

    #[test]
    fn leaves_out_what_it_is_told_to() {
        let home = Home::new(&[CLI, SDK]);
        let ignored = Options { ignore_environment: true, ..Options::default() };
        let without_cli = Options { ignore_profiles: true, ..ignored.clone() };

        assert_eq!(home.text(&ignored, &ENVIRONMENT), "keys \"of-cli\"");
        assert_eq!(home.text(&without_cli, &ENVIRONMENT), "keys \"of-sdk\"");
        assert_eq!(home.text(&ignored, &[("ALIBABACLOUD_IGNORE_PROFILE", "true")]), "keys \"of-sdk\"");
        let machine = Options { node_role: true, ..Options::default() };
        assert_eq!(home.text(&machine, &ENVIRONMENT), "node role None");
    }

    #[test]
    fn follows_the_name_of_a_profile_and_of_a_file() {
        let home = Home::new(&[CLI, ("elsewhere.json", &CLI.1.replace("of-", "from-"))]);
        let by_name = Options { profile: Some("other".into()), ..Options::default() };
        let elsewhere = home.0.path().join("elsewhere.json");
        let by_file = Options { profile_file: Some(elsewhere.clone()), ..Options::default() };

        assert_eq!(home.text(&by_name, &[("ALIBABA_CLOUD_PROFILE", "default")]), "keys \"of-other\"");
        assert_eq!(home.text(&Options::default(), &[("ALICLOUD_PROFILE", "other")]), "keys \"of-other\"");
        assert_eq!(home.text(&by_file, &[]), "keys \"from-cli\"");
        let path = elsewhere.to_str().unwrap();
        assert_eq!(
            home.text(&Options::default(), &[("ALIBABACLOUD_PROFILE_PATH", path)]),
            "keys \"from-cli\""
        );
        let unknown = Options { profile: Some("none".into()), ..Options::default() };
        assert!(matches!(home.choose(&unknown, &[]), Err(SourceError::NoProfile { .. })));
    }

    #[test]
    fn a_broken_file_is_an_error_and_not_another_source() {
        for file in [(CLI.0, "{"), (SDK.0, "[default"), (ACS.0, "{}")] {
            let outcome = Home::new(&[file]).choose(&Options::default(), &[]);
            assert!(matches!(outcome, Err(SourceError::Form { .. })), "{file:?} {outcome:?}");
        }
    }
}
