//! A cache of free blocks for each thread of the runtime, in front of the C library's allocator. Depends on nothing of ours; `main` makes it the global
//! allocator.
//!
//! musl's allocator takes a lock for each block, and asks the kernel for memory and gives it back with each connection: it made a connection per request
//! a third slower than glibc's. The well-kept ones hold too much for nothing: with 110 pods the agent takes 47 MiB with mimalloc 0.1.52 and 37 MiB with
//! dlmalloc 0.2.14, instead of 12. Since Rust tells a block's size when it is given back, this takes no more than lists.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::UnsafeCell,
    ptr::null_mut,
};

/// The allocator.
#[derive(Clone, Copy, Debug)]
pub struct Cached;

/// Blocks are as large as their class, and every allocation of the class fits into each of them.
const CLASSES: usize = FINE_CLASSES + 4 * 5;
/// Steps of 16 bytes up to 512 bytes; then four for each doubling, up to 16 KiB: hyper's read buffer and more.
const FINE_CLASSES: usize = 32;
const FINE_BYTES: usize = 16;
const LARGEST_BYTES: usize = 16 * 1024;
/// What the allocator promises without being asked.
const ALIGN: usize = 16;
/// How much one thread may keep.
const KEPT_BYTES: usize = 256 * 1024;

/// A free block: the beginning of it leads to the next one of its class.
#[repr(C)]
struct Free {
    next: *mut Self,
}

struct Shelves {
    is_open: bool,
    kept_bytes: usize,
    first: [*mut Free; CLASSES],
}

thread_local! {
    /// Constant and without a destructor: looking at it allocates nothing, at any moment of a thread's life.
    static SHELVES: UnsafeCell<Shelves> =
        const { UnsafeCell::new(Shelves { is_open: false, kept_bytes: 0, first: [null_mut(); CLASSES] }) };
}

impl Cached {
    /// This thread keeps blocks from now on.
    pub fn open() {
        with_shelves(|shelves| shelves.is_open = true);
    }

    /// This thread keeps nothing any more; what it kept goes back. To be called before it ends, or that is lost.
    pub fn close() {
        with_shelves(|shelves| {
            shelves.is_open = false;
            for class in 0..CLASSES {
                while let Some(block) = shelves.take(class) {
                    #[expect(unsafe_code, reason = "gives a block back")]
                    // SAFETY: a block on a shelf came from `System` with its class's layout, and nobody else knows it.
                    unsafe {
                        System.dealloc(block, layout_of(class));
                    }
                }
            }
        });
    }
}

impl Shelves {
    fn take(&mut self, class: usize) -> Option<*mut u8> {
        let block = self.first[class];
        if block.is_null() {
            return None;
        }
        #[expect(unsafe_code, reason = "follows the list of free blocks")]
        // SAFETY: what is on a shelf is a live block of at least 16 bytes, aligned to 16, whose beginning `keep` has written.
        let next = unsafe { (*block).next };
        self.first[class] = next;
        self.kept_bytes -= bytes_of(class);
        Some(block.cast())
    }

    /// Whether it took the block.
    fn keep(&mut self, class: usize, block: *mut u8) -> bool {
        if !self.is_open || self.kept_bytes + bytes_of(class) > KEPT_BYTES {
            return false;
        }
        #[expect(clippy::cast_ptr_alignment, reason = "blocks of a class are aligned to 16")]
        let block = block.cast::<Free>();
        #[expect(unsafe_code, reason = "writes the list of free blocks")]
        // SAFETY: the caller gives a block of this class up: at least 16 bytes, aligned to 16, and nobody else's.
        unsafe {
            (*block).next = self.first[class];
        }
        self.first[class] = block;
        self.kept_bytes += bytes_of(class);
        true
    }
}

fn with_shelves<T>(change: impl FnOnce(&mut Shelves) -> T) -> T {
    SHELVES.with(|shelves| {
        #[expect(unsafe_code, reason = "a RefCell would have to be able to panic in the allocator")]
        // SAFETY: only this thread has it, and `change` neither allocates from here nor keeps it: there is no second reference.
        let shelves = unsafe { &mut *shelves.get() };
        change(shelves)
    })
}

/// `None` when the C library's allocator is asked as it is. It depends on the layout alone, so that a block goes back the way it came.
fn class_of(layout: Layout) -> Option<usize> {
    let last = layout.size().checked_sub(1)?;
    if layout.align() > ALIGN || last >= LARGEST_BYTES {
        return None;
    }
    if last < FINE_CLASSES * FINE_BYTES {
        return Some(last / FINE_BYTES);
    }
    let doublings = last.ilog2() as usize;
    let quarter = (last >> (doublings - 2)) & 3;
    Some(FINE_CLASSES + 4 * (doublings - 9) + quarter)
}

const fn bytes_of(class: usize) -> usize {
    if class < FINE_CLASSES {
        return (class + 1) * FINE_BYTES;
    }
    let (doublings, quarter) = (9 + (class - FINE_CLASSES) / 4, (class - FINE_CLASSES) % 4);
    (1 << doublings) + ((quarter + 1) << (doublings - 2))
}

const fn layout_of(class: usize) -> Layout {
    match Layout::from_size_align(bytes_of(class), ALIGN) {
        Ok(layout) => layout,
        Err(_) => panic!("sizes of classes are small"),
    }
}

#[expect(unsafe_code, reason = "that is what an allocator implements")]
// SAFETY: a block comes from `System` with the layout of its class, which the wanted layout fits into, or with the wanted layout; which of the two
// follows from the layout alone, so it goes back with the one it came with. A kept block is on one list of one thread, and leaves it before it is handed out.
unsafe impl GlobalAlloc for Cached {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some(class) = class_of(layout) else {
            // SAFETY: the caller's promise.
            return unsafe { System.alloc(layout) };
        };
        with_shelves(|shelves| shelves.take(class)).unwrap_or_else(|| {
            // SAFETY: no class has no bytes.
            unsafe { System.alloc(layout_of(class)) }
        })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let Some(class) = class_of(layout) else {
            // SAFETY: the caller's promise.
            return unsafe { System.alloc_zeroed(layout) };
        };
        let Some(block) = with_shelves(|shelves| shelves.take(class)) else {
            // SAFETY: no class has no bytes.
            return unsafe { System.alloc_zeroed(layout_of(class)) };
        };
        // SAFETY: the block is as large as its class, and so at least as large as the layout.
        unsafe { block.write_bytes(0, layout.size()) };
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        let came_with = match class_of(layout) {
            Some(class) if with_shelves(|shelves| shelves.keep(class, block)) => return,
            Some(class) => layout_of(class),
            None => layout,
        };
        // SAFETY: the layout it came with, and the caller gives it up.
        unsafe { System.dealloc(block, came_with) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller's promise: a size that does not overflow when it is rounded up to the alignment.
        let new_layout = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        match (class_of(layout), class_of(new_layout)) {
            (Some(class), Some(new_class)) if class == new_class => return block,
            // SAFETY: it came from `System` with this layout.
            (None, None) => return unsafe { System.realloc(block, layout, new_size) },
            _ => {}
        }
        // SAFETY: the caller's promise: `new_size` is not zero.
        let new_block = unsafe { self.alloc(new_layout) };
        if !new_block.is_null() {
            // SAFETY: both are blocks of their own, and at least so large.
            unsafe { new_block.copy_from_nonoverlapping(block, layout.size().min(new_size)) };
            // SAFETY: the caller's promise; it has moved.
            unsafe { self.dealloc(block, layout) };
        }
        new_block
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A block that is filled with one byte, which is checked before it is given back.
    struct Filled {
        block: *mut u8,
        layout: Layout,
        with: u8,
    }

    impl Filled {
        #[expect(unsafe_code, reason = "allocates by hand")]
        fn new(layout: Layout, with: u8, zeroed: bool) -> Self {
            let block = if zeroed {
                // SAFETY: the layouts of these tests have a size.
                unsafe { Cached.alloc_zeroed(layout) }
            } else {
                // SAFETY: the layouts of these tests have a size.
                unsafe { Cached.alloc(layout) }
            };
            assert!(!block.is_null() && block.addr().is_multiple_of(layout.align()));
            let mut filled = Self { block, layout, with };
            assert!(!zeroed || filled.bytes().iter().all(|byte| *byte == 0));
            filled.bytes().fill(with);
            filled
        }

        #[expect(unsafe_code, reason = "looks at what was allocated")]
        fn bytes(&mut self) -> &mut [u8] {
            // SAFETY: its own block; where it was not filled yet, it was zeroed, or is only written.
            unsafe { std::slice::from_raw_parts_mut(self.block, self.layout.size()) }
        }

        #[expect(unsafe_code, reason = "allocates by hand")]
        fn resize(&mut self, size: usize) {
            let kept = self.layout.size().min(size);
            // SAFETY: its own block and layout; no size of these tests is zero.
            self.block = unsafe { Cached.realloc(self.block, self.layout, size) };
            self.layout = Layout::from_size_align(size, self.layout.align()).unwrap();
            let with = self.with;
            assert!(self.bytes()[..kept].iter().all(|byte| *byte == with));
            self.bytes().fill(with);
        }
    }

    impl Drop for Filled {
        #[expect(unsafe_code, reason = "allocates by hand")]
        fn drop(&mut self) {
            let with = self.with;
            assert!(self.bytes().iter().all(|byte| *byte == with), "somebody else wrote to it");
            // SAFETY: its own block and layout.
            unsafe { Cached.dealloc(self.block, self.layout) }
        }
    }

    fn kept_bytes() -> usize {
        with_shelves(|shelves| shelves.kept_bytes)
    }

    fn layout(size: usize) -> Layout {
        Layout::from_size_align(size, 8).unwrap()
    }

    #[test]
    fn every_size_has_the_smallest_class_that_it_fits_into() {
        for size in 1..=LARGEST_BYTES {
            let class = class_of(layout(size)).unwrap();
            assert!(class < CLASSES && bytes_of(class) >= size, "{size}");
            assert!(class == 0 || bytes_of(class - 1) < size, "{size}");
        }
        assert_eq!(class_of(layout(LARGEST_BYTES + 1)), None);
        assert_eq!(class_of(Layout::from_size_align(64, 32).unwrap()), None);
        assert_eq!(bytes_of(CLASSES - 1), LARGEST_BYTES);
    }

    #[test]
    fn what_is_given_back_is_handed_out_again_until_the_cache_is_closed() {
        Cached::open();
        let first = Filled::new(layout(100), 1, false);
        let place = first.block.addr();
        drop(first);
        assert_eq!(kept_bytes(), 112);

        let second = Filled::new(layout(112), 2, true);
        assert_eq!((second.block.addr(), kept_bytes()), (place, 0));
        drop(second);
        Cached::close();

        assert_eq!(kept_bytes(), 0);
        drop(Filled::new(layout(100), 3, false));
        assert_eq!(kept_bytes(), 0, "it is closed");
    }

    #[test]
    fn keeps_a_bounded_amount() {
        Cached::open();
        let blocks: Vec<Filled> = (0..100).map(|n| Filled::new(layout(8192), n, false)).collect();
        drop(blocks);
        assert_eq!(kept_bytes(), KEPT_BYTES);
        Cached::close();
        assert_eq!(kept_bytes(), 0);
    }

    #[test]
    fn a_block_of_one_thread_may_go_back_in_another() {
        Cached::open();
        let block = Filled::new(layout(40), 7, false);
        let (address, layout) = (block.block.expose_provenance(), block.layout);
        std::mem::forget(block);
        let other = std::thread::spawn(move || {
            Cached::open();
            drop(Filled { block: std::ptr::with_exposed_provenance_mut(address), layout, with: 7 });
            let kept = kept_bytes();
            Cached::close();
            kept
        });

        assert_eq!((other.join().unwrap(), kept_bytes()), (48, 0));
        Cached::close();
    }

    proptest! {
        #[test]
        fn nobody_gets_what_somebody_has(
            steps in prop::collection::vec((0..4_u8, 1..20_000_usize, 0..6_u32, any::<prop::sample::Index>()), 1..200)
        ) {
            Cached::open();
            let mut blocks: Vec<Filled> = Vec::new();
            for (number, (what, size, align, which)) in steps.into_iter().enumerate() {
                let with = u8::try_from(number % 251).unwrap() + 1;
                match what {
                    0 if !blocks.is_empty() => drop(blocks.swap_remove(which.index(blocks.len()))),
                    1 if !blocks.is_empty() => {
                        let index = which.index(blocks.len());
                        blocks[index].resize(size);
                    }
                    _ => {
                        let layout = Layout::from_size_align(size, 1 << align).unwrap();
                        blocks.push(Filled::new(layout, with, what == 2));
                    }
                }
                prop_assert!(kept_bytes() <= KEPT_BYTES);
            }
            blocks.clear();
            Cached::close();
            prop_assert_eq!(kept_bytes(), 0);
        }
    }
}
