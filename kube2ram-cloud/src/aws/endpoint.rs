//! Region and partition → STS endpoints. Pure: no I/O, no clock, no logs. Sources: botocore's
//! `partitions.json` and the endpoint rules of its STS model (1.43); Account Management reference guide,
//! "Specify which AWS Regions your account can use". Called by `base`, `metadata`, `sts`.
//!
//! A host is put together of a region's name, which holds no dot, and a suffix of [`PARTITIONS`]: what signs
//! is never sent to a host that came from the network.

use std::fmt;

pub use crate::endpoint::{Endpoint, EndpointError};

/// A region's name, such as `eu-west-1`: 1–32 characters of `[a-z0-9-]`, as it becomes part of a host name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region(Box<str>);

impl Region {
    /// Parses a region's name.
    ///
    /// # Errors
    /// [`EndpointError::Region`].
    pub fn parse(text: &str) -> Result<Self, EndpointError> {
        let legal = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
        let is_label = !text.starts_with('-') && !text.ends_with('-');
        let fits = (1..=32).contains(&text.len()) && text.bytes().all(legal) && is_label;
        if fits { Ok(Self(text.into())) } else { Err(EndpointError::Region) }
    }

    /// Reads `AWS_REGION`, or else `AWS_DEFAULT_REGION`; `None` when neither is set. An empty one counts as
    /// unset.
    ///
    /// Source: AWS SDKs and tools reference guide, "AWS Region".
    ///
    /// # Errors
    /// The name of the variable, when its value is no region's name.
    pub fn from_env(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, &'static str> {
        let set = |name| variable(name).filter(|value| !value.is_empty()).map(|value| (name, value));
        let mut found = ["AWS_REGION", "AWS_DEFAULT_REGION"].into_iter().filter_map(set);
        found.next().map(|(name, value)| Self::parse(&value).map_err(|_malformed| name)).transpose()
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A partition of AWS: accounts, roles and endpoints of their own.
#[derive(Debug, PartialEq, Eq)]
pub struct Partition {
    /// As it stands in ARNs, and as the metadata server's `services/partition` has it.
    pub name: &'static str,
    /// What the hosts of its services end in.
    pub suffix: &'static str,
    /// What those that speak IPv6, too, end in.
    pub dual_stack_suffix: &'static str,
    /// How its regions' names begin.
    prefixes: &'static [&'static str],
    fips: Fips,
}

/// What the FIPS endpoint of STS without IPv6 is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fips {
    /// `sts`: the usual endpoint is one.
    Plain,
    /// `sts-fips`.
    Prefixed,
}

impl Partition {
    /// The partition of this name.
    pub fn named(name: &str) -> Option<&'static Self> {
        PARTITIONS.iter().find(|partition| partition.name == name)
    }

    /// The partition that a region lies in by its name: `<prefix>-<word>-<digits>`.
    pub fn of_region(region: &Region) -> Option<&'static Self> {
        Self::of_name(region.as_str())
    }

    fn of_name(region: &str) -> Option<&'static Self> {
        PARTITIONS.iter().find(|partition| {
            partition.prefixes.iter().any(|prefix| {
                let rest = region.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('-'));
                rest.and_then(|rest| rest.split_once('-')).is_some_and(|(word, number)| {
                    let is_word = !word.is_empty() && word.bytes().all(|c| c.is_ascii_alphanumeric());
                    is_word && !number.is_empty() && number.bytes().all(|c| c.is_ascii_digit())
                })
            })
        })
    }
}

/// All of them.
pub static PARTITIONS: [Partition; 8] = [
    Partition {
        name: "aws",
        suffix: "amazonaws.com",
        dual_stack_suffix: "api.aws",
        prefixes: &["us", "eu", "ap", "sa", "ca", "me", "af", "il", "mx"],
        fips: Fips::Prefixed,
    },
    Partition {
        name: "aws-cn",
        suffix: "amazonaws.com.cn",
        dual_stack_suffix: "api.amazonwebservices.com.cn",
        prefixes: &["cn"],
        fips: Fips::Prefixed,
    },
    Partition {
        name: "aws-us-gov",
        suffix: "amazonaws.com",
        dual_stack_suffix: "api.aws",
        prefixes: &["us-gov"],
        fips: Fips::Plain,
    },
    Partition {
        name: "aws-iso",
        suffix: "c2s.ic.gov",
        dual_stack_suffix: "api.aws.ic.gov",
        prefixes: &["us-iso"],
        fips: Fips::Prefixed,
    },
    Partition {
        name: "aws-iso-b",
        suffix: "sc2s.sgov.gov",
        dual_stack_suffix: "api.aws.scloud",
        prefixes: &["us-isob"],
        fips: Fips::Prefixed,
    },
    Partition {
        name: "aws-iso-e",
        suffix: "cloud.adc-e.uk",
        dual_stack_suffix: "api.cloud-aws.adc-e.uk",
        prefixes: &["eu-isoe"],
        fips: Fips::Prefixed,
    },
    Partition {
        name: "aws-iso-f",
        suffix: "csp.hci.ic.gov",
        dual_stack_suffix: "api.aws.hci.ic.gov",
        prefixes: &["us-isof"],
        fips: Fips::Prefixed,
    },
    Partition {
        name: "aws-eusc",
        suffix: "amazonaws.eu",
        dual_stack_suffix: "api.amazonwebservices.eu",
        prefixes: &["eusc-de"],
        fips: Fips::Prefixed,
    },
];

/// Which endpoints to use, as the SDKs' variables say it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EndpointOptions {
    /// `AWS_USE_DUALSTACK_ENDPOINT`: by IPv6, too.
    pub dual_stack: bool,
    /// `AWS_USE_FIPS_ENDPOINT`: validated cryptography. There is no other endpoint to go on to.
    pub fips: bool,
    /// `AWS_STS_REGIONAL_ENDPOINTS=legacy`: the global endpoint first, in regions that are enabled by
    /// default. It has neither a dual-stack nor a FIPS variant, so those options win.
    pub global: bool,
}

impl EndpointOptions {
    /// Reads the variables. An empty one counts as unset.
    ///
    /// Source: AWS SDKs and tools reference guide, "Dual-stack and FIPS endpoints" and "AWS STS Regional
    /// endpoints".
    ///
    /// # Errors
    /// The name of a variable with another value than the documented ones: with a typing error FIPS would be
    /// off.
    pub fn from_env(variable: impl Fn(&str) -> Option<String>) -> Result<Self, &'static str> {
        let read = |name: &'static str, off: &str, on: &str| match variable(name).as_deref() {
            None | Some("") => Ok(false),
            Some(value) if value.eq_ignore_ascii_case(off) => Ok(false),
            Some(value) if value.eq_ignore_ascii_case(on) => Ok(true),
            Some(_) => Err(name),
        };
        Ok(Self {
            dual_stack: read("AWS_USE_DUALSTACK_ENDPOINT", "false", "true")?,
            fips: read("AWS_USE_FIPS_ENDPOINT", "false", "true")?,
            global: read("AWS_STS_REGIONAL_ENDPOINTS", "regional", "legacy")?,
        })
    }
}

/// The STS endpoints to try, in order: the region's, then the global one, for when the region's cannot be
/// reached, or is off. What the global one issues is not valid in regions that an account has to enable. So
/// the global one stands in for regions that are enabled by default only, and never for an endpoint with dual
/// stack or FIPS.
///
/// # Errors
/// [`EndpointError::Url`], when the region makes no host name after all (bad punycode).
pub fn sts_endpoints(
    region: &Region,
    partition: &Partition,
    options: EndpointOptions,
) -> Result<Vec<Endpoint>, EndpointError> {
    let is_plain = partition.fips == Fips::Plain && !options.dual_stack;
    let name = if options.fips && !is_plain { "sts-fips" } else { "sts" };
    let suffix = if options.dual_stack { partition.dual_stack_suffix } else { partition.suffix };
    let mut hosts = vec![format!("{name}.{region}.{suffix}")];
    let is_usual = !options.fips && !options.dual_stack;
    if is_usual && partition.name == "aws" && ENABLED_BY_DEFAULT.contains(&region.as_str()) {
        hosts.insert(if options.global { 0 } else { 1 }, GLOBAL_HOST.to_owned());
    }
    hosts.iter().map(|host| Endpoint::parse(host)).collect()
}

/// The region that a call to `endpoint` is signed for: the one that its host names, else the agent's. STS
/// refuses a signature for another region. The global endpoint is in `us-east-1`.
pub(super) fn signing_region<'a>(endpoint: &'a Endpoint, region: &'a Region) -> &'a str {
    match endpoint.url().host_str() {
        Some(GLOBAL_HOST) => GLOBAL_REGION,
        host => host.and_then(region_of).unwrap_or(region.as_str()),
    }
}

/// The region in a host of AWS: `sts.<region>.<suffix>`, `sts-fips.<region>.<suffix>`, and of an interface
/// endpoint `<id>.sts.<region>.vpce.<suffix>`.
fn region_of(host: &str) -> Option<&str> {
    let labels: Vec<&str> = host.split('.').collect();
    let service = labels.iter().position(|label| ["sts", "sts-fips"].contains(label))?;
    let region = labels.get(service + 1)?;
    let partition = Partition::of_name(region)?;
    let rest = labels.get(service + 2..)?.join(".");
    let suffix = rest.strip_prefix("vpce.").unwrap_or(&rest);
    [partition.suffix, partition.dual_stack_suffix].contains(&suffix).then_some(*region)
}

/// Regions of the partition `aws` that every account has without enabling them. A region that AWS adds later
/// is none of them: since 2019 an account has to enable each new one.
const ENABLED_BY_DEFAULT: [&str; 17] = [
    "ap-northeast-1",
    "ap-northeast-2",
    "ap-northeast-3",
    "ap-south-1",
    "ap-southeast-1",
    "ap-southeast-2",
    "ca-central-1",
    "eu-central-1",
    "eu-north-1",
    "eu-west-1",
    "eu-west-2",
    "eu-west-3",
    "sa-east-1",
    "us-east-1",
    "us-east-2",
    "us-west-1",
    "us-west-2",
];
const GLOBAL_HOST: &str = "sts.amazonaws.com";
const GLOBAL_REGION: &str = "us-east-1";

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    const PLAIN: EndpointOptions = EndpointOptions { dual_stack: false, fips: false, global: false };
    const DUAL_STACK: EndpointOptions = EndpointOptions { dual_stack: true, ..PLAIN };
    const FIPS: EndpointOptions = EndpointOptions { fips: true, ..PLAIN };
    const BOTH: EndpointOptions = EndpointOptions { fips: true, ..DUAL_STACK };
    const GLOBAL: EndpointOptions = EndpointOptions { global: true, ..PLAIN };

    fn region(text: &str) -> Region {
        Region::parse(text).unwrap()
    }

    fn hosts(text: &str, options: EndpointOptions) -> Vec<String> {
        let region = region(text);
        let partition = Partition::of_region(&region).unwrap();
        let endpoints = sts_endpoints(&region, partition, options).unwrap();
        endpoints.iter().map(|endpoint| endpoint.host().to_owned()).collect()
    }

    #[test]
    fn the_regions_endpoint_comes_first_and_the_global_one_in_its_partition_only() {
        assert_eq!(hosts("eu-west-1", PLAIN), ["sts.eu-west-1.amazonaws.com", "sts.amazonaws.com"]);
        assert_eq!(hosts("eu-west-1", GLOBAL), ["sts.amazonaws.com", "sts.eu-west-1.amazonaws.com"]);
        assert_eq!(hosts("cn-north-1", GLOBAL), ["sts.cn-north-1.amazonaws.com.cn"]);
        assert_eq!(hosts("us-gov-west-1", PLAIN), ["sts.us-gov-west-1.amazonaws.com"]);
    }

    #[test]
    fn the_global_endpoint_stands_in_for_regions_that_are_enabled_by_default_only() {
        for region in
            ["af-south-1", "ap-southeast-7", "eu-south-1", "me-south-1", "mx-central-1", "us-east-9"]
        {
            for options in [PLAIN, GLOBAL] {
                assert_eq!(hosts(region, options), [format!("sts.{region}.amazonaws.com")], "{options:?}");
            }
        }
        for region in ENABLED_BY_DEFAULT {
            assert_eq!(hosts(region, PLAIN)[1..], [GLOBAL_HOST], "the twin");
            for options in [DUAL_STACK, FIPS, BOTH] {
                let legacy = EndpointOptions { global: true, ..options };
                assert_eq!(hosts(region, legacy), hosts(region, options));
                assert_eq!(hosts(region, options).len(), 1, "{region} {options:?}");
            }
        }
    }

    /// As botocore 1.43.11 resolves each of them (`endpoint-rule-set-1.json` of STS).
    #[test]
    fn each_partition_has_its_own_hosts() {
        for (region, plain, dual_stack, fips, both) in [
            (
                "us-east-2",
                "sts.us-east-2.amazonaws.com",
                "sts.us-east-2.api.aws",
                "sts-fips.us-east-2.amazonaws.com",
                "sts-fips.us-east-2.api.aws",
            ),
            (
                "cn-north-1",
                "sts.cn-north-1.amazonaws.com.cn",
                "sts.cn-north-1.api.amazonwebservices.com.cn",
                "sts-fips.cn-north-1.amazonaws.com.cn",
                "sts-fips.cn-north-1.api.amazonwebservices.com.cn",
            ),
            (
                "us-gov-east-1",
                "sts.us-gov-east-1.amazonaws.com",
                "sts.us-gov-east-1.api.aws",
                "sts.us-gov-east-1.amazonaws.com",
                "sts-fips.us-gov-east-1.api.aws",
            ),
            (
                "us-iso-east-1",
                "sts.us-iso-east-1.c2s.ic.gov",
                "sts.us-iso-east-1.api.aws.ic.gov",
                "sts-fips.us-iso-east-1.c2s.ic.gov",
                "sts-fips.us-iso-east-1.api.aws.ic.gov",
            ),
            (
                "us-isob-east-1",
                "sts.us-isob-east-1.sc2s.sgov.gov",
                "sts.us-isob-east-1.api.aws.scloud",
                "sts-fips.us-isob-east-1.sc2s.sgov.gov",
                "sts-fips.us-isob-east-1.api.aws.scloud",
            ),
            (
                "eu-isoe-west-1",
                "sts.eu-isoe-west-1.cloud.adc-e.uk",
                "sts.eu-isoe-west-1.api.cloud-aws.adc-e.uk",
                "sts-fips.eu-isoe-west-1.cloud.adc-e.uk",
                "sts-fips.eu-isoe-west-1.api.cloud-aws.adc-e.uk",
            ),
            (
                "us-isof-south-1",
                "sts.us-isof-south-1.csp.hci.ic.gov",
                "sts.us-isof-south-1.api.aws.hci.ic.gov",
                "sts-fips.us-isof-south-1.csp.hci.ic.gov",
                "sts-fips.us-isof-south-1.api.aws.hci.ic.gov",
            ),
            (
                "eusc-de-east-1",
                "sts.eusc-de-east-1.amazonaws.eu",
                "sts.eusc-de-east-1.api.amazonwebservices.eu",
                "sts-fips.eusc-de-east-1.amazonaws.eu",
                "sts-fips.eusc-de-east-1.api.amazonwebservices.eu",
            ),
        ] {
            for (options, host) in [(PLAIN, plain), (DUAL_STACK, dual_stack), (FIPS, fips), (BOTH, both)] {
                assert_eq!(hosts(region, options)[0], host, "{options:?}");
            }
        }
    }

    #[test]
    fn a_region_tells_its_partition_and_what_is_none_tells_none() {
        for (text, name) in [
            ("us-east-1", Some("aws")),
            ("ap-southeast-7", Some("aws")),
            ("mx-central-1", Some("aws")),
            ("us-gov-west-1", Some("aws-us-gov")),
            ("us-isob-east-1", Some("aws-iso-b")),
            ("cn-northwest-1", Some("aws-cn")),
            ("eusc-de-east-1", Some("aws-eusc")),
            ("aws-global", None),
            ("us-east", None),
            ("us-east-1a", None),
            ("us--1", None),
            ("xx-east-1", None),
            ("usx-east-1", None),
            ("cn-hangzhou", None),
        ] {
            assert_eq!(Partition::of_region(&region(text)).map(|partition| partition.name), name, "{text}");
        }
        assert_eq!(Partition::named("aws-cn").unwrap().suffix, "amazonaws.com.cn");
        assert!(Partition::named("aws-xx").is_none() && Partition::named("").is_none());
    }

    #[test]
    fn a_call_is_signed_for_the_region_of_its_endpoint() {
        let region = region("eu-west-1");
        for (host, signed) in [
            ("sts.eu-west-1.amazonaws.com", "eu-west-1"),
            ("vpce-1-x.sts.eu-west-1.vpce.amazonaws.com", "eu-west-1"),
            ("sts.amazonaws.com", "us-east-1"),
            ("https://sts.amazonaws.com:8443", "us-east-1"),
            // Of another region than the node's, as `--sts-endpoint` can name it.
            ("STS.us-west-2.amazonaws.com", "us-west-2"),
            ("https://sts.us-west-2.amazonaws.com:8443", "us-west-2"),
            ("sts-fips.us-west-2.amazonaws.com", "us-west-2"),
            ("sts.us-west-2.api.aws", "us-west-2"),
            ("vpce-1-x.sts.us-west-2.vpce.amazonaws.com", "us-west-2"),
            ("vpce-1-x-us-west-2a.sts.us-west-2.vpce.amazonaws.com", "us-west-2"),
            ("sts.cn-north-1.amazonaws.com.cn", "cn-north-1"),
            ("sts.us-gov-west-1.amazonaws.com", "us-gov-west-1"),
            // A host that is not AWS's says nothing about the region.
            ("sts.us-west-2.example.com", "eu-west-1"),
            ("sts.us-west-2.amazonaws.com.example.com", "eu-west-1"),
            ("sts.cn-north-1.amazonaws.com", "eu-west-1"),
            ("us-west-2.sts.example.com", "eu-west-1"),
            ("proxy.example.com", "eu-west-1"),
            ("http://127.0.0.1:8080", "eu-west-1"),
        ] {
            assert_eq!(signing_region(&Endpoint::parse(host).unwrap(), &region), signed, "{host}");
        }
    }

    #[test]
    fn reads_the_sdks_variables_and_takes_no_other_value() {
        let read = |pairs: &[(&str, &str)]| {
            let pairs: HashMap<&str, &str> = pairs.iter().copied().collect();
            EndpointOptions::from_env(|name| pairs.get(name).map(ToString::to_string))
        };
        let [dual, fips, sts] =
            ["AWS_USE_DUALSTACK_ENDPOINT", "AWS_USE_FIPS_ENDPOINT", "AWS_STS_REGIONAL_ENDPOINTS"];

        assert_eq!(read(&[]), Ok(PLAIN));
        assert_eq!(read(&[(dual, ""), (fips, "false"), (sts, "regional")]), Ok(PLAIN));
        assert_eq!(read(&[(dual, "true"), (fips, "True")]), Ok(BOTH));
        assert_eq!(read(&[(sts, "legacy")]), Ok(GLOBAL));
        for (name, value) in [(dual, "1"), (fips, "yes"), (fips, "true "), (sts, "global")] {
            assert_eq!(read(&[(name, value)]), Err(name), "{value}");
        }
    }

    #[test]
    fn the_region_of_the_environment_is_the_first_that_is_set() {
        let read = |first: Option<&str>, second: Option<&str>| {
            Region::from_env(|name| {
                let value = if name == "AWS_REGION" { first } else { second };
                value.map(str::to_owned)
            })
        };

        assert_eq!(read(None, None).unwrap(), None);
        assert_eq!(read(Some("eu-west-1"), Some("us-east-1")).unwrap(), Some(region("eu-west-1")));
        assert_eq!(read(Some(""), Some("us-east-1")).unwrap(), Some(region("us-east-1")));
        assert!(read(Some("EU"), Some("us-east-1")).is_err());
    }

    #[test]
    fn refuses_regions_that_would_change_the_host() {
        for text in [
            "",
            "eu west-1",
            "EU-WEST-1",
            "evil.example/",
            "a.b",
            "a@b",
            "eu-west-1\n",
            "-eu",
            "eu-",
            "a/b",
            "é",
        ] {
            assert!(Region::parse(text).is_err(), "{text:?}");
        }
        assert!(sts_endpoints(&region("xn--0"), &PARTITIONS[0], PLAIN).is_err());
        assert!(Region::parse(&"a".repeat(32)).is_ok() && Region::parse(&"a".repeat(33)).is_err());
    }

    proptest! {
        #[test]
        fn never_panics_and_stays_inside_the_partition(text in ".{0,40}", id in "[a-z0-9-]{1,32}", bits in 0..8_u8, which in 0..8_usize) {
            let options = EndpointOptions { dual_stack: bits & 1 > 0, fips: bits & 2 > 0, global: bits & 4 > 0 };
            let partition = &PARTITIONS[which];
            for region in [&text, &id].into_iter().filter_map(|text| Region::parse(text).ok()) {
                let _partition = Partition::of_region(&region);
                for endpoint in sts_endpoints(&region, partition, options).into_iter().flatten() {
                    let ends = [partition.suffix, partition.dual_stack_suffix]
                        .iter()
                        .any(|suffix| endpoint.host().ends_with(&format!(".{suffix}")));
                    prop_assert!(endpoint.is_https() && ends, "{}", endpoint.host());
                    prop_assert!(endpoint.host().starts_with("sts"));
                }
            }
        }
    }
}
