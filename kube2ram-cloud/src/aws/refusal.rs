//! STS's error table, as kinds and remedies. Pure: no I/O, no clock, no logs. Called by `base` and `sts`.
//! Sources: STS API 2011-06-15, "Common errors" and the errors of AssumeRole and AssumeRoleWithWebIdentity;
//! botocore's `_retry.json` for the codes of throttling.

use http::StatusCode;

use super::wire::parse_error;
use crate::{
    credentials::IssueErrorKind,
    sts::refusal::{Remedy, Table, retry_after},
    wire::ErrorDocument,
};

/// AWS's, of signed calls and of the exchange of the agent's own token. STS itself sends no `Retry-After`; a
/// gateway in between may.
pub(super) static TABLE: Table = Table { parse: parse_error, judge, time_left: retry_after };

/// The same for exchanges of ServiceAccounts' tokens for pods' roles.
pub(super) static EXCHANGE: Table =
    Table { parse: parse_error, judge: judge_exchange, time_left: retry_after };

/// STS's codes for a token that has expired.
pub(super) const EXPIRED_TOKEN: [&str; 2] = ["ExpiredToken", "ExpiredTokenException"];

/// Only a code that is known to mean "this role, no" is a denial: a denial takes valid credentials from pods.
fn judge(status: StatusCode, error: &ErrorDocument) -> (IssueErrorKind, Option<Remedy>) {
    use IssueErrorKind::*;
    let message = &*error.message;
    match &*error.code {
        code if is_throttling(code) => (Throttled, None),
        _ if status == StatusCode::TOO_MANY_REQUESTS || status.as_u16() == BANDWIDTH_EXCEEDED => {
            (Throttled, None)
        }
        _ if status.is_server_error() => (Unavailable, None),
        // Also for a role that does not exist: AWS does not tell the two apart.
        "AccessDenied" | "AccessDeniedException" => (Denied, None),
        "ValidationError" if message.contains(CHAINING) => (Invalid, Some(Remedy::OneHour)),
        "ValidationError" if message.contains(DURATION) => (Invalid, Some(Remedy::ShorterSession)),
        // All parameters come from the pod's annotations.
        "ValidationError" | "MalformedPolicyDocument" | "PackedPolicyTooLarge" => (Invalid, None),
        // STS is off in that region for the agent's account or the role's.
        "RegionDisabledException" => (Unavailable, Some(Remedy::NextEndpoint)),
        "ExpiredToken" | "ExpiredTokenException" | "InvalidClientTokenId" | "UnrecognizedClientException" => {
            (BaseCredentials, Some(Remedy::FreshBase))
        }
        // The agent can correct these, and they are not the role's fault: the retry has failed, too.
        "RequestExpired" => (Unavailable, Some(Remedy::ServerTime)),
        "SignatureDoesNotMatch" if SKEWED.iter().any(|text| message.contains(text)) => {
            (Unavailable, Some(Remedy::ServerTime))
        }
        "SignatureDoesNotMatch" => (BaseCredentials, None),
        // Of the agent's own web identity: its provider, its audience, its claims.
        "InvalidIdentityToken" | "IDPRejectedClaim" => (BaseCredentials, None),
        // STS did not reach the provider. To ask again is its own advice.
        "IDPCommunicationError" => (Unavailable, Some(Remedy::FreshNonce)),
        _ => (Unexpected, None),
    }
}

/// Nothing is signed, so no code is about the agent's own credentials. What is wrong with a token is never
/// the pod's fault, nor that of its role: the cluster made the token.
fn judge_exchange(status: StatusCode, error: &ErrorDocument) -> (IssueErrorKind, Option<Remedy>) {
    use IssueErrorKind::*;
    match (judge(status, error), &*error.code) {
        ((BaseCredentials, _), code) if EXPIRED_TOKEN.contains(&code) => (Token, Some(Remedy::FreshBase)),
        // STS looks for the provider in the account of the pod's role. Either the provider was removed, or an
        // annotation names a wrong account: the agent does not know which, so one pod must not accuse the
        // cluster. A denial would take valid credentials from all pods after a provider was removed by
        // mistake. Another token has the same issuer, so none is asked for.
        ((BaseCredentials, _), "InvalidIdentityToken") if error.message.contains(NO_PROVIDER) => {
            (Token, None)
        }
        // The provider lacks the audience; STS cannot read the issuer's keys; or the signing key was just
        // replaced.
        ((BaseCredentials, _), "InvalidIdentityToken" | "IDPRejectedClaim") => {
            (ClusterConfiguration, Some(Remedy::FreshBase))
        }
        ((BaseCredentials, _), _) => (Unexpected, None),
        // No annotation of a pod has any part in it.
        ((Invalid, _), "ValidationError") if error.message.contains(TOKEN_PARAMETER) => {
            (ClusterConfiguration, None)
        }
        (judged, _) => judged,
    }
}

/// The remedy: the end of a sentence that names the role and STS's code.
pub(super) fn advice(kind: IssueErrorKind) -> &'static str {
    match kind {
        IssueErrorKind::BaseCredentials => {
            "the agent itself has no valid credentials; attach an instance profile to the node, renew the agent's static keys, or repair its web identity configuration"
        }
        IssueErrorKind::ClusterConfiguration => {
            "the cluster's configuration is wrong, not the pod's. Compare the IAM OIDC provider (issuer, audience sts.amazonaws.com) with the cluster; check that the issuer's JWKS is public and has the signing key, and that the agent may create tokens of ServiceAccounts (RBAC, admission policies)"
        }
        IssueErrorKind::Denied => {
            "create the IAM role, or let its trust policy trust the node's role (or the other identity that the agent signs with), and allow that identity sts:AssumeRole on the role; with --session-tags both also need sts:TagSession, with --source-identity sts:SetSourceIdentity; if the trust policy requires an external id, annotate the pod with it"
        }
        // STS has one code for several annotations.
        IssueErrorKind::Invalid => {
            "correct the pod's annotation that STS's message names (kube2ram explain shows it); after PackedPolicyTooLarge shorten the session policy, which shares its limit with the session tags"
        }
        IssueErrorKind::NoSuchRole => "create the IAM role, or correct the pod's annotation",
        IssueErrorKind::Throttled => {
            "the account calls STS in this region too often; the agent tries again by itself. Find the caller (CloudTrail)"
        }
        IssueErrorKind::Token => {
            "the agent has no valid token of the pod's ServiceAccount; it tries again by itself. Check that the node reaches the API server, and that the API server's clock is right"
        }
        IssueErrorKind::Unavailable => {
            "STS does not answer the node, or is off in its region; the agent tries again by itself. Check that the node reaches the STS endpoint"
        }
        IssueErrorKind::Unexpected => {
            "the agent does not know this code of STS; it tries again by itself. Look up the code (STS API reference, \"Common errors\"): it may concern the account"
        }
    }
}

/// The same where roles are assumed by ServiceAccounts' tokens.
pub(super) fn exchange_advice(kind: IssueErrorKind) -> &'static str {
    match kind {
        IssueErrorKind::Denied => {
            "create the IAM role, or let its trust policy allow sts:AssumeRoleWithWebIdentity to the cluster's OIDC provider, with the audience sts.amazonaws.com and the pod's ServiceAccount as subject (system:serviceaccount:<namespace>:<name>)"
        }
        IssueErrorKind::Invalid => {
            "correct the annotation that STS's message names (kube2ram explain shows it), of the pod or of its ServiceAccount; after PackedPolicyTooLarge shorten the session policy"
        }
        IssueErrorKind::NoSuchRole => {
            "create the IAM role, or correct the annotation of the pod or of its ServiceAccount"
        }
        IssueErrorKind::Unavailable => {
            "STS does not answer the node, is off in its region, or cannot read the cluster's signing keys; the agent tries again by itself. Check that the node reaches the STS endpoint; after IDPCommunicationError, that the cluster's issuer and its JWKS are public"
        }
        IssueErrorKind::Token => {
            "there is no token of the pod's ServiceAccount that STS accepts; the agent tries again by itself. After InvalidIdentityToken, correct the account in the role's ARN, or create the cluster's IAM OIDC provider in that account; after NamespaceNotOptedIn, label the namespace; otherwise check that the node reaches the API server, and the API server's clock"
        }
        _ => advice(kind),
    }
}

fn is_throttling(code: &str) -> bool {
    THROTTLING.contains(&code)
}

const THROTTLING: [&str; 8] = [
    "RequestLimitExceeded",
    "RequestThrottled",
    "RequestThrottledException",
    "SlowDown",
    "ThrottledException",
    "Throttling",
    "ThrottlingException",
    "TooManyRequestsException",
];
/// "The requested DurationSeconds exceeds the 1 hour session limit for roles assumed by role chaining."
const CHAINING: &str = "role chaining";
/// "The requested DurationSeconds exceeds the MaxSessionDuration set for this role."
const DURATION: &str = "DurationSeconds exceeds";
/// "1 validation error detected: Value at 'webIdentityToken' failed to satisfy constraint"
const TOKEN_PARAMETER: &str = "webIdentityToken";
/// "No OpenIDConnect provider found in your account for https://…": the account is the role's.
const NO_PROVIDER: &str = "No OpenIDConnect provider found";
/// "Signature expired: … is now earlier than …", "Signature not yet current: … is still later than …".
const SKEWED: [&str; 2] = ["Signature expired", "Signature not yet current"];
/// Not registered; AWS's services send it for throttling.
const BANDWIDTH_EXCEEDED: u16 = 509;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http::{HeaderMap, HeaderName, HeaderValue};

    use super::*;
    use crate::sts::refusal::Refusal;

    fn parse(status: u16, code: &str, message: &str, headers: &[(&'static str, &'static str)]) -> Refusal {
        parse_in(&TABLE, status, code, message, headers)
    }

    fn parse_in(
        table: &Table,
        status: u16,
        code: &str,
        message: &str,
        headers: &[(&'static str, &'static str)],
    ) -> Refusal {
        let headers = headers
            .iter()
            .map(|&(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect();
        let body = format!(
            "<ErrorResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><Error><Type>Sender</Type>\
             <Code>{code}</Code><Message>{message}</Message></Error><RequestId>r-1</RequestId></ErrorResponse>"
        );
        table.refusal(StatusCode::from_u16(status).unwrap(), &headers, body.as_bytes())
    }

    #[test]
    fn follows_the_error_table() {
        use IssueErrorKind::*;
        use Remedy::*;
        let chaining = "The requested DurationSeconds exceeds the 1 hour session limit for roles assumed by role chaining.";
        let longest = "The requested DurationSeconds exceeds the MaxSessionDuration set for this role.";
        let expired = "Signature expired: 20261128T100000Z is now earlier than 20261128T100100Z (20261128T100600Z - 5 min.)";
        let early = "Signature not yet current: 20261128T101000Z is still later than 20261128T100600Z";

        for (status, code, message, kind, remedy) in [
            (403, "AccessDenied", "User: x is not authorized", Denied, None),
            (403, "AccessDeniedException", "", Denied, None),
            (400, "ValidationError", chaining, Invalid, Some(OneHour)),
            (400, "ValidationError", longest, Invalid, Some(ShorterSession)),
            (400, "ValidationError", "1 validation error detected: roleArn", Invalid, None),
            (400, "MalformedPolicyDocument", "", Invalid, None),
            (400, "PackedPolicyTooLarge", "", Invalid, None),
            (403, "RegionDisabledException", "", Unavailable, Some(NextEndpoint)),
            (403, "ExpiredToken", "", BaseCredentials, Some(FreshBase)),
            (400, "ExpiredTokenException", "", BaseCredentials, Some(FreshBase)),
            (403, "InvalidClientTokenId", "", BaseCredentials, Some(FreshBase)),
            (400, "UnrecognizedClientException", "", BaseCredentials, Some(FreshBase)),
            (403, "SignatureDoesNotMatch", "The request signature we calculated …", BaseCredentials, None),
            (403, "SignatureDoesNotMatch", expired, Unavailable, Some(ServerTime)),
            (403, "SignatureDoesNotMatch", early, Unavailable, Some(ServerTime)),
            (400, "RequestExpired", "", Unavailable, Some(ServerTime)),
            (400, "InvalidIdentityToken", "", BaseCredentials, None),
            (403, "IDPRejectedClaim", "", BaseCredentials, None),
            (400, "IDPCommunicationError", "", Unavailable, Some(FreshNonce)),
            (400, "Throttling", "Rate exceeded", Throttled, None),
            (400, "ThrottlingException", "", Throttled, None),
            (400, "ThrottledException", "", Throttled, None),
            (400, "RequestThrottled", "", Throttled, None),
            (503, "RequestLimitExceeded", "", Throttled, None),
            (429, "Anything", "", Throttled, None),
            (509, "BandwidthLimitExceeded", "", Throttled, None),
            (500, "InternalFailure", "", Unavailable, None),
            (503, "ServiceUnavailable", "", Unavailable, None),
            (500, "AccessDenied", "", Unavailable, None),
            // What is not known to be about the role.
            (403, "MissingAuthenticationToken", "", Unexpected, None),
            (400, "IncompleteSignature", "", Unexpected, None),
            (400, "InvalidParameterValue", "", Unexpected, None),
            (403, "OptInRequired", "", Unexpected, None),
            (403, "AccessDeniedX", "", Unexpected, None),
            (400, "ThrottlingX", "", Unexpected, None),
            (418, "Teapot", "", Unexpected, None),
        ] {
            let refusal = parse(status, code, message, &[]);

            let result = (refusal.error.kind, refusal.remedy());
            assert_eq!(result, (kind, remedy), "{status} {code} {message}");
            assert_eq!((&*refusal.error.code, refusal.error.request_id.as_deref()), (code, Some("r-1")));
        }
    }

    #[test]
    fn follows_the_error_table_of_the_exchange() {
        use IssueErrorKind::*;
        use Remedy::*;
        let denied = "Not authorized to perform sts:AssumeRoleWithWebIdentity";
        let longest = "The requested DurationSeconds exceeds the MaxSessionDuration set for this role.";
        let malformed =
            "1 validation error detected: Value at 'webIdentityToken' failed to satisfy constraint";

        for (status, code, message, kind, remedy) in [
            (403, "AccessDenied", denied, Denied, None),
            (
                400,
                "InvalidIdentityToken",
                "No OpenIDConnect provider found in your account for https://oidc.example.com",
                Token,
                None,
            ),
            (400, "InvalidIdentityToken", "Incorrect token audience", ClusterConfiguration, Some(FreshBase)),
            (400, "InvalidIdentityToken", "", ClusterConfiguration, Some(FreshBase)),
            (403, "IDPRejectedClaim", "", ClusterConfiguration, Some(FreshBase)),
            (400, "ExpiredTokenException", "", Token, Some(FreshBase)),
            (400, "ExpiredToken", "", Token, Some(FreshBase)),
            (400, "IDPCommunicationError", "", Unavailable, Some(FreshNonce)),
            (400, "MalformedPolicyDocument", "", Invalid, None),
            (400, "PackedPolicyTooLarge", "", Invalid, None),
            (400, "ValidationError", longest, Invalid, Some(ShorterSession)),
            (400, "ValidationError", "1 validation error detected: roleArn", Invalid, None),
            (400, "ValidationError", malformed, ClusterConfiguration, None),
            (403, "RegionDisabledException", "", Unavailable, Some(NextEndpoint)),
            (400, "Throttling", "Rate exceeded", Throttled, None),
            (429, "AccessDenied", "", Throttled, None),
            (500, "AccessDenied", "", Unavailable, None),
            (500, "InvalidIdentityToken", "", Unavailable, None),
            (500, "InternalFailure", "", Unavailable, None),
            // Nothing is signed.
            (403, "InvalidClientTokenId", "", Unexpected, None),
            (403, "SignatureDoesNotMatch", "", Unexpected, None),
            (403, "MissingAuthenticationToken", "", Unexpected, None),
            (418, "Teapot", "", Unexpected, None),
        ] {
            let refusal = parse_in(&EXCHANGE, status, code, message, &[]);

            let result = (refusal.error.kind, refusal.remedy());
            assert_eq!(result, (kind, remedy), "{status} {code} {message}");
        }
    }

    #[test]
    fn advice_is_there_for_each_kind_and_names_no_other_cloud() {
        for text in IssueErrorKind::ALL.into_iter().flat_map(|kind| [advice(kind), exchange_advice(kind)]) {
            assert!(text.len() > 20 && !text.ends_with('.'), "{text}");
            assert!(!["RAM", "ActionTrail", "aliyun"].iter().any(|word| text.contains(word)), "{text}");
            // An Event has 1,024 bytes, with an ARN of up to 512, the code and a few words.
            assert!(text.len() <= 400, "{} bytes: {text}", text.len());
        }
        // The token's kind has both causes of a provider that is not there.
        for cause in ["the account in the role's ARN", "IAM OIDC provider"] {
            assert!(exchange_advice(IssueErrorKind::Token).contains(cause));
        }
        // The whole call is refused with the code of a role that does not exist.
        for right in ["sts:TagSession", "sts:SetSourceIdentity"] {
            assert!(advice(IssueErrorKind::Denied).contains(right));
        }
        // By a token, nothing of the node's is involved.
        assert!(!exchange_advice(IssueErrorKind::Denied).contains("node"));
    }

    #[test]
    fn takes_what_sts_did_not_write_for_an_outage_and_never_for_a_denial() {
        for (status, kind) in [(403, IssueErrorKind::Unavailable), (429, IssueErrorKind::Throttled)] {
            let status = StatusCode::from_u16(status).unwrap();
            for body in [&b"<html>"[..], b"<Error><Code>AccessDenied</Code></Error>", b"\xff"] {
                let refusal = TABLE.refusal(status, &HeaderMap::new(), body);
                assert_eq!((refusal.error.kind, refusal.remedy()), (kind, None));
            }
        }
    }

    #[test]
    fn reads_how_long_to_wait_within_bounds() {
        let left = |headers| parse(400, "Throttling", "", headers).error.retry_after;

        assert_eq!(left(&[("retry-after", "7")]), Some(Duration::from_secs(7)));
        assert_eq!(left(&[("retry-after", "99999999")]), Some(Duration::from_secs(300)));
        assert_eq!(left(&[("retry-after", "Sat, 21 Nov 2026 21:30:00 GMT")]), None);
        assert_eq!(left(&[]), None);
        assert_eq!(parse(403, "AccessDenied", "", &[("retry-after", "7")]).error.retry_after, None);
    }

    #[test]
    fn reads_the_servers_time() {
        let date = ("date", "Sat, 28 Nov 2026 10:06:00 GMT");

        let refusal = parse(403, "SignatureDoesNotMatch", "Signature expired: x", &[date]);

        assert_eq!(refusal.server_time.unwrap().to_string(), "2026-11-28T10:06:00Z");
        assert!(parse(403, "RequestExpired", "", &[("date", "today")]).server_time.is_none());
    }
}
