//! The least that an HTTP server can do: hyper, and the same bytes for everybody. What the metadata service
//! is compared with. Depends on hyper. Called by the binary's `client hello`, in the pod that asks.

use std::{convert::Infallible, net::SocketAddr};

use anyhow::Result;
use bytes::Bytes;
use http::{HeaderValue, Response, header};
use http_body_util::Full;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpSocket};

/// The agent's.
const BACKLOG: u32 = 4096;

/// Answers every request with these bytes, on as many threads as the agent has, until the process ends.
///
/// # Errors
/// When the address cannot be listened on.
pub fn hello(addr: SocketAddr, body: Vec<u8>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let socket = TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        socket.bind(addr)?;
        serve(socket.listen(BACKLOG)?, body.into()).await
    })
}

async fn serve(listener: TcpListener, body: Bytes) -> Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let body = body.clone();
        let service = service_fn(move |_| {
            let mut response = Response::new(Full::new(body.clone()));
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
            async { Ok::<_, Infallible>(response) }
        });
        // A client that resets its connection is no concern of anybody's.
        tokio::spawn(async move {
            drop(http1::Builder::new().serve_connection(TokioIo::new(stream), service).await)
        });
    }
}
