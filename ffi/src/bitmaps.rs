//! Persistent bitmaps
//!
//! Which parts of the disk were written since somebody last looked: for incremental backups. They live in the image
//! (version 3 of the format only). While an image is open for writing, the file says that they are in use; closing it
//! stores them, and everything done here becomes durable with that. After a crash they are inconsistent, as in QEMU,
//! and can only be removed. The recycler's moves mark nothing. All calls from any thread, and while the image is in use.

use std::ffi::{c_char, c_int, c_void};

use crate::abi::{self, Out, Shared};
use crate::boundary::on_image;
use crate::error::{Fault, qcr_error};
use crate::image::qcr_image;

/// Flag of a bitmap: it marks what is written.
pub const QCR_BITMAP_RECORDING: u32 = 0x1;
/// Flag of a bitmap: it was left behind by somebody who did not store it; it can only be removed.
pub const QCR_BITMAP_INCONSISTENT: u32 = 0x2;

/// What a bitmap is.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct qcr_bitmap {
    /// sizeof(struct qcr_bitmap), as the library knows it.
    pub struct_size: u32,
    /// QCR_BITMAP_RECORDING, QCR_BITMAP_INCONSISTENT.
    pub flags: u32,
    /// Bytes of the disk that one bit stands for.
    pub granularity: u64,
    /// Bytes of the disk that are marked, in whole units of the granularity.
    pub dirty: u64,
    /// Its name, UTF-8.
    pub name: [c_char; 1024],
}

// SAFETY: integers only, no padding.
unsafe impl Shared for qcr_bitmap {
    const NAME: &'static str = "bitmap";
}

/// Takes a bitmap, valid during the call; called on the thread that called qcr_get_bitmaps(), with no lock of the
/// library held. It must return by itself (no longjmp, no C++ exception).
pub type qcr_bitmap_fn = Option<unsafe extern "C" fn(user: *mut c_void, bitmap: *const qcr_bitmap)>;

/// Calls `each` with `user` for every bitmap, in the image's order.
///
/// Errors: -EBADF; on an image that was opened read-only also those of reading the file.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_get_bitmaps(
    image: *mut qcr_image,
    each: qcr_bitmap_fn,
    user: *mut c_void,
    error: *mut qcr_error,
) -> c_int {
    let body = |image: &qcr_image| {
        let each = each.ok_or_else(|| Fault::null("each"))?;
        for found in image.disk().bitmaps()? {
            let recording = if found.recording { QCR_BITMAP_RECORDING } else { 0 };
            let inconsistent = if found.inconsistent { QCR_BITMAP_INCONSISTENT } else { 0 };
            let mut c = qcr_bitmap {
                struct_size: size_of::<qcr_bitmap>() as u32,
                flags: recording | inconsistent,
                granularity: found.granularity,
                dirty: found.dirty,
                ..qcr_bitmap::zeroed()
            };
            abi::store_text(&mut c.name, &found.name);
            // SAFETY: the header's rules for callbacks; `c` outlives the call.
            unsafe { each(user, &raw const c) };
        }
        Ok(())
    };
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}

/// Adds an empty bitmap. `granularity`: a power of two from 512 bytes to 2 GiB, 0 for 64 KiB; `flags`: 0 or
/// QCR_BITMAP_RECORDING.
///
/// Errors: -EINVAL for a name that is taken, empty or longer than 1023 bytes, and for an unusable granularity;
/// -EOPNOTSUPP for an image of version 2, or whose header has no room; -EROFS; -EBADF.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_add_bitmap(
    image: *mut qcr_image,
    name: *const c_char,
    granularity: u64,
    flags: u32,
    error: *mut qcr_error,
) -> c_int {
    let body = |image: &qcr_image| {
        // SAFETY: the header's rule for strings.
        let name = unsafe { abi::text("name", name)? };
        abi::known_flags(flags, QCR_BITMAP_RECORDING)?;
        let granularity = if granularity == 0 { 65536 } else { granularity };
        Ok(image.disk().add_bitmap(name, granularity, flags & QCR_BITMAP_RECORDING != 0)?)
    };
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}

/// Removes a bitmap, also an inconsistent one.
///
/// Errors: -EINVAL if there is none of this name; -EROFS; -EBADF.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_remove_bitmap(image: *mut qcr_image, name: *const c_char, error: *mut qcr_error) -> c_int {
    // SAFETY: the header's rule for strings.
    let body = |image: &qcr_image| Ok(image.disk().image().remove_bitmap(unsafe { abi::text("name", name)? })?);
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}

/// Takes all marks off a bitmap. Waits for the requests that are under way, as qcr_add_bitmap() and qcr_record_bitmap() do: when it
/// returns, what they wrote is there for a backup, and what comes later is marked. So it must not be called on a thread that
/// others' requests need to end.
///
/// Errors: as qcr_remove_bitmap(); -EINVAL for an inconsistent bitmap.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_clear_bitmap(image: *mut qcr_image, name: *const c_char, error: *mut qcr_error) -> c_int {
    // SAFETY: the header's rule for strings.
    let body = |image: &qcr_image| Ok(image.disk().clear_bitmap(unsafe { abi::text("name", name)? })?);
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}

/// Lets a bitmap mark what is written from now on, now and whenever the image is opened (`recording` not 0), or stop to.
///
/// Errors: as qcr_clear_bitmap().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_record_bitmap(
    image: *mut qcr_image,
    name: *const c_char,
    recording: c_int,
    error: *mut qcr_error,
) -> c_int {
    let body = |image: &qcr_image| {
        // SAFETY: the header's rule for strings.
        let name = unsafe { abi::text("name", name)? };
        Ok(image.disk().record_bitmap(name, recording != 0)?)
    };
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}

/// Marks in the bitmap `target` whatever `source` marks; their granularities may differ.
///
/// Errors: as qcr_clear_bitmap(), for either.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_merge_bitmap(
    image: *mut qcr_image,
    target: *const c_char,
    source: *const c_char,
    error: *mut qcr_error,
) -> c_int {
    let body = |image: &qcr_image| {
        // SAFETY: the header's rule for strings.
        let (target, source) = unsafe { (abi::text("target", target)?, abi::text("source", source)?) };
        Ok(image.disk().image().merge_bitmap(target, source)?)
    };
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}

/// A range of the disk.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct qcr_range {
    /// sizeof(struct qcr_range), set by the caller.
    pub struct_size: u32,
    /// 0.
    pub reserved: u32,
    /// Where it starts, in bytes.
    pub offset: u64,
    /// Its length in bytes; 0: there is none.
    pub length: u64,
}

// SAFETY: integers only, no padding.
unsafe impl Shared for qcr_range {
    const NAME: &'static str = "range";
}

/// Finds the first part of the disk from byte `from` on that a bitmap marks. Start from 0, and go on from the end of what
/// was found, until the length is 0.
///
/// Errors: as qcr_clear_bitmap().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_next_dirty(
    image: *mut qcr_image,
    name: *const c_char,
    from: u64,
    range: *mut qcr_range,
    error: *mut qcr_error,
) -> c_int {
    let body = |image: &qcr_image| {
        // SAFETY: the header's rules for structs and strings.
        let (out, name) = unsafe { (Out::new(range)?, abi::text("name", name)?) };
        let found = image.disk().image().next_dirty(name, from)?.unwrap_or(from..from);
        out.store(qcr_range {
            struct_size: 0,
            reserved: 0,
            offset: found.start,
            length: found.end.saturating_sub(found.start),
        });
        Ok(())
    };
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}
