//! The guest's disk
//!
//! Offsets and lengths are in bytes on the virtual disk and multiples of 512 (-EINVAL otherwise, and for a range
//! that reaches past the end). Any number of threads may call at once. Two calls whose ranges overlap have no order
//! between them: one that must see another begins after it has returned.
//!
//! The memory may belong to a guest that changes it meanwhile: the library never trusts it twice.

use std::ffi::{c_int, c_void};

use libc::iovec;
use qcow_recycler::ExtentKind;
use qcow_recycler::buf::{IoBuf, IoBufMut, iovecs_len};

use crate::abi::{self, Out, Shared};
use crate::boundary::on_image;
use crate::error::{Fault, qcr_error};
use crate::image::qcr_image;

/// Fills `iovcnt` areas of memory, in order, from byte `offset` of the disk. When it fails, their contents are
/// undefined.
///
/// `iovcnt` may be any number from 0 on. The array must not change during the call.
///
/// Errors: -EUCLEAN if the image contradicts its format where this looks; -EBADF; the device's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_readv(
    image: *mut qcr_image,
    iov: *const iovec,
    iovcnt: c_int,
    offset: u64,
    error: *mut qcr_error,
) -> c_int {
    let body = |image: &qcr_image| {
        // SAFETY: the header's rules for memory.
        let buf = unsafe { IoBufMut::from_iovecs(areas(iov, iovcnt)?) };
        Ok(image.disk().read(offset, buf)?)
    };
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}

/// Stores `iovcnt` areas of memory, in order, at byte `offset` of the disk. It is durable when a qcr_flush() that
/// began later has succeeded. When it fails, the range may hold the old bytes, the new, or in part both.
///
/// Errors: as qcr_readv(), and -EROFS, -ENOSPC.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_writev(
    image: *mut qcr_image,
    iov: *const iovec,
    iovcnt: c_int,
    offset: u64,
    error: *mut qcr_error,
) -> c_int {
    let body = |image: &qcr_image| {
        // SAFETY: the header's rules for memory.
        let buf = unsafe { IoBuf::from_iovecs(areas(iov, iovcnt)?) };
        Ok(image.disk().write(offset, buf)?)
    };
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}

/// qcr_readv() into one area of `count` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_read(
    image: *mut qcr_image,
    buffer: *mut c_void,
    count: usize,
    offset: u64,
    error: *mut qcr_error,
) -> c_int {
    let body = |image: &qcr_image| {
        check_area(buffer, count)?;
        // SAFETY: the header's rules for memory; the length was checked.
        Ok(image.disk().read(offset, unsafe { IoBufMut::from_raw(buffer.cast(), count) })?)
    };
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}

/// qcr_writev() from one area of `count` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_write(
    image: *mut qcr_image,
    buffer: *const c_void,
    count: usize,
    offset: u64,
    error: *mut qcr_error,
) -> c_int {
    let body = |image: &qcr_image| {
        check_area(buffer, count)?;
        // SAFETY: the header's rules for memory; the length was checked.
        Ok(image.disk().write(offset, unsafe { IoBuf::from_raw(buffer.cast(), count) })?)
    };
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}

/// Stores `count` bytes of whole clusters at byte `offset`, compressed as far as that saves room: for programs that make
/// images. `offset` is a multiple of the cluster size, and so is `count`, unless the disk ends there. A later qcr_write() to
/// such a cluster stores it plainly again. Otherwise as qcr_write().
///
/// Errors: as qcr_writev(); -EINVAL for pieces of clusters.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_write_compressed(
    image: *mut qcr_image,
    buffer: *const c_void,
    count: usize,
    offset: u64,
    error: *mut qcr_error,
) -> c_int {
    let body = |image: &qcr_image| {
        check_area(buffer, count)?;
        // SAFETY: the header's rules for memory; the length was checked.
        Ok(image.disk().write_compressed(offset, unsafe { IoBuf::from_raw(buffer.cast(), count) })?)
    };
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}

/// Tells the image that the guest does not need a range any more: it reads as zeroes from now on. Whole clusters in it are
/// freed for the recycler; pieces of clusters are overwritten with zeroes where they hold data. After a power cut before
/// the next flush, the range may read as before.
///
/// Errors: -EOPNOTSUPP without QCR_DISCARD; otherwise as qcr_writev().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_discard(image: *mut qcr_image, offset: u64, length: u64, error: *mut qcr_error) -> c_int {
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, |image| Ok(image.disk().discard(offset, length)?)) }
}

/// qcr_write_zeroes(): clusters in the range may be freed.
pub const QCR_ZERO_MAY_UNMAP: u32 = 0x1;

/// Makes a range read as zeroes, whatever the backing file has there. `flags`: 0 or QCR_ZERO_MAY_UNMAP.
///
/// Errors: as qcr_writev().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_write_zeroes(
    image: *mut qcr_image,
    offset: u64,
    length: u64,
    flags: u32,
    error: *mut qcr_error,
) -> c_int {
    let body = |image: &qcr_image| {
        abi::known_flags(flags, QCR_ZERO_MAY_UNMAP)?;
        Ok(image.disk().write_zeroes(offset, length, flags & QCR_ZERO_MAY_UNMAP != 0)?)
    };
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}

/// Makes everything durable that completed before this call. After a failed flush the image is read-only, since
/// nobody can say what of it became durable: close it and open it again.
///
/// Errors: the device's; -EROFS after an earlier failure; -EBADF.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_flush(image: *mut qcr_image, error: *mut qcr_error) -> c_int {
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, |image| Ok(image.disk().flush()?)) }
}

/// qcr_resize(): the disk may become smaller, and what is cut off is lost.
pub const QCR_RESIZE_SHRINK: u32 = 0x1;

/// Makes the virtual disk `size` bytes large. What is new reads as zeroes. `flags`: 0 or QCR_RESIZE_SHRINK; without
/// it, a smaller size is refused with -EINVAL.
///
/// Errors: as qcr_writev(); -EOPNOTSUPP if the image has something that forbids it, such as snapshots.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_resize(image: *mut qcr_image, size: u64, flags: u32, error: *mut qcr_error) -> c_int {
    let body = |image: &qcr_image| {
        abi::known_flags(flags, QCR_RESIZE_SHRINK)?;
        Ok(image.disk().resize(size, flags & QCR_RESIZE_SHRINK != 0)?)
    };
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}

/// Extent: stored in the image file.
pub const QCR_EXTENT_DATA: u32 = 1;
/// Extent: reads as zeroes, whatever the backing file has.
pub const QCR_EXTENT_ZERO: u32 = 2;
/// Extent: not allocated; reads as the backing file does, or as zeroes without one.
pub const QCR_EXTENT_UNALLOCATED: u32 = 3;
/// Extent: stored in the image file, compressed.
pub const QCR_EXTENT_COMPRESSED: u32 = 4;

/// How a range of the disk is stored.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct qcr_extent {
    /// sizeof(struct qcr_extent), set by the caller.
    pub struct_size: u32,
    /// One of QCR_EXTENT_DATA to QCR_EXTENT_COMPRESSED; a later version may know more.
    pub kind: u32,
    /// In bytes, from the offset that was asked for.
    pub length: u64,
    /// QCR_EXTENT_DATA: where the range starts in the image file, in bytes; until the recycler moves it. Otherwise
    /// 0.
    pub host_offset: u64,
}

// SAFETY: integers only, no padding.
unsafe impl Shared for qcr_extent {
    const NAME: &'static str = "extent";
}

/// Tells how the bytes from `offset` on are stored, at most `length` of them (not 0).
///
/// Errors: as qcr_readv().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_get_extent(
    image: *mut qcr_image,
    offset: u64,
    length: u64,
    extent: *mut qcr_extent,
    error: *mut qcr_error,
) -> c_int {
    let body = |image: &qcr_image| {
        // SAFETY: the header's rule for structs.
        let out = unsafe { Out::new(extent)? };
        if length == 0 {
            return Err(Fault::argument("length", "is 0"));
        }
        let found = image.disk().extent(offset, length)?;
        let (kind, host_offset) = match found.kind {
            ExtentKind::Data { host_offset } => (QCR_EXTENT_DATA, host_offset),
            ExtentKind::Zero => (QCR_EXTENT_ZERO, 0),
            ExtentKind::Unallocated => (QCR_EXTENT_UNALLOCATED, 0),
            ExtentKind::Compressed => (QCR_EXTENT_COMPRESSED, 0),
        };
        out.store(qcr_extent { struct_size: 0, kind, length: found.length, host_offset });
        Ok(())
    };
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}

/// The areas of a vectored call, checked as far as they can be.
///
/// # Safety
/// The header's rules for memory; the array lives for `'a`.
pub(crate) unsafe fn areas<'a>(iov: *const iovec, iovcnt: c_int) -> Result<&'a [iovec], Fault> {
    let count = usize::try_from(iovcnt).map_err(|_| Fault::argument("iovcnt", "is negative"))?;
    if count == 0 {
        return Ok(&[]);
    }
    if iov.is_null() {
        return Err(Fault::null("iov"));
    }
    if !iov.is_aligned() {
        return Err(Fault::argument("iov", "is not aligned"));
    }
    // SAFETY: not NULL, aligned, and the caller has `count` areas there.
    let areas = unsafe { std::slice::from_raw_parts(iov, count) };
    if areas.iter().any(|area| area.iov_base.is_null() && area.iov_len > 0) {
        return Err(Fault::null("iov_base"));
    }
    match iovecs_len(areas) {
        Some(total) if isize::try_from(total).is_ok() => Ok(areas),
        _ => Err(Fault::argument("iov_len", "the areas are too long")),
    }
}

#[inline]
pub(crate) fn check_area(base: *const c_void, count: usize) -> Result<(), Fault> {
    if base.is_null() && count > 0 || isize::try_from(count).is_err() { Err(refuse_area(count)) } else { Ok(()) }
}

#[cold]
fn refuse_area(count: usize) -> Fault {
    if isize::try_from(count).is_err() { Fault::argument("count", "is too large") } else { Fault::null("buffer") }
}
