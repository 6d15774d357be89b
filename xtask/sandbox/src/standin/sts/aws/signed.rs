//! Who has made a call: its signature, taken apart and verified. Depends on the account and the signature.
//! Called by the parent.

use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode, header::AUTHORIZATION};
use jiff::{SignedDuration, Timestamp, civil::DateTime, tz::TimeZone};

use super::{Call, Failure};
use crate::{
    Cloud,
    standin::{
        account::{AccessKey, Accounts},
        signature::hex_sha256,
        sigv4::{Authorization, V4Request, V4Scope, v4_signature},
    },
};

/// A call with its signature.
pub(super) struct Signed<'a> {
    authorization: Authorization,
    request: &'a Request<Bytes>,
}

impl<'a> Signed<'a> {
    /// Takes a call apart and notes in `call` who has signed it.
    pub(super) fn parse(request: &'a Request<Bytes>, call: &mut Call) -> Result<Self, Failure> {
        let header = text(request.headers(), AUTHORIZATION.as_str()).ok_or_else(|| {
            let message = "Request is missing Authentication Token";
            Failure::new(StatusCode::FORBIDDEN, "MissingAuthenticationToken", message)
        })?;
        let authorization =
            Authorization::parse(header).ok_or_else(|| incomplete("the header Authorization"))?;
        call.access_key_id = authorization.access_key_id.clone();
        call.signature = "V4";
        Ok(Self { authorization, request })
    }

    /// The key that has signed it.
    pub(super) fn authenticate(&self, accounts: &Accounts) -> Result<AccessKey, Failure> {
        let now = accounts.clock().now();
        let token = self.header("x-amz-security-token");
        let key = accounts.key(&self.authorization.access_key_id);
        let key = key.filter(|key| key.security_token.as_deref() == token).ok_or_else(|| {
            let message = "The security token included in the request is invalid.";
            Failure::new(StatusCode::FORBIDDEN, "InvalidClientTokenId", message)
        })?;
        let date = self.header("x-amz-date").ok_or_else(|| incomplete("the header X-Amz-Date"))?;
        check_date(date, now)?;
        self.check_scope(date)?;
        if !self.verify(date, &key.secret) {
            return Err(mismatch(
                "The request signature we calculated does not match the signature you provided. Check your \
                 AWS Secret Access Key and signing method. Consult the service documentation for details.",
            ));
        }
        if key.expires.is_some_and(|end| end <= now) {
            let message = "The security token included in the request is expired";
            return Err(Failure::new(StatusCode::FORBIDDEN, "ExpiredToken", message));
        }
        Ok(key)
    }

    fn header(&self, name: &str) -> Option<&str> {
        text(self.request.headers(), name)
    }

    /// A signature is good for one day, region and service.
    fn check_scope(&self, date: &str) -> Result<(), Failure> {
        let Authorization { day, region, service, .. } = &self.authorization;
        if date.split('T').next() != Some(day.as_str()) {
            return Err(mismatch(
                "Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date from HTTP",
            ));
        }
        if region != region_of(self.header("host").unwrap_or_default()) {
            return Err(mismatch("Credential should be scoped to a valid region."));
        }
        if service != "sts" {
            return Err(mismatch("Credential should be scoped to correct service: 'sts'."));
        }
        Ok(())
    }

    /// Whether the signature is this secret's, over everything that must be signed.
    fn verify(&self, date: &str, secret: &str) -> bool {
        let Authorization { region, service, signed_headers, signature, .. } = &self.authorization;
        let headers = self.request.headers();
        let is_signed = |name: &str| signed_headers.iter().any(|signed| signed == name);
        let must_be_signed = |name: &str| name == "host" || name.starts_with("x-amz-");
        let payload = self.request.body();
        if headers.keys().any(|name| must_be_signed(name.as_str()) && !is_signed(name.as_str()))
            || self.header("x-amz-content-sha256").is_some_and(|hash| hash != hex_sha256(payload))
        {
            return false;
        }
        let pairs = signed_headers
            .iter()
            .flat_map(|name| headers.get_all(name.as_str()).iter().map(move |value| (name, value)))
            .map(|(name, value)| (name.clone(), value.to_str().unwrap_or_default().to_owned()))
            .collect::<Vec<_>>();
        let request = V4Request {
            method: self.request.method().as_str(),
            path: self.request.uri().path(),
            query: self.request.uri().query().unwrap_or_default(),
            headers: &pairs,
            payload,
        };
        let scope = V4Scope { date, region, service };
        request.signed_headers() == signed_headers.join(";")
            && *signature == v4_signature(secret, scope, &request)
    }
}

/// The clocks may differ by 5 minutes.
fn check_date(date: &str, now: Timestamp) -> Result<(), Failure> {
    const WINDOW: SignedDuration = SignedDuration::from_mins(5);
    let sent = DateTime::strptime(FORMAT, date).ok().and_then(|time| time.to_zoned(TimeZone::UTC).ok());
    let sent = sent.ok_or_else(|| incomplete("a date in ISO 8601's basic format"))?.timestamp();
    let written = |time: Timestamp| time.strftime(FORMAT).to_string();
    let ahead = sent.duration_since(now);
    if ahead < -WINDOW {
        return Err(mismatch(format!(
            "Signature expired: {date} is now earlier than {} ({} - 5 min.)",
            written(now.saturating_sub(WINDOW).unwrap_or(Timestamp::MIN)),
            written(now)
        )));
    }
    if ahead > WINDOW {
        return Err(mismatch(format!(
            "Signature not yet current: {date} is still later than {} ({} + 5 min.)",
            written(now.saturating_add(WINDOW).unwrap_or(Timestamp::MAX)),
            written(now)
        )));
    }
    Ok(())
}

/// The region that a call to a host is signed for: the one in the name of an endpoint, else the node's.
fn region_of(host: &str) -> &str {
    let named = host.strip_prefix("sts.").and_then(|rest| rest.strip_suffix(".amazonaws.com"));
    match host {
        "sts.amazonaws.com" => "us-east-1",
        _ => named.unwrap_or(Cloud::Aws.region()),
    }
}

fn incomplete(missing: &str) -> Failure {
    Failure::bad("IncompleteSignature", format!("The request signature lacks {missing}"))
}

fn mismatch(message: impl Into<std::borrow::Cow<'static, str>>) -> Failure {
    Failure::new(StatusCode::FORBIDDEN, "SignatureDoesNotMatch", message)
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// `YYYYMMDDThhmmssZ`.
const FORMAT: &str = "%Y%m%dT%H%M%SZ";
