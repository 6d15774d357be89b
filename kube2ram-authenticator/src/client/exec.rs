//! ExecCredential, as kubectl writes it to the environment and reads it from standard output. Pure. Called by
//! the parent.
//!
//! Source: client-go 1.36, `plugin/pkg/client/auth/exec`: an answer of another version than the kubeconfig's
//! is refused.

use jiff::Timestamp;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};

use super::ClientError;

/// A version of the API.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub enum Version {
    /// `v1`.
    #[serde(rename = "client.authentication.k8s.io/v1")]
    V1,
    /// `v1beta1`, the default of ack-ram-tool.
    #[default]
    #[serde(rename = "client.authentication.k8s.io/v1beta1")]
    V1Beta1,
}

#[derive(Deserialize, Serialize)]
enum Kind {
    ExecCredential,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Info {
    api_version: Version,
    #[serde(rename = "kind")]
    _kind: Kind,
}

/// The version that kubectl names in `KUBERNETES_EXEC_INFO`, or else the one that was asked for.
pub(super) fn version(info: Option<&str>, asked: Version) -> Result<Version, ClientError> {
    match info.filter(|info| !info.is_empty()) {
        None => Ok(asked),
        Some(info) => {
            let info: Info = serde_json::from_str(info).or(Err(ClientError::ExecInfo))?;
            Ok(info.api_version)
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Written<'a> {
    kind: Kind,
    api_version: Version,
    spec: Spec,
    status: Status<'a>,
}

#[derive(Serialize)]
struct Spec {
    interactive: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Status<'a> {
    expiration_timestamp: String,
    token: &'a str,
}

/// The document with a token.
pub(super) fn write(
    version: Version,
    token: &SecretString,
    expires_at: Timestamp,
) -> serde_json::Result<String> {
    serde_json::to_string(&Written {
        kind: Kind::ExecCredential,
        api_version: version,
        spec: Spec { interactive: false },
        status: Status {
            expiration_timestamp: expires_at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            token: token.expose_secret(),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_kubectl_and_else_the_flag() {
        let info = |version: &str| {
            format!(
                r#"{{"kind":"ExecCredential","apiVersion":"client.authentication.k8s.io/{version}",
                "spec":{{"cluster":{{"server":"https://api:6443","config":null}},"interactive":true}}}}"#
            )
        };

        assert_eq!(version(Some(&info("v1")), Version::V1Beta1).unwrap(), Version::V1);
        assert_eq!(version(Some(&info("v1beta1")), Version::V1).unwrap(), Version::V1Beta1);
        assert_eq!(version(None, Version::V1).unwrap(), Version::V1);
        assert_eq!(version(Some(""), Version::V1).unwrap(), Version::V1);
        for bad in ["{}", "x", &info("v1alpha1"), &info("v1").replace("ExecCredential", "Pod")] {
            assert!(matches!(version(Some(bad), Version::V1), Err(ClientError::ExecInfo)), "{bad}");
        }
    }

    #[test]
    fn writes_what_kubectl_reads() {
        let at = "2026-01-02T03:14:05.6Z".parse().unwrap();

        let v1 = write(Version::V1, &"k8s-ack-v2.x".into(), at).unwrap();
        let beta = write(Version::V1Beta1, &"k8s-ack-v2.x".into(), at).unwrap();

        assert_eq!(
            v1,
            r#"{"kind":"ExecCredential","apiVersion":"client.authentication.k8s.io/v1","spec":{"interactive":false},"status":{"expirationTimestamp":"2026-01-02T03:14:05Z","token":"k8s-ack-v2.x"}}"#
        );
        assert_eq!(beta, v1.replace("/v1\"", "/v1beta1\""));
    }
}
