//! The file of the SDKs, `~/.alibabacloud/credentials`, in the format of INI. Pure. Called by `choice`.
//!
//! Source: alibabacloud-credentials, "profile provider".

use std::{collections::BTreeMap, path::Path};

use kube2ram_cloud::alibaba::base::CredentialsUri;
use secrecy::SecretString;

use super::source::{Source, SourceError, keys, role, session};

/// The source in the section of this name, or in `default`. `None` when nobody has named a section, and there
/// is no such one.
pub(super) fn source(path: &Path, text: &str, name: Option<&str>) -> Result<Option<Source>, SourceError> {
    let section = name.unwrap_or("default");
    let Some(values) = find(path, text, section)? else {
        let no_profile = || SourceError::NoProfile { path: path.to_owned(), profile: section.into() };
        return name.map_or(Ok(None), |_| Err(no_profile()));
    };
    let value = |key: &str| values.get(key).copied().filter(|value| !value.is_empty());
    let need = |key: &'static str| {
        let missing = || SourceError::Missing { present: format!("section [{section}]"), missing: key };
        value(key).ok_or_else(missing)
    };
    let keys_with = |token: Option<&str>| -> Result<Source, SourceError> {
        let secret = need("access_key_secret")?.into();
        let keys = keys(need("access_key_id")?, secret, token.map(SecretString::from))?;
        Ok(Source::Keys { keys, until: None })
    };
    let source = match need("type")? {
        "access_key" => keys_with(None)?,
        "sts" => keys_with(Some(need("sts_token")?))?,
        "ram_role_arn" => {
            let role = role(need("role_arn")?)?;
            let session = session(value("role_session_name"))?;
            Source::assumed(keys_with(value("sts_token"))?, role, session, None, None)
        }
        "ecs_ram_role" => Source::NodeRole { name: value("role_name").map(Into::into) },
        "credentials_uri" => {
            Source::Uri(CredentialsUri::parse(need("credentials_uri")?).map_err(SourceError::Uri)?)
        }
        "external" => Source::Process { profile: section.into(), command: need("process_command")?.into() },
        mode => return Err(SourceError::Unsupported { profile: section.into(), mode: mode.into() }),
    };
    Ok(Some(source))
}

/// The values of a section; where a key is there twice, the last one, as in the SDKs.
fn find<'a>(
    path: &Path,
    text: &'a str,
    section: &str,
) -> Result<Option<BTreeMap<String, &'a str>>, SourceError> {
    let malformed = || SourceError::Form {
        path: path.to_owned(),
        form: "a credentials file of the SDKs, with sections such as [default] and lines such as type = sts",
    };
    let mut found: Option<BTreeMap<String, &str>> = None;
    let mut is_inside = false;
    for line in text.lines() {
        let line = without_comment(line).trim();
        if line.is_empty() {
            continue;
        }
        if let Some(header) = line.strip_prefix('[') {
            let name = header.strip_suffix(']').ok_or_else(malformed)?;
            is_inside = name.trim() == section;
            if is_inside {
                found.get_or_insert_default();
            }
            continue;
        }
        let (key, value) = line.split_once('=').ok_or_else(malformed)?;
        if let (true, Some(found)) = (is_inside, &mut found) {
            found.insert(key.trim().to_ascii_lowercase(), unquoted(value.trim()));
        }
    }
    Ok(found)
}

/// A comment begins at the line's beginning or after a blank: keys may hold both marks.
fn without_comment(line: &str) -> &str {
    let is_mark = |(at, c): &(usize, char)| {
        matches!(c, '#' | ';') && line[..*at].chars().next_back().is_none_or(char::is_whitespace)
    };
    line.char_indices().find(is_mark).map_or(line, |(at, _)| &line[..at])
}

fn unquoted(value: &str) -> &str {
    let between = |mark: char| value.strip_prefix(mark).and_then(|value| value.strip_suffix(mark));
    between('"').or_else(|| between('\'')).unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use secrecy::ExposeSecret as _;

    use super::*;

    fn of(text: &str, name: Option<&str>) -> Result<Option<Source>, SourceError> {
        source(Path::new("/home/me/credentials"), text, name)
    }

    fn text(section: &str) -> String {
        of(section, None).unwrap().unwrap().to_string()
    }

    const KEYS: &str = "access_key_id = id\naccess_key_secret = s\n";

    #[test]
    fn knows_each_type() {
        for (lines, expected) in [
            (format!("type = access_key\n{KEYS}"), "keys \"id\""),
            (format!("type = sts\n{KEYS}sts_token = t\n"), "keys \"id\""),
            (
                format!(
                    "type = ram_role_arn\n{KEYS}role_arn = acs:ram::1:role/x\nrole_session_name = me@here\n"
                ),
                "role \"acs:ram::1:role/x\" \"me@here\" None 3600 by (keys \"id\")",
            ),
            ("type = ecs_ram_role\nrole_name = worker\n".into(), "node role Some(\"worker\")"),
            ("type = ecs_ram_role\n".into(), "node role None"),
            ("type = external\nprocess_command = get keys\n".into(), "process \"default\" \"get keys\""),
        ] {
            assert_eq!(text(&format!("[default]\n{lines}")), expected);
        }
        assert!(
            text("[default]\ntype=credentials_uri\ncredentials_uri=http://127.0.0.1/x").starts_with("uri ")
        );
    }

    #[test]
    fn reads_comments_quotes_and_sections() {
        let file = "# first\n; second\n[other]\ntype=sts\n[ default ]\n  Type = 'access_key' # why\n\
                    access_key_id = \"id\" ; whose\naccess_key_secret = a#b;c==\n[last]\naccess_key_id = x\n";

        let Some(Source::Keys { keys, .. }) = of(file, None).unwrap() else { panic!("no keys") };

        assert_eq!((&*keys.access_key_id, keys.access_key_secret.expose_secret()), ("id", "a#b;c=="));
    }

    #[test]
    fn names_what_is_missing_or_unknown() {
        assert!(of("[other]\ntype = access_key\n", None).unwrap().is_none());
        assert!(matches!(of("[other]\n", Some("none")), Err(SourceError::NoProfile { .. })));
        assert!(matches!(of("[default]\n", None), Err(SourceError::Missing { missing: "type", .. })));
        let half = of("[default]\ntype = access_key\naccess_key_id = id\n", None);
        assert!(matches!(half, Err(SourceError::Missing { missing: "access_key_secret", .. })));
        let odd = of("[default]\ntype = rsa_key_pair\n", None);
        assert!(matches!(odd, Err(SourceError::Unsupported { .. })));
        for bad in ["[default", "[default]\nno value\n"] {
            assert!(matches!(of(bad, None), Err(SourceError::Form { .. })), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in any::<String>(), name in proptest::option::of("[a-c]")) {
            drop(of(&text, name.as_deref()));
        }
    }
}
