//! The library as a C program sees it.

use std::ffi::{CString, c_char, c_int, c_void};
use std::io;
use std::ptr;
use std::sync::Mutex;
use std::time::Instant;

use bench_work::Disk;
use bench_work::buffer::Buffer;
use bench_work::protocol::{Extra, Kind, Opening, Work};
use serde_json::{Value, json};

/// `struct qcr_image`
#[repr(C)]
struct Handle {
    _opaque: [u8; 0],
}

/// `struct qcr_queue`
#[repr(C)]
struct Queue {
    _opaque: [u8; 0],
}

/// `struct qcr_error`, of which only NULL is passed: the values returned are enough.
type NoDetails = *mut c_void;

// shim.c checks these against the header.
unsafe extern "C" {
    fn qcr_read(image: *mut Handle, buffer: *mut c_void, count: usize, offset: u64, error: NoDetails) -> c_int;
    fn qcr_write(image: *mut Handle, buffer: *const c_void, count: usize, offset: u64, error: NoDetails) -> c_int;
    fn qcr_flush(image: *mut Handle, error: NoDetails) -> c_int;
    fn qcr_discard(image: *mut Handle, offset: u64, length: u64, error: NoDetails) -> c_int;
    fn qcr_start(image: *mut Handle, error: NoDetails) -> c_int;
    fn qcr_pause(image: *mut Handle, error: NoDetails) -> c_int;
    fn qcr_resume(image: *mut Handle, error: NoDetails) -> c_int;
    fn qcr_stop(image: *mut Handle, error: NoDetails) -> c_int;
    fn qcr_close(image: *mut Handle, error: NoDetails) -> c_int;
    fn qcr_free(image: *mut Handle);
    // Of shim.c itself.
    fn bench_open(path: *const c_char, config: *const c_char, image: *mut *mut Handle) -> c_int;
    fn bench_compact(image: *mut Handle, report: *mut u64) -> c_int;
    fn bench_queue_open(image: *mut Handle, depth: u32, queue: *mut *mut Queue) -> c_int;
    fn bench_queue_run(
        queue: *mut Queue,
        write: c_int,
        buffers: *const *mut c_void,
        depth: usize,
        size: usize,
        offsets: *const u64,
        count: usize,
    ) -> c_int;
    fn bench_queue_close(queue: *mut Queue);
    fn bench_stats(image: *mut Handle, values: *mut u64) -> c_int;
}

const STATS: [&str; 9] = [
    "file_size",
    "junk",
    "available",
    "device_flushes",
    "metadata_read_bytes",
    "metadata_write_bytes",
    "moved_bytes",
    "background_errors",
    "moves",
];

fn check(result: c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-result)) }
}

pub struct Image {
    image: *mut Handle,
    queue: Mutex<*mut Queue>,
}

// SAFETY: the header allows any call from any thread; qcr_free() is called from `drop`, when nobody has the handle.
unsafe impl Send for Image {}
// SAFETY: as above.
unsafe impl Sync for Image {}

impl Image {
    pub fn open(opening: &Opening) -> io::Result<Self> {
        let path = CString::new(opening.path.as_str())?;
        let direct = if opening.direct { "direct=true;" } else { "" };
        let config = CString::new(format!("{direct}{}", opening.config))?;
        let mut image = ptr::null_mut();
        // SAFETY: the strings end with a zero byte and live until the call returns; `image` takes the handle.
        check(unsafe { bench_open(path.as_ptr(), config.as_ptr(), &mut image) })?;
        Ok(Self { image, queue: Mutex::new(ptr::null_mut()) })
    }

    /// A queue must be freed before its image.
    fn close_queue(&self) {
        if let Ok(mut queue) = self.queue.lock() {
            // SAFETY: a queue that nobody uses any more, or NULL, which is ignored.
            unsafe { bench_queue_close(std::mem::replace(&mut *queue, ptr::null_mut())) };
        }
    }

    fn compact(&self) -> io::Result<Value> {
        let mut report = [0; 4];
        let before = self.stats()?;
        let started = Instant::now();
        // SAFETY: an open handle, and room for the four numbers.
        check(unsafe { bench_compact(self.image, report.as_mut_ptr()) })?;
        let nanoseconds = started.elapsed().as_nanos() as u64;
        let after = self.stats()?;
        let [file_size_before, file_size_after, moved, cancelled] = report;
        Ok(json!({
            "nanoseconds": nanoseconds, "before": file_size_before, "after": file_size_after, "moved": moved,
            "cancelled": cancelled, "flushes": after[3] - before[3],
        }))
    }

    fn stats(&self) -> io::Result<[u64; 9]> {
        let mut values = [0; 9];
        // SAFETY: an open handle, and room for the nine numbers.
        check(unsafe { bench_stats(self.image, values.as_mut_ptr()) })?;
        Ok(values)
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        self.close_queue();
        // SAFETY: the handle is ours and used by nobody else any more.
        unsafe { qcr_free(self.image) }
    }
}

impl Disk for Image {
    #[inline]
    async fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        // SAFETY: an open handle; the buffer is ours until the call returns.
        check(unsafe { qcr_read(self.image, buffer.as_mut_ptr().cast(), buffer.len(), offset, ptr::null_mut()) })
    }

    #[inline]
    async fn write(&self, buffer: &[u8], offset: u64) -> io::Result<()> {
        // SAFETY: as above.
        check(unsafe { qcr_write(self.image, buffer.as_ptr().cast(), buffer.len(), offset, ptr::null_mut()) })
    }

    #[inline]
    async fn flush(&self) -> io::Result<()> {
        // SAFETY: an open handle.
        check(unsafe { qcr_flush(self.image, ptr::null_mut()) })
    }

    #[inline]
    async fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: an open handle.
        check(unsafe { qcr_discard(self.image, offset, length, ptr::null_mut()) })
    }

    fn queue(&self, work: &Work, offsets: &[u64], buffers: &mut [Buffer]) -> Option<io::Result<()>> {
        let mut queue = self.queue.lock().ok()?;
        if queue.is_null() {
            // SAFETY: an open handle, and a place for the queue.
            let opened = check(unsafe { bench_queue_open(self.image, buffers.len() as u32, &mut *queue) });
            if opened.is_err() {
                return Some(opened);
            }
        }
        let areas: Vec<*mut c_void> = buffers.iter_mut().map(|buffer| buffer.as_mut_ptr().cast()).collect();
        let write = c_int::from(work.kind == Kind::Write);
        // SAFETY: the queue is open; `areas` names as many buffers of `work.size` bytes as it says, and all of them
        // have been reaped when the call returns.
        Some(check(unsafe {
            bench_queue_run(*queue, write, areas.as_ptr(), areas.len(), work.size, offsets.as_ptr(), offsets.len())
        }))
    }

    fn extra(&mut self, extra: &Extra) -> io::Result<Value> {
        let none = ptr::null_mut();
        // SAFETY: an open handle, in each of these calls.
        let result = match extra {
            Extra::Start => unsafe { qcr_start(self.image, none) },
            Extra::Pause => unsafe { qcr_pause(self.image, none) },
            Extra::Resume => unsafe { qcr_resume(self.image, none) },
            Extra::Stop => unsafe { qcr_stop(self.image, none) },
            Extra::Stats => {
                let values = self.stats()?;
                return Ok(STATS
                    .iter()
                    .zip(values)
                    .map(|(name, value)| ((*name).to_owned(), Value::from(value)))
                    .collect());
            }
            Extra::Compact(_) => return self.compact(),
            Extra::Idle { .. } => 0,
        };
        check(result).map(|()| Value::Null)
    }

    async fn close(self) -> io::Result<()> {
        self.close_queue();
        // SAFETY: an open handle; it is freed when `self` is dropped.
        check(unsafe { qcr_close(self.image, ptr::null_mut()) })
    }
}
