//! One HTTP/1.1 request over its own socket.
//! Depends on socket2. Called by everything in this crate that is a client.

use std::{
    collections::BTreeMap,
    io::{ErrorKind, Read, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};
use url::{Host, Url};

/// Which kind of socket connects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Family {
    /// An IPv4 socket.
    #[default]
    #[value(name = "4")]
    V4,
    /// An IPv6 socket to an IPv6 address.
    #[value(name = "6")]
    V6,
    /// An IPv6 socket to `::ffff:a.b.c.d`, as every JVM makes them.
    #[value(name = "6mapped")]
    V6Mapped,
}

impl Family {
    /// The one of an address.
    pub(super) const fn of(addr: SocketAddr) -> Self {
        if addr.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// A request to be sent.
#[derive(Clone, Debug)]
pub struct Request {
    /// Sent as is, before `HTTP/1.1`.
    pub method: String,
    /// `http://address[:port]/target`. The target is sent as it is written, not normalised.
    pub url: String,
    /// The socket's family.
    pub family: Family,
    /// Headers besides `Host` and `Connection: close`.
    pub headers: Vec<(String, String)>,
    /// Sent with its length unless empty.
    pub body: Vec<u8>,
}

/// What came back.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Reply {
    /// The status code.
    pub status: u16,
    /// Headers, names in lower case.
    pub headers: BTreeMap<String, String>,
    /// The body, decoded.
    pub body: String,
    /// From before `connect` until the end of the answer, in microseconds.
    pub latency_us: u64,
}

/// How long each step of a request may take.
const TIMEOUT: Duration = Duration::from_secs(5);
/// No answer is longer.
const REPLY_LIMIT_BYTES: u64 = 1024 * 1024;

impl Request {
    /// A GET without further headers, on a socket of the address's family.
    pub fn get(url: impl Into<String>) -> Self {
        let url = url.into();
        Self {
            method: "GET".into(),
            family: if url.starts_with("http://[") { Family::V6 } else { Family::V4 },
            url,
            headers: Vec::new(),
            body: Vec::new(),
        }
    }

    /// Adds a header.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// Sends the request on a new connection and reads the answer.
    ///
    /// # Errors
    /// When the server cannot be reached, takes longer than five seconds or does not speak HTTP.
    pub fn send(&self) -> Result<Reply> {
        let started = Instant::now();
        let (addr, host, target) = self.destination()?;
        let mut head = format!("{} {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n", self.method);
        for (name, value) in &self.headers {
            head += &format!("{name}: {value}\r\n");
        }
        if !self.body.is_empty() || self.method != "GET" {
            head += &format!("Content-Length: {}\r\n", self.body.len());
        }
        head += "\r\n";
        let answer = exchange(addr, self.family, &[head.as_bytes(), &self.body].concat())?;
        let mut reply = parse(&answer, self.method == "HEAD")?;
        reply.latency_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);

        Ok(reply)
    }

    fn destination(&self) -> Result<(SocketAddr, &str, &str)> {
        let rest = self.url.strip_prefix("http://").context("the URL must begin with http://")?;
        let (host, target) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let url = Url::parse(&format!("http://{host}"))?;
        let ip = match url.host().context("the URL has no host")? {
            Host::Ipv4(ip) => IpAddr::from(ip),
            Host::Ipv6(ip) => ip.into(),
            Host::Domain(name) => bail!("{name} is no address"),
        };
        let addr = SocketAddr::new(ip, url.port().unwrap_or(80));

        Ok((addr, host, if target.is_empty() { "/" } else { target }))
    }
}

/// Sends bytes on a new connection and reads until the server closes it.
///
/// # Errors
/// When the server cannot be reached, or keeps the connection open for more than five seconds.
pub fn raw(addr: SocketAddr, bytes: &[u8]) -> Result<Vec<u8>> {
    exchange(addr, Family::of(addr), bytes)
}

fn exchange(addr: SocketAddr, family: Family, bytes: &[u8]) -> Result<Vec<u8>> {
    let mut stream = connect(addr, family).with_context(|| format!("cannot connect to {addr}"))?;
    stream.write_all(bytes).context("cannot send")?;
    let mut answer = Vec::new();
    stream.take(REPLY_LIMIT_BYTES).read_to_end(&mut answer).context("cannot receive")?;

    Ok(answer)
}

pub(super) fn connect(addr: SocketAddr, family: Family) -> std::io::Result<TcpStream> {
    let addr = match (family, addr) {
        (Family::V6Mapped, SocketAddr::V4(v4)) => SocketAddr::from((v4.ip().to_ipv6_mapped(), v4.port())),
        (Family::V4, SocketAddr::V4(_)) | (Family::V6 | Family::V6Mapped, SocketAddr::V6(_)) => addr,
        (Family::V4, SocketAddr::V6(_)) | (Family::V6, SocketAddr::V4(_)) => {
            return Err(ErrorKind::InvalidInput.into());
        }
    };
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None)?;
    if family == Family::V6Mapped {
        socket.set_only_v6(false)?;
    }
    socket.set_read_timeout(Some(TIMEOUT))?;
    socket.set_write_timeout(Some(TIMEOUT))?;
    socket.connect_timeout(&addr.into(), TIMEOUT)?;
    Ok(socket.into())
}

pub(super) fn parse(answer: &[u8], bodiless: bool) -> Result<Reply> {
    let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n").context("no HTTP answer")?;
    let head = String::from_utf8_lossy(&answer[..end]);
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).context("no status line")?.parse()?;
    let headers = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect::<BTreeMap<_, _>>();
    let body = &answer[end + 4..];
    let chunked =
        headers.get("transfer-encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked"));
    let body = if chunked { dechunk(body)? } else { body.to_vec() };
    if let Some(length) = headers.get("content-length").filter(|_| !bodiless) {
        ensure!(length.parse::<usize>()? == body.len(), "the body was cut short");
    }

    Ok(Reply { status, headers, body: String::from_utf8_lossy(&body).into_owned(), latency_us: 0 })
}

fn dechunk(mut rest: &[u8]) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = rest.windows(2).position(|bytes| bytes == b"\r\n").context("a chunk without size")?;
        let size = str::from_utf8(&rest[..end])?.split(';').next().unwrap_or_default().trim();
        let size = usize::from_str_radix(size, 16)?;
        if size == 0 {
            return Ok(body);
        }
        let chunk = rest.get(end + 2..).and_then(|chunk| chunk.split_at_checked(size));
        let (chunk, after) = chunk.context("the last chunk was cut short")?;
        body.extend_from_slice(chunk);
        rest = after.get(2..).context("a chunk without end")?;
    }
}
