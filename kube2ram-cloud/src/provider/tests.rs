//! What the environment and the metadata server say, against a stand-in server that has both clouds' items.

use http::Response;
use http_body_util::Full;

use super::*;
use crate::{
    MetadataAddr, OidcProviderArn,
    role::{Grant, RoleArn, RoleSession, ServiceAccount, SessionName},
    testing::{Asked, CountingPass, Server, SetClock, Tokens, answer, body},
    upstream::MetadataServer,
};

const NOWHERE: [(&str, &str); 0] = [];

fn settings(cloud: Cloud, variables: &[(&str, &str)]) -> Result<CloudSettings, BaseError> {
    let variable =
        |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
    CloudSettings::from_env(cloud, variable, "node-1")
}

fn provider(cloud: Cloud, variables: &[(&str, &str)], server: &Server) -> Provider {
    let server =
        MetadataServer::new(MetadataAddr::v4_only(server.address), Arc::new(CountingPass::default()));
    let clock: Arc<dyn Clock> = SetClock::at("2026-11-28T10:00:00Z");
    settings(cloud, variables).unwrap().connect(server, &clock)
}

async fn serve(region: &'static str) -> Server {
    let item = move |asked: &Asked| -> Response<Full<bytes::Bytes>> {
        match asked.uri().path() {
            "/latest/api/token" => answer(200, "token"),
            "/latest/meta-data/region-id" | "/latest/meta-data/placement/region" => answer(200, region),
            "/latest/meta-data/owner-account-id" => answer(200, "1234567890123456"),
            "/latest/meta-data/services/partition" => answer(200, "aws-eusc"),
            "/latest/meta-data/iam/info" => answer(
                200,
                r#"{"Code":"Success","InstanceProfileArn":"arn:aws-cn:iam::123456789012:instance-profile/p"}"#,
            ),
            "/latest/meta-data/ram/security-credentials/" | "/latest/meta-data/iam/security-credentials/" => {
                answer(200, "node-role")
            }
            _ => answer(404, ""),
        }
    };
    Server::start(item).await
}

fn hosts(route: &StsRoute) -> Vec<&str> {
    let (RouteOf::Alibaba(endpoints) | RouteOf::Aws(endpoints, _)) = &route.0;
    endpoints.iter().map(Endpoint::host).collect()
}

/// By the metadata server's word alone.
async fn regional_hosts(provider: &Provider) -> Vec<String> {
    let location = provider.location(&StsEndpoint::Regional).await.unwrap();
    let route = provider.sts_route(&StsEndpoint::Regional, Some(&location)).unwrap();
    hosts(&route).into_iter().map(str::to_owned).collect()
}

#[tokio::test]
async fn each_cloud_is_asked_at_its_own_paths() {
    let server = serve("cn-north-1").await;

    for (cloud, base, first) in [
        (Cloud::Alibaba, "acs:ram::1234567890123456:role/", "sts-vpc.cn-north-1.aliyuncs.com"),
        (Cloud::Aws, "arn:aws-cn:iam::123456789012:role/", "sts.cn-north-1.amazonaws.com.cn"),
    ] {
        let provider = provider(cloud, &NOWHERE, &server);

        assert_eq!(provider.base_arn().await.unwrap().as_str(), base);
        assert_eq!(provider.node_role_name().await.unwrap().as_deref(), Some("node-role"));
        assert_eq!(regional_hosts(&provider).await[0], first);
        assert_eq!(provider.base().source(), crate::BaseSource::NodeRole);
    }
}

#[tokio::test]
async fn a_region_of_the_environment_needs_no_request() {
    let server = serve("eu-west-1").await;
    let provider = provider(Cloud::Aws, &[("AWS_REGION", "us-east-2")], &server);

    assert_eq!(regional_hosts(&provider).await, ["sts.us-east-2.amazonaws.com", "sts.amazonaws.com"]);
    assert_eq!(server.targets(), Vec::<String>::new());
    assert_eq!(provider.configured_location().unwrap().region.as_ref(), "us-east-2");
}

#[tokio::test]
async fn a_region_that_tells_no_partition_makes_the_server_tell_it() {
    let server = serve("new-land-1").await;

    let location = provider(Cloud::Aws, &NOWHERE, &server).location(&StsEndpoint::Regional).await.unwrap();

    assert_eq!((&*location.region, location.partition.as_deref()), ("new-land-1", Some("aws-eusc")));
    let hosts = regional_hosts(&provider(Cloud::Aws, &NOWHERE, &server)).await;
    assert_eq!(hosts, ["sts.new-land-1.amazonaws.eu"]);
    let only = StsEndpoint::Only(Endpoint::parse("sts.example.com").unwrap());
    let location = provider(Cloud::Aws, &NOWHERE, &server).location(&only).await.unwrap();
    assert_eq!(location.partition, None, "it is not asked for what nothing depends on");
}

#[tokio::test]
async fn only_one_endpoint_and_the_global_one_are_what_the_flags_say() {
    let server = serve("eu-west-1").await;
    let only = StsEndpoint::Only(Endpoint::parse("sts.example.com").unwrap());
    let location = Location { region: "eu-west-1".into(), partition: None };
    let (alibaba, aws) =
        (provider(Cloud::Alibaba, &NOWHERE, &server), provider(Cloud::Aws, &NOWHERE, &server));

    for provider in [&alibaba, &aws] {
        assert_eq!(hosts(&provider.sts_route(&only, Some(&location)).unwrap()), ["sts.example.com"]);
    }
    let global = |provider: &Provider| provider.sts_route(&StsEndpoint::Global, Some(&location)).unwrap();
    assert_eq!(hosts(&global(&alibaba)), ["sts.aliyuncs.com"]);
    assert_eq!(hosts(&global(&aws)), ["sts.amazonaws.com", "sts.eu-west-1.amazonaws.com"]);
}

#[tokio::test]
async fn where_the_node_is_matters_to_whatever_depends_on_it() {
    let server = serve("eu-west-1").await;
    let only = StsEndpoint::Only(Endpoint::parse("sts.example.com").unwrap());
    let (alibaba, aws) =
        (provider(Cloud::Alibaba, &NOWHERE, &server), provider(Cloud::Aws, &NOWHERE, &server));

    for choice in [&only, &StsEndpoint::Global] {
        assert!(!alibaba.needs_location(choice) && alibaba.sts_route(choice, None).is_ok());
    }
    assert!(alibaba.needs_location(&StsEndpoint::Regional));
    assert!(alibaba.sts_route(&StsEndpoint::Regional, None).is_err());
    for choice in [&only, &StsEndpoint::Global, &StsEndpoint::Regional] {
        // A signature names the region.
        assert!(aws.needs_location(choice) && aws.sts_route(choice, None).is_err());
    }
}

#[tokio::test]
async fn an_exchange_asks_sts_alone_and_needs_nothing_of_the_agents_own() {
    let _installed = rustls::crypto::ring::default_provider().install_default();
    let metadata = serve("eu-west-1").await;
    let location = Location { region: "eu-west-1".into(), partition: None };
    let arn = "acs:ram::1234567890123456:oidc-provider/ack-rrsa-c0123";

    for (cloud, role, action) in [
        (Cloud::Alibaba, "acs:ram::1234567890123456:role/app", "AssumeRoleWithOIDC"),
        (Cloud::Aws, "arn:aws:iam::123456789012:role/app", "AssumeRoleWithWebIdentity"),
    ] {
        let sts = Server::start(|_| answer(503, "")).await;
        let provider = provider(cloud, &NOWHERE, &metadata);
        let only = StsEndpoint::Only(Endpoint::parse(&format!("http://{}", sts.address)).unwrap());
        let clock = SetClock::at("2026-11-28T10:00:00Z");
        let tokens = Tokens::new(&clock, vec![]);
        let exchange = ExchangeSettings { provider: Some(OidcProviderArn::parse(arn).unwrap()) };
        let route = provider.sts_route(&only, Some(&location)).unwrap();
        let client = StsClient::try_new(false).unwrap();
        let issuer = provider.exchange(client, route, exchange, Arc::clone(&tokens) as _, clock);
        let session = RoleSession {
            role: RoleArn::parse(role).unwrap(),
            grant: Grant::ServiceAccount(ServiceAccount { namespace: "shop".into(), name: "web".into() }),
            policy: None,
            session_name: SessionName::parse("shop.web").unwrap(),
            duration: std::time::Duration::from_hours(1),
            tags: [].into(),
            source_identity: None,
        };

        issuer.issue(&session).await.unwrap_err();

        let asked = &sts.asked()[0];
        // In the query on one cloud, in the body on the other.
        let said = format!("{} {}", asked.uri(), String::from_utf8_lossy(body(asked)));
        assert!(said.contains(&format!("Action={action}&")), "{said}");
        let audience = cloud.dialect().audience;
        let subject = "system:serviceaccount:shop:web";
        assert_eq!(tokens.asked(), [(subject.to_owned(), audience.to_owned(), 600)]);
    }
    assert_eq!(metadata.targets(), Vec::<String>::new());
}

#[test]
fn a_variable_that_cannot_be_used_is_named() {
    for (variable, value) in [
        ("AWS_REGION", "eu west 1"),
        ("AWS_DEFAULT_REGION", "eu west 1"),
        ("AWS_SESSION_TOKEN", "without keys"),
        ("AWS_USE_FIPS_ENDPOINT", "yes"),
        ("AWS_STS_REGIONAL_ENDPOINTS", "global"),
        ("AWS_ACCESS_KEY_ID", "half"),
    ] {
        let error = settings(Cloud::Aws, &[(variable, value)]).unwrap_err();
        assert!(error.to_string().contains(variable), "{error}");
        assert!(settings(Cloud::Alibaba, &[(variable, value)]).is_ok(), "{variable} is not its own");
    }
}
