//! The library as a C program sees it.

use std::ffi::{CString, c_char, c_int, c_void};
use std::io;
use std::ptr;
use std::time::Instant;

use bench_work::Disk;
use bench_work::protocol::{Extra, Opening};
use serde_json::{Value, json};

/// `struct qcr_image`
#[repr(C)]
struct Handle {
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

pub struct Image(*mut Handle);

// SAFETY: the header allows any call from any thread; qcr_free() is called from `drop`, when nobody has the handle.
unsafe impl Send for Image {}
// SAFETY: as above.
unsafe impl Sync for Image {}

impl Image {
    pub fn open(opening: &Opening) -> io::Result<Self> {
        let path = CString::new(opening.path.as_str())?;
        let config = CString::new(opening.config.as_str())?;
        let mut image = ptr::null_mut();
        // SAFETY: the strings end with a zero byte and live until the call returns; `image` takes the handle.
        check(unsafe { bench_open(path.as_ptr(), config.as_ptr(), &mut image) })?;
        Ok(Self(image))
    }

    fn compact(&self) -> io::Result<Value> {
        let mut report = [0; 4];
        let before = self.stats()?;
        let started = Instant::now();
        // SAFETY: an open handle, and room for the four numbers.
        check(unsafe { bench_compact(self.0, report.as_mut_ptr()) })?;
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
        check(unsafe { bench_stats(self.0, values.as_mut_ptr()) })?;
        Ok(values)
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // SAFETY: the handle is ours and used by nobody else any more.
        unsafe { qcr_free(self.0) }
    }
}

impl Disk for Image {
    #[inline]
    async fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        // SAFETY: an open handle; the buffer is ours until the call returns.
        check(unsafe { qcr_read(self.0, buffer.as_mut_ptr().cast(), buffer.len(), offset, ptr::null_mut()) })
    }

    #[inline]
    async fn write(&self, buffer: &[u8], offset: u64) -> io::Result<()> {
        // SAFETY: as above.
        check(unsafe { qcr_write(self.0, buffer.as_ptr().cast(), buffer.len(), offset, ptr::null_mut()) })
    }

    #[inline]
    async fn flush(&self) -> io::Result<()> {
        // SAFETY: an open handle.
        check(unsafe { qcr_flush(self.0, ptr::null_mut()) })
    }

    #[inline]
    async fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: an open handle.
        check(unsafe { qcr_discard(self.0, offset, length, ptr::null_mut()) })
    }

    fn extra(&mut self, extra: &Extra) -> io::Result<Value> {
        let none = ptr::null_mut();
        // SAFETY: an open handle, in each of these calls.
        let result = match extra {
            Extra::Start => unsafe { qcr_start(self.0, none) },
            Extra::Pause => unsafe { qcr_pause(self.0, none) },
            Extra::Resume => unsafe { qcr_resume(self.0, none) },
            Extra::Stop => unsafe { qcr_stop(self.0, none) },
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
        // SAFETY: an open handle; it is freed when `self` is dropped.
        check(unsafe { qcr_close(self.0, ptr::null_mut()) })
    }
}
