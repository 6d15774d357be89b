//! Stands for the agent where only its life matters: it is ready at once and protects nobody. Built for
//! `tests/sandbox.rs`.

use std::{
    env,
    io::{Read as _, Write as _, stdout},
    net::TcpListener,
};

fn main() -> std::io::Result<()> {
    let flag =
        |name: &str| env::args().find_map(|arg| Some(arg.strip_prefix(name)?.to_owned())).unwrap_or_default();
    if env::args().nth(1).as_deref() == Some("uninstall") {
        return Ok(());
    }
    writeln!(stdout(), "started for {}", flag("--node="))?;
    if flag("--fail=") == "yes" {
        return Err(std::io::Error::other("as it was told"));
    }
    let listener = TcpListener::bind(format!("{}:{}", flag("--host-ip="), flag("--metrics-port=")))?;
    for stream in listener.incoming() {
        let mut stream = stream?;
        let _ = stream.read(&mut [0; 1024])?;
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")?;
    }
    Ok(())
}
