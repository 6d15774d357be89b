//! A scripted HTTP server on its own port, and a scripted source of tokens, for the tests of this crate.

use std::{
    collections::VecDeque,
    convert::Infallible,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    os::fd::BorrowedFd,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

use crate::{
    credentials::{AccountToken, IssueError, IssueErrorKind, TokenSource},
    role::ServiceAccount,
    sts::refusal::ours,
    upstream::PassGrant,
};
use kube2ram_service::clock::Clock;

/// What a server was asked: the request without its body, which [`body`] has.
pub(crate) type Asked = Request<()>;

#[derive(Clone)]
struct Body(Bytes);

/// The body of what a server was asked.
pub(crate) fn body(asked: &Asked) -> &[u8] {
    &asked.extensions().get::<Body>().unwrap().0
}

/// Accepts until it is dropped; connections end with the test's runtime.
pub(crate) struct Server {
    pub(crate) address: SocketAddrV4,
    pub(crate) connections: Arc<AtomicUsize>,
    asked: Arc<Mutex<Vec<Asked>>>,
    accepting: tokio::task::JoinHandle<()>,
}

impl Server {
    pub(crate) async fn start(
        answer: impl Fn(&Asked) -> Response<Full<Bytes>> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let SocketAddr::V4(address) = listener.local_addr().unwrap() else { unreachable!() };
        let asked = Arc::new(Mutex::new(Vec::new()));
        let connections = Arc::new(AtomicUsize::new(0));
        let (log, count, answer) = (Arc::clone(&asked), Arc::clone(&connections), Arc::new(answer));
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::SeqCst);
                let (log, answer) = (Arc::clone(&log), Arc::clone(&answer));
                let service = service_fn(move |request: Request<Incoming>| {
                    let (log, answer) = (Arc::clone(&log), Arc::clone(&answer));
                    async move {
                        let (mut head, body) = request.into_parts();
                        head.extensions.insert(Body(body.collect().await.unwrap().to_bytes()));
                        let request = Request::from_parts(head, ());
                        let response = answer(&request);
                        log.lock().unwrap().push(request);
                        Ok::<_, Infallible>(response)
                    }
                });
                tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        Self { address, connections, asked, accepting }
    }

    /// What was asked so far.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    pub(crate) fn targets(&self) -> Vec<String> {
        self.asked().iter().map(|asked| format!("{} {}", asked.method(), asked.uri())).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

pub(crate) fn answer(status: u16, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    Response::builder().status(status).body(Full::new(body.into())).unwrap()
}

/// Counts the sockets that it was asked to pass, and refuses them if configured so.
#[derive(Default)]
pub(crate) struct CountingPass {
    pub(crate) granted: AtomicUsize,
    pub(crate) refuse: bool,
}

impl PassGrant for CountingPass {
    fn grant(&self, _: BorrowedFd<'_>) -> std::io::Result<()> {
        if self.refuse {
            return Err(std::io::Error::other("refused"));
        }
        self.granted.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// Gives tokens of ServiceAccounts, each another one, after what the script says.
pub(crate) struct Tokens {
    clock: Arc<SetClock>,
    script: Mutex<VecDeque<Result<String, IssueErrorKind>>>,
    asked: Mutex<Vec<(String, String, u64)>>,
}

impl Tokens {
    pub(crate) fn new(clock: &Arc<SetClock>, script: Vec<Result<String, IssueErrorKind>>) -> Arc<Self> {
        let (script, asked) = (Mutex::new(script.into()), Mutex::default());
        Arc::new(Self { clock: Arc::clone(clock), script, asked })
    }

    /// The token that is given as an answer of that number, from 1 on.
    pub(crate) fn numbered(number: usize) -> String {
        format!("eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJzeXN0ZW0i{number:04}In0.c2lnbmF0dXJlX29m{number:04}")
    }

    /// For whom tokens were requested so far, for which audience, and for how many seconds.
    pub(crate) fn asked(&self) -> Vec<(String, String, u64)> {
        self.asked.lock().unwrap().clone()
    }

    /// For how many seconds tokens were requested so far.
    pub(crate) fn lifetimes(&self) -> Vec<u64> {
        self.asked().into_iter().map(|(_, _, seconds)| seconds).collect()
    }
}

#[async_trait]
impl TokenSource for Tokens {
    async fn token(
        &self,
        account: &ServiceAccount,
        audience: &str,
        lifetime: Duration,
    ) -> Result<AccountToken, IssueError> {
        let number = {
            let mut asked = self.asked.lock().unwrap();
            asked.push((account.subject(), audience.to_owned(), lifetime.as_secs()));
            asked.len()
        };
        let scripted = self.script.lock().unwrap().pop_front();
        let token = scripted.unwrap_or_else(|| Ok(Self::numbered(number)));
        let token = token.map_err(|kind| IssueError {
            retry_after: Some(Duration::from_secs(7)),
            ..ours(kind, "Scripted", "no token", None)
        })?;
        Ok(AccountToken { token: token.into(), expires_at: self.clock.now() + lifetime })
    }
}

/// Stands still until it is set.
pub(crate) struct SetClock(pub(crate) Mutex<jiff::Timestamp>);

impl SetClock {
    pub(crate) fn at(text: &str) -> Arc<Self> {
        Arc::new(Self(Mutex::new(text.parse().unwrap())))
    }
}

impl Clock for SetClock {
    fn now(&self) -> jiff::Timestamp {
        *self.0.lock().unwrap()
    }
}
