//! How the allocator keeps memory: on a node, what an agent holds for nothing is missing elsewhere. Depends on libc alone; called by `main`.

mod cached;

pub use self::cached::Cached;

/// Has glibc serve all threads from one heap, and take large blocks from the kernel and give them back at once. By default it opens a heap for each
/// thread, in which the first list of the cluster's namespaces leaves megabytes behind, and keeps ever larger blocks.
///
/// To be called before there are other threads. Elsewhere than with glibc it does nothing.
pub fn keep_little() {
    #[cfg(target_env = "gnu")]
    {
        /// glibc's own first threshold (mallopt(3)), which stays what it is once it was set.
        const LARGE_BYTES: libc::c_int = 128 * 1024;

        for (option, value) in [(libc::M_ARENA_MAX, 1), (libc::M_MMAP_THRESHOLD, LARGE_BYTES)] {
            #[expect(unsafe_code, reason = "there is no safe binding of mallopt(3)")]
            // SAFETY: plain values. What is refused leaves things as they were, which costs memory only.
            unsafe {
                libc::mallopt(option, value);
            }
        }
    }
}
