//! Region → STS endpoints. Pure: no I/O, no clock, no logs. Sources: STS API "Endpoints"; the generated SDK's
//! endpoint map (alibabacloud_sts20150401 1.2.0). Called by `app`, `metadata`, `sts`.

use std::fmt;

use url::Url;

pub use crate::endpoint::{Endpoint, EndpointError};

/// A region id, such as `cn-hangzhou`: 1–64 characters of `[a-z0-9-]`, as it becomes part of a host name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region(Box<str>);

impl Region {
    /// Parses a region id.
    ///
    /// # Errors
    /// [`EndpointError::Region`].
    pub fn parse(text: &str) -> Result<Self, EndpointError> {
        let legal = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
        let fits = (1..=64).contains(&text.len()) && text.bytes().all(legal);
        if fits { Ok(Self(text.into())) } else { Err(EndpointError::Region) }
    }

    /// The STS endpoints to try, in order: inside the VPC first, because a node without NAT reaches no other;
    /// then the public one, and the global one last. Credentials of all of them are valid everywhere.
    ///
    /// # Errors
    /// [`EndpointError::Url`], when the region makes no host name after all (bad punycode).
    pub fn sts_endpoints(&self) -> Result<Vec<Endpoint>, EndpointError> {
        let region = match &*self.0 {
            "cn-hangzhou-finance" => "cn-hangzhou",
            odd if WITHOUT_REGIONAL_STS.contains(&odd) => return Ok(vec![global()]),
            region => region,
        };
        ["sts-vpc", "sts"]
            .iter()
            .map(|name| Endpoint::parse(&format!("{name}.{region}.aliyuncs.com")))
            .chain([Ok(global())])
            .collect()
    }
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The endpoint of no region: `sts.aliyuncs.com`, for `--use-regional-sts-endpoint=false`.
#[expect(clippy::expect_used, reason = "a literal")]
pub fn global() -> Endpoint {
    Endpoint(Url::parse("https://sts.aliyuncs.com/").expect("a URL"))
}

/// Which of STS's endpoints one is: a closed set, for metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EndpointKind {
    /// That of no region.
    Global,
    /// One that is not Alibaba Cloud's own, such as a gateway or a stand-in.
    Other,
    /// That of a region, by public addresses.
    Regional,
    /// That of a region, by addresses inside of a VPC.
    Vpc,
}

impl EndpointKind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Global, Self::Other, Self::Regional, Self::Vpc];

    /// The kind of an endpoint, by its host's name.
    pub fn of(endpoint: &Endpoint) -> Self {
        match endpoint.host().strip_suffix(".aliyuncs.com") {
            Some("sts") => Self::Global,
            Some(name) if name.starts_with("sts-vpc.") => Self::Vpc,
            Some(name) if name.starts_with("sts.") => Self::Regional,
            Some(_) | None => Self::Other,
        }
    }

    /// The metrics label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Global => "global",
            Self::Other => "other",
            Self::Regional => "regional",
            Self::Vpc => "vpc",
        }
    }
}

/// Regions whose STS is the global endpoint.
const WITHOUT_REGIONAL_STS: &[&str] = &[
    "ap-northeast-2-pop",
    "ap-south-1",
    "ap-southeast-2",
    "cn-beijing-finance-pop",
    "cn-beijing-gov-1",
    "cn-beijing-nu16-b01",
    "cn-edge-1",
    "cn-fujian",
    "cn-haidian-cm12-c01",
    "cn-hangzhou-bj-b01",
    "cn-hangzhou-internal-prod-1",
    "cn-hangzhou-internal-test-1",
    "cn-hangzhou-internal-test-2",
    "cn-hangzhou-internal-test-3",
    "cn-hangzhou-test-306",
    "cn-hongkong-finance-pop",
    "cn-huhehaote-nebula-1",
    "cn-shanghai-et15-b01",
    "cn-shanghai-et2-b01",
    "cn-shanghai-inner",
    "cn-shanghai-internal-test-1",
    "cn-shenzhen-inner",
    "cn-shenzhen-st4-d01",
    "cn-shenzhen-su18-b01",
    "cn-wuhan",
    "cn-yushanfang",
    "cn-zhangbei",
    "cn-zhangbei-na61-b01",
    "cn-zhangjiakou-na62-a01",
    "cn-zhengzhou-nebula-1",
    "eu-west-1-oxs",
    "rus-west-1-pop",
];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hosts(region: &str) -> Vec<String> {
        Region::parse(region).unwrap().sts_endpoints().unwrap().iter().map(|e| e.url().to_string()).collect()
    }

    #[test]
    fn prefers_the_endpoint_inside_the_vpc() {
        assert_eq!(
            hosts("cn-hangzhou"),
            [
                "https://sts-vpc.cn-hangzhou.aliyuncs.com/",
                "https://sts.cn-hangzhou.aliyuncs.com/",
                "https://sts.aliyuncs.com/"
            ]
        );
    }

    #[test]
    fn knows_the_odd_regions() {
        assert_eq!(hosts("cn-hangzhou-finance"), hosts("cn-hangzhou"));
        assert_eq!(hosts("ap-south-1"), ["https://sts.aliyuncs.com/"]);
    }

    #[test]
    fn tells_kinds_of_endpoints_apart_by_their_hosts() {
        use EndpointKind::*;

        let kinds = |region: &str| {
            let endpoints = Region::parse(region).unwrap().sts_endpoints().unwrap();
            endpoints.iter().map(EndpointKind::of).collect::<Vec<_>>()
        };

        assert_eq!(kinds("cn-hangzhou"), [Vpc, Regional, Global]);
        assert_eq!(kinds("ap-south-1"), [Global]);
        for host in ["sts.example.com", "xsts.aliyuncs.com", "aliyuncs.com", "http://127.0.0.1:1"] {
            assert_eq!(EndpointKind::of(&Endpoint::parse(host).unwrap()), Other, "{host}");
        }
    }

    #[test]
    fn refuses_regions_that_would_change_the_host() {
        for text in ["", "cn hangzhou", "CN-HANGZHOU", "evil.example/", "a.b", "a@b", "cn-hangzhou\n"] {
            assert!(Region::parse(text).is_err(), "{text:?}");
        }
        assert!(Region::parse("xn--0").unwrap().sts_endpoints().is_err());
        assert!(Region::parse(&"a".repeat(64)).is_ok());
        assert!(Region::parse(&"a".repeat(65)).is_err());
    }

    proptest! {
        #[test]
        fn never_panics_and_stays_inside_aliyuncs(text in ".{0,80}", id in "[a-z0-9-]{1,64}") {
            drop(Endpoint::parse(&text));
            if let Ok(region) = Region::parse(&text) {
                drop(region.sts_endpoints());
            }
            for endpoint in Region::parse(&id).unwrap().sts_endpoints().into_iter().flatten() {
                prop_assert!(endpoint.is_https() && endpoint.host().ends_with(".aliyuncs.com"));
            }
        }
    }
}
