//! Buffers aligned to pages, as O_DIRECT wants them; every contender gets the same.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};

const ALIGNMENT: usize = 4096;

pub struct Buffer {
    start: *mut u8,
    layout: Layout,
}

impl Buffer {
    /// Filled with what no filesystem takes for zeroes.
    pub fn new(size: usize, seed: u8) -> Self {
        let layout = Layout::from_size_align(size.max(1), ALIGNMENT).expect("a buffer's size");
        // SAFETY: the layout's size is not zero.
        let start = unsafe { alloc(layout) };
        if start.is_null() {
            handle_alloc_error(layout);
        }
        // SAFETY: `start` was allocated with this size.
        unsafe { start.write_bytes(seed | 1, layout.size()) };
        Self { start, layout }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.start, self.layout) }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: initialised in `new`, and ours.
        unsafe { std::slice::from_raw_parts(self.start, self.layout.size()) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: initialised in `new`, and ours alone through `&mut self`.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.layout.size()) }
    }
}
