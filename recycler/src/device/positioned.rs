//! Positioned transfers between a file and raw guest memory.
//!
//! The only place where guest memory is handed to the kernel. One area costs one system call and nothing else. (And the one other
//! call on files for which there is no safe wrapper.)
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use crate::buf::{IoBuf, IoBufMut, IoVec};

/// Areas handed over in one call: at most IOV_MAX (1024), and few enough to live on the stack.
pub(super) const AREAS: usize = 128;

const NO_AREA: IoVec = IoVec { iov_base: std::ptr::null_mut(), iov_len: 0 };

fn file_offset(offset: u64, done: usize) -> io::Result<i64> {
    offset
        .checked_add(done as u64)
        .and_then(|at| i64::try_from(at).ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the offset is beyond what a file can have"))
}

/// How many bytes a call moved; `None` when a signal interrupted it before any.
fn moved(result: isize) -> io::Result<Option<usize>> {
    match usize::try_from(result) {
        Ok(count) => Ok(Some(count)),
        Err(_) => match io::Error::last_os_error() {
            e if e.kind() == io::ErrorKind::Interrupted => Ok(None),
            e => Err(e),
        },
    }
}

/// Has the system begin to write out what it has in its cache of a range. If it does not, nothing is lost.
pub(super) fn write_out(file: &File, offset: u64, length: u64) {
    let (Ok(at), Ok(length)) = (i64::try_from(offset), i64::try_from(length)) else { return };
    // SAFETY: no memory is involved.
    unsafe { libc::sync_file_range(file.as_raw_fd(), at, length, libc::SYNC_FILE_RANGE_WRITE) };
}

/// Fills `buf` from byte `offset` of the file.
///
/// # Errors
/// [`io::ErrorKind::UnexpectedEof`] if the file ends before; what the system reports.
#[inline]
pub(super) fn read(file: &File, offset: u64, mut buf: IoBufMut<'_>) -> io::Result<()> {
    // Nearly always one area, and one call.
    if let (Some(base), Ok(at)) = (buf.single(), i64::try_from(offset)) {
        // SAFETY: by `IoBufMut` the area is writable memory of this length, and belongs to no reference, while `buf` lives.
        let result = unsafe { libc::pread64(file.as_raw_fd(), base.cast(), buf.len(), at) };
        // No buffer is as long as an error's -1 would be.
        if result.cast_unsigned() == buf.len() {
            return Ok(());
        }
        moved(result)?;
    }
    // What was cut short or interrupted is done again: the bytes are the same.
    let length = buf.len();
    read_least(file, offset, buf, length)
}

/// As [`read`], but only the first `least` bytes need be there.
#[cold]
pub(super) fn read_least(file: &File, offset: u64, mut buf: IoBufMut<'_>, least: usize) -> io::Result<()> {
    let (fd, length) = (file.as_raw_fd(), buf.len());
    let mut done = 0;
    while done < least {
        let at = file_offset(offset, done)?;
        let mut rest = buf.slice(done..length);
        let mut one = [NO_AREA];
        rest.fill_iovecs(&mut one);
        let [area] = one;
        let result = if area.iov_len == length - done {
            // SAFETY: by `IoBufMut` the area is writable memory of this length, and belongs to no reference, while
            // `buf` lives.
            unsafe { libc::pread64(fd, area.iov_base, area.iov_len, at) }
        } else {
            let mut areas = [NO_AREA; AREAS];
            let count = rest.fill_iovecs(&mut areas);
            // SAFETY: the first `count` areas are as above; `count` is at most AREAS.
            unsafe { libc::preadv64(fd, areas.as_ptr(), count as libc::c_int, at) }
        };
        match moved(result)? {
            Some(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Some(count) => done += count,
            None => {}
        }
    }
    Ok(())
}

/// Stores `buf` at byte `offset` of the file.
///
/// # Errors
/// What the system reports.
#[inline]
pub(super) fn write(file: &File, offset: u64, buf: IoBuf<'_>) -> io::Result<()> {
    // Nearly always one area, and one call.
    if let (Some(base), Ok(at)) = (buf.single(), i64::try_from(offset)) {
        // SAFETY: by `IoBuf` the area is readable memory of this length while `buf` lives; the kernel only reads it.
        let result = unsafe { libc::pwrite64(file.as_raw_fd(), base.cast(), buf.len(), at) };
        // No buffer is as long as an error's -1 would be.
        if result.cast_unsigned() == buf.len() {
            return Ok(());
        }
        moved(result)?;
    }
    // What was cut short or interrupted is done again: the bytes are the same.
    write_pieces(file, offset, buf)
}

#[cold]
fn write_pieces(file: &File, offset: u64, buf: IoBuf<'_>) -> io::Result<()> {
    let (fd, length) = (file.as_raw_fd(), buf.len());
    let mut done = 0;
    while done < length {
        let at = file_offset(offset, done)?;
        let rest = buf.slice(done..length);
        let mut one = [NO_AREA];
        rest.fill_iovecs(&mut one);
        let [area] = one;
        let result = if area.iov_len == length - done {
            // SAFETY: by `IoBuf` the area is readable memory of this length while `buf` lives; the kernel only reads
            // it.
            unsafe { libc::pwrite64(fd, area.iov_base, area.iov_len, at) }
        } else {
            let mut areas = [NO_AREA; AREAS];
            let count = rest.fill_iovecs(&mut areas);
            // SAFETY: the first `count` areas are as above; `count` is at most AREAS.
            unsafe { libc::pwritev64(fd, areas.as_ptr(), count as libc::c_int, at) }
        };
        match moved(result)? {
            Some(0) => return Err(io::ErrorKind::WriteZero.into()),
            Some(count) => done += count,
            None => {}
        }
    }
    Ok(())
}
