//! Asynchronous queues
//!
//! Requests that go on by themselves, many at a time, on one thread:
//!
//!     struct qcr_queue *queue;
//!     struct qcr_completion done[32];
//!     size_t count, i;
//!     qcr_queue_create(image, NULL, &queue, &error);
//!     qcr_queue_write(queue, data, 4096, 0, 1, &error);     1 is for the program to know the request again
//!     qcr_queue_read(queue, more, 4096, 65536, 2, &error);
//!     while (requests are missing) {
//!         qcr_queue_reap(queue, done, 32, 1, -1, &count, &error);
//!         for (i = 0; i < count; i++)
//!             use done[i].user_data and done[i].result
//!     }
//!     qcr_queue_free(queue);
//!
//! - Each request that was submitted is completed exactly once, and whatever goes wrong with it is the result in its
//!   completion, a range that does not fit the disk included. The submitting call itself fails only if it was given
//!   something unusable (-EINVAL), the queue is full (-EBUSY), or the library found a fault of its own; then there will
//!   be no completion.
//! - The memory of a request (not the array of areas) is in use until its completion has been reaped, or the queue is
//!   freed. It may belong to a guest that changes it meanwhile.
//! - Requests are carried out side by side and completed in any order. One that must see another is submitted after
//!   the other's completion. A flush covers every request that was completed when it was submitted.
//! - On a host file the kernel carries transfers out (io_uring), and takes them many at a time: when qcr_queue_reap() or
//!   qcr_queue_arm() is called, or qcr_queue_kick(). Where the kernel refuses, and for whatever has to wait for something
//!   else, threads of the library do the work. On block callbacks these threads call them, but for transfers that the
//!   program begins itself: see "Asynchronous block callbacks".
//! - An image may have several queues. A queue is for one thread at a time; others that call it wait. All its calls but
//!   qcr_queue_reap() and qcr_queue_free() return at once.
//! - Nothing waits for a program that does not reap: the image can be compacted, resized and closed by the very thread
//!   that has submitted something. After the close, what is submitted completes with -EBADF. (With asynchronous block
//!   callbacks, not by the thread that completes them: what is closed waits for what the program has begun.)
//! - A queue must be freed before its image. It keeps the image's file open and locked until then.
//! - While requests are under way on io_uring, the kernel may interrupt what the thread that submitted them waits for:
//!   a call such as epoll_wait(2) then fails with EINTR, and is to be made again.

use std::ffi::{c_int, c_void};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use libc::iovec;
use qcow_recycler::buf::Held;
use qcow_recycler::queue::{Full, Queue, QueueOptions, Request, Transfers};

use crate::abi::{self, Out, Shared, copy_in};
use crate::boundary::{Fuse, call, contain, guarded, on_image};
use crate::data::{QCR_ZERO_MAY_UNMAP, areas, check_area};
use crate::device::Device;
use crate::error::{Fault, qcr_error};
use crate::image::qcr_image;

/// Queue flag: transfers are carried out by threads, even where the kernel would do it.
pub const QCR_QUEUE_THREADS: u32 = 0x1;
/// In struct qcr_queue_info: the kernel carries transfers out.
pub const QCR_QUEUE_IO_URING: u32 = 0x2;

/// What a queue is to be like. All zeroes but struct_size: the defaults.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct qcr_queue_options {
    /// sizeof(struct qcr_queue_options), set by the caller.
    pub struct_size: u32,
    /// 0 or QCR_QUEUE_THREADS.
    pub flags: u32,
    /// The most requests that are submitted and not reaped: up to 16384; 0: 128.
    pub depth: u32,
    /// The most threads that the queue uses for what has to wait; 0: 16. They are started when they are needed.
    pub threads: u32,
}

// SAFETY: integers only, no padding.
unsafe impl Shared for qcr_queue_options {
    const NAME: &'static str = "queue_options";
}

/// What a queue is doing.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct qcr_queue_info {
    /// sizeof(struct qcr_queue_info), set by the caller.
    pub struct_size: u32,
    /// 0 or QCR_QUEUE_IO_URING.
    pub flags: u32,
    /// Requests that were submitted and not reaped.
    pub pending: u64,
}

// SAFETY: integers only, no padding.
unsafe impl Shared for qcr_queue_info {
    const NAME: &'static str = "queue_info";
}

/// The end of a request. As one of an array it never grows.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct qcr_completion {
    /// What the request was submitted with.
    pub user_data: u64,
    /// 0 or a negative errno: what the call without a queue would have returned.
    pub result: i32,
    /// 0.
    pub reserved: u32,
}

/// A queue of requests to an image.
pub struct qcr_queue {
    queue: Queue<Device>,
    fuse: Arc<Fuse>,
    /// Details of the failed completion that was reaped last.
    failure: std::sync::Mutex<Option<Fault>>,
}

impl qcr_queue {
    fn submit(&self, request: Request, user_data: u64) -> Result<(), Fault> {
        self.queue
            .submit(request, user_data)
            .map_err(|Full| Fault::new(libc::EBUSY, "the queue is full: reap completions first"))
    }

    fn keep(&self, fault: Fault) {
        if let Ok(mut failure) = self.failure.lock() {
            *failure = Some(fault);
        }
    }
}

/// # Safety
/// As [`call`]; `queue` is NULL or a queue that is not freed before this returns.
unsafe fn on_queue(
    queue: *const qcr_queue,
    error: *mut qcr_error,
    body: impl FnOnce(&qcr_queue) -> Result<(), Fault>,
) -> c_int {
    let body = || {
        // SAFETY: as promised by the caller.
        let queue = unsafe { queue.as_ref() }.ok_or_else(|| Fault::null("queue"))?;
        guarded(queue.queue.image(), &queue.fuse, || body(queue))
    };
    // SAFETY: as promised by the caller.
    unsafe { call(error, body) }
}

/// Makes a queue over an open image. `options` may be NULL: the defaults. On success `*queue` is the caller's to
/// qcr_queue_free(). Any thread.
///
/// Errors: -EINVAL; -EMFILE and the like if there is no descriptor left.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_queue_create(
    image: *mut qcr_image,
    options: *const qcr_queue_options,
    queue: *mut *mut qcr_queue,
    error: *mut qcr_error,
) -> c_int {
    let body = |image: &qcr_image| {
        if queue.is_null() {
            return Err(Fault::null("queue"));
        }
        let mut wanted = QueueOptions::default();
        if !options.is_null() {
            // SAFETY: the header's rule for structs.
            let c = unsafe { copy_in(options)? };
            abi::known_flags(c.flags, QCR_QUEUE_THREADS)?;
            if c.flags & QCR_QUEUE_THREADS != 0 {
                wanted.transfers = Transfers::Threads;
            }
            for (given, member) in [(c.depth, &mut wanted.depth), (c.threads, &mut wanted.helpers)] {
                *member = if given == 0 { *member } else { given };
            }
        }
        let made = Queue::new(image.disk().image().clone(), wanted)?;
        let made = qcr_queue { queue: made, fuse: image.fuse().clone(), failure: std::sync::Mutex::default() };
        // SAFETY: not NULL, and the caller has room for a pointer there.
        unsafe { queue.write(Box::into_raw(Box::new(made))) };
        Ok(())
    };
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}

/// Submits what qcr_readv() does. The array of areas is not used any more when this returns; the memory is.
///
/// Errors: -EINVAL, -EBUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_queue_readv(
    queue: *mut qcr_queue,
    iov: *const iovec,
    iovcnt: c_int,
    offset: u64,
    user_data: u64,
    error: *mut qcr_error,
) -> c_int {
    let body = |queue: &qcr_queue| {
        // SAFETY: the header's rules for memory.
        let memory = unsafe { Held::new(areas(iov, iovcnt)?) };
        queue.submit(Request::Read { offset, memory }, user_data)
    };
    // SAFETY: the header's rules for queues and errors.
    unsafe { on_queue(queue, error, body) }
}

/// Submits what qcr_writev() does. The array of areas is not used any more when this returns; the memory is.
///
/// Errors: -EINVAL, -EBUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_queue_writev(
    queue: *mut qcr_queue,
    iov: *const iovec,
    iovcnt: c_int,
    offset: u64,
    user_data: u64,
    error: *mut qcr_error,
) -> c_int {
    let body = |queue: &qcr_queue| {
        // SAFETY: the header's rules for memory.
        let memory = unsafe { Held::new(areas(iov, iovcnt)?) };
        queue.submit(Request::Write { offset, memory }, user_data)
    };
    // SAFETY: the header's rules for queues and errors.
    unsafe { on_queue(queue, error, body) }
}

/// qcr_queue_readv() into one area of `count` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_queue_read(
    queue: *mut qcr_queue,
    buffer: *mut c_void,
    count: usize,
    offset: u64,
    user_data: u64,
    error: *mut qcr_error,
) -> c_int {
    let body = |queue: &qcr_queue| {
        check_area(buffer, count)?;
        // SAFETY: the header's rules for memory.
        let memory = unsafe { Held::new(&[iovec { iov_base: buffer, iov_len: count }]) };
        queue.submit(Request::Read { offset, memory }, user_data)
    };
    // SAFETY: the header's rules for queues and errors.
    unsafe { on_queue(queue, error, body) }
}

/// qcr_queue_writev() from one area of `count` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_queue_write(
    queue: *mut qcr_queue,
    buffer: *const c_void,
    count: usize,
    offset: u64,
    user_data: u64,
    error: *mut qcr_error,
) -> c_int {
    let body = |queue: &qcr_queue| {
        check_area(buffer, count)?;
        // SAFETY: the header's rules for memory.
        let memory = unsafe { Held::new(&[iovec { iov_base: buffer.cast_mut(), iov_len: count }]) };
        queue.submit(Request::Write { offset, memory }, user_data)
    };
    // SAFETY: the header's rules for queues and errors.
    unsafe { on_queue(queue, error, body) }
}

/// Submits what qcr_discard() does.
///
/// Errors: -EINVAL, -EBUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_queue_discard(
    queue: *mut qcr_queue,
    offset: u64,
    length: u64,
    user_data: u64,
    error: *mut qcr_error,
) -> c_int {
    // SAFETY: the header's rules for queues and errors.
    unsafe { on_queue(queue, error, |queue| queue.submit(Request::Discard { offset, length }, user_data)) }
}

/// Submits what qcr_write_zeroes() does. `flags`: 0 or QCR_ZERO_MAY_UNMAP.
///
/// Errors: -EINVAL, -EBUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_queue_write_zeroes(
    queue: *mut qcr_queue,
    offset: u64,
    length: u64,
    flags: u32,
    user_data: u64,
    error: *mut qcr_error,
) -> c_int {
    let body = |queue: &qcr_queue| {
        abi::known_flags(flags, QCR_ZERO_MAY_UNMAP)?;
        let may_unmap = flags & QCR_ZERO_MAY_UNMAP != 0;
        queue.submit(Request::WriteZeroes { offset, length, may_unmap }, user_data)
    };
    // SAFETY: the header's rules for queues and errors.
    unsafe { on_queue(queue, error, body) }
}

/// Submits a flush: what it covers are the requests of all queues, and the calls, that were completed before it was
/// submitted.
///
/// Errors: -EINVAL, -EBUSY.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_queue_flush(queue: *mut qcr_queue, user_data: u64, error: *mut qcr_error) -> c_int {
    // SAFETY: the header's rules for queues and errors.
    unsafe { on_queue(queue, error, |queue| queue.submit(Request::Flush, user_data)) }
}

/// Hands what was submitted to the kernel now, for a program that does something else before it reaps.
///
/// Errors: -EINVAL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_queue_kick(queue: *mut qcr_queue, error: *mut qcr_error) -> c_int {
    let body = |queue: &qcr_queue| {
        queue.queue.kick();
        Ok(())
    };
    // SAFETY: the header's rules for queues and errors.
    unsafe { on_queue(queue, error, body) }
}

/// Stores completions in the array `completions`, which has room for `max`, and their number in `*count`.
///
/// Waits until `min` are there (or as many as were submitted, if they are fewer), but no longer than `timeout_us`
/// microseconds: 0 does not wait, a negative value waits for as long as it takes. Works on an image with a fault of the
/// library's own, too, so that the memory of requests can be had back.
///
/// Errors: -EINVAL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_queue_reap(
    queue: *mut qcr_queue,
    completions: *mut qcr_completion,
    max: usize,
    min: usize,
    timeout_us: i64,
    count: *mut usize,
    error: *mut qcr_error,
) -> c_int {
    let body = || {
        // SAFETY: the header's rule for queues.
        let queue = unsafe { queue.as_ref() }.ok_or_else(|| Fault::null("queue"))?;
        if completions.is_null() && max > 0 {
            return Err(Fault::null("completions"));
        }
        if count.is_null() {
            return Err(Fault::null("count"));
        }
        let timeout = u64::try_from(timeout_us).ok().map(Duration::from_micros);
        let mut stored = 0;
        queue.queue.reap(min, max, timeout, |completion| {
            let result = match completion.result {
                Ok(()) => 0,
                Err(e) => {
                    let fault = if queue.queue.image().has_panicked() {
                        Fault::new(libc::ENOTRECOVERABLE, e.to_string())
                    } else {
                        Fault::from(e)
                    };
                    queue.keep(fault.clone());
                    fault.report(None)
                }
            };
            let ours = qcr_completion { user_data: completion.user_data, result, reserved: 0 };
            // SAFETY: fewer than `max` were stored before, and there is room for so many.
            unsafe { completions.add(stored).write(ours) };
            stored += 1;
        });
        // SAFETY: not NULL, and the caller has room for a number there.
        unsafe { count.write(stored) };
        Ok(())
    };
    // SAFETY: the header's rule for errors.
    unsafe { call(error, body) }
}

/// Gives the details of the failed request that was reaped last: they are stored in `error`, and its result is
/// returned; 0 if none has failed.
///
/// Errors: as said; -EINVAL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_queue_failure(queue: *mut qcr_queue, error: *mut qcr_error) -> c_int {
    let body = || {
        // SAFETY: the header's rule for queues.
        let queue = unsafe { queue.as_ref() }.ok_or_else(|| Fault::null("queue"))?;
        match queue.failure.lock().ok().and_then(|failure| failure.clone()) {
            Some(fault) => Err(fault),
            None => Ok(()),
        }
    };
    // SAFETY: the header's rule for errors.
    unsafe { call(error, body) }
}

/// Stores in `*fd` the queue's eventfd, for a program that sleeps in poll(2), epoll_wait(2) or the like. It belongs to
/// the queue, and is the same each time.
///
/// It is written only between a qcr_queue_arm() and the next qcr_queue_reap(), which also makes it unreadable again; the
/// program need not read it. Now and then it becomes readable although there is nothing to reap; the program then arms
/// the queue anew. It is always readable when there is something.
///
/// Errors: -EINVAL; -EMFILE and the like if there is no descriptor left.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_queue_eventfd(queue: *mut qcr_queue, fd: *mut c_int, error: *mut qcr_error) -> c_int {
    let body = |queue: &qcr_queue| {
        if fd.is_null() {
            return Err(Fault::null("fd"));
        }
        let event = queue.queue.event()?.as_raw_fd();
        // SAFETY: not NULL, and the caller has room for a number there.
        unsafe { fd.write(event) };
        Ok(())
    };
    // SAFETY: the header's rules for queues and errors.
    unsafe { on_queue(queue, error, body) }
}

/// To be called before sleeping on the eventfd: stores in `*ready` how many completions are there already. If there are
/// none, the eventfd becomes readable with the next one. Hands what was submitted to the kernel.
///
/// Errors: -EINVAL; -EMFILE and the like if there is no descriptor left.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_queue_arm(queue: *mut qcr_queue, ready: *mut usize, error: *mut qcr_error) -> c_int {
    let body = |queue: &qcr_queue| {
        if ready.is_null() {
            return Err(Fault::null("ready"));
        }
        let there = queue.queue.arm()?;
        // SAFETY: not NULL, and the caller has room for a number there.
        unsafe { ready.write(there) };
        Ok(())
    };
    // SAFETY: the header's rules for queues and errors.
    unsafe { on_queue(queue, error, body) }
}

/// Tells what a queue is doing.
///
/// Errors: -EINVAL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_queue_get_info(
    queue: *mut qcr_queue,
    info: *mut qcr_queue_info,
    error: *mut qcr_error,
) -> c_int {
    let body = |queue: &qcr_queue| {
        // SAFETY: the header's rule for structs.
        let out = unsafe { Out::new(info)? };
        let flags = if queue.queue.uses_io_uring() { QCR_QUEUE_IO_URING } else { 0 };
        out.store(qcr_queue_info { struct_size: 0, flags, pending: queue.queue.pending() as u64 });
        Ok(())
    };
    // SAFETY: the header's rules for queues and errors.
    unsafe { on_queue(queue, error, body) }
}

/// Waits until everything that was submitted has ended, and frees the queue; completions that were not reaped are lost.
/// NULL is ignored. It must be the last call on the queue, and not from a callback of its image.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_queue_free(queue: *mut qcr_queue) {
    if queue.is_null() {
        return;
    }
    // SAFETY: it came from qcr_queue_create(), and this is its last use.
    let queue = unsafe { Box::from_raw(queue) };
    let _ = contain(|| {
        drop(queue);
        Ok(())
    });
}
