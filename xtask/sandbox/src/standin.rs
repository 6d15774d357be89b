//! What a node talks to, as far as kube2ram can see a difference: STS, the metadata server, the API server,
//! a predecessor's agent and name servers, each a real server on its own thread, so that blocking and
//! asynchronous tests can both use them. Depends on nothing else of this crate but the clock and the cloud;
//! called by `sandbox` and by tests.

mod account;
mod predecessor;
mod api_server;

mod metadata;
mod names;
mod oidc;
mod server;
mod signature;
mod sigv4;
mod sts;
mod tls;

pub use self::{
    account::{AccessKey, Accounts, Principal, Role},
    api_server::{ApiServer, PodManifest, Right, TokenCall, TokenRequestFault},
    metadata::{Metadata, MetadataMode, Seen, Tokens},
    names::{Loss, NameServer},
    oidc::{OidcIssuer, OidcProvider, OidcTrust},
    predecessor::Predecessor,
    server::Bind,
    signature::{V3Request, pe, v1_signature, v3_signature},
    sigv4::{V4Request, V4Scope, v4_authorization, v4_signature},
    sts::{Call, Sts, StsMode},
    tls::{Authority, TlsFront},
};
pub(crate) use self::{signature::hex_sha256, sts::xml_text};
