//! Where STS is: a host, or the URL of one, for every cloud. Pure: no I/O, no clock, no logs.
//! Called by each cloud's `endpoint`, which knows the hosts of a region, and by the transport.

use url::{Host, Url};

/// An STS endpoint: HTTPS, or plain HTTP to a loopback address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint(pub(crate) Url);

/// Which of STS's endpoints are asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StsEndpoint {
    /// The endpoint of no region, where the cloud has one.
    Global,
    /// Only this one.
    Only(Endpoint),
    /// The endpoints of the node's region.
    Regional,
}

impl StsEndpoint {
    /// Whether STS is asked over TLS. Only a single endpoint on loopback need not be.
    pub fn is_https(&self) -> bool {
        match self {
            Self::Global | Self::Regional => true,
            Self::Only(endpoint) => endpoint.is_https(),
        }
    }
}

/// Why a region or an endpoint is not one.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The endpoint is more than a scheme, a host and a port, or is plain HTTP to another machine.
    #[error("endpoint {0:?} is neither a host nor an https URL of one")]
    Endpoint(String),
    /// The region id is malformed.
    #[error("malformed region id")]
    Region,
    /// The endpoint is not a URL.
    #[error("cannot parse endpoint {endpoint:?}")]
    Url {
        /// What was given.
        endpoint: String,
        /// Why.
        #[source]
        source: url::ParseError,
    },
}

impl Endpoint {
    /// Parses `--sts-endpoint`: a host, or an `https://` URL of one; `http://` only to a loopback address,
    /// for tests.
    ///
    /// # Errors
    /// [`EndpointError::Endpoint`] or [`EndpointError::Url`].
    pub fn parse(text: &str) -> Result<Self, EndpointError> {
        let full = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
        let url =
            Url::parse(&full).map_err(|source| EndpointError::Url { endpoint: text.to_owned(), source })?;
        let loopback = match url.host() {
            Some(Host::Ipv4(address)) => address.is_loopback(),
            Some(Host::Ipv6(address)) => address.is_loopback(),
            Some(Host::Domain(_)) | None => false,
        };
        let secure = url.scheme() == "https" || (url.scheme() == "http" && loopback);
        let bare = url.path() == "/" && url.query().is_none() && url.fragment().is_none();
        let anonymous = url.username().is_empty() && url.password().is_none();
        if secure && bare && anonymous && url.has_host() {
            Ok(Self(url))
        } else {
            Err(EndpointError::Endpoint(text.to_owned()))
        }
    }

    /// Whether the endpoint uses HTTPS.
    pub fn is_https(&self) -> bool {
        self.0.scheme() == "https"
    }

    /// The endpoint's URL; its path is `/`.
    pub fn url(&self) -> &Url {
        &self.0
    }

    /// The value of the `Host` header: the port only if it is not the scheme's default.
    pub fn host(&self) -> &str {
        self.0.authority()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn takes_plain_http_for_loopback_only() {
        for (text, host) in [
            ("sts.example.com", "sts.example.com"),
            ("https://sts.example.com:8443", "sts.example.com:8443"),
            ("https://sts.example.com:443/", "sts.example.com"),
            ("http://127.0.0.1:8080", "127.0.0.1:8080"),
            ("http://[::1]:8080", "[::1]:8080"),
        ] {
            assert_eq!(Endpoint::parse(text).unwrap().host(), host);
        }
        for text in [
            "http://sts.aliyuncs.com",
            "http://localhost:1",
            "http://10.0.0.1",
            "ftp://127.0.0.1",
            "https://u:p@sts.example.com",
            "https://sts.example.com/path",
            "https://sts.example.com?x",
            "",
        ] {
            assert!(Endpoint::parse(text).is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in ".{0,80}") {
            if let Ok(endpoint) = Endpoint::parse(&text) {
                prop_assert!(endpoint.is_https() || endpoint.url().scheme() == "http");
            }
        }
    }
}
