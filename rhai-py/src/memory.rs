//! How much memory Rust code holds that this thread allocated.
//!
//! Rhai does not measure a map that grows by `m[key] = value`, nor what closures hold. Counting what is allocated bounds
//! whatever its own limits miss. The allocator is that of this extension only; Python's own memory is not counted.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    /// Allocated less freed. Negative on a thread that frees what another allocated.
    static LIVE_BYTES: Cell<isize> = const { Cell::new(0) };
}

/// Bytes allocated less bytes freed by this thread since it started.
#[inline]
pub fn live_bytes() -> isize {
    LIVE_BYTES.get()
}

#[inline]
fn count(bytes: isize) {
    LIVE_BYTES.set(LIVE_BYTES.get().wrapping_add(bytes));
}

/// No layout is larger than `isize::MAX`.
#[inline]
fn signed(bytes: usize) -> isize {
    bytes.cast_signed()
}

// SAFETY: every call is passed on unchanged to the system's allocator. The counter is a constant-initialised `Cell`
// without a destructor, so reading it neither allocates nor fails while a thread ends.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(signed(layout.size()));
        System.alloc(layout)
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(signed(layout.size()));
        System.alloc_zeroed(layout)
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-signed(layout.size()));
        System.dealloc(pointer, layout);
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count(signed(new_size) - signed(layout.size()));
        System.realloc(pointer, layout, new_size)
    }
}
