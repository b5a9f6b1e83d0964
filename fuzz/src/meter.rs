//! How much memory a thread has taken, if [`Metered`] is the program's allocator.

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

/// Who asks for this much at once has believed an image: the program ends there, with a message.
const ABSURD: usize = 1 << 30;

/// What is being tried, by number, for that message.
pub static SEED: AtomicU64 = AtomicU64::new(0);

#[derive(Clone, Copy)]
struct State {
    now: isize,
    peak: isize,
    paused: u32,
}

thread_local! {
    // Neither initialised lazily nor dropped, so it can be used while memory is being allocated.
    static STATE: Cell<State> = const { Cell::new(State { now: 0, peak: 0, paused: 0 }) };
}

/// The system's allocator, which notes what each thread takes and gives back.
pub struct Metered;

fn note(taken: usize, returned: usize) {
    STATE.with(|cell| {
        let mut state = cell.get();
        if state.paused == 0 {
            state.now += taken as isize - returned as isize;
            state.peak = state.peak.max(state.now);
            cell.set(state);
            if taken > ABSURD {
                let _unmetered = pause();
                let seed = SEED.load(Ordering::SeqCst);
                eprintln!("seed {seed}: {taken} bytes are asked for at once\n{}", Backtrace::force_capture());
                std::process::abort();
            }
        }
    });
}

// SAFETY: everything is handed on to the system's allocator as it comes.
unsafe impl GlobalAlloc for Metered {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size(), 0);
        // SAFETY: the caller's promises are the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size(), 0);
        // SAFETY: the caller's promises are the same.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        note(0, layout.size());
        // SAFETY: the caller's promises are the same.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(size, layout.size());
        // SAFETY: the caller's promises are the same.
        unsafe { System.realloc(memory, layout, size) }
    }
}

/// Counts from here on; [`peak`] tells how much there was at most.
pub fn start() {
    STATE.with(|cell| cell.set(State { now: 0, peak: 0, paused: cell.get().paused }));
}

/// The most bytes that this thread had taken at any time since [`start`], beyond those it had then.
pub fn peak() -> u64 {
    STATE.with(|cell| cell.get().peak.max(0) as u64)
}

/// While this lives, nothing is counted on this thread.
pub struct Paused;

/// Stops counting on this thread.
pub fn pause() -> Paused {
    STATE.with(|cell| cell.set(State { paused: cell.get().paused + 1, ..cell.get() }));
    Paused
}

impl Drop for Paused {
    fn drop(&mut self) {
        STATE.with(|cell| cell.set(State { paused: cell.get().paused - 1, ..cell.get() }));
    }
}
