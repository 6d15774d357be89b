//! Source → keys to sign with: asks the machine's metadata server, a program, a URI or STS, as the source
//! takes. Depends on `source` and `cache`; called by the parent.

use std::{
    io,
    os::fd::BorrowedFd,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use kube2ram_cloud::{
    Base, BaseCredentials, MetadataAddr, StsClient,
    alibaba::{
        base::of_oidc,
        endpoint::Endpoint,
        metadata::{Metadata, MetadataError, hardened_mode},
        sts::StsIssuer,
        wire::Issued,
    },
    credentials::Issuer as _,
    role::{Grant, RoleSession},
    upstream::{MetadataServer, PassGrant},
};
use secrecy::{SecretString, zeroize::Zeroizing};
use serde::Deserialize;
use tokio::{task::spawn_blocking, time::timeout};

use super::{
    ClientError,
    cache::{Cache, Kept},
    source::{Assumed, Source, keys},
};
use kube2ram_service::{clock::Clock, telemetry::chain};

/// What is asked, and where.
pub(super) struct Network {
    pub(super) sts: Vec<Endpoint>,
    pub(super) metadata: MetadataAddr,
    pub(super) clock: Arc<dyn Clock>,
}

/// Keys, and when they end.
#[derive(Clone, Debug)]
pub(super) struct Held {
    pub(super) keys: BaseCredentials,
    pub(super) expires_at: Option<Timestamp>,
}

impl Held {
    fn of_issued(issued: Issued) -> Self {
        let Issued { access_key_id, access_key_secret, security_token, expires_at, .. } = issued;
        let security_token = Some(security_token);
        let keys = BaseCredentials { access_key_id, access_key_secret, security_token };
        Self { keys, expires_at: Some(expires_at) }
    }

    /// Fails when they have ended.
    fn valid(self, network: &Network, whose: &'static str) -> Result<Self, ClientError> {
        match self.expires_at {
            Some(end) if end <= network.clock.now() => Err(ClientError::Expired(whose)),
            _ => Ok(self),
        }
    }
}

/// The keys that a source gives now. Only those of assumed roles are kept in `cache`.
pub(super) async fn obtain(
    source: &Source,
    network: &Network,
    cache: Option<&Cache>,
) -> Result<Held, ClientError> {
    match source {
        Source::Assumed(assumed) => match cache {
            Some(cache) => kept_or_assumed(assumed, network, cache).await,
            None => assume(assumed, network, cache).await,
        },
        Source::Keys { keys, until } => {
            Held { keys: keys.clone(), expires_at: *until }.valid(network, "of the profile")
        }
        Source::NodeRole { name } => {
            node_role(name.as_deref(), network).await?.valid(network, "of the role attached to this machine")
        }
        Source::Oidc(settings) => {
            let base = of_oidc(settings.clone(), Arc::clone(&network.clock));
            let fetched =
                base.credentials(network.client()?, network.sts.clone(), Arc::clone(&network.clock)).await;
            let failed = |source| ClientError::Base { from: "by the OIDC token", source };
            let (keys, expires_at) = fetched.map_err(failed)?;
            Ok(Held { keys: (*keys).clone(), expires_at })
        }
        Source::Process { profile, command } => process(profile, command).await,
        Source::Uri(uri) => {
            let issued = uri.fetch().await.map_err(ClientError::Uri)?;
            Held::of_issued(issued).valid(network, "of the credentials URI")
        }
    }
}

/// Of processes that want the same at once, one assumes the role.
async fn kept_or_assumed(assumed: &Assumed, network: &Network, cache: &Cache) -> Result<Held, ClientError> {
    let entry = cache.entry(assumed.to_string());
    let kept = |held: Kept| Held { keys: held.keys, expires_at: Some(held.expires_at) };
    if let Some(held) = entry.read(network.clock.now()) {
        return Ok(kept(held));
    }
    let locked = entry.lock().await;
    if let Some(held) = entry.read(network.clock.now()) {
        return Ok(kept(held));
    }
    let held = assume(assumed, network, Some(cache)).await?;
    if let (Some(_locked), Some(expires_at)) = (&locked, held.expires_at) {
        entry.write(&Kept { keys: held.keys.clone(), expires_at });
    }
    Ok(held)
}

async fn assume(assumed: &Assumed, network: &Network, cache: Option<&Cache>) -> Result<Held, ClientError> {
    let Assumed { base, role, session, external_id, duration } = assumed;
    // In a box, because a role may be assumed with those of another one.
    let base = Box::pin(obtain(base, network, cache)).await?;
    let (sts, clock) = (network.sts.clone(), Arc::clone(&network.clock));
    let issuer = StsIssuer::new(network.client()?, sts, Base::of_keys(base.keys), clock);
    let session = RoleSession {
        role: role.clone(),
        grant: Grant::AssumeRole { external_id: external_id.clone() },
        policy: None,
        session_name: session.clone(),
        tags: Box::default(),
        source_identity: None,
        duration: *duration,
    };
    let failed = |source| ClientError::Assume { role: role.as_str().into(), source };
    let issued = issuer.issue(&session).await.map_err(failed)?;
    let keys = BaseCredentials {
        access_key_id: issued.access_key_id,
        access_key_secret: issued.access_key_secret,
        security_token: Some(issued.security_token),
    };
    Ok(Held { keys, expires_at: Some(issued.expires_at) })
}

async fn node_role(name: Option<&str>, network: &Network) -> Result<Held, ClientError> {
    let server = MetadataServer::new(network.metadata, Arc::new(NoPass));
    let metadata = Metadata::new(Arc::new(hardened_mode(server)));
    let name: Box<str> = match name {
        Some(name) => name.into(),
        None => match metadata.node_role_name().await {
            Ok(name) => name.ok_or(ClientError::NoCredentials)?,
            // On any other machine nobody answers there.
            Err(MetadataError::Upstream { .. }) => return Err(ClientError::NoCredentials),
            Err(error) => return Err(ClientError::Metadata(error)),
        },
    };
    metadata.node_credentials(&name).await.map(Held::of_issued).map_err(ClientError::Metadata)
}

impl Network {
    fn client(&self) -> Result<StsClient, ClientError> {
        StsClient::try_new(self.sts.iter().all(Endpoint::is_https)).map_err(ClientError::Sts)
    }
}

/// The agent's sockets need a pass to reach the real server. In a pod, the agent is who should answer.
struct NoPass;

impl PassGrant for NoPass {
    fn grant(&self, _: BorrowedFd<'_>) -> io::Result<()> {
        Ok(())
    }
}

/// Runs the program of a profile, without a shell, as aliyun-cli does. It may ask the user: standard input
/// and standard error are the terminal's.
async fn process(profile: &str, command: &str) -> Result<Held, ClientError> {
    let failed = |why: String| ClientError::Process { profile: profile.into(), why };
    let mut words = command.split_whitespace().map(str::to_owned);
    let program = words.next().ok_or_else(|| failed("it is empty".into()))?;
    let mut command = Command::new(program);
    command.args(words).stdin(Stdio::inherit()).stderr(Stdio::inherit()).stdout(Stdio::piped());
    let running = timeout(PROCESS_DEADLINE, spawn_blocking(move || command.output()));
    let output = match running.await {
        Ok(Ok(Ok(output))) => output,
        Ok(Ok(Err(error))) => return Err(failed(format!("it does not run: {error}"))),
        Ok(Err(error)) => return Err(failed(chain(&error))),
        Err(_elapsed) => return Err(failed("it takes too long".into())),
    };
    let stdout = Zeroizing::new(output.stdout);
    if !output.status.success() {
        return Err(failed(format!("it ended with {}", output.status)));
    }
    let printed = printed(&stdout).map_err(|why| failed(why.into()))?;
    Ok(Held { keys: printed, expires_at: None })
}

/// What such a program prints: a profile of aliyun-cli of the mode `AK` or `StsToken`.
fn printed(stdout: &[u8]) -> Result<BaseCredentials, &'static str> {
    #[derive(Deserialize)]
    struct Document {
        mode: String,
        access_key_id: String,
        access_key_secret: SecretString,
        #[serde(default)]
        sts_token: Option<SecretString>,
    }

    if stdout.len() > OUTPUT_LIMIT_BYTES {
        return Err("it prints too much");
    }
    // serde_json's error quotes values.
    let document: Document =
        serde_json::from_slice(stdout).or(Err("it prints no JSON with mode, access_key_id and so on"))?;
    let Document { mode, access_key_id, access_key_secret, sts_token } = document;
    let token = match &*mode {
        "AK" => None,
        "StsToken" => Some(sts_token.ok_or("it prints no sts_token")?),
        _ => return Err("it prints another mode than AK and StsToken"),
    };
    keys(&access_key_id, access_key_secret, token).or(Err("it prints what is no key"))
}

/// The user may have to type something.
const PROCESS_DEADLINE: Duration = Duration::from_mins(5);
const OUTPUT_LIMIT_BYTES: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret as _;

    use super::*;

    async fn ran(command: &str) -> Result<Held, String> {
        process("a", command).await.map_err(|error| error.to_string())
    }

    #[test]
    fn reads_what_a_program_prints() {
        let ak = printed(br#"{"mode":"AK","access_key_id":"id","access_key_secret":"s","region_id":"x"}"#);
        assert_eq!(&*ak.unwrap().access_key_id, "id");
        let sts =
            printed(br#"{"mode":"StsToken","access_key_id":"id","access_key_secret":"s","sts_token":"t"}"#);
        assert_eq!(sts.unwrap().security_token.unwrap().expose_secret(), "t");
        for bad in [
            "",
            "{}",
            r#"{"mode":"AK","access_key_id":"","access_key_secret":"s"}"#,
            r#"{"mode":"StsToken","access_key_id":"id","access_key_secret":"s"}"#,
            r#"{"mode":"RamRoleArn","access_key_id":"id","access_key_secret":"s"}"#,
        ] {
            assert!(printed(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn runs_a_program_without_a_shell() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys.json");
        let printed = r#"{"mode":"AK","access_key_id":"id","access_key_secret":"s"}"#;
        std::fs::write(&path, printed).unwrap();

        let held = ran(&format!("cat {}", path.display())).await.unwrap();

        assert_eq!(&*held.keys.access_key_id, "id");
        assert!(ran("false").await.unwrap_err().contains("it ended with"));
        assert!(ran("/nowhere/program").await.unwrap_err().contains("it does not run"));
        let shell = ran(&format!("cat {} ; echo", path.display())).await.unwrap_err();
        assert!(shell.contains("it ended with"), "{shell}");
    }
}
