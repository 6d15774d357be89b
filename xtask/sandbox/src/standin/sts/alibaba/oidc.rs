//! AssumeRoleWithOIDC: a token instead of a signature. Depends on the account; called by the STS stand-in.

use std::collections::BTreeMap;

use bytes::Bytes;
use http::{Request, StatusCode, header};
use serde_json::json;

use super::{CLOCK_WINDOW, Call, Failure, State, no_such_role, request};
use crate::{
    Cloud,
    standin::{
        account::Accounts,
        oidc::{OidcTrust, TokenFault},
    },
};

/// A request without a signature.
pub(super) struct Unsigned {
    public: BTreeMap<String, String>,
    token: String,
}

impl Unsigned {
    /// Takes a request apart, if it is one, and notes in `call` what it asks, but the token.
    pub(super) fn parse(request: &Request<Bytes>, call: &mut Call) -> Option<Self> {
        let public = request::decoded(request.uri().query().unwrap_or_default().as_bytes());
        let is_signed =
            request.headers().contains_key(header::AUTHORIZATION) || public.contains_key("Signature");
        if is_signed || public.get("Action").map(String::as_str) != Some("AssumeRoleWithOIDC") {
            return None;
        }
        call.action = "AssumeRoleWithOIDC".into();
        call.params = request::decoded(request.body());
        // One in the query would end up in logs: it counts as none.
        let token = call.params.remove("OIDCToken").unwrap_or_default();
        Some(Self { public, token })
    }

    fn is(&self, name: &str, value: &str) -> bool {
        self.public.get(name).is_some_and(|given| given == value)
    }
}

impl State {
    /// In STS's order: the provider, the form, the token, the role, its trust.
    pub(super) fn assume_role_with_oidc(
        &self,
        asked: &Unsigned,
        call: &mut Call,
    ) -> Result<serde_json::Value, Failure> {
        let now = self.accounts.clock().now();
        if !asked.is("Version", "2015-04-01") || !asked.is("Format", "JSON") {
            return Err(Failure::bad("InvalidVersion", "Specified parameter Version is not valid."));
        }
        let sent = asked.public.get("Timestamp").and_then(|text| request::timestamp(text));
        if sent.is_none_or(|sent| sent.duration_since(now).unsigned_abs() > CLOCK_WINDOW) {
            return Err(Failure::bad(
                "InvalidTimeStamp.Expired",
                "Specified time stamp or date value is expired.",
            ));
        }
        let arn = call.param("RoleArn").unwrap_or_default().to_owned();
        self.refusal(&arn)?;
        let provider_arn = call.param("OIDCProviderArn").unwrap_or_default();
        let provider = self.accounts.provider(provider_arn).ok_or_else(|| {
            let message = "The specified OIDC Provider not exists.";
            Failure::new(StatusCode::NOT_FOUND, "EntityNotExist.OIDCProvider", message)
        })?;
        let role_name = request::role_name(&arn)?;
        let session = request::session_name(call)?.to_owned();
        request::check_policy(call)?;
        if !(4..=20_000).contains(&asked.token.len()) {
            return Err(Failure::bad(
                "InvalidParameter.OIDCToken",
                "The parameter OIDCToken is wrongly formed.",
            ));
        }
        let verified = provider.verify(&asked.token, now).map_err(refusal)?;
        let role = self.accounts.role(&arn).ok_or_else(no_such_role)?;
        let trusts = |trust: &OidcTrust| trust.holds(provider_arn, &verified.subject);
        if !role.oidc.as_ref().is_some_and(trusts) {
            return Err(Failure::new(
                StatusCode::FORBIDDEN,
                "AuthenticationFail.NoPermission",
                "This operation is forbidden by the role's trust policy.",
            ));
        }
        let lifetime = request::duration(call, role.max_session)?;

        let user = format!("acs:ram::{}:assumed-role/{role_name}/{session}", Accounts::UID);
        let mut answer = self.issue(&user, role_name, &session, lifetime);
        answer["OIDCTokenInfo"] = json!({
            "ClientIds": Cloud::Alibaba.audience(),
            "ExpirationTime": verified.expires_at.to_string(),
            "IssuanceTime": verified.issued_at.to_string(),
            "Issuer": verified.issuer,
            "Subject": verified.subject,
            "VerificationInfo": "Success",
        });
        call.subject = verified.subject;
        Ok(answer)
    }
}

fn refusal(fault: TokenFault) -> Failure {
    let (code, message) = match fault {
        TokenFault::Audience => ("AudienceNotMatch", "Invalid audience."),
        TokenFault::Expired => ("Expired", "This JsonWebToken is expired."),
        TokenFault::Fingerprint => (
            "PublicKeyFingerprintMismatch",
            "The fingerprint of the OIDC Provider's certificate does not match.",
        ),
        TokenFault::Invalid | TokenFault::NotYet | TokenFault::TooOld | TokenFault::UnknownKey => {
            ("Invalid", "This JsonWebToken is invalid.")
        }
        TokenFault::Issuer => ("IssuerNotMatch", "The issuer of the OIDC token is not the provider's."),
        TokenFault::IssuerAway => ("IssuerConfigurationBroken", "Get public keys from OIDC Provider failed."),
    };
    Failure::new(StatusCode::BAD_REQUEST, format!("AuthenticationFail.OIDCToken.{code}"), message)
}

#[cfg(test)]
mod tests;
