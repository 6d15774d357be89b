//! Counts the entries of maps. Called by `fill_levels`.

use std::{io, os::fd::AsFd};

use super::{bpf, number};

/// Of `enum bpf_cmd`.
const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;

/// Counts the entries of a hash map, from Linux 5.6 on. One that comes or goes meanwhile may be counted or
/// not, but none is counted twice, and it always ends: the kernel goes through the buckets in their order.
///
/// # Errors
/// bpf(2)'s.
pub(in crate::datapath) fn count_entries(
    map: impl AsFd,
    key_bytes: usize,
    value_bytes: usize,
) -> io::Result<usize> {
    /// The `batch` member of `union bpf_attr`.
    #[repr(C)]
    struct Batch {
        in_batch: u64,
        out_batch: u64,
        keys: u64,
        values: u64,
        count: u32,
        map_fd: u32,
        elem_flags: u64,
        flags: u64,
    }
    /// Copied by one call: whole buckets, which have a few entries each.
    const AT_ONCE: u32 = 1024;
    let buffer = |bytes: usize| vec![0_u8; bytes * AT_ONCE as usize];
    let (mut keys, mut values) = (buffer(key_bytes), buffer(value_bytes));
    // Where a call begins, and where it ended: the number of a bucket.
    let mut bucket = 0_u32;
    let bucket = std::ptr::from_mut(&mut bucket) as u64;
    let mut total = 0;
    loop {
        let mut attributes = Batch {
            in_batch: bucket,
            out_batch: bucket,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: AT_ONCE,
            map_fd: number(map.as_fd()),
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: the buffers have room for `count` keys and values. They and the bucket outlive the call.
        let is_last = match unsafe { bpf(BPF_MAP_LOOKUP_BATCH, &mut attributes) } {
            Ok(_) => false,
            // This was the last bucket.
            Err(error) if error.kind() == io::ErrorKind::NotFound => true,
            Err(error) => return Err(error),
        };
        total += attributes.count as usize;
        if is_last {
            return Ok(total);
        }
    }
}
