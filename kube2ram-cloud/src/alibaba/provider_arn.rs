//! The ARN of a RAM OIDC provider: a cluster, as RAM knows it. Pure: no I/O, no clock, no logs. Depends on
//! `role`; used by `base` and `exchange`, and by the agent's `args`.

use std::fmt;

use crate::role::{BaseArn, ValueError};

/// `acs:ram::<account>:oidc-provider/<name>`. Its account is the cluster's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OidcProviderArn {
    arn: Box<str>,
    account: BaseArn,
}

impl OidcProviderArn {
    /// Parses an ARN. The account has 1–32 digits, the name 1–128 characters of `[A-Za-z0-9._-]`, which is a
    /// little more than RAM's CreateOIDCProvider accepts.
    ///
    /// # Errors
    /// [`ValueError::NotProviderArn`], or what [`BaseArn::parse`] refuses in the account.
    pub fn parse(text: &str) -> Result<Self, ValueError> {
        let legal = |c: u8| c.is_ascii_alphanumeric() || b"._-".contains(&c);
        let parts = text.strip_prefix("acs:ram::").and_then(|rest| rest.split_once(":oidc-provider/"));
        let parts = parts.filter(|(account, name)| {
            (1..=32).contains(&account.len())
                && account.bytes().all(|c| c.is_ascii_digit())
                && (1..=128).contains(&name.len())
                && name.bytes().all(legal)
        });
        let (account, _) = parts.ok_or(ValueError::NotProviderArn)?;
        let account = BaseArn::parse(&format!("acs:ram::{account}:role/"))?;
        Ok(Self { arn: text.into(), account })
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.arn
    }

    /// The base ARN of all roles in the provider's account.
    pub fn of_account(&self) -> BaseArn {
        self.account.clone()
    }
}

impl fmt::Display for OidcProviderArn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.arn)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn takes_the_arns_of_providers_only() {
        let longest = format!("acs:ram::1234567890123456:oidc-provider/{}", "n".repeat(128));
        for text in ["acs:ram::1234567890123456:oidc-provider/ack-rrsa-c0123", &longest] {
            let arn = OidcProviderArn::parse(text).unwrap();

            assert_eq!((arn.as_str(), &*arn.to_string()), (text, text));
            assert_eq!(arn.of_account().as_str(), "acs:ram::1234567890123456:role/");
        }
        for text in [
            "",
            "ack-rrsa-c0123",
            "acs:ram::1234567890123456:role/ack-rrsa-c0123",
            "acs:ram::1234567890123456:oidc-provider/",
            "acs:ram::1234567890123456:oidc-provider/a/b",
            "acs:ram::1234567890123456:oidc-provider/a&RoleArn=b",
            "acs:ram:::oidc-provider/a",
            "acs:ram::x:oidc-provider/a",
            "acs:ram:cn-hangzhou:1234567890123456:oidc-provider/a",
            "ACS:ram::1234567890123456:oidc-provider/a",
            "arn:aws:iam::123456789012:oidc-provider/oidc.eks.eu-west-1.amazonaws.com/id/EXAMPLE",
            &format!("{longest}n"),
        ] {
            assert_eq!(OidcProviderArn::parse(text), Err(ValueError::NotProviderArn), "{text}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_what_is_one_comes_back(text in ".{0,80}", account in "[0-9]{1,32}", name in "[A-Za-z0-9._-]{1,128}") {
            let _ = OidcProviderArn::parse(&text).is_ok();
            let text = format!("acs:ram::{account}:oidc-provider/{name}");

            let arn = OidcProviderArn::parse(&text).unwrap();

            let account = arn.of_account();
            prop_assert_eq!((arn.as_str(), account.as_str()), (&*text, &*format!("acs:ram::{}:role/", account.account())));
        }
    }
}
