//! Sessions that are to last longer than STS allows because the agent signs with a role's credentials (role
//! chaining): STS refuses them, and the agent then asks for the longest one. Pure; called by `explain`, and
//! by `app` at the start.

use std::time::Duration;

use humantime::format_duration;

use crate::{
    args::{Config, CredentialsFrom},
    role::Setting,
};
use kube2ram_cloud::{Base, role::SessionRules};

/// Whether roles are assumed with another role's credentials. A ServiceAccount's token is no role's.
pub(in crate::app) fn is_chained(config: &Config, base: &Base) -> bool {
    config.credentials_from == CredentialsFrom::Node && base.source().is_role()
}

/// For the log at the start, if the sessions of pods without an annotation (`default`) are to be too long.
/// `is_chained`: the agent signs with a role's credentials.
pub(in crate::app) fn notice(rules: &SessionRules, default: Duration, is_chained: bool) -> Option<String> {
    let longest = rules.limit(default, is_chained)?;
    // As `args` reads the flag: sessions last twice as long.
    let [given, most] = [default, longest].map(|duration| format_duration(duration / 2));
    Some(format!(
        "{TTL} {given} has no effect above {most}: STS limits sessions to {} because the agent signs with a role's credentials (role chaining); set it to {most}",
        format_duration(longest)
    ))
}

/// For `explain`, the end of a sentence about a pod's session, which is to last `wanted` by this annotation,
/// or by the flag.
pub(super) fn remark(
    rules: &SessionRules,
    wanted: Duration,
    annotation: Option<&Setting>,
    is_chained: bool,
) -> Option<String> {
    let longest = format_duration(rules.limit(wanted, is_chained)?);
    let wanted = format_duration(wanted);
    let by = annotation.map_or_else(|| TTL.to_owned(), |setting| format!("annotation {setting}"));
    Some(format!(
        "STS limits the session to {longest} instead of {wanted} ({by}), because the agent signs with a role's credentials (role chaining)"
    ))
}

/// The flag's name that the clouds with such a limit know.
const TTL: &str = "--iam-role-session-ttl";

#[cfg(test)]
mod tests {
    use super::*;

    const fn hours(hours: u64) -> Duration {
        Duration::from_hours(hours)
    }

    #[test]
    fn what_cannot_be_had_is_named_with_its_cause_and_all_else_is_not() {
        let aws = &SessionRules::AWS;
        let key = Setting::from("iam.amazonaws.com/session-duration");

        assert_eq!(
            notice(aws, hours(4), true).unwrap(),
            "--iam-role-session-ttl 2h has no effect above 30m: STS limits sessions to 1h because the agent signs with a role's credentials (role chaining); set it to 30m"
        );
        let annotated = remark(aws, hours(12), Some(&key), true).unwrap();
        assert_eq!(
            annotated,
            "STS limits the session to 1h instead of 12h (annotation iam.amazonaws.com/session-duration), because the agent signs with a role's credentials (role chaining)"
        );
        assert!(remark(aws, hours(2), None, true).unwrap().contains("2h (--iam-role-session-ttl), because"));
        for (rules, wanted, is_chained) in
            [(aws, hours(1), true), (aws, hours(12), false), (&SessionRules::ACS, hours(12), true)]
        {
            assert_eq!(notice(rules, wanted, is_chained), None);
            assert_eq!(remark(rules, wanted, Some(&key), is_chained), None);
        }
    }
}
