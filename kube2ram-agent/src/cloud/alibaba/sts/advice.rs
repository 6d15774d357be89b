//! What people can do about STS's refusals. Pure: no I/O, no clock, no logs. Source: STS API 2015-04-01, "Error codes".
//! Depends on `credentials` for the kinds; called by whoever tells people, `app` and `server`.

use crate::credentials::IssueErrorKind;

/// What to do about a failure of this kind and with this code of STS's, in one sentence that names no role.
pub fn advice(kind: IssueErrorKind, code: &str) -> &'static str {
    match (kind, code) {
        (IssueErrorKind::BaseCredentials, _) => {
            "check that a RAM role is attached to the node, or the static keys in the agent's environment"
        }
        (IssueErrorKind::Denied, _) => {
            "let the role's trust policy name who the agent is (the node's role, or the static keys' user), and let that one call sts:AssumeRole on the role"
        }
        (IssueErrorKind::Invalid, "InvalidParameter.DurationSeconds") => {
            "annotate the pod with a shorter session, or raise the role's MaxSessionDuration"
        }
        (IssueErrorKind::Invalid, code) if code.starts_with("InvalidParameter.Policy") => {
            "correct the session policy in the pod's annotation"
        }
        (IssueErrorKind::Invalid, _) => "correct what STS names in the pod's annotations",
        (IssueErrorKind::NoSuchRole, _) => {
            "create the role, or correct its name in the pod's annotation or the agent's --base-role-arn"
        }
        (IssueErrorKind::Throttled, _) => {
            "wait: the agent asks again by itself, those who wait first; find who else uses up the account's calls to STS"
        }
        (IssueErrorKind::Unavailable, _) => {
            "check the way from the node to STS: DNS, security groups, the VPC's endpoint (--sts-endpoint)"
        }
    }
}
