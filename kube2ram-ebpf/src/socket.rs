//! Socket storage for any program type: aya-ebpf 0.2 offers it to sock_addr programs only. Called by the
//! programs.

use core::ptr;

use aya_ebpf::{
    bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock},
    btf_maps::SkStorage,
    helpers::generated::{bpf_sk_fullsock, bpf_sk_storage_get},
};

/// A socket; never null.
#[derive(Clone, Copy)]
pub(crate) struct Socket(*mut bpf_sock);

impl Socket {
    /// `raw` comes straight from a context, or the verifier refuses the program.
    #[inline(always)]
    pub(crate) const fn new(raw: *mut bpf_sock) -> Option<Self> {
        if raw.is_null() { None } else { Some(Self(raw)) }
    }

    /// The full socket of a packet's socket.
    #[inline(always)]
    pub(crate) fn full(self) -> Option<Self> {
        // SAFETY: a socket pointer of the context, as the verifier checks.
        Self::new(unsafe { bpf_sk_fullsock(self.0) })
    }

    /// The value that `map` stores for this socket.
    #[inline(always)]
    pub(crate) fn stored<T>(self, map: &'static SkStorage<T>) -> Option<&'static mut T> {
        self.storage(map, ptr::null_mut(), 0)
    }

    /// Copies `value` into `map` for a socket that has no value there yet. `None`: no memory.
    #[inline(always)]
    pub(crate) fn store_new<T>(self, map: &'static SkStorage<T>, value: *mut T) -> Option<&'static mut T> {
        self.storage(map, value, BPF_SK_STORAGE_GET_F_CREATE)
    }

    #[inline(always)]
    #[expect(clippy::mut_from_ref, reason = "the storage belongs to the socket, not to the map")]
    fn storage<T>(self, map: &'static SkStorage<T>, value: *mut T, flags: u32) -> Option<&'static mut T> {
        // The map "object" is only a relocation target: its address is what the loader patches.
        let map = ptr::from_ref(map).cast_mut().cast();
        // SAFETY: the verifier checks the map, the socket and the size behind `value` (null is allowed).
        let stored: *mut T =
            unsafe { bpf_sk_storage_get(map, self.0.cast(), value.cast(), u64::from(flags)) }.cast();
        // SAFETY: null, or storage of a T that lives as long as the program runs (RCU).
        unsafe { stored.as_mut() }
    }
}
