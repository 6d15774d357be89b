//! The profiles of aliyun-cli, `~/.aliyun/config.json`. Pure. Called by `choice`.
//!
//! Source: aliyun-cli, `config/profile.go`.

use std::{path::Path, time::Duration};

use jiff::Timestamp;
use kube2ram_cloud::alibaba::base::{CredentialsUri, OidcSettings};
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;

use super::source::{Source, SourceError, external_id, keys, role, session};

#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    current: Option<String>,
    #[serde(default)]
    profiles: Vec<Profile>,
}

/// Of the many fields, those that lead to credentials. An empty text counts as none.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Profile {
    name: String,
    mode: Option<String>,
    access_key_id: Option<String>,
    access_key_secret: Option<SecretString>,
    sts_token: Option<SecretString>,
    /// In seconds since 1970.
    sts_expiration: Option<i64>,
    ram_role_name: Option<String>,
    ram_role_arn: Option<String>,
    ram_session_name: Option<String>,
    external_id: Option<String>,
    source_profile: Option<String>,
    expired_seconds: Option<u64>,
    process_command: Option<String>,
    credentials_uri: Option<String>,
    oidc_provider_arn: Option<String>,
    oidc_token_file: Option<String>,
}

/// The source that the profile of this name configures, or the current one. `None` when nobody has configured
/// anything: the file is written before that.
pub(super) fn source(path: &Path, text: &str, name: Option<&str>) -> Result<Option<Source>, SourceError> {
    // serde_json's error quotes values.
    let document: Document = serde_json::from_str(text).or(Err(SourceError::Form {
        path: path.to_owned(),
        form: "a configuration of aliyun-cli, which is JSON with profiles",
    }))?;
    if document.profiles.is_empty() && name.is_none() {
        return Ok(None);
    }
    let current = document.current.as_deref().filter(|current| !current.is_empty());
    let chosen = name.or(current).unwrap_or("default");
    let profiles = Profiles { path, document: &document };
    if name.is_none() && profiles.find(chosen)?.is_blank() {
        return Ok(None);
    }
    profiles.source(chosen, &mut Vec::new()).map(Some)
}

struct Profiles<'a> {
    path: &'a Path,
    document: &'a Document,
}

impl<'a> Profiles<'a> {
    fn find(&self, name: &str) -> Result<&'a Profile, SourceError> {
        let profile = self.document.profiles.iter().find(|profile| profile.name == name);
        profile.ok_or_else(|| SourceError::NoProfile { path: self.path.to_owned(), profile: name.into() })
    }

    /// `visited` are the profiles that have led here.
    fn source(&self, name: &str, visited: &mut Vec<String>) -> Result<Source, SourceError> {
        let profile = self.find(name)?;
        if visited.iter().any(|other| other == name) {
            return Err(SourceError::Cycle { path: self.path.to_owned(), profile: name.into() });
        }
        visited.push(name.to_owned());
        match profile.mode.as_deref().unwrap_or_default() {
            "AK" => profile.keys(None),
            "StsToken" => {
                profile.need(&profile.sts_token, "sts_token")?;
                profile.keys(profile.sts_token.clone())
            }
            "RamRoleArn" => {
                let token = filled(&profile.sts_token).cloned();
                profile.assumed(profile.keys(token)?)
            }
            "EcsRamRole" => {
                Ok(Source::NodeRole { name: filled_text(&profile.ram_role_name).map(Into::into) })
            }
            "RamRoleArnWithRoleName" => {
                let name = profile.need_text(&profile.ram_role_name, "ram_role_name")?;
                profile.assumed(Source::NodeRole { name: Some(name.into()) })
            }
            "ChainableRamRoleArn" => {
                let base = profile.need_text(&profile.source_profile, "source_profile")?;
                profile.assumed(self.source(base, visited)?)
            }
            "External" => {
                let command = profile.need_text(&profile.process_command, "process_command")?;
                Ok(Source::Process { profile: name.into(), command: command.into() })
            }
            "CredentialsURI" => {
                let uri = profile.need_text(&profile.credentials_uri, "credentials_uri")?;
                CredentialsUri::parse(uri).map(Source::Uri).map_err(SourceError::Uri)
            }
            "OIDC" => Ok(Source::Oidc(OidcSettings {
                role: role(profile.need_text(&profile.ram_role_arn, "ram_role_arn")?)?,
                provider: profile.need_text(&profile.oidc_provider_arn, "oidc_provider_arn")?.into(),
                token_file: profile.need_text(&profile.oidc_token_file, "oidc_token_file")?.into(),
                session: session(profile.ram_session_name.as_deref())?,
            })),
            // aliyun-cli renews these; here they are read only.
            mode @ ("CloudSSO" | "OAuth") => profile.signed_in(mode),
            mode => Err(SourceError::Unsupported { profile: name.into(), mode: mode.into() }),
        }
    }
}

impl Profile {
    fn is_blank(&self) -> bool {
        matches!(self.mode.as_deref(), None | Some("" | "AK"))
            && filled_text(&self.access_key_id).is_none()
            && filled(&self.access_key_secret).is_none()
    }

    fn keys(&self, token: Option<SecretString>) -> Result<Source, SourceError> {
        let id = self.need_text(&self.access_key_id, "access_key_id")?;
        let secret = self.need(&self.access_key_secret, "access_key_secret")?;
        Ok(Source::Keys { keys: keys(id, secret.clone(), token)?, until: None })
    }

    fn assumed(&self, base: Source) -> Result<Source, SourceError> {
        let role = role(self.need_text(&self.ram_role_arn, "ram_role_arn")?)?;
        let session = session(self.ram_session_name.as_deref())?;
        let external_id = external_id(self.external_id.as_deref())?;
        let seconds = self.expired_seconds.filter(|seconds| *seconds > 0);
        Ok(Source::assumed(base, role, session, external_id, seconds.map(Duration::from_secs)))
    }

    /// The keys that signing in has left.
    fn signed_in(&self, mode: &str) -> Result<Source, SourceError> {
        let signed_out = || SourceError::SignIn { profile: self.name.clone(), mode: mode.into() };
        let until = self.sts_expiration.filter(|seconds| *seconds > 0).ok_or_else(signed_out)?;
        let until = Timestamp::from_second(until).or(Err(signed_out()))?;
        let (Some(id), Some(secret), Some(token)) =
            (filled_text(&self.access_key_id), filled(&self.access_key_secret), filled(&self.sts_token))
        else {
            return Err(signed_out());
        };
        Ok(Source::Keys { keys: keys(id, secret.clone(), Some(token.clone()))?, until: Some(until) })
    }

    fn need_text<'a>(&self, field: &'a Option<String>, name: &'static str) -> Result<&'a str, SourceError> {
        filled_text(field).ok_or_else(|| self.missing(name))
    }

    fn need<'a>(
        &self,
        field: &'a Option<SecretString>,
        name: &'static str,
    ) -> Result<&'a SecretString, SourceError> {
        filled(field).ok_or_else(|| self.missing(name))
    }

    fn missing(&self, missing: &'static str) -> SourceError {
        let mode = self.mode.as_deref().unwrap_or_default();
        SourceError::Missing { present: format!("the mode {mode} of profile {:?}", self.name), missing }
    }
}

fn filled_text(field: &Option<String>) -> Option<&str> {
    field.as_deref().filter(|text| !text.is_empty())
}

fn filled(field: &Option<SecretString>) -> Option<&SecretString> {
    field.as_ref().filter(|secret| !secret.expose_secret().is_empty())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(profiles: &str, name: Option<&str>) -> Result<Option<Source>, SourceError> {
        let text = format!(r#"{{"current":"a","profiles":[{profiles}],"meta_path":""}}"#);
        source(Path::new("/home/me/config.json"), &text, name)
    }

    /// The profile `a`, with what a mode takes.
    fn profile(mode: &str, fields: &str) -> String {
        format!(
            r#"{{"name":"a","mode":"{mode}","region_id":"cn-hangzhou","output_format":"json","retry_timeout":0,{fields}}}"#
        )
    }

    fn text(profiles: &str) -> String {
        of(profiles, None).unwrap().unwrap().to_string()
    }

    const KEYS: &str = r#""access_key_id":"id","access_key_secret":"s""#;
    const ROLE: &str = r#""ram_role_arn":"acs:ram::1:role/x","ram_session_name":"me@here""#;

    #[test]
    fn knows_each_mode_that_gives_credentials() {
        for (mode, fields, expected) in [
            ("AK", KEYS.to_owned(), "keys \"id\""),
            ("StsToken", format!(r#"{KEYS},"sts_token":"t""#), "keys \"id\""),
            (
                "RamRoleArn",
                format!(r#"{KEYS},{ROLE},"expired_seconds":900,"external_id":"ext""#),
                "role \"acs:ram::1:role/x\" \"me@here\" Some(\"ext\") 900 by (keys \"id\")",
            ),
            ("EcsRamRole", r#""ram_role_name":"""#.to_owned(), "node role None"),
            ("EcsRamRole", r#""ram_role_name":"worker""#.to_owned(), "node role Some(\"worker\")"),
            (
                "RamRoleArnWithRoleName",
                format!(r#"{ROLE},"ram_role_name":"worker""#),
                "role \"acs:ram::1:role/x\" \"me@here\" None 3600 by (node role Some(\"worker\"))",
            ),
            ("External", r#""process_command":"get keys""#.to_owned(), "process \"a\" \"get keys\""),
            (
                "OIDC",
                format!(r#"{ROLE},"oidc_provider_arn":"p","oidc_token_file":"/t""#),
                "oidc \"acs:ram::1:role/x\" \"p\" \"/t\" \"me@here\"",
            ),
            ("CloudSSO", format!(r#"{KEYS},"sts_token":"t","sts_expiration":1767323045"#), "keys \"id\""),
        ] {
            assert_eq!(text(&profile(mode, &fields)), expected, "{mode}");
        }
        let uri = text(&profile("CredentialsURI", r#""credentials_uri":"http://127.0.0.1/x""#));
        assert!(uri.starts_with("uri "), "{uri}");
    }

    #[test]
    fn names_what_a_mode_lacks() {
        for (mode, fields, missing) in [
            ("AK", r#""access_key_id":"id""#.to_owned(), "access_key_secret"),
            ("AK", r#""access_key_secret":"s""#.to_owned(), "access_key_id"),
            ("StsToken", KEYS.to_owned(), "sts_token"),
            ("RamRoleArn", KEYS.to_owned(), "ram_role_arn"),
            ("ChainableRamRoleArn", ROLE.to_owned(), "source_profile"),
            ("External", r#""process_command":"""#.to_owned(), "process_command"),
            ("OIDC", ROLE.to_owned(), "oidc_provider_arn"),
        ] {
            match of(&profile(mode, &fields), None) {
                Err(SourceError::Missing { missing: named, .. }) => assert_eq!(named, missing, "{mode}"),
                other => panic!("{mode}: {other:?}"),
            }
        }
    }

    #[test]
    fn follows_a_chain_of_profiles_and_no_circle() {
        let chained = |name: &str, base: &str| {
            format!(
                r#"{{"name":"{name}","mode":"ChainableRamRoleArn","source_profile":"{base}","ram_role_arn":"acs:ram::1:role/{name}"}}"#
            )
        };
        let last = format!(r#"{{"name":"c","mode":"AK",{KEYS}}}"#);

        let text = text(&[chained("a", "b"), chained("b", "c"), last].join(","));
        assert_eq!(
            text,
            "role \"acs:ram::1:role/a\" \"kube2ram-authenticator\" None 3600 by (role \"acs:ram::1:role/b\" \"kube2ram-authenticator\" None 3600 by (keys \"id\"))"
        );
        let circle = of(&[chained("a", "b"), chained("b", "a")].join(","), None);
        assert!(matches!(circle, Err(SourceError::Cycle { .. })), "{circle:?}");
        let itself = of(&chained("a", "a"), None);
        assert!(matches!(itself, Err(SourceError::Cycle { .. })), "{itself:?}");
        let nowhere = of(&chained("a", "b"), None);
        assert!(matches!(nowhere, Err(SourceError::NoProfile { .. })), "{nowhere:?}");
    }

    #[test]
    fn a_session_that_was_not_signed_in_is_named_and_other_modes_are_refused() {
        for fields in [KEYS.to_owned(), format!(r#"{KEYS},"sts_token":"t""#), r#""sts_expiration":1"#.into()]
        {
            let outcome = of(&profile("OAuth", &fields), None);
            assert!(matches!(outcome, Err(SourceError::SignIn { .. })), "{outcome:?}");
        }
        for mode in ["RsaKeyPair", "BearerToken", "Unheard"] {
            let outcome = of(&profile(mode, KEYS), None);
            assert!(matches!(outcome, Err(SourceError::Unsupported { .. })), "{outcome:?}");
        }
    }

    #[test]
    fn a_file_that_nobody_has_filled_in_configures_nothing() {
        let blank = profile("AK", r#""access_key_id":"","access_key_secret":"""#);
        let source = |text: &str| source(Path::new("c"), text, None);

        assert!(of(&blank, None).unwrap().is_none());
        assert!(source(r#"{"current":"","profiles":[]}"#).unwrap().is_none());
        assert!(source("{}").unwrap().is_none());
        assert!(
            matches!(of(&blank, Some("a")), Err(SourceError::Missing { .. })),
            "but not one that is named"
        );
        assert!(matches!(source("x"), Err(SourceError::Form { .. })));
    }

    #[test]
    fn the_region_of_a_profile_chooses_no_endpoint() {
        // STS takes keys at any of its endpoints.
        assert_eq!(text(&profile("AK", KEYS)), text(&format!(r#"{{"name":"a","mode":"AK",{KEYS}}}"#)));
    }

    proptest! {
        #[test]
        fn never_panics(text in any::<String>(), name in proptest::option::of("[a-c]")) {
            drop(source(Path::new("c"), &text, name.as_deref()));
        }
    }
}
