//! What must be asked of the metadata server before the first credential can be issued: account, node role,
//! region. Retried until it answers; pods get 503 meanwhile. Then makes the issuer that the flags name.
//! Called by `app`.

use std::{sync::Arc, time::Duration};

use tokio::{sync::SetOnce, time::sleep};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

use crate::{
    args::{Config, CredentialsFrom, Source},
    audit::Trail,
    credentials::{self, Cache, Limits},
    policy::Policy,
    role::{RoleError, Roles},
    server::Entitlements,
    snapshot::Discovered,
};
use kube2ram_cloud::{
    EndpointError, ExchangeSettings, Location, MetadataError, OidcProviderArn, Provider, StsClient, StsRoute,
    credentials::{Issuer, TokenSource},
    role::{BaseArn, ValueError},
};
use kube2ram_service::{admin::Pending, clock::Clock, telemetry::chain};

/// The pause after the first failure; doubled up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// The longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// Why credentials cannot be issued yet.
#[derive(Debug, thiserror::Error)]
enum DiscoveryError {
    /// The account id makes no base ARN.
    #[error("cannot build a base ARN from the account id")]
    BaseArn(#[source] ValueError),
    /// `--auto-discover-default-role`, but no role is attached to the node.
    #[error(
        "--auto-discover-default-role needs a role, and none is attached to the node: attach one, or set --default-role"
    )]
    NoNodeRole,
    /// The region or the endpoint is unusable.
    #[error("cannot determine the STS endpoint")]
    Endpoint(#[source] EndpointError),
    /// The metadata server.
    #[error("cannot query the metadata server")]
    Metadata(#[source] MetadataError),
    /// The default role.
    #[error("cannot use the default role")]
    DefaultRole(#[source] RoleError),
    /// The previous agent had other flags, and did not discover it.
    #[error("the snapshot does not hold the {0}")]
    Undiscovered(&'static str),
}

/// The input of discovery; most of it becomes part of the entitlements.
pub(super) struct Discovery {
    pub(super) provider: Provider,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) sts: StsClient,
    /// Of tokens of ServiceAccounts. Asked only where roles are assumed by those.
    pub(super) tokens: Arc<dyn TokenSource>,
    pub(super) tasks: TaskTracker,
    pub(super) shutdown: CancellationToken,
    pub(super) cache_metrics: credentials::Metrics,
    pub(super) trail: Arc<Trail>,
    pub(super) pending: Pending,
    /// The facts that a previous agent discovered.
    pub(super) known_before: Option<Discovered>,
    /// The facts that this agent discovered, for the next one.
    pub(super) discovered: Arc<SetOnce<Discovered>>,
}

impl Discovery {
    /// Fills `entitlements`, however long it takes; then waits for the shutdown.
    pub(super) async fn run(self, config: Arc<Config>, entitlements: Arc<SetOnce<Entitlements>>) {
        let shutdown = self.shutdown.clone();
        let all = async {
            let (roles, route) = self.until_known(&config).await;
            self.finish(&config, roles, route, &entitlements);
            shutdown.cancelled().await;
        };
        shutdown.run_until_cancelled(Box::pin(all)).await;
    }

    async fn until_known(&self, config: &Config) -> (Roles, StsRoute) {
        let mut pause = FIRST_PAUSE;
        loop {
            let error = match self.ask(config).await {
                Ok(known) => return known,
                Err(error) => error,
            };
            // Account, region and role of a node stay what they are while it is up.
            if let (DiscoveryError::Metadata(_), Some(before)) = (&error, &self.known_before)
                && let Ok(known) = self.derive(config, before)
            {
                warn!(error = chain(&error), "account and region are known from before the restart only");
                // For the agent after this one.
                let _first = self.discovered.set(before.clone());
                return known;
            }
            warn!(error = chain(&error), "cannot issue credentials yet");
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn ask(&self, config: &Config) -> Result<(Roles, StsRoute), DiscoveryError> {
        let mut found = Discovered::default();
        let wants_node_role = matches!(config.default_role, Source::Discover);
        let wants_account = wants_node_role || matches!(config.base_arn, Source::Discover);
        if wants_account && self.own_account(config).is_none() {
            let arn = self.provider.base_arn().await.map_err(DiscoveryError::Metadata)?;
            found.account_arn = Some(arn.as_str().into());
        }
        if wants_node_role {
            found.node_role = self.provider.node_role_name().await.map_err(DiscoveryError::Metadata)?;
        }
        if self.provider.needs_location(&config.sts_endpoint) {
            let Location { region, partition } =
                self.provider.location(&config.sts_endpoint).await.map_err(DiscoveryError::Metadata)?;
            (found.region, found.partition) = (Some(region), partition);
        }
        let known = self.derive(config, &found)?;
        // Once: this is asked until it succeeds.
        let _first = self.discovered.set(found);
        Ok(known)
    }

    fn finish(self, config: &Config, roles: Roles, route: StsRoute, entitlements: &SetOnce<Entitlements>) {
        let issuer = issuer(&self.provider, config, self.sts, route, self.tokens, &self.clock);
        info!(
            base_arn = roles.base().map(tracing::field::display),
            default_role = roles.default_role().map(tracing::field::display),
            credentials_from = config.credentials_from.as_str(),
            "issuing credentials"
        );
        let policy = Policy::new(config.namespace_restrictions, &roles);
        let credentials = Cache::new(
            issuer,
            self.clock,
            self.tasks,
            self.shutdown,
            Limits { answer: config.cloud.dialect().patience.answer, ..Limits::default() },
            self.cache_metrics,
            self.trail,
        );
        if entitlements.set(Entitlements { roles, policy, credentials }).is_err() {
            unreachable!("set only here, once");
        }
        self.pending.ready();
    }

    /// The cluster's account, which has its OIDC provider and the agent's own role. The node's role comes
    /// from the metadata server in any case.
    fn own_account(&self, config: &Config) -> Option<BaseArn> {
        let account = match config.credentials_from {
            CredentialsFrom::Node => self.provider.base().account(),
            CredentialsFrom::ServiceAccount => config.oidc_provider.as_ref().map(OidcProviderArn::of_account),
        };
        let wants_node_role = matches!(config.default_role, Source::Discover);
        account.filter(|_| !wants_node_role)
    }

    /// Makes roles and the way to STS of the flags and of what was discovered for them.
    fn derive(&self, config: &Config, found: &Discovered) -> Result<(Roles, StsRoute), DiscoveryError> {
        let account = || match self.own_account(config) {
            Some(account) => Ok(account),
            None => {
                let text = found.account_arn.as_deref().ok_or(DiscoveryError::Undiscovered("account"))?;
                BaseArn::parse_in(config.cloud.dialect().arns, text).map_err(DiscoveryError::BaseArn)
            }
        };
        let base = match &config.base_arn {
            Source::Discover => Some(account()?),
            Source::Given(base) => Some(base.clone()),
            Source::Unset => None,
        };
        let default_role = match &config.default_role {
            // In the node's own account, whatever --base-role-arn says.
            Source::Discover => {
                let name = found.node_role.as_deref().ok_or(DiscoveryError::NoNodeRole)?;
                Some(format!("{}{name}", account()?.as_str()))
            }
            Source::Given(text) => Some(text.clone()),
            Source::Unset => None,
        };
        let roles = Roles::try_new(
            config.cloud.dialect(),
            config.annotation_keys.clone(),
            base,
            default_role.as_deref(),
            config.session_duration,
            config.attribution.clone(),
            config.credentials_from,
        )
        .map_err(DiscoveryError::DefaultRole)?;
        let location = || {
            let partition = found.partition.clone();
            // What the environment says now goes before what an agent found before.
            match self.provider.configured_location() {
                Some(configured) => Ok(Location { partition, ..configured }),
                None => {
                    let region = found.region.clone().ok_or(DiscoveryError::Undiscovered("region"))?;
                    Ok(Location { region, partition })
                }
            }
        };
        let is_needed = self.provider.needs_location(&config.sts_endpoint);
        let location = is_needed.then(location).transpose()?;
        let route = self.provider.sts_route(&config.sts_endpoint, location.as_ref());
        Ok((roles, route.map_err(DiscoveryError::Endpoint)?))
    }
}

/// What issues credentials by the right that the flags say. There is no other way when that one fails.
fn issuer(
    provider: &Provider,
    config: &Config,
    sts: StsClient,
    route: StsRoute,
    tokens: Arc<dyn TokenSource>,
    clock: &Arc<dyn Clock>,
) -> Arc<dyn Issuer> {
    match config.credentials_from {
        CredentialsFrom::Node => provider.issuer(sts, route, Arc::clone(clock)),
        CredentialsFrom::ServiceAccount => {
            let exchange = ExchangeSettings { provider: config.oidc_provider.clone() };
            provider.exchange(sts, route, exchange, tokens, Arc::clone(clock))
        }
    }
}
