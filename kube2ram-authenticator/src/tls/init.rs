//! What must be there before the API server starts: the authority, and the kubeconfig that names it. Made
//! once; made again, nothing changes. Depends on `authority` and `kubeconfig`; called by the command `init`
//! and by
//! `serve`.

use std::{fmt, net::IpAddr, path::PathBuf};

use jiff::Timestamp;

use super::{
    FILE_LIMIT_BYTES, TlsError,
    authority::{Authority, Found},
    kubeconfig::{ClientFiles, Kubeconfig},
};
use crate::files::{self, Mode};

/// What is to be there.
#[derive(Clone, Debug)]
pub struct Init {
    /// Where `cert.pem` and `key.pem` of the authority are.
    pub directory: PathBuf,
    /// The kubeconfig of the API server.
    pub kubeconfig: PathBuf,
    /// By which name the API server calls this server.
    pub hostname: String,
    /// Where this server listens.
    pub address: IpAddr,
    /// As above.
    pub port: u16,
    /// The certificate that the API server shows, if it is to show one.
    pub client: Option<ClientFiles>,
}

/// What [`init`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// Whether the authority was made now: then an API server that runs does not know it.
    pub made_authority: bool,
    /// Whether the kubeconfig was written or changed now: the API server reads it at its start.
    pub wrote_kubeconfig: bool,
}

/// Something that would keep the API server from this server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// In which file.
    pub path: PathBuf,
    /// What.
    pub what: String,
}

impl Init {
    /// The names in the server's certificate: its host name, and its address unless it listens on all.
    pub fn names(&self) -> Vec<String> {
        let mut names = vec![self.hostname.clone()];
        let address = self.address.to_string();
        if !self.address.is_unspecified() && address != self.hostname {
            names.push(address);
        }
        names
    }

    fn kubeconfig<'a>(&'a self, authority: &'a Authority) -> Kubeconfig<'a> {
        let (hostname, port, client) = (&*self.hostname, self.port, self.client.as_ref());
        Kubeconfig { ca_pem: authority.pem(), hostname, port, client }
    }
}

/// Makes what is missing, and leaves what is there and fits.
///
/// # Errors
/// See [`TlsError`].
pub fn init(wanted: &Init, now: Timestamp) -> Result<Report, TlsError> {
    let (authority, found) = Authority::open_or_create(&wanted.directory, now)?;
    // Names that no certificate can have are found now.
    authority.certify(&wanted.names(), now)?;
    let kubeconfig = wanted.kubeconfig(&authority);
    let failed = |what| {
        let path = wanted.kubeconfig.clone();
        move |source| TlsError::Io { what, path, source }
    };
    let there = files::read(&wanted.kubeconfig, FILE_LIMIT_BYTES).map_err(failed("read"))?;
    let fits = there.as_deref().is_some_and(|there| {
        str::from_utf8(there).is_ok_and(|there| kubeconfig.differences(there).is_empty())
    });
    if !fits {
        if let Some(directory) = wanted.kubeconfig.parent() {
            files::make_directory(directory).map_err(failed("create the directory of"))?;
        }
        files::replace(&wanted.kubeconfig, kubeconfig.text().as_bytes(), Mode::Public)
            .map_err(failed("write"))?;
    }
    Ok(Report { made_authority: found == Found::Made, wrote_kubeconfig: !fits })
}

/// Compares what is there with what the API server needs. Changes nothing.
///
/// # Errors
/// See [`TlsError`]: what is there cannot be read.
pub fn check(wanted: &Init, now: Timestamp) -> Result<Vec<Finding>, TlsError> {
    let Some(authority) = Authority::open(&wanted.directory, now)? else {
        return Ok(vec![finding(wanted.directory.join("cert.pem"), "it does not exist: run init")]);
    };
    authority.certify(&wanted.names(), now)?;
    let path = wanted.kubeconfig.clone();
    let there = files::read(&path, FILE_LIMIT_BYTES).map_err(|source| TlsError::Io {
        what: "read",
        path: path.clone(),
        source,
    })?;
    let Some(there) = there else {
        return Ok(vec![finding(path, "it does not exist: run init")]);
    };
    let Ok(text) = str::from_utf8(&there) else { return Ok(vec![finding(path, "it is not UTF-8")]) };
    let differences = wanted.kubeconfig(&authority).differences(text);
    Ok(differences.into_iter().map(|what| Finding { path: path.clone(), what }).collect())
}

fn finding(path: PathBuf, what: &str) -> Finding {
    Finding { path, what: what.into() }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.what)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.made_authority, self.wrote_kubeconfig) {
            (false, false) => "everything is in place: nothing was changed",
            (false, true) => "the kubeconfig was written: restart the API server if it runs with another one",
            (true, _) => "a new CA was made: restart the API server if it runs with another one",
        })
    }
}
