//! A real kube-apiserver and its etcd on the loopback device, from the programs that
//! `cargo xtask test --api-server` builds. Depends on the authority of the stand-ins. Called by tests, which
//! bring their own client.

use std::{
    fs::{self, File},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result};

use crate::{Sandbox, standin::Authority};

/// Both programs, until it is dropped.
#[derive(Debug)]
pub struct ControlPlane {
    directory: PathBuf,
    port: u16,
    _processes: [Process; 2],
}

#[derive(Debug)]
struct Process(Child);

impl ControlPlane {
    /// The token of a user in `system:masters`.
    pub const ADMIN: &str = "admin-token";
    /// The token of the kubelet of [`Sandbox::NODE`]: user and group are as in its client certificate.
    pub const KUBELET: &str = "kubelet-token";
    /// The token of the user `tenant`, who has no rights.
    pub const TENANT: &str = "tenant-token";

    /// Starts the `kube-apiserver` and the `etcd` in `programs`. All their files are in `directory`. Clients
    /// must trust `authority`. `flags` are more flags of the API server. It is not ready yet.
    ///
    /// # Errors
    /// When a file cannot be written, or a program does not start.
    pub fn start(programs: &Path, directory: &Path, authority: &Authority, flags: &[String]) -> Result<Self> {
        let [port, client, peer] = free_ports()?;
        let at = |name: &str| directory.join(name).display().to_string();
        let (certificate, key) = authority.certificate(&["127.0.0.1", "localhost"])?;
        let (verifying_key, signing_key) = authority.certificate(&["service-accounts"])?;
        // Authentication is decided here, authorization by RBAC and, for nodes, by the Node authorizer.
        let tokens = format!(
            "{},admin,admin,system:masters\n{},system:node:{},kubelet,system:nodes\n{},tenant,tenant,\n",
            Self::ADMIN,
            Self::KUBELET,
            Sandbox::NODE,
            Self::TENANT
        );
        let files = [
            (CA, authority.pem()),
            ("tls.crt", &certificate),
            ("tls.key", &key),
            // The API server takes a certificate for a public key.
            ("sa.crt", &verifying_key),
            ("sa.key", &signing_key),
            ("tokens.csv", &tokens),
        ];
        for (name, text) in files {
            fs::write(at(name), text).with_context(|| format!("cannot write {}", at(name)))?;
        }
        let etcd = [
            format!("--data-dir={}", at("etcd")),
            format!("--listen-client-urls=http://127.0.0.1:{client}"),
            format!("--advertise-client-urls=http://127.0.0.1:{client}"),
            format!("--listen-peer-urls=http://127.0.0.1:{peer}"),
            "--unsafe-no-fsync".to_owned(),
        ];
        let api_server = [
            format!("--etcd-servers=http://127.0.0.1:{client}"),
            "--bind-address=127.0.0.1".to_owned(),
            "--advertise-address=127.0.0.1".to_owned(),
            "--endpoint-reconciler-type=none".to_owned(),
            format!("--secure-port={port}"),
            format!("--tls-cert-file={}", at("tls.crt")),
            format!("--tls-private-key-file={}", at("tls.key")),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={}", at("sa.crt")),
            format!("--service-account-signing-key-file={}", at("sa.key")),
            "--service-cluster-ip-range=10.255.0.0/24".to_owned(),
            // As every cluster has it: the kubelet's requests concern its own node's objects only.
            "--authorization-mode=Node,RBAC".to_owned(),
            "--enable-admission-plugins=NodeRestriction".to_owned(),
            "--allow-privileged=true".to_owned(),
            format!("--token-auth-file={}", at("tokens.csv")),
        ];
        let run = |name: &str, args: &[String]| -> Result<Process> {
            let log = File::create(at(&format!("{name}.log")))?;
            let mut command = Command::new(programs.join(name));
            command.args(args).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
            command.spawn().map(Process).with_context(|| format!("cannot start {name}"))
        };
        let processes = [run("etcd", &etcd)?, run(API_SERVER, &[&api_server, flags].concat())?];
        Ok(Self { directory: directory.to_owned(), port, _processes: processes })
    }

    /// The port of the API server, on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The file with the certificate that clients must trust.
    pub fn ca(&self) -> PathBuf {
        self.directory.join(CA)
    }

    /// What the API server has logged; empty if that cannot be read.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.join(API_SERVER).with_extension("log")).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// All are open at the same time, so that they differ.
fn free_ports() -> Result<[u16; 3]> {
    let bind = || TcpListener::bind("127.0.0.1:0");
    let listeners = [bind()?, bind()?, bind()?];
    let mut ports = [0; 3];
    for (port, listener) in ports.iter_mut().zip(&listeners) {
        *port = listener.local_addr()?.port();
    }
    Ok(ports)
}

const API_SERVER: &str = "kube-apiserver";
const CA: &str = "ca.crt";
