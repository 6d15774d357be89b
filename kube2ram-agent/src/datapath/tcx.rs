//! Programs that others attach where a device's packets arrive (`BPF_TCX_INGRESS`, Linux 6.6). Called by
//! `listeners`.

use aya::programs::{SchedClassifier, tc::TcAttachType};

/// Whether a device of the calling thread's network namespace has such a program. `false` if that cannot be
/// determined: older kernels have no such query, and the device may have been removed.
pub(crate) fn has_ingress_programs(device: &str) -> bool {
    SchedClassifier::query_tcx(device, TcAttachType::Ingress).is_ok_and(|(_, programs)| !programs.is_empty())
}
