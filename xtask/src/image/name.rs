//! What an image is called: `kube2ram:0.1.0`, `registry.example:5000/team/kube2ram:edge`. Pure; called by
//! `image` and `layout`.

use std::str::FromStr;

use anyhow::{Error, ensure};

/// A repository and a tag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Name {
    repository: String,
    tag: String,
}

impl Name {
    pub(crate) fn tag(&self) -> &str {
        &self.tag
    }

    /// With the registry and the directory that short names are in, as containerd and the kubelet complete
    /// them.
    pub(crate) fn complete(&self) -> String {
        let Self { repository, tag } = self;
        match repository.split_once('/') {
            Some((host, _)) if host.contains(['.', ':']) || host == "localhost" => {
                format!("{repository}:{tag}")
            }
            Some(_) => format!("docker.io/{repository}:{tag}"),
            None => format!("docker.io/library/{repository}:{tag}"),
        }
    }
}

impl FromStr for Name {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let last = name.rfind('/').map_or(0, |slash| slash + 1);
        let (repository, tag) = match name[last..].rfind(':') {
            Some(colon) => (&name[..last + colon], &name[last + colon + 1..]),
            None => (name, env!("CARGO_PKG_VERSION")),
        };
        let host_and_port = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-:".contains(c);
        ensure!(
            repository.split('/').all(|part| !part.is_empty() && part.chars().all(host_and_port)),
            "{repository:?} is no name of a repository: lower case, digits and ._- between slashes"
        );
        let of_tag = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
        ensure!(
            (1..=128).contains(&tag.len()) && tag.chars().all(of_tag) && !tag.starts_with(['.', '-']),
            "{tag:?} is no tag: up to 128 letters, digits and _.-"
        );
        Ok(Self { repository: repository.to_owned(), tag: tag.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_name_is_completed_as_runtimes_do() {
        for (name, complete) in [
            ("kube2ram:1.2", "docker.io/library/kube2ram:1.2"),
            ("team/kube2ram:1.2", "docker.io/team/kube2ram:1.2"),
            ("registry.example/kube2ram:1.2", "registry.example/kube2ram:1.2"),
            ("localhost/kube2ram:1.2", "localhost/kube2ram:1.2"),
            ("localhost:5000/team/kube2ram:1.2", "localhost:5000/team/kube2ram:1.2"),
        ] {
            assert_eq!(name.parse::<Name>().unwrap().complete(), complete);
        }
    }

    #[test]
    fn without_a_tag_the_version_is_the_tag() {
        for name in ["kube2ram", "localhost:5000/kube2ram"] {
            assert_eq!(name.parse::<Name>().unwrap().tag(), env!("CARGO_PKG_VERSION"));
        }
    }

    #[test]
    fn what_no_registry_takes_is_an_error() {
        for name in ["", "Kube2ram", "a//b", "kube2ram:", "kube2ram:-x", "kube2ram@sha256:00", "kube2ram:a b"]
        {
            assert!(name.parse::<Name>().is_err(), "{name}");
        }
        assert!("kube2ram:x".parse::<Name>().is_ok());
    }
}
