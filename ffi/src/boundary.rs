//! The one place where calls from C enter, and where panics end.

use std::any::Any;
use std::ffi::c_int;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};

use qcow_recycler::Image;

use crate::abi::Out;
use crate::device::Device;
use crate::error::{Fault, qcr_error};
use crate::image::qcr_image;

/// Set for good when a call on a handle has panicked. The state in memory may then contradict itself, so nothing of
/// it may reach the image any more: every later call is refused, and so is everything that the handle's device is
/// asked to do, which also keeps the recycler and the write-back of a close from the image.
#[derive(Debug, Default)]
pub(crate) struct Fuse(AtomicBool);

impl Fuse {
    pub(crate) fn blow(&self) {
        self.0.store(true, Ordering::Release);
    }

    pub(crate) fn is_blown(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Runs `body`, turning what it returns, or its panic, into C's terms.
///
/// # Safety
/// `error` is NULL or points at as many writable bytes as its first member says.
pub(crate) unsafe fn call(error: *mut qcr_error, body: impl FnOnce() -> Result<(), Fault>) -> c_int {
    // SAFETY: as promised by the caller.
    let details = match unsafe { Out::optional(error) } {
        Ok(details) => details,
        Err(fault) => return fault.report(None),
    };
    match contain(body) {
        Ok(()) => 0,
        Err(fault) => fault.report(details),
    }
}

/// As [`call`], on an image; a panic blows its fuse.
///
/// # Safety
/// As there; `image` is NULL or an image that is not freed before this returns.
#[inline]
pub(crate) unsafe fn on_image(
    image: *const qcr_image,
    error: *mut qcr_error,
    body: impl FnOnce(&qcr_image) -> Result<(), Fault>,
) -> c_int {
    // SAFETY: as promised by the caller.
    let image = unsafe { image.as_ref() };
    let run = || {
        let image = image.ok_or_else(|| Fault::null("image"))?;
        if image.disk().image().has_panicked() {
            image.fuse().blow();
        }
        if image.fuse().is_blown() {
            return Err(already_poisoned());
        }
        body(image)
    };
    // SAFETY: as promised by the caller.
    let details = match unsafe { Out::optional(error) } {
        Ok(details) => details,
        Err(fault) => return fault.report(None),
    };
    let result = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|payload| {
        if let Some(image) = image {
            image.fuse().blow();
        }
        Err(poisoned(&describe(payload)))
    });
    match result {
        Ok(()) => 0,
        Err(fault) => fault.report(details),
    }
}

/// Runs `body` unless the fuse is blown; a panic blows it.
pub(crate) fn guarded(
    image: &Image<Device>,
    fuse: &Fuse,
    body: impl FnOnce() -> Result<(), Fault>,
) -> Result<(), Fault> {
    if image.has_panicked() {
        fuse.blow();
    }
    if fuse.is_blown() {
        return Err(already_poisoned());
    }
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| {
        fuse.blow();
        Err(poisoned(&describe(payload)))
    })
}

/// Runs `body`, which touches no image that anybody else can see, and turns a panic into a fault.
pub(crate) fn contain<T>(body: impl FnOnce() -> Result<T, Fault>) -> Result<T, Fault> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| Err(poisoned(&describe(payload))))
}

#[cold]
fn already_poisoned() -> Fault {
    poisoned("an earlier call found a fault of the library; close the image")
}

#[cold]
fn poisoned(reason: &str) -> Fault {
    Fault::new(libc::ENOTRECOVERABLE, format!("internal fault: {reason}"))
}

fn describe(payload: Box<dyn Any + Send>) -> String {
    if let Some(text) = payload.downcast_ref::<&str>() {
        return (*text).to_owned();
    }
    payload.downcast::<String>().map(|text| *text).unwrap_or_else(|payload| {
        // Its destructor might panic again.
        std::mem::forget(payload);
        "unknown".to_owned()
    })
}
