//! Opening and closing images
//!
//! The life of an image:
//!
//!   qcr_open_path() or qcr_open_callbacks()    the image can be used; its recycler rests
//!   qcr_start()                                the recycler works in the background
//!   qcr_readv(), qcr_writev(), qcr_discard()   from any number of threads
//!   qcr_close()                                everything is durable, or the error says what is not
//!   qcr_free()                                 the handle is gone, and `destroy` has run

use std::ffi::{c_char, c_int};
use std::path::Path;
use std::sync::Arc;

use qcow_recycler::{Disk, Options};

use crate::abi;
use crate::boundary::{Fuse, call, contain, on_image};
use crate::callbacks::{Callbacks, qcr_block_callbacks};
use crate::device::Device;
use crate::error::{Fault, qcr_error};
use crate::options::{Log, options_for_open, path_of, qcr_log, qcr_options};

/// An open image.
pub struct qcr_image {
    disk: Disk<Device>,
    fuse: Arc<Fuse>,
    id: String,
}

impl qcr_image {
    fn open(
        options: *const qcr_options,
        path: Option<&Path>,
        log: Option<Log>,
        device: impl FnOnce(&Options) -> Result<(Device, Option<Device>), Fault>,
    ) -> Result<Box<Self>, Fault> {
        // SAFETY: the header's rules for structs and strings, on which every caller relies.
        let options = unsafe { options_for_open(options, path, log)? };
        let (device, data) = device(&options)?;
        let (fuse, id) = (device.fuse(), options.id.clone());
        let disk = match data {
            None => Disk::open(device, options)?,
            Some(data) => Disk::open_with_data(device, data.behind(fuse.clone()), options)?,
        };
        Ok(Box::new(qcr_image { disk, fuse, id }))
    }

    pub(crate) fn disk(&self) -> &Disk<Device> {
        &self.disk
    }

    pub(crate) fn fuse(&self) -> &Arc<Fuse> {
        &self.fuse
    }

    pub(crate) fn id(&self) -> &str {
        &self.id
    }
}

/// Opens the image in the file (or on the block device) `path`, and locks it as QEMU does. Any thread.
///
/// `options` and `log` may be NULL: the defaults, and no messages. On success `*image` is the caller's to
/// qcr_free().
///
/// Errors: -EUCLEAN if the image contradicts its format; -EOPNOTSUPP names the feature that is not supported; -EPERM if
/// it has a backing file or an external data file that the options do not allow; -EAGAIN if another process uses it;
/// those of open(2) and read(2). An image that is refused is not changed. `log->destroy` has been called when this fails.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_open_path(
    path: *const c_char,
    options: *const qcr_options,
    log: *const qcr_log,
    image: *mut *mut qcr_image,
    error: *mut qcr_error,
) -> c_int {
    // Before anything can fail: `destroy` must run even then.
    // SAFETY: the header's rules for structs and callbacks.
    let log = unsafe { Log::adopt(log) };
    let body = || {
        let log = log?;
        let out = not_null(image)?;
        // SAFETY: the header's rule for strings.
        let path = path_of(unsafe { abi::string("path", path)? });
        let opened = qcr_image::open(options, Some(&path), log, |options| Ok((Device::open(&path, options)?, None)))?;
        // SAFETY: not NULL, and the caller has room for a pointer there.
        unsafe { out.write(Box::into_raw(opened)) };
        Ok(())
    };
    // SAFETY: the header's rule for errors.
    unsafe { call(error, body) }
}

/// Opens the image on block callbacks. Any thread; the callbacks are first called by this very call.
///
/// `options` and `log` may be NULL: the defaults, and no messages. On success `*image` is the caller's to
/// qcr_free().
///
/// Errors: as qcr_open_path(), and the callbacks' own. `destroy` of `callbacks` and of `log` have been called when this
/// fails.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_open_callbacks(
    callbacks: *const qcr_block_callbacks,
    options: *const qcr_options,
    log: *const qcr_log,
    image: *mut *mut qcr_image,
    error: *mut qcr_error,
) -> c_int {
    // Before anything can fail: `destroy` of both must run even then.
    // SAFETY: the header's rules for structs and callbacks.
    let (callbacks, log) = unsafe { (Callbacks::adopt(callbacks), Log::adopt(log)) };
    let body = || {
        let (callbacks, log) = (callbacks?, log?);
        let out = not_null(image)?;
        let device = |options: &Options| Ok((Device::on(callbacks, options.read_only)?, None));
        let opened = qcr_image::open(options, None, log, device)?;
        // SAFETY: not NULL, and the caller has room for a pointer there.
        unsafe { out.write(Box::into_raw(opened)) };
        Ok(())
    };
    // SAFETY: the header's rule for errors.
    unsafe { call(error, body) }
}

/// Opens the image on block callbacks whose external data file is on the block callbacks `data`. Any thread; the
/// callbacks are first called by this very call.
///
/// `options` and `log` may be NULL: the defaults, and no messages. On success `*image` is the caller's to
/// qcr_free().
///
/// Errors: as qcr_open_callbacks(); -EINVAL if the image has no external data file. `destroy` of `callbacks`, of `data`
/// and of `log` have been called when this fails.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_open_callbacks_with_data(
    callbacks: *const qcr_block_callbacks,
    data: *const qcr_block_callbacks,
    options: *const qcr_options,
    log: *const qcr_log,
    image: *mut *mut qcr_image,
    error: *mut qcr_error,
) -> c_int {
    // Before anything can fail: `destroy` of all must run even then.
    // SAFETY: the header's rules for structs and callbacks.
    let (callbacks, data, log) = unsafe { (Callbacks::adopt(callbacks), Callbacks::adopt(data), Log::adopt(log)) };
    let body = || {
        let (callbacks, data, log) = (callbacks?, data?, log?);
        let out = not_null(image)?;
        let devices = |options: &Options| {
            let read_only = options.read_only;
            Ok((Device::on(callbacks, read_only)?, Some(Device::on(data, read_only)?)))
        };
        let opened = qcr_image::open(options, None, log, devices)?;
        // SAFETY: not NULL, and the caller has room for a pointer there.
        unsafe { out.write(Box::into_raw(opened)) };
        Ok(())
    };
    // SAFETY: the header's rule for errors.
    unsafe { call(error, body) }
}

fn not_null(image: *mut *mut qcr_image) -> Result<*mut *mut qcr_image, Fault> {
    if image.is_null() { Err(Fault::null("image")) } else { Ok(image) }
}

/// Stops the recycler, waits for the calls under way, makes everything durable and closes the image. Any thread,
/// also while others use the image: their later calls fail with -EBADF. Closing twice does nothing. Not from a
/// callback of the same image.
///
/// Errors: the device's, or -ENOTRECOVERABLE after a fault of the library: from that fault on nothing more is
/// written to the image, which is as after a power cut and can be opened again. The image is closed whatever the
/// error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_close(image: *mut qcr_image, error: *mut qcr_error) -> c_int {
    let body = |image: &qcr_image| Ok(image.disk.close()?);
    // SAFETY: the header's rules for images and errors.
    unsafe {
        if image.as_ref().is_some_and(|image| image.fuse.is_blown() || image.disk.image().has_panicked()) {
            // No use of the image is left but this: its device refuses everything, so only threads and memory end here.
            let _ = contain(|| body(&*image));
        }
        on_image(image, error, body)
    }
}

/// Frees an image, and closes it first if that has not been done; an error then only reaches the log. `destroy` of
/// the callbacks and of the log have run when this returns. NULL is ignored.
///
/// Any thread, but it must be the last call on the image: no other may be under way. Not from a callback of the
/// same image.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_free(image: *mut qcr_image) {
    if image.is_null() {
        return;
    }
    // SAFETY: it came from an open call, and this is its last use.
    let image = unsafe { Box::from_raw(image) };
    let _ = contain(|| {
        drop(image);
        Ok(())
    });
}
