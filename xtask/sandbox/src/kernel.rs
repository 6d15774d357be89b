//! What the running kernel lacks. Called by tests that run on several kernels.

use std::env;

use crate::say;

/// What the kernel may lack, separated by commas. Set where the kernel is known; where it is not set, a
/// kernel may lack anything.
const MAY_LACK: &str = "KUBE2RAM_TEST_MAY_LACK";

/// Reports a row that does not run, with what the kernel lacks for it.
///
/// # Panics
///
/// When this kernel is known to have it: then a module is missing, or the test is wrong.
pub fn skip(row: &str, lack: &str) {
    assert!(may_lack(env::var(MAY_LACK).ok().as_deref(), lack), "{row}: this kernel should have {lack}");
    // On its own line, whatever the test harness has begun.
    say(&format!("\nskipped {row}: this kernel has no {lack}"));
}

fn may_lack(known: Option<&str>, lack: &str) -> bool {
    known.is_none_or(|known| known.split(',').any(|known| known == lack))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_kernel_lacks_what_is_named_and_nothing_else() {
        assert!(may_lack(None, "MPTCP"));
        assert!(may_lack(Some("IPVS,MPTCP"), "MPTCP"));
        assert!(!may_lack(Some("IPVS,MPTCP"), "SCTP"));
        assert!(!may_lack(Some(""), "MPTCP"));
    }
}
