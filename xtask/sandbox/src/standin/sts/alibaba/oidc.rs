//! AssumeRoleWithOIDC: a token instead of a signature. Depends on the account; called by the STS stand-in.

use std::collections::BTreeMap;

use bytes::Bytes;
use http::{Request, StatusCode, header};

use super::{CLOCK_WINDOW, Call, Failure, State, no_such_role, request};
use crate::standin::oidc::TokenFault;

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
    pub(super) fn assume_role_with_oidc(
        &self,
        asked: &Unsigned,
        call: &Call,
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
        let arn = call.param("RoleArn").unwrap_or_default();
        let role_name = request::role_name(arn)?;
        let session = request::session_name(call)?;
        if !(4..=20_000).contains(&asked.token.len()) {
            return Err(Failure::bad(
                "InvalidParameter.OIDCToken",
                "The parameter OIDCToken is wrongly formed.",
            ));
        }
        let provider_arn = call.param("OIDCProviderArn").unwrap_or_default();
        let provider = self.accounts.provider(provider_arn).ok_or_else(|| {
            let message = "The specified OIDC Provider not exists.";
            Failure::new(StatusCode::NOT_FOUND, "EntityNotExist.OIDCProvider", message)
        })?;
        let subject = provider.subject(&asked.token, now).map_err(refusal)?;
        let role = self.accounts.role(arn).ok_or_else(no_such_role)?;
        if !role.oidc.is_some_and(|trust| trust.provider == provider_arn && trust.subject == subject) {
            return Err(Failure::new(
                StatusCode::FORBIDDEN,
                "AuthenticationFail.NoPermission",
                "This operation is forbidden by the role's trust policy.",
            ));
        }
        let lifetime = request::duration(call, role.max_session)?;
        Ok(self.issue(arn, role_name, session, lifetime))
    }
}

fn refusal(fault: TokenFault) -> Failure {
    match fault {
        TokenFault::Audience => Failure::bad(
            "AuthenticationFail.OIDCToken.AudienceNotMatch",
            "The audience of the OIDC token is none of the provider's client ids.",
        ),
        TokenFault::Expired => {
            Failure::bad("AuthenticationFail.OIDCToken.Expired", "This OIDC token has expired.")
        }
        TokenFault::Invalid => {
            Failure::bad("AuthenticationFail.OIDCToken.Invalid", "This OIDC token is invalid.")
        }
    }
}

#[cfg(test)]
mod tests;
