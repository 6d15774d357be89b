//! The kinds of backend, with ack-ram-authenticator's names. Pure; used by `config`, `args` and the parent.

use std::fmt;

/// A kind of backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// The ConfigMap `kube-system/alibabacloud-auth`.
    AckConfigMap,
    /// The objects of the kind RAMIdentityMapping.
    Crd,
    /// A file of mappings alone, in JSON.
    DynamicFile,
    /// The lists of the configuration file.
    MountedFile,
}

/// Why a list of backends is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModeError {
    /// A backend is named twice.
    #[error("backend-mode {0:?} is there twice")]
    Duplicate(&'static str),
    /// There is none.
    #[error("at least one backend-mode must be specified")]
    Empty,
    /// A name of no backend.
    #[error(
        "backend-mode {0:?} is not a valid mode: choose of MountedFile, ACKConfigMap, CRD and DynamicFile"
    )]
    Unknown(Box<str>),
}

impl Mode {
    /// Its name, which is also its label in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::AckConfigMap => "ACKConfigMap",
            Self::Crd => "CRD",
            Self::DynamicFile => "DynamicFile",
            Self::MountedFile => "MountedFile",
        }
    }

    /// Whether it needs the API server.
    pub fn is_of_cluster(self) -> bool {
        matches!(self, Self::AckConfigMap | Self::Crd)
    }

    /// Reads a name.
    ///
    /// # Errors
    /// [`ModeError::Unknown`].
    pub fn parse(name: &str) -> Result<Self, ModeError> {
        match name {
            "ACKConfigMap" | "ConfigMap" => Ok(Self::AckConfigMap),
            "CRD" => Ok(Self::Crd),
            "DynamicFile" => Ok(Self::DynamicFile),
            "MountedFile" | "File" => Ok(Self::MountedFile),
            other => Err(ModeError::Unknown(other.into())),
        }
    }

    /// Reads a list of names; each of them may be several, with commas between.
    ///
    /// # Errors
    /// Whatever is wrong with the list.
    pub fn parse_all<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<Vec<Self>, ModeError> {
        let names = names.into_iter().flat_map(|names| names.split(',')).map(str::trim);
        let modes = names.filter(|name| !name.is_empty()).map(Self::parse);
        let modes: Vec<Self> = modes.collect::<Result<_, _>>()?;
        if modes.is_empty() {
            return Err(ModeError::Empty);
        }
        let is_repeated = |(n, mode): &(usize, &Self)| modes.iter().take(*n).any(|other| other == *mode);
        match modes.iter().enumerate().find(is_repeated) {
            Some((_, mode)) => Err(ModeError::Duplicate(mode.name())),
            None => Ok(modes),
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_aliases_are_ack_ram_authenticators() {
        assert_eq!(
            Mode::parse_all(["File,ConfigMap", "CRD", "DynamicFile"]),
            Ok(vec![Mode::MountedFile, Mode::AckConfigMap, Mode::Crd, Mode::DynamicFile])
        );
        for mode in [Mode::AckConfigMap, Mode::Crd, Mode::DynamicFile, Mode::MountedFile] {
            assert_eq!(Mode::parse(mode.name()), Ok(mode));
        }
    }

    #[test]
    fn wrong_lists_are_refused() {
        assert_eq!(Mode::parse_all([""]), Err(ModeError::Empty));
        assert_eq!(Mode::parse_all([]), Err(ModeError::Empty));
        assert_eq!(Mode::parse_all(["crd"]), Err(ModeError::Unknown("crd".into())));
        assert_eq!(Mode::parse_all(["File", "MountedFile"]), Err(ModeError::Duplicate("MountedFile")));
    }
}
