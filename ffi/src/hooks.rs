//! Faults on purpose, for the library's own tests: never in a library that is installed.

use std::ffi::c_int;
use std::sync::atomic::{AtomicPtr, Ordering};

use crate::boundary::{Fuse, on_image};
use crate::error::qcr_error;
use crate::image::qcr_image;

/// The fuse of the handle whose device panics when it is used next.
static ARMED: AtomicPtr<Fuse> = AtomicPtr::new(std::ptr::null_mut());

/// Panics in the call itself.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_test_panic(image: *mut qcr_image, error: *mut qcr_error) -> c_int {
    // Unlike `panic!`, this prints nothing.
    let body = |_: &qcr_image| std::panic::resume_unwind(Box::new("on purpose"));
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}

/// Makes the image's device panic when it is used next, deep inside a call or in the recycler.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcr_test_panic_in_device(image: *mut qcr_image, error: *mut qcr_error) -> c_int {
    let body = |image: &qcr_image| {
        ARMED.store(std::ptr::from_ref::<Fuse>(image.fuse()).cast_mut(), Ordering::SeqCst);
        Ok(())
    };
    // SAFETY: the header's rules for images and errors.
    unsafe { on_image(image, error, body) }
}

pub(crate) fn panic_if_armed(fuse: &Fuse) {
    let fuse = std::ptr::from_ref(fuse).cast_mut();
    if ARMED.compare_exchange(fuse, std::ptr::null_mut(), Ordering::SeqCst, Ordering::SeqCst).is_ok() {
        std::panic::resume_unwind(Box::new("on purpose, in the device"));
    }
}
