//! Variables of the environment that name the agent's own credentials: what all clouds check alike. Pure:
//! variables come through a function. Called by each cloud's `base`.

use super::{BaseCredentials, BaseError};

/// Reads one variable. An empty one counts as unset.
///
/// # Errors
/// [`BaseError::Malformed`], when it contains characters that a header may not have.
pub(crate) fn read(
    variable: &impl Fn(&str) -> Option<String>,
    name: &'static str,
) -> Result<Option<String>, BaseError> {
    match variable(name).filter(|value| !value.is_empty()) {
        Some(value) if !value.bytes().all(|c| c.is_ascii_graphic()) => Err(BaseError::Malformed(name)),
        value => Ok(value),
    }
}

/// Reads variables that go together; `None` when none of them is set.
///
/// # Errors
/// [`BaseError::Missing`], when only some of them are set, and those of [`read`].
pub(crate) fn all_or_none<const N: usize>(
    variable: &impl Fn(&str) -> Option<String>,
    names: [&'static str; N],
) -> Result<Option<[String; N]>, BaseError> {
    let (mut values, mut present, mut missing) = (Vec::with_capacity(N), None, None);
    for name in names {
        match read(variable, name)? {
            Some(value) => {
                present.get_or_insert(name);
                values.push(value);
            }
            None => {
                missing.get_or_insert(name);
            }
        }
    }
    match (present, missing) {
        (None, _) => Ok(None),
        (Some(present), Some(missing)) => Err(BaseError::Missing { present, missing }),
        (Some(present), None) => values.try_into().map(Some).or(Err(BaseError::Malformed(present))),
    }
}

/// Reads a key pair, and the token that goes with it; `None` when none of them is set.
///
/// # Errors
/// Those of [`all_or_none`].
pub(crate) fn static_keys(
    variable: &impl Fn(&str) -> Option<String>,
    pair: [&'static str; 2],
    token: Option<&'static str>,
) -> Result<Option<BaseCredentials>, BaseError> {
    let security_token = token.map(|name| read(variable, name)).transpose()?.flatten();
    let Some([access_key_id, access_key_secret]) = all_or_none(variable, pair)? else {
        return match token.filter(|_| security_token.is_some()) {
            Some(present) => Err(BaseError::Missing { present, missing: pair[0] }),
            None => Ok(None),
        };
    };
    Ok(Some(BaseCredentials {
        access_key_id: access_key_id.into(),
        access_key_secret: access_key_secret.into(),
        security_token: security_token.map(Into::into),
    }))
}
