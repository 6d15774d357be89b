//! STS's error table, as kinds and remedies. Pure: no I/O, no clock, no logs.
//! Source: STS API 2015-04-01, "Error codes". Depends on `wire`; called by `base` and `sts`.

use std::time::Duration;

use http::{HeaderMap, StatusCode};

use super::wire::parse_error;
use crate::{
    credentials::IssueErrorKind,
    sts::refusal::{MAX_RETRY_AFTER, Remedy, Table, retry_after},
    wire::ErrorDocument,
};

/// Alibaba Cloud's, of signed calls and of the exchange of the agent's own token.
pub(super) static TABLE: Table = Table { parse: parse_error, judge, time_left };

/// The same for exchanges of ServiceAccounts' tokens for pods' roles.
pub(super) static EXCHANGE: Table = Table { parse: parse_error, judge: judge_exchange, time_left };

/// STS's codes for a token that has expired.
pub(super) const EXPIRED_TOKEN: [&str; 1] = ["AuthenticationFail.OIDCToken.Expired"];

fn judge(status: StatusCode, error: &ErrorDocument) -> (IssueErrorKind, Option<Remedy>) {
    (kind_of(status, &error.code), remedy(&error.code))
}

fn remedy(code: &str) -> Option<Remedy> {
    match code {
        "SignatureNonceUsed" => Some(Remedy::FreshNonce),
        "InvalidParameter.DurationSeconds" => Some(Remedy::ShorterSession),
        code if code.starts_with("InvalidTimeStamp") => Some(Remedy::ServerTime),
        code if code.starts_with("InvalidAccessKeyId") || code.starts_with("InvalidSecurityToken") => {
            Some(Remedy::FreshBase)
        }
        _ => None,
    }
}

/// Only a code that is known to mean "this role, no" is a denial: a denial takes valid credentials from pods.
fn kind_of(status: StatusCode, code: &str) -> IssueErrorKind {
    match code {
        // The agent can correct these, and they are not the role's fault: the retry has failed, too.
        "SignatureNonceUsed" => IssueErrorKind::Unavailable,
        _ if code.starts_with("InvalidTimeStamp") => IssueErrorKind::Unavailable,
        _ if is_or_below(code, "Throttling") => IssueErrorKind::Throttled,
        _ if is_base(code) => IssueErrorKind::BaseCredentials,
        _ if status.is_server_error() => IssueErrorKind::Unavailable,
        _ if status == StatusCode::TOO_MANY_REQUESTS => IssueErrorKind::Throttled,
        "EntityNotExist.Role" => IssueErrorKind::NoSuchRole,
        _ if is_or_below(code, "NoPermission") => IssueErrorKind::Denied,
        // All parameters come from the pod's annotations.
        _ if is_or_below(code, "InvalidParameter") => IssueErrorKind::Invalid,
        _ => IssueErrorKind::Unexpected,
    }
}

/// Nothing is signed, so no code is about the agent's own credentials. What is wrong with a token is never
/// the pod's fault, nor that of its role: the cluster made the token. Sources: RAM, "FAQ about OIDC-based
/// SSO"; STS API 2015-04-01, "AssumeRoleWithOIDC".
fn judge_exchange(status: StatusCode, error: &ErrorDocument) -> (IssueErrorKind, Option<Remedy>) {
    use IssueErrorKind::*;
    // It is not documented with which statuses these come.
    if let Some(fault) = error.code.strip_prefix("AuthenticationFail.OIDCToken.") {
        return match fault {
            "Expired" => (Token, Some(Remedy::FreshBase)),
            // The signing key may just have been replaced.
            "Invalid" => (ClusterConfiguration, Some(Remedy::FreshBase)),
            "IssuerConfigurationBroken" => (Unavailable, None),
            // AudienceNotMatch, IssuerNotMatch, PublicKeyFingerprintMismatch.
            _ => (ClusterConfiguration, None),
        };
    }
    match (judge(status, error), &*error.code) {
        ((Unexpected, _), "EntityNotExist.OIDCProvider") => (ClusterConfiguration, None),
        ((Unexpected, _), "AuthenticationFail.NoPermission") if error.message.contains(NO_PROVIDER) => {
            (ClusterConfiguration, None)
        }
        ((Unexpected, _), "AuthenticationFail.NoPermission") => (Denied, None),
        // No annotation of a pod has any part in these.
        ((Invalid, _), code) if code.starts_with("InvalidParameter.OIDC") => (ClusterConfiguration, None),
        ((BaseCredentials, _), _) => (Unexpected, None),
        (judged, _) => judged,
    }
}

/// The remedy: the end of a sentence that names the role and STS's code.
pub(super) fn advice(kind: IssueErrorKind) -> &'static str {
    match kind {
        IssueErrorKind::BaseCredentials => {
            "the agent itself has no valid credentials; attach a role to the node, renew the agent's static keys, or repair its OIDC configuration"
        }
        IssueErrorKind::ClusterConfiguration => {
            "the cluster's configuration is wrong, not the pod's. Compare the RAM OIDC provider (issuer, client id sts.aliyuncs.com, fingerprints) with the cluster and with --oidc-provider-arn; check that the issuer's JWKS is public and has the signing key, and that the agent may create tokens of ServiceAccounts (RBAC, admission policies)"
        }
        IssueErrorKind::Denied => {
            "let the role's trust policy trust the node's role (or the other identity that the agent signs with), and allow that identity sts:AssumeRole on the role; if the trust policy requires an external id, annotate the pod with it"
        }
        IssueErrorKind::Invalid => "correct the pod's annotation that the code names",
        IssueErrorKind::NoSuchRole => "create the role, or correct the pod's annotation",
        IssueErrorKind::Throttled => {
            "the account calls STS too often; the agent tries again by itself. Find the caller (ActionTrail), or have the limit raised"
        }
        IssueErrorKind::Token => {
            "the agent has no valid token of the pod's ServiceAccount; it tries again by itself. Check that the node reaches the API server, and that the API server's clock is right"
        }
        IssueErrorKind::Unavailable => {
            "STS does not answer the node; the agent tries again by itself. Check that the node reaches the STS endpoint"
        }
        IssueErrorKind::Unexpected => {
            "the agent does not know this code of STS; it tries again by itself. Look up the code (api.aliyun.com/troubleshoot): it may concern the account"
        }
    }
}

/// The same where roles are assumed by ServiceAccounts' tokens.
pub(super) fn exchange_advice(kind: IssueErrorKind) -> &'static str {
    match kind {
        IssueErrorKind::Denied => {
            "let the role's trust policy trust the cluster's RAM OIDC provider, with the client id sts.aliyuncs.com as oidc:aud and the pod's ServiceAccount as oidc:sub (system:serviceaccount:<namespace>:<name>)"
        }
        IssueErrorKind::Invalid => {
            "correct the annotation that the code names, of the pod or of its ServiceAccount"
        }
        IssueErrorKind::NoSuchRole => {
            "create the role, or correct the annotation of the pod or of its ServiceAccount"
        }
        IssueErrorKind::Unavailable => {
            "STS does not answer the node, or cannot read the cluster's signing keys; the agent tries again by itself. Check that the node reaches the STS endpoint; after IssuerConfigurationBroken, that the cluster's issuer and its JWKS are public"
        }
        IssueErrorKind::Token => {
            "the agent has no valid token of the pod's ServiceAccount; it tries again by itself. Check that the node reaches the API server, and that the API server's clock is right; after NamespaceNotOptedIn, label the namespace"
        }
        _ => advice(kind),
    }
}

/// `Throttling` and `Throttling.User`, not `ThrottlingX`.
fn is_or_below(code: &str, family: &str) -> bool {
    code.strip_prefix(family).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// "No such OIDC Provider registered."
const NO_PROVIDER: &str = "No such OIDC Provider";

fn is_base(code: &str) -> bool {
    ["InvalidAccessKeyId", "InvalidSecurityToken", "MissingSecurityToken", "SignatureDoesNotMatch"]
        .iter()
        .any(|prefix| code.starts_with(prefix))
}

/// `x-ratelimit-user: Limit:..,Remain:..,TimeLeft:<ms>,Reset:..`, the same of the API, and
/// `Retry-After: <s>`, which a gateway in between may send; the longest of them.
fn time_left(headers: &HeaderMap) -> Option<Duration> {
    ["x-ratelimit-user", "x-ratelimit-user-api"]
        .iter()
        .filter_map(|name| headers.get(*name)?.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|field| field.trim().strip_prefix("TimeLeft:")?.trim().parse().ok())
        .map(|milliseconds| Duration::from_millis(milliseconds).min(MAX_RETRY_AFTER))
        .chain(retry_after(headers))
        .max()
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;
    use crate::sts::refusal::Refusal;

    fn parse(status: u16, code: &str, headers: &[(&'static str, &'static str)]) -> Refusal {
        parse_in(&TABLE, status, code, headers)
    }

    fn parse_in(table: &Table, status: u16, code: &str, headers: &[(&'static str, &'static str)]) -> Refusal {
        let headers = headers
            .iter()
            .map(|&(name, value)| (http::HeaderName::from_static(name), HeaderValue::from_static(value)))
            .collect();
        let body = format!(r#"{{"Code":"{code}","Message":"m","RequestId":"r"}}"#);
        table.refusal(StatusCode::from_u16(status).unwrap(), &headers, body.as_bytes())
    }

    #[test]
    fn follows_the_error_table() {
        use IssueErrorKind::*;
        use Remedy::*;

        for (status, code, kind, remedy) in [
            (400, "InvalidParameter", Invalid, None),
            (400, "InvalidParameter.RoleArn", Invalid, None),
            (400, "InvalidParameter.DurationSeconds", Invalid, Some(ShorterSession)),
            (403, "NoPermission", Denied, None),
            (404, "EntityNotExist.Role", NoSuchRole, None),
            (400, "MissingSecurityToken", BaseCredentials, None),
            (400, "InvalidSecurityToken.Expired", BaseCredentials, Some(FreshBase)),
            (400, "InvalidSecurityToken.MismatchWithAccessKey", BaseCredentials, Some(FreshBase)),
            (404, "InvalidAccessKeyId.NotFound", BaseCredentials, Some(FreshBase)),
            (400, "InvalidAccessKeyId.Inactive", BaseCredentials, Some(FreshBase)),
            (400, "SignatureDoesNotMatch", BaseCredentials, None),
            (400, "InvalidTimeStamp.Expired", Unavailable, Some(ServerTime)),
            (400, "InvalidTimeStamp.Format", Unavailable, Some(ServerTime)),
            (400, "SignatureNonceUsed", Unavailable, Some(FreshNonce)),
            (400, "Throttling.User", Throttled, None),
            (429, "Anything", Throttled, None),
            (500, "InternalError", Unavailable, None),
            (503, "ServiceUnavailable", Unavailable, None),
            (403, "NoPermission.Something", Denied, None),
            (500, "NoPermission", Unavailable, None),
            (502, "EntityNotExist.Role", Unavailable, None),
            // What is not known to be about the role.
            (400, "UnheardOf", Unexpected, None),
            (400, "InvalidAccount.Arrears", Unexpected, None),
            (400, "InvalidParameters", Unexpected, None),
            (403, "Forbidden", Unexpected, None),
            (403, "Forbidden.RiskControl", Unexpected, None),
            (403, "NoPermissions", Unexpected, None),
            (404, "EntityNotExist.User", Unexpected, None),
            (404, "InvalidAction.NotFound", Unexpected, None),
            (418, "Teapot", Unexpected, None),
        ] {
            let refusal = parse(status, code, &[]);
            assert_eq!((refusal.error.kind, refusal.remedy()), (kind, remedy), "{status} {code}");
        }
    }

    #[test]
    fn follows_the_error_table_of_the_exchange() {
        use IssueErrorKind::*;
        use Remedy::*;

        for (status, code, kind, remedy) in [
            (400, "AuthenticationFail.OIDCToken.Expired", Token, Some(FreshBase)),
            (400, "AuthenticationFail.OIDCToken.AudienceNotMatch", ClusterConfiguration, None),
            (400, "AuthenticationFail.OIDCToken.IssuerNotMatch", ClusterConfiguration, None),
            (400, "AuthenticationFail.OIDCToken.IssuerConfigurationBroken", Unavailable, None),
            (400, "AuthenticationFail.OIDCToken.PublicKeyFingerprintMismatch", ClusterConfiguration, None),
            (400, "AuthenticationFail.OIDCToken.Invalid", ClusterConfiguration, Some(FreshBase)),
            (400, "AuthenticationFail.OIDCToken.UnheardOf", ClusterConfiguration, None),
            // With whatever status.
            (403, "AuthenticationFail.OIDCToken.Invalid", ClusterConfiguration, Some(FreshBase)),
            (500, "AuthenticationFail.OIDCToken.IssuerConfigurationBroken", Unavailable, None),
            (403, "AuthenticationFail.NoPermission", Denied, None),
            (403, "NoPermission", Denied, None),
            (404, "EntityNotExist.OIDCProvider", ClusterConfiguration, None),
            (404, "EntityNotExist.Role", NoSuchRole, None),
            (400, "InvalidParameter.OIDCToken", ClusterConfiguration, None),
            (400, "InvalidParameter.OIDCProviderArn", ClusterConfiguration, None),
            (400, "InvalidParameter.RoleArn", Invalid, None),
            (400, "InvalidParameter.PolicyGrammar", Invalid, None),
            (400, "InvalidParameter.DurationSeconds", Invalid, Some(ShorterSession)),
            (400, "InvalidTimeStamp.Expired", Unavailable, Some(ServerTime)),
            (400, "SignatureNonceUsed", Unavailable, Some(FreshNonce)),
            (400, "Throttling", Throttled, None),
            (400, "Throttling.User", Throttled, None),
            (400, "Throttling.Api", Throttled, None),
            (429, "AuthenticationFail.NoPermission", Throttled, None),
            (500, "AuthenticationFail.NoPermission", Unavailable, None),
            (500, "InternalError", Unavailable, None),
            // Nothing is signed.
            (400, "InvalidSecurityToken.Expired", Unexpected, None),
            (400, "SignatureDoesNotMatch", Unexpected, None),
            (400, "MissingParameter", Unexpected, None),
            (403, "AuthenticationFail", Unexpected, None),
            (403, "AuthenticationFail.NoPermissions", Unexpected, None),
            (400, "UnheardOf", Unexpected, None),
        ] {
            let refusal = parse_in(&EXCHANGE, status, code, &[]);
            assert_eq!((refusal.error.kind, refusal.remedy()), (kind, remedy), "{status} {code}");
        }
    }

    #[test]
    fn a_provider_that_is_not_there_is_not_the_roles_fault() {
        let body =
            br#"{"Code":"AuthenticationFail.NoPermission","Message":"No such OIDC Provider registered."}"#;

        let refusal = EXCHANGE.refusal(StatusCode::FORBIDDEN, &HeaderMap::new(), body);

        assert_eq!((refusal.error.kind, refusal.remedy()), (IssueErrorKind::ClusterConfiguration, None));
    }

    #[test]
    fn advice_is_there_for_each_kind_and_names_no_other_cloud() {
        for text in IssueErrorKind::ALL.into_iter().flat_map(|kind| [advice(kind), exchange_advice(kind)]) {
            assert!(text.len() > 20 && !text.ends_with('.'), "{text}");
            assert!(!["IAM", "CloudTrail", "AWS"].iter().any(|word| text.contains(word)), "{text}");
            // An Event has 1,024 bytes, with an ARN of up to 512, the code and a few words.
            assert!(text.len() <= 400, "{} bytes: {text}", text.len());
        }
        // By a token, nothing of the node's is involved.
        assert!(!exchange_advice(IssueErrorKind::Denied).contains("node"));
    }

    #[test]
    fn takes_a_page_without_a_code_for_an_outage_and_never_for_a_denial() {
        for (status, kind) in [(403, IssueErrorKind::Unavailable), (429, IssueErrorKind::Throttled)] {
            let status = StatusCode::from_u16(status).unwrap();
            let refusal = TABLE.refusal(status, &HeaderMap::new(), b"<html>");
            assert_eq!((refusal.error.kind, refusal.remedy()), (kind, None));
        }
    }

    #[test]
    fn reads_how_long_to_wait_within_bounds() {
        let left = |headers| parse(400, "Throttling.User", headers).error.retry_after;

        assert_eq!(
            left(&[
                ("x-ratelimit-user", "Limit:100,Remain:0,TimeLeft:1500,Reset:2000"),
                ("x-ratelimit-user-api", "Limit:1,Remain:0,TimeLeft:2500,Reset:1"),
            ]),
            Some(Duration::from_millis(2500))
        );
        assert_eq!(left(&[("x-ratelimit-user", "TimeLeft:99999999999")]), Some(MAX_RETRY_AFTER));
        assert_eq!(left(&[("retry-after", "7")]), Some(Duration::from_secs(7)));
        assert_eq!(left(&[("retry-after", "Sat, 21 Nov 2026 21:30:00 GMT")]), None);
        assert_eq!(left(&[("x-ratelimit-user", "TimeLeft:-1")]), None);
        assert_eq!(left(&[]), None);
        assert_eq!(parse(403, "NoPermission", &[("x-ratelimit-user", "TimeLeft:1")]).error.retry_after, None);
    }

    #[test]
    fn reads_the_servers_time() {
        let refusal = parse(400, "InvalidTimeStamp.Expired", &[("date", "Sat, 21 Nov 2026 21:30:00 GMT")]);

        assert_eq!(refusal.server_time.unwrap().to_string(), "2026-11-21T21:30:00Z");
        assert!(parse(400, "InvalidTimeStamp.Expired", &[("date", "today")]).server_time.is_none());
    }
}
