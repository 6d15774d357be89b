//! The JSON document in a token, read strictly: no key twice, none that is unknown. Pure; called by the
//! parent.

use std::fmt;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use secrecy::zeroize::Zeroizing;
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};

use super::{ClusterId, TokenError};

/// Names and values, as they stand.
pub(super) type Pairs = Vec<(String, Zeroizing<String>)>;

/// What of the document is used.
pub(super) struct Document {
    pub(super) query: Pairs,
    pub(super) headers: Pairs,
}

/// `clusterId`, `method` and `path` are for people: the predecessor's server does not read them. STS checks a
/// signature over `POST /`, so a token with another method or path is refused.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Written {
    #[serde(default)]
    cluster_id: Option<String>,
    #[serde(default)]
    method: Option<String>,
    #[serde(default)]
    path: Option<String>,
    #[serde(default, deserialize_with = "pairs")]
    query: Pairs,
    #[serde(default, deserialize_with = "pairs")]
    headers: Pairs,
}

impl Document {
    /// Reads what follows the prefix.
    pub(super) fn parse(encoded: &str, cluster: &ClusterId) -> Result<Self, TokenError> {
        // Padding is required, and bits that no byte uses must be zero: a token has one spelling.
        let mut json = Zeroizing::new(vec![0; encoded.len() / 4 * 3 + 3]);
        let length = STANDARD.decode_slice(encoded, &mut json).or(Err(TokenError::Base64))?;
        // serde_json's error quotes values. It also refuses what follows the document, and deep nesting.
        let json = json.get(..length).unwrap_or_default();
        // serde would take an array for an object, by the order of its fields.
        if !json.trim_ascii_start().starts_with(b"{") {
            return Err(TokenError::Json);
        }
        let written: Written = serde_json::from_slice(json).or(Err(TokenError::Json))?;
        let Written { cluster_id, method, path, query, headers } = written;
        if method.is_some_and(|method| method != "POST") || path.is_some_and(|path| path != "/") {
            return Err(TokenError::Target);
        }
        if cluster_id.is_some_and(|id| id != cluster.as_str()) {
            return Err(TokenError::Cluster);
        }
        Ok(Self { query, headers })
    }
}

/// Its values are secrets.
impl fmt::Debug for Document {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[REDACTED]")
    }
}

/// More than a token has.
const PAIRS_LIMIT: usize = 32;

fn pairs<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Pairs, D::Error> {
    struct OfMap;

    impl<'de> Visitor<'de> for OfMap {
        type Value = Pairs;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a few names with texts, none of them twice")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
            use serde::de::Error as _;
            let mut pairs = Pairs::new();
            while let Some((name, value)) = map.next_entry::<String, String>()? {
                let value = Zeroizing::new(value);
                if pairs.len() >= PAIRS_LIMIT || pairs.iter().any(|(other, _)| *other == name) {
                    return Err(A::Error::custom("too many names, or one twice"));
                }
                pairs.push((name, value));
            }
            Ok(pairs)
        }
    }

    deserializer.deserialize_map(OfMap)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Document, TokenError> {
        Document::parse(&STANDARD.encode(json), &ClusterId::parse("c1").unwrap())
    }

    #[test]
    fn takes_the_whole_document_and_one_without_what_is_for_people() {
        let whole = r#"{"clusterId":"c1","method":"POST","path":"/","query":{"a":"b"},"headers":{"c":"d"}}"#;
        let document = parse(whole).unwrap();
        assert_eq!((document.query[0].0.as_str(), document.query[0].1.as_str()), ("a", "b"));
        assert_eq!(document.headers.len(), 1);
        assert!(parse(r#"{"query":{},"headers":{}}"#).unwrap().headers.is_empty());
        assert!(parse("{}").unwrap().query.is_empty());
    }

    #[test]
    fn refuses_what_another_reader_could_read_otherwise() {
        for (json, error) in [
            ("foobar", TokenError::Json),
            ("", TokenError::Json),
            ("[]", TokenError::Json),
            (r#"{"headers":{"a":"b","a":"c"}}"#, TokenError::Json),
            (r#"{"headers":{},"headers":{}}"#, TokenError::Json),
            (r#"{"headers":{"a":1}}"#, TokenError::Json),
            (r#"{"headers":{"a":null}}"#, TokenError::Json),
            (r#"{"headers":[]}"#, TokenError::Json),
            (r#"{"host":"sts.example"}"#, TokenError::Json),
            ("{} {}", TokenError::Json),
            (r#"{"method":"GET"}"#, TokenError::Target),
            (r#"{"path":"/x"}"#, TokenError::Target),
            (r#"{"clusterId":"c2"}"#, TokenError::Cluster),
        ] {
            assert_eq!(parse(json).unwrap_err(), error, "{json}");
        }
        let deep = format!(r#"{{"query":{}{}}}"#, "[".repeat(10_000), "]".repeat(10_000));
        assert_eq!(parse(&deep).unwrap_err(), TokenError::Json);
    }

    #[test]
    fn bounds_the_number_of_names() {
        let with = |count: usize| {
            let names: Vec<String> = (0..count).map(|n| format!(r#""n{n}":"""#)).collect();
            parse(&format!(r#"{{"query":{{{}}}}}"#, names.join(",")))
        };

        assert!(with(PAIRS_LIMIT).is_ok());
        assert_eq!(with(PAIRS_LIMIT + 1).unwrap_err(), TokenError::Json);
    }

    #[test]
    fn takes_one_spelling_of_base64() {
        let cluster = ClusterId::parse("c1").unwrap();
        let encoded = STANDARD.encode(r#"{"path":"/" }"#);
        assert!(encoded.ends_with('=') && Document::parse(&encoded, &cluster).is_ok(), "{encoded}");

        let last = encoded.trim_end_matches('=').len() - 1;
        let other_bits = {
            let mut bytes = encoded.clone().into_bytes();
            bytes[last] += 1;
            String::from_utf8(bytes).unwrap()
        };
        for bad in [
            encoded.trim_end_matches('=').to_owned(),
            format!("{encoded}="),
            format!("{encoded}\n"),
            format!(" {encoded}"),
            other_bits,
            "_-8=".to_owned(),
        ] {
            assert_eq!(Document::parse(&bad, &cluster).unwrap_err(), TokenError::Base64, "{bad:?}");
        }
    }
}
