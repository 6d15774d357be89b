//! The value of `authorization` in a token. Pure; called by the parent.

use kube2ram_cloud::alibaba::caller_identity::ALGORITHM;

/// Its parts, but the signature, which only STS can check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Authorization<'a> {
    pub(super) access_key_id: &'a str,
    /// As they stand, between semicolons.
    pub(super) signed_headers: &'a str,
}

impl<'a> Authorization<'a> {
    /// Exactly `<algorithm> Credential=<id>,SignedHeaders=<names>,Signature=<64 hex digits>`: with parts in
    /// another order, or twice, two readers could take different ones.
    pub(super) fn parse(text: &'a str) -> Option<Self> {
        let parts = text.strip_prefix(ALGORITHM)?.strip_prefix(" Credential=")?;
        let (access_key_id, parts) = parts.split_once(",SignedHeaders=")?;
        let (signed_headers, signature) = parts.split_once(",Signature=")?;
        let is_name = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-;".contains(&byte);
        let is_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        let fits = (1..=KEY_LIMIT_BYTES).contains(&access_key_id.len())
            && access_key_id.bytes().all(|byte| byte.is_ascii_graphic() && !b",=;".contains(&byte))
            && signed_headers.bytes().all(is_name)
            && signature.len() == SIGNATURE_BYTES
            && signature.bytes().all(is_hex);
        fits.then_some(Self { access_key_id, signed_headers })
    }
}

/// Longer than any access key id.
pub(crate) const KEY_LIMIT_BYTES: usize = 128;
/// A SHA-256 in hex.
const SIGNATURE_BYTES: usize = 64;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(credential: &str, signed: &str) -> String {
        format!(
            "ACS3-HMAC-SHA256 Credential={credential},SignedHeaders={signed},Signature={}",
            "0a".repeat(32)
        )
    }

    #[test]
    fn names_the_access_key_and_the_signed_headers() {
        for id in ["foobar.test.xxx", "************SJGW2B******", "STS.NTx"] {
            let text = text(id, "x-acs-action;x-acs-date");

            let parsed = Authorization::parse(&text).unwrap();

            assert_eq!((parsed.access_key_id, parsed.signed_headers), (id, "x-acs-action;x-acs-date"));
        }
    }

    #[test]
    fn refuses_another_algorithm_order_or_number_of_parts() {
        let good = text("id", "x-acs-date");
        assert!(Authorization::parse(&good).is_some());

        for bad in [
            "foobar".to_owned(),
            "Credential=foobar".to_owned(),
            text("", "x-acs-date"),
            text("id,Credential=other", "x-acs-date"),
            text("id", "x-acs-date,SignedHeaders=host"),
            text("i d", "x-acs-date"),
            text("id", "X-Acs-Date"),
            good.replace("ACS3-HMAC-SHA256", "ACS3-HMAC-SM3"),
            good.replace("ACS3-HMAC-SHA256 ", "ACS3-HMAC-SHA256  "),
            good.replace("0a0a", "0A0A"),
            good.replace("0a0a", "0a0"),
            format!("{good},"),
            format!("{good},Credential=other"),
            format!(" {good}"),
        ] {
            assert_eq!(Authorization::parse(&bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn never_panics_and_reads_what_is_there(text in any::<String>(), id in "[A-Za-z0-9.]{1,40}") {
            let _nothing_panics = Authorization::parse(&text);
            let text = self::text(&id, "host");
            prop_assert_eq!(Authorization::parse(&text).unwrap().access_key_id, id);
        }
    }
}
