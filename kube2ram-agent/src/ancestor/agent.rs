//! Whether an ancestor's agent still answers on this node. Called by `ancestor`; depends on the standard library.

use std::{
    collections::BTreeSet,
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    time::Duration,
};

/// The loopback device takes microseconds.
const TIMEOUT: Duration = Duration::from_millis(150);
/// Its answer is shorter.
const ANSWER_MAX: u64 = 2048;

/// The port at which one listens. The ancestors listen on all addresses, kube2ram on the node's alone, so that whoever answers at the loopback
/// device's is not kube2ram. Where a rule leads, that is enough; on the ancestors' default port something else might listen, so it is asked.
pub(super) fn find(led_to: &BTreeSet<u16>, default: u16) -> Option<u16> {
    let listens = |port: &u16| connect(*port).is_ok();
    led_to.iter().copied().take(2).find(|port| listens(port)).or_else(|| {
        let answer = health(default).unwrap_or_default();
        is_ancestors(&answer).then_some(default)
    })
}

fn connect(port: u16) -> io::Result<TcpStream> {
    TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)), TIMEOUT)
}

/// What `/healthz` says.
fn health(port: u16) -> io::Result<Vec<u8>> {
    let mut stream = connect(port)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    stream.write_all(b"GET /healthz HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
    let mut answer = Vec::new();
    // What came before an error counts.
    drop(stream.take(ANSWER_MAX).read_to_end(&mut answer));
    Ok(answer)
}

/// Both tell the instance's id and the host's address, or that they do not know the former (kube2iam and kube2ram, server.go).
fn is_ancestors(answer: &[u8]) -> bool {
    let answer = String::from_utf8_lossy(answer);
    answer.contains(r#""instanceId""#) && answer.contains(r#""hostIP""#)
        || answer.contains("Healthcheck not yet performed")
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, thread};

    use super::*;

    /// Answers once, and tells its port.
    fn server(answer: &'static str) -> u16 {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.read_exact(&mut [0; 20]).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
        });
        port
    }

    #[test]
    fn an_ancestor_is_told_by_its_health() {
        let healthy = "HTTP/1.0 200 OK\r\n\r\n{\"hostIP\":\"10.0.0.42\",\"instanceId\":\"i-0\"}\n";
        let rows = [
            (healthy, true),
            ("HTTP/1.0 500 Internal Server Error\r\n\r\nHealthcheck not yet performed\n", true),
            ("HTTP/1.0 200 OK\r\n\r\nok", false),
            ("", false),
        ];

        for (answer, is_one) in rows {
            let port = server(answer);
            assert_eq!(find(&BTreeSet::new(), port), is_one.then_some(port), "{answer}");
        }
    }

    #[test]
    fn where_a_rule_leads_nobody_is_asked_who_they_are() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        assert_eq!(find(&BTreeSet::from([port]), 1), Some(port));

        drop(listener);

        assert_eq!(find(&BTreeSet::from([port]), 1), None);
    }
}
