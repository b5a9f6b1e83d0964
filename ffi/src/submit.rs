//! Asynchronous block callbacks
//!
//! For a program whose own I/O is asynchronous: the library begins what it needs with `submit_preadv`, `submit_pwritev`
//! and `submit_flush` of struct qcr_block_callbacks, and the program tells of the end when it comes.
//!
//!     static void submit_preadv(void *user, const struct iovec *iov, int iovcnt, uint64_t offset, struct qcr_io *io)
//!     {
//!         begin_to_read(user, iov, iovcnt, offset, io);     the program's own; `io` for it to know the transfer again
//!     }
//!
//!     static void has_been_read(struct qcr_io *io, int result)
//!     {
//!         qcr_io_complete(io, result);
//!     }
//!
//! - Each is completed exactly once, on any thread, in any order, also before the submitting callback returns. Until
//!   then the array of areas and the memory stay as they are; from then on the program uses neither, nor `io`.
//! - Failures are told in the same way: a submitting callback returns nothing.
//! - A queue begins the transfers of its requests so, and needs no thread for them: see "Asynchronous queues". What has to
//!   wait for something else (a table that is not in memory, a cluster to be allocated, a flush) is done by its threads.
//! - Everything else that the library reads, writes and flushes is done by `preadv`, `pwritev` and `flush`. Where one of
//!   these is NULL, the submitting callback of the same name serves instead, and the thread that called the library
//!   sleeps until the end is told: it must come from another one, or from within the submitting callback.
//! - The rules for other block callbacks hold. Besides, a queue is held while it submits, so a submitting callback must
//!   not call functions of the queue, nor wait for a thread that does.
//! - `destroy` is called after the last end was told, but perhaps before that call of qcr_io_complete() returns.

use std::ffi::c_int;

use qcow_recycler::device::Done;

use crate::boundary::contain;
use crate::callbacks::qcr_io;
use crate::verbs::outcome;

impl qcr_io {
    /// What the program tells the end of, which ends `done`.
    pub(crate) fn of(done: Done) -> *mut qcr_io {
        done.into_raw().cast_mut().cast()
    }
}

/// Tells the library that what was submitted with `io` has ended. `result` is 0 when everything was done, or a negative
/// errno; any other value counts as -EIO. Any thread; waits for nothing. NULL is ignored.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_io_complete(io: *mut qcr_io, result: c_int) {
    if io.is_null() {
        return;
    }
    // SAFETY: it is what a submitting callback was given, and this is its last use.
    let done = unsafe { Done::from_raw(io.cast_const().cast()) };
    let _ = contain(|| {
        done.complete(outcome("submitting", result));
        Ok(())
    });
}
