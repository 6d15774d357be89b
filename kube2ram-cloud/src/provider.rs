//! The parts of the agent's cloud as one: what the environment configures, what the node's metadata server
//! tells, and the issuer. Depends on each cloud's `base`, `metadata`, `endpoint` and `sts`; composed by the
//! agent's `app`, which need not know which cloud it is.

use std::sync::Arc;

use crate::{
    alibaba, aws,
    base::{Base, BaseError},
    cloud::Cloud,
    credentials::{Issuer, TokenSource},
    endpoint::{Endpoint, EndpointError, StsEndpoint},
    metadata::MetadataError,
    role::BaseArn,
    session_token::SessionTokens,
    sts::StsClient,
    upstream::Upstream,
};
use kube2ram_service::clock::Clock;

/// What the environment says about the agent's own credentials and about STS.
#[derive(Debug)]
pub struct CloudSettings(OfCloud);

#[derive(Debug)]
enum OfCloud {
    Alibaba(alibaba::base::Configured),
    Aws(aws::base::Configured, AwsPlace),
}

/// Where STS is, as far as the environment says.
#[derive(Debug)]
struct AwsPlace {
    region: Option<aws::endpoint::Region>,
    endpoints: aws::endpoint::EndpointOptions,
}

/// A cloud's parts on this node.
pub struct Provider {
    upstream: Arc<SessionTokens>,
    base: Base,
    metadata: MetadataOf,
}

enum MetadataOf {
    Alibaba(alibaba::metadata::Metadata),
    Aws(aws::metadata::Metadata, AwsPlace),
}

/// Where a node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// The region's id.
    pub region: Box<str>,
    /// The cloud's partition, where the region's id does not tell it.
    pub partition: Option<Box<str>>,
}

/// What the exchange of ServiceAccounts' tokens takes besides the tokens.
#[derive(Clone, Debug, Default)]
pub struct ExchangeSettings {
    /// The cluster, as the cloud knows it. Required on Alibaba Cloud. On AWS, only the role's trust policy
    /// names it.
    pub provider: Option<alibaba::OidcProviderArn>,
}

/// How STS is reached: endpoints, to try in their order, and what a signature for them takes.
#[derive(Debug)]
pub struct StsRoute(RouteOf);

#[derive(Debug)]
enum RouteOf {
    Alibaba(Vec<Endpoint>),
    Aws(Vec<Endpoint>, aws::endpoint::Region),
}

impl CloudSettings {
    /// Reads the variables of the cloud's SDKs; `variable` looks one up. `node` becomes part of the name of
    /// the agent's own session.
    ///
    /// # Errors
    /// [`BaseError::Missing`], [`BaseError::Malformed`] and [`BaseError::NotOfForm`].
    pub fn from_env(
        cloud: Cloud,
        variable: impl Fn(&str) -> Option<String>,
        node: &str,
    ) -> Result<Self, BaseError> {
        Ok(Self(match cloud {
            Cloud::Alibaba => OfCloud::Alibaba(alibaba::base::Configured::from_env(variable, node)?),
            Cloud::Aws => {
                let place = AwsPlace::from_env(&variable)?;
                OfCloud::Aws(aws::base::Configured::from_env(variable, node)?, place)
            }
        }))
    }

    /// The cloud's parts; `server` is the node's metadata server. Sends no request.
    pub fn connect(self, server: impl Upstream, clock: &Arc<dyn Clock>) -> Provider {
        match self.0 {
            OfCloud::Alibaba(configured) => {
                use alibaba::{
                    base::of_configured,
                    metadata::{Metadata, hardened_mode},
                };
                let upstream = Arc::new(hardened_mode(server));
                let base = of_configured(configured, Metadata::new(Arc::clone(&upstream)), Arc::clone(clock));
                let metadata = MetadataOf::Alibaba(Metadata::new(Arc::clone(&upstream)));
                Provider { upstream, base, metadata }
            }
            OfCloud::Aws(configured, place) => {
                use aws::metadata::{Metadata, imdsv2};
                let upstream = Arc::new(imdsv2(server));
                let base = configured.into_base(Metadata::new(Arc::clone(&upstream)), Arc::clone(clock));
                let metadata = MetadataOf::Aws(Metadata::new(Arc::clone(&upstream)), place);
                Provider { upstream, base, metadata }
            }
        }
    }
}

impl AwsPlace {
    fn from_env(variable: &impl Fn(&str) -> Option<String>) -> Result<Self, BaseError> {
        let form = "a region's name, such as eu-west-1";
        let region = aws::endpoint::Region::from_env(variable)
            .map_err(|variable| BaseError::NotOfForm { variable, form })?;
        let endpoints = aws::endpoint::EndpointOptions::from_env(variable).map_err(|variable| {
            let form = if variable == LEGACY { "regional or legacy" } else { "true or false" };
            BaseError::NotOfForm { variable, form }
        })?;
        Ok(Self { region, endpoints })
    }

    fn sts_endpoints(
        &self,
        choice: &StsEndpoint,
        region: &aws::endpoint::Region,
        partition: Option<&str>,
    ) -> Result<Vec<Endpoint>, EndpointError> {
        use aws::endpoint::{EndpointOptions, Partition, sts_endpoints};
        let global = match choice {
            StsEndpoint::Only(endpoint) => return Ok(vec![endpoint.clone()]),
            StsEndpoint::Global => true,
            StsEndpoint::Regional => self.endpoints.global,
        };
        let partition = match partition {
            Some(name) => Partition::named(name),
            None => Partition::of_region(region),
        };
        let options = EndpointOptions { global, ..self.endpoints };
        sts_endpoints(region, partition.ok_or(EndpointError::Region)?, options)
    }
}

const LEGACY: &str = "AWS_STS_REGIONAL_ENDPOINTS";

impl Provider {
    /// The metadata server, to which pods' requests are passed through.
    pub fn upstream(&self) -> Arc<dyn Upstream> {
        Arc::clone(&self.upstream) as _
    }

    /// What the agent signs with.
    pub fn base(&self) -> &Base {
        &self.base
    }

    /// The base ARN of the node's account.
    ///
    /// # Errors
    /// See [`MetadataError`].
    pub async fn base_arn(&self) -> Result<BaseArn, MetadataError> {
        match &self.metadata {
            MetadataOf::Alibaba(metadata) => metadata.base_arn().await,
            MetadataOf::Aws(metadata, _) => metadata.base_arn().await,
        }
    }

    /// The role attached to the node; `None` when there is none.
    ///
    /// # Errors
    /// See [`MetadataError`].
    pub async fn node_role_name(&self) -> Result<Option<Box<str>>, MetadataError> {
        match &self.metadata {
            MetadataOf::Alibaba(metadata) => metadata.node_role_name().await,
            MetadataOf::Aws(metadata, _) => metadata.node_role_name().await,
        }
    }

    /// Whether [`sts_route`](Self::sts_route) depends on where the node is.
    pub fn needs_location(&self, choice: &StsEndpoint) -> bool {
        match self.metadata {
            MetadataOf::Alibaba(_) => matches!(choice, StsEndpoint::Regional),
            // A signature names the region.
            MetadataOf::Aws(..) => true,
        }
    }

    /// Where the node is, when the environment says so.
    pub fn configured_location(&self) -> Option<Location> {
        match &self.metadata {
            MetadataOf::Alibaba(_) => None,
            MetadataOf::Aws(_, place) => {
                let region = place.region.as_ref()?;
                Some(Location { region: region.as_str().into(), partition: None })
            }
        }
    }

    /// Where the node is, by the metadata server, as far as `choice` depends on it and the environment does
    /// not say it.
    ///
    /// # Errors
    /// See [`MetadataError`].
    pub async fn location(&self, choice: &StsEndpoint) -> Result<Location, MetadataError> {
        match &self.metadata {
            MetadataOf::Alibaba(metadata) => {
                Ok(Location { region: metadata.region_id().await?.to_string().into(), partition: None })
            }
            MetadataOf::Aws(metadata, place) => {
                let region = match &place.region {
                    Some(region) => region.clone(),
                    None => metadata.region().await?,
                };
                let is_known = aws::endpoint::Partition::of_region(&region).is_some();
                let partition = match choice {
                    StsEndpoint::Global | StsEndpoint::Regional if !is_known => {
                        Some(metadata.partition().await?.name.into())
                    }
                    _ => None,
                };
                Ok(Location { region: region.as_str().into(), partition })
            }
        }
    }

    /// How STS is reached from `location`, which must be there if it is [needed](Self::needs_location).
    ///
    /// # Errors
    /// [`EndpointError::Region`] for a location that is missing or unknown; [`EndpointError::Url`].
    pub fn sts_route(
        &self,
        choice: &StsEndpoint,
        location: Option<&Location>,
    ) -> Result<StsRoute, EndpointError> {
        let known = || location.ok_or(EndpointError::Region);
        Ok(StsRoute(match &self.metadata {
            MetadataOf::Alibaba(_) => RouteOf::Alibaba(match choice {
                StsEndpoint::Global => vec![alibaba::endpoint::global()],
                StsEndpoint::Only(endpoint) => vec![endpoint.clone()],
                StsEndpoint::Regional => {
                    alibaba::endpoint::Region::parse(&known()?.region)?.sts_endpoints()?
                }
            }),
            MetadataOf::Aws(_, place) => {
                let Location { region, partition } = known()?;
                let region = aws::endpoint::Region::parse(region)?;
                RouteOf::Aws(place.sts_endpoints(choice, &region, partition.as_deref())?, region)
            }
        }))
    }

    /// Issues credentials of roles that trust ServiceAccounts, by their tokens alone. Connects on first use
    /// only. Without a provider where one is required, it issues none.
    pub fn exchange(
        &self,
        client: StsClient,
        route: StsRoute,
        exchange: ExchangeSettings,
        tokens: Arc<dyn TokenSource>,
        clock: Arc<dyn Clock>,
    ) -> Arc<dyn Issuer> {
        match route.0 {
            RouteOf::Alibaba(endpoints) => {
                Arc::new(alibaba::exchange::issuer(client, endpoints, exchange.provider, tokens, clock))
            }
            // The call is not signed, so that it is for no region.
            RouteOf::Aws(endpoints, _) => Arc::new(aws::exchange::issuer(client, endpoints, tokens, clock)),
        }
    }

    /// Issues credentials of roles that trust the agent's own identity. Connects on first use only.
    pub fn issuer(&self, client: StsClient, route: StsRoute, clock: Arc<dyn Clock>) -> Arc<dyn Issuer> {
        let base = self.base.clone();
        match route.0 {
            RouteOf::Alibaba(endpoints) => {
                Arc::new(alibaba::sts::StsIssuer::new(client, endpoints, base, clock))
            }
            RouteOf::Aws(endpoints, region) => {
                Arc::new(aws::sts::StsIssuer::new(client, endpoints, region, base, clock))
            }
        }
    }
}

#[cfg(test)]
mod tests;
