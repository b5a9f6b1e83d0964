//! Images that nobody is using
//!
//! Work on whole files. Nobody may be using them, which their locks see to: -EAGAIN otherwise. Any thread.

use std::ffi::{c_char, c_int};

use qcow_recycler::Options;
use qcow_recycler::blocking::block_on;
use qcow_recycler::device::host::HostFile;

use crate::abi::{self, Out, Shared};
use crate::boundary::call;
use crate::error::qcr_error;
use crate::options::{options_for_open, path_of, qcr_options};

/// What a commit into a backing file did.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct qcr_commit_report {
    /// sizeof(struct qcr_commit_report), set by the caller.
    pub struct_size: u32,
    /// 0.
    pub reserved: u32,
    /// Bytes written to the backing file.
    pub written: u64,
    /// Bytes made zero in the backing file.
    pub zeroed: u64,
}

// SAFETY: integers only, no padding.
unsafe impl Shared for qcr_commit_report {
    const NAME: &'static str = "report";
}

/// Writes what the image in the file `path` holds into its backing file, which grows if it is shorter than the disk,
/// and empties the image: its disk reads as before. No other image may have the same backing file. A power cut at any
/// moment leaves a disk that reads as before.
///
/// `options` must allow backing files (QCR_BACKING_ALLOW). `report` may be NULL.
///
/// Errors: as qcr_open_path(); -EINVAL if the image has no backing file or `options` do not allow it; -EAGAIN if
/// somebody uses one of the files; those of reading and writing. The disk reads as before after any of them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_commit_path(
    path: *const c_char,
    options: *const qcr_options,
    report: *mut qcr_commit_report,
    error: *mut qcr_error,
) -> c_int {
    let body = || {
        // SAFETY: the header's rules for structs and strings.
        let (out, path) = unsafe { (Out::optional(report)?, path_of(abi::string("path", path)?)) };
        // SAFETY: the header's rules for structs and strings.
        let options = unsafe { options_for_open(options, Some(&path), None)? };
        let done = block_on(qcow_recycler::image::commit(&path, &options, &mut |_| true))?;
        if let Some(out) = out {
            out.store(qcr_commit_report { struct_size: 0, reserved: 0, written: done.written, zeroed: done.zeroed });
        }
        Ok(())
    };
    // SAFETY: the header's rule for errors.
    unsafe { call(error, body) }
}

/// Makes the image in the file `path` one of version 3 of the format, if it is of version 2. A power cut at any moment
/// leaves one or the other.
///
/// Errors: as qcr_open_path(); -EOPNOTSUPP if its header has no room for that.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_upgrade_path(path: *const c_char, error: *mut qcr_error) -> c_int {
    let body = || {
        // SAFETY: the header's rule for strings.
        let path = path_of(unsafe { abi::string("path", path)? });
        block_on(qcow_recycler::image::upgrade(HostFile::open(&path, false)?, &Options::default()))?;
        Ok(())
    };
    // SAFETY: the header's rule for errors.
    unsafe { call(error, body) }
}
