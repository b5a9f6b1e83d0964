//! The recycler
//!
//! While it runs, the recycler keeps zeroed clusters ready for the guest, moves clusters from the end of the file
//! into free ones nearer its start, and shortens the file. It gives way to the guest: a guest never waits for it.
//! An error in its work is logged, counted in the statistics, and tried again.
//!
//! All calls from any thread.

use std::ffi::{c_int, c_void};

use qcow_recycler::recycler::Progress;

use crate::abi::{Out, Shared};
use crate::boundary::on_image;
use crate::error::qcr_error;
use crate::image::qcr_image;

/// Starts the recycler. Does nothing if it runs already.
///
/// Errors: -EROFS; -EBADF; -EAGAIN or -ENOMEM if no thread can be started.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_start(image: *mut qcr_image, error: *mut qcr_error) -> c_int {
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, |image| Ok(image.disk().start()?)) }
}

/// Lets the recycler finish the step it is at, then rest; does not wait for that. Does nothing if it does not run.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_pause(image: *mut qcr_image, error: *mut qcr_error) -> c_int {
    let body = |image: &qcr_image| {
        image.disk().pause();
        Ok(())
    };
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}

/// Lets a paused recycler go on. Does nothing if it is not paused.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_resume(image: *mut qcr_image, error: *mut qcr_error) -> c_int {
    let body = |image: &qcr_image| {
        image.disk().resume();
        Ok(())
    };
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}

/// Stops the recycler and waits until it has ended; what it was moving stays where it was. It can be started again.
/// Does nothing if it does not run. Not from a callback of the same image.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_stop(image: *mut qcr_image, error: *mut qcr_error) -> c_int {
    let body = |image: &qcr_image| {
        image.disk().stop();
        Ok(())
    };
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}

/// How far a compaction is.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct qcr_progress {
    /// As much of the struct as the library fills, in bytes.
    pub struct_size: u32,
    /// 0.
    pub reserved: u32,
    /// Clusters handled so far: moved, or found in use by the guest and left.
    pub done: u64,
    /// Clusters that are to be handled, as far as is known: while the tables are searched, one more than are done.
    pub total: u64,
    /// Length of the image file now, in bytes.
    pub file_size: u64,
}

/// Is told how far a compaction is, on the thread that called qcr_compact(). `progress` is valid during the call. Returns
/// 0 to go on, anything else to cancel. It may read, write, discard and flush, ask for statistics, pause and resume: guests
/// go on meanwhile. What waits until the compaction has come to a rest would wait for ever: on the same image it must not
/// compact, compress, check, resize, make, delete or apply a snapshot, change a bitmap, stop, close or free. It must return
/// by itself (no longjmp, no C++ exception).
pub type qcr_progress_fn = Option<unsafe extern "C" fn(user: *mut c_void, progress: *const qcr_progress) -> c_int>;

/// What a compaction did.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct qcr_compact_report {
    /// sizeof(struct qcr_compact_report), set by the caller.
    pub struct_size: u32,
    /// 0.
    pub reserved: u32,
    /// Length of the image file before, in bytes.
    pub file_size_before: u64,
    /// Length of the image file after, in bytes. On a device of fixed length: how much of it is in use.
    pub file_size_after: u64,
    /// Bytes of clusters moved.
    pub moved: u64,
    /// Moves that a guest write or discard cancelled.
    pub cancelled: u64,
}

// SAFETY: integers only, no padding.
unsafe impl Shared for qcr_compact_report {
    const NAME: &'static str = "report";
}

/// Compacts the image now, on this thread, while the guest goes on using it and whether or not the recycler runs.
///
/// `progress` is called with `user` from time to time; NULL: nobody is interested. `report` may be NULL.
///
/// A compaction that is under way already is not waited for: the two take turns, batch by batch.
///
/// Errors: -ECANCELED if `progress` cancelled it (the image is consistent, and what was moved stays moved); -EROFS;
/// -EBADF; -EAGAIN or -ENOMEM if no thread could be started; the device's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_compact(
    image: *mut qcr_image,
    progress: qcr_progress_fn,
    user: *mut c_void,
    report: *mut qcr_compact_report,
    error: *mut qcr_error,
) -> c_int {
    let watcher = Watcher { progress, user };
    let body = |image: &qcr_image| {
        // SAFETY: the header's rule for structs.
        let out = unsafe { Out::optional(report)? };
        let watcher = &watcher;
        let done = image.disk().compact(move |at| watcher.wants_more(at))?;
        if let Some(out) = out {
            out.store(qcr_compact_report {
                struct_size: 0,
                reserved: 0,
                file_size_before: done.file_size_before,
                file_size_after: done.file_size_after,
                moved: done.moved,
                cancelled: done.cancelled,
            });
        }
        Ok(())
    };
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}

/// Compresses what the disk holds, on this thread, while the guest goes on using it: clusters that are stored plainly, that no
/// snapshot shares, and that get smaller by that. For data that is seldom written. The file gets shorter with the next
/// compaction. `progress` as in qcr_compact(), with clusters of the disk. `compressed` may be NULL: gets how many bytes of the
/// disk are compressed now that were not.
///
/// Errors: as qcr_compact(); -EOPNOTSUPP if refcounts are of one bit.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_compress(
    image: *mut qcr_image,
    progress: qcr_progress_fn,
    user: *mut c_void,
    compressed: *mut u64,
    error: *mut qcr_error,
) -> c_int {
    let watcher = Watcher { progress, user };
    let body = |image: &qcr_image| {
        let watcher = &watcher;
        let done = image.disk().compress(move |at| watcher.wants_more(at))?;
        if !compressed.is_null() {
            // SAFETY: the header's rules for memory.
            unsafe { compressed.write(done.compressed) };
        }
        Ok(())
    };
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}

struct Watcher {
    progress: qcr_progress_fn,
    user: *mut c_void,
}

// SAFETY: it is used on the calling thread only; the core's signature asks for more.
unsafe impl Sync for Watcher {}

impl Watcher {
    fn wants_more(&self, at: Progress) -> bool {
        let Some(progress) = self.progress else { return true };
        let at = qcr_progress {
            struct_size: size_of::<qcr_progress>() as u32,
            reserved: 0,
            done: at.done,
            total: at.total,
            file_size: at.file_size,
        };
        // SAFETY: the header's rules for callbacks; `at` outlives the call.
        (unsafe { progress(self.user, &raw const at) }) == 0
    }
}
