//! Creating images

use std::ffi::{c_char, c_int};
use std::path::Path;

use qcow_recycler::blocking::block_on;
use qcow_recycler::{BlockDevice, CreateOptions, DataFileOptions};

use crate::abi::{self, Shared, copy_in};
use crate::boundary::call;
use crate::callbacks::{Callbacks, qcr_block_callbacks};
use crate::device::Device;
use crate::error::{Fault, qcr_error};
use crate::options::path_of;

/// Creation flag: let refcounts go stale while the image is open (version 3 only).
pub const QCR_CREATE_LAZY_REFCOUNTS: u32 = 0x1;
/// Creation flag: replace an existing file, whatever it holds.
pub const QCR_CREATE_REPLACE: u32 = 0x2;
/// Creation flag: extended L2 entries, so that clusters are allocated in 32 parts (version 3 only, clusters of 16 KiB at
/// least).
pub const QCR_CREATE_EXTENDED_L2: u32 = 0x4;
/// Creation flag: the external data file is to read as the disk does, without the image, at any time: discards make it
/// zero. Not with a backing file.
pub const QCR_CREATE_DATA_FILE_RAW: u32 = 0x8;

/// What a new image is to be like. All zeroes but struct_size and virtual_size: as QEMU makes them by default.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct qcr_create_options {
    /// sizeof(struct qcr_create_options), set by the caller.
    pub struct_size: u32,
    /// QCR_CREATE_LAZY_REFCOUNTS, QCR_CREATE_REPLACE, QCR_CREATE_EXTENDED_L2, QCR_CREATE_DATA_FILE_RAW.
    pub flags: u32,
    /// Size of the virtual disk in bytes, a multiple of 512.
    pub virtual_size: u64,
    /// Cluster size in bytes, a power of two from 512 to 2 MiB; 0: 64 KiB.
    pub cluster_size: u64,
    /// Width of a refcount in bits: 1, 2, 4, 8, 16, 32 or 64; 0: 16.
    pub refcount_bits: u32,
    /// Of the format, 2 or 3; 0: 3.
    pub version: u32,
    /// The backing file's name to record, UTF-8, and its format ("raw" or "qcow2"), or both NULL. The file is not
    /// opened.
    pub backing_file: *const c_char,
    /// See backing_file.
    pub backing_format: *const c_char,
    /// The name of an external data file to record, UTF-8, relative to the image, or NULL: the guest's data is kept
    /// there, not in the image (version 3 only). qcr_create_path() makes it as it makes the image. QEMU takes a relative
    /// name from its own working directory.
    pub data_file: *const c_char,
}

// SAFETY: integers, and pointers that may be NULL; no padding.
unsafe impl Shared for qcr_create_options {
    const NAME: &'static str = "create_options";
}

/// Makes a new image in the file `path` and closes it. Any thread.
///
/// Errors: -EEXIST if there is a file already, and QCR_CREATE_REPLACE is not set; -EAGAIN if it is an image in use;
/// -EINVAL names the unusable option. When it fails, a file that this call made is removed again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_create_path(
    path: *const c_char,
    options: *const qcr_create_options,
    error: *mut qcr_error,
) -> c_int {
    let body = || {
        // SAFETY: the header's rules for strings and structs.
        let (path, wanted, flags) = unsafe {
            let path = path_of(abi::string("path", path)?);
            let (wanted, flags) = wanted(options)?;
            (path, wanted, flags)
        };
        let replace = flags & QCR_CREATE_REPLACE != 0;
        let (device, made) = Device::create(&path, replace)?;
        let written = match &wanted.data_file {
            None => block_on(qcow_recycler::image::create(&device, &wanted)).map_err(Fault::from),
            Some(file) => create_both(&device, &path.with_file_name(&file.name), &wanted, replace),
        };
        written.inspect_err(|_| {
            if made {
                // Half an image is of no use; and the first error is the one to report.
                let _ = std::fs::remove_file(&path);
            }
        })
    };
    // SAFETY: the header's rule for errors.
    unsafe { call(error, body) }
}

/// Makes the data file at `path`, too.
fn create_both(device: &Device, path: &Path, wanted: &CreateOptions, replace: bool) -> Result<(), Fault> {
    if device.host_file().is_some_and(|file| file.is_at(path)) {
        return Err(Fault::argument("data_file", "is the image itself"));
    }
    let (data, made) = Device::create(path, replace)?;
    block_on(qcow_recycler::image::create_with_data(device, &data, wanted)).inspect_err(|_| {
        if made {
            let _ = std::fs::remove_file(path);
        }
    })?;
    Ok(())
}

/// Writes a new image to block callbacks, whatever they held before; then `destroy` is called. Any thread.
///
/// Errors: -EINVAL names the unusable option; -EOPNOTSUPP if the device is too short and cannot be made longer; the
/// callbacks' own.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_create_callbacks(
    callbacks: *const qcr_block_callbacks,
    options: *const qcr_create_options,
    error: *mut qcr_error,
) -> c_int {
    // Before anything can fail: `destroy` must run even then.
    // SAFETY: the header's rules for structs and callbacks.
    let callbacks = unsafe { Callbacks::adopt(callbacks) };
    let body = || {
        let device = Device::on(callbacks?, false)?;
        // SAFETY: the header's rules for strings and structs.
        let (wanted, flags) = unsafe { wanted(options)? };
        if flags & QCR_CREATE_REPLACE != 0 {
            return Err(Fault::argument("flags", "QCR_CREATE_REPLACE is for files only"));
        }
        block_on(qcow_recycler::image::create(&device, &wanted))?;
        Ok(())
    };
    // SAFETY: the header's rule for errors.
    unsafe { call(error, body) }
}

/// Writes a new image with an external data file to block callbacks, whatever they held before: the data file to those of
/// `data`; then `destroy` of both is called. Any thread.
///
/// Errors: as qcr_create_callbacks(); -EINVAL without a name for the data file.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_create_callbacks_with_data(
    callbacks: *const qcr_block_callbacks,
    data: *const qcr_block_callbacks,
    options: *const qcr_create_options,
    error: *mut qcr_error,
) -> c_int {
    // Before anything can fail: `destroy` of both must run even then.
    // SAFETY: the header's rules for structs and callbacks.
    let (callbacks, data) = unsafe { (Callbacks::adopt(callbacks), Callbacks::adopt(data)) };
    let body = || {
        let (device, data) = (Device::on(callbacks?, false)?, Device::on(data?, false)?);
        // SAFETY: the header's rules for strings and structs.
        let (wanted, flags) = unsafe { wanted(options)? };
        if flags & QCR_CREATE_REPLACE != 0 {
            return Err(Fault::argument("flags", "QCR_CREATE_REPLACE is for files only"));
        }
        block_on(qcow_recycler::image::create_with_data(&device, &data, &wanted))?;
        Ok(())
    };
    // SAFETY: the header's rule for errors.
    unsafe { call(error, body) }
}

unsafe fn wanted(options: *const qcr_create_options) -> Result<(CreateOptions, u32), Fault> {
    // SAFETY: the header's rule for structs.
    let c = unsafe { copy_in(options)? };
    let raw = c.flags & QCR_CREATE_DATA_FILE_RAW != 0;
    let known = QCR_CREATE_LAZY_REFCOUNTS | QCR_CREATE_REPLACE | QCR_CREATE_EXTENDED_L2 | QCR_CREATE_DATA_FILE_RAW;
    abi::known_flags(c.flags, known)?;
    let mut wanted = CreateOptions::new(c.virtual_size);
    if c.cluster_size != 0 {
        wanted.cluster_size = c.cluster_size;
    }
    if c.refcount_bits != 0 {
        wanted.refcount_bits = c.refcount_bits;
    }
    if c.version != 0 {
        wanted.version = c.version;
    }
    wanted.lazy_refcounts = c.flags & QCR_CREATE_LAZY_REFCOUNTS != 0;
    wanted.extended_l2 = c.flags & QCR_CREATE_EXTENDED_L2 != 0;
    if !c.backing_file.is_null() || !c.backing_format.is_null() {
        // SAFETY: the header's rule for strings.
        let (name, format) =
            unsafe { (abi::text("backing_file", c.backing_file)?, abi::text("backing_format", c.backing_format)?) };
        wanted.backing = Some((name.to_owned(), format.to_owned()));
    }
    if !c.data_file.is_null() {
        // SAFETY: the header's rule for strings.
        let name = unsafe { abi::text("data_file", c.data_file)? }.to_owned();
        wanted.data_file = Some(DataFileOptions { name, raw });
    } else if raw {
        return Err(Fault::argument("data_file", "is NULL, and QCR_CREATE_DATA_FILE_RAW is set"));
    }
    Ok((wanted, c.flags))
}
