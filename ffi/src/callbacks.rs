//! Block callbacks
//!
//! The bytes of an image where the program keeps them: a volume, a network store, memory. (For a file on the host,
//! qcr_open_path() does it all.)
//!
//! - All offsets and lengths are in bytes. Transfers are whole: a callback returns 0 when everything was moved, or a
//!   negative errno; any other value counts as -EIO. The error reaches the call of the library that needed the
//!   transfer, and with it the program.
//! - Callbacks are called from the threads that call the library and from the recycler's thread, several at once. No
//!   lock of the library is held meanwhile: a callback may take its time, and may call the library again, on other
//!   images anything, on its own image qcr_get_info(), qcr_get_stats() and qcr_stats_prometheus().
//! - They must return by themselves: no longjmp, no C++ exception may leave them.
//! - The library never asks for bytes past the length it knows: what `length` said at the start and `truncate` made
//!   since.
//! - Until a `flush` that began later has succeeded, what a completed call did may be lost in a power cut, in any
//!   order and in parts of 512 bytes. After that it may not. If a `flush` fails, the image becomes read-only.

use std::ffi::{c_int, c_void};

use crate::abi::{Shared, copy_in};
use crate::error::Fault;

/// The most areas of memory that one callback is given.
pub const QCR_IOV_MAX: u32 = 64;

/// Something that was submitted to the program.
pub struct qcr_io {
    _opaque: [u8; 0],
}

/// How the library reaches the bytes of an image. The library copies the struct. Members marked so may be NULL.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct qcr_block_callbacks {
    /// sizeof(struct qcr_block_callbacks), set by the caller.
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// Passed to every callback.
    pub user: *mut c_void,
    /// Called exactly once when no callback will be called any more, so that `user` can be freed: at the latest
    /// when qcr_free() of the image returns; and before the function that took the struct returns, if that fails
    /// for whatever reason or makes no image (qcr_create_callbacks(), qcr_check_callbacks()). The one exception is
    /// a struct_size too small for this member. May be NULL.
    pub destroy: Option<unsafe extern "C" fn(user: *mut c_void)>,
    /// Fills `iovcnt` areas (1 to QCR_IOV_MAX), in order, from `offset`. NULL only beside `submit_preadv`.
    pub preadv:
        Option<unsafe extern "C" fn(user: *mut c_void, iov: *const libc::iovec, iovcnt: c_int, offset: u64) -> c_int>,
    /// Stores `iovcnt` areas (1 to QCR_IOV_MAX), in order, at `offset`. The guest may change the memory meanwhile.
    /// NULL only beside `submit_pwritev`, or for an image opened with QCR_READ_ONLY.
    pub pwritev:
        Option<unsafe extern "C" fn(user: *mut c_void, iov: *const libc::iovec, iovcnt: c_int, offset: u64) -> c_int>,
    /// Makes everything durable that completed before. NULL only beside `submit_flush`, or for an image opened with
    /// QCR_READ_ONLY.
    pub flush: Option<unsafe extern "C" fn(user: *mut c_void) -> c_int>,
    /// Stores the device's length in `*length`.
    pub length: Option<unsafe extern "C" fn(user: *mut c_void, length: *mut u64) -> c_int>,
    /// Makes the device `length` bytes long, longer or shorter. New bytes read as zeroes, also where there were
    /// others before the device was once shortened. NULL: the device's length is fixed; qcr_get_stats() then tells
    /// how much of it is in use.
    pub truncate: Option<unsafe extern "C" fn(user: *mut c_void, length: u64) -> c_int>,
    /// Makes a range read as zeroes and gives its space back. May be NULL, and may return -EOPNOTSUPP.
    pub punch_hole: Option<unsafe extern "C" fn(user: *mut c_void, offset: u64, length: u64) -> c_int>,
    /// Makes a range read as zeroes and keeps its space, cheaper than by writing. May be NULL, and may return
    /// -EOPNOTSUPP.
    pub write_zeroes: Option<unsafe extern "C" fn(user: *mut c_void, offset: u64, length: u64) -> c_int>,
    /// Copies `length` bytes inside the device; the ranges do not overlap. May be NULL, and may return -EOPNOTSUPP.
    pub copy_range: Option<unsafe extern "C" fn(user: *mut c_void, from: u64, to: u64, length: u64) -> c_int>,
    /// Begins what `preadv` does, and returns; qcr_io_complete() tells of the end. This and the next two: see
    /// "Asynchronous block callbacks". May be NULL.
    pub submit_preadv: Option<
        unsafe extern "C" fn(user: *mut c_void, iov: *const libc::iovec, iovcnt: c_int, offset: u64, io: *mut qcr_io),
    >,
    /// Begins what `pwritev` does. May be NULL.
    pub submit_pwritev: Option<
        unsafe extern "C" fn(user: *mut c_void, iov: *const libc::iovec, iovcnt: c_int, offset: u64, io: *mut qcr_io),
    >,
    /// Begins what `flush` does: for what completed before this was called. May be NULL.
    pub submit_flush: Option<unsafe extern "C" fn(user: *mut c_void, io: *mut qcr_io)>,
}

// SAFETY: integers, and pointers that may be NULL; no padding.
unsafe impl Shared for qcr_block_callbacks {
    const NAME: &'static str = "callbacks";
}

/// What every struct with callbacks starts with, so that `destroy` can run even if the rest cannot be understood.
#[derive(Clone, Copy)]
#[repr(C)]
struct Head {
    struct_size: u32,
    flags: u32,
    user: *mut c_void,
    destroy: Option<unsafe extern "C" fn(*mut c_void)>,
}

/// Where [`Head`] ends, in bytes.
pub(crate) const DESTROY_END: usize = size_of::<Head>();
const _: () = assert!(std::mem::offset_of!(qcr_block_callbacks, preadv) == DESTROY_END);

/// The program's data, until `destroy`, which dropping this calls.
pub(crate) struct UserData {
    user: *mut c_void,
    destroy: Option<unsafe extern "C" fn(*mut c_void)>,
}

// SAFETY: the header requires callbacks to accept calls from any thread, several at once.
unsafe impl Send for UserData {}
// SAFETY: as above.
unsafe impl Sync for UserData {}

impl UserData {
    /// Takes over the data of a struct with callbacks that is not NULL.
    ///
    /// # Safety
    /// `theirs` starts with a [`Head`] if its size says so, and the header's rules for callbacks hold.
    pub(crate) unsafe fn adopt<T: Shared>(theirs: *const T) -> Result<Self, Fault> {
        // SAFETY: every struct starts with its size.
        let size = unsafe { theirs.cast::<u32>().read_unaligned() } as usize;
        if size < DESTROY_END {
            return Err(Fault::argument(T::NAME, format!("struct_size is {size}")));
        }
        // SAFETY: the size says so.
        let head = unsafe { theirs.cast::<Head>().read_unaligned() };
        Ok(UserData { user: head.user, destroy: head.destroy })
    }

    pub(crate) fn user(&self) -> *mut c_void {
        self.user
    }
}

impl Drop for UserData {
    fn drop(&mut self) {
        if let Some(destroy) = self.destroy {
            // SAFETY: the header's rules for callbacks; a value is dropped once.
            unsafe { destroy(self.user) }
        }
    }
}

/// Block callbacks that the library has taken over.
pub(crate) struct Callbacks {
    pub(crate) owner: UserData,
    pub(crate) verbs: qcr_block_callbacks,
}

// SAFETY: the verbs are function pointers and the owner's `user` again.
unsafe impl Send for Callbacks {}
// SAFETY: as above.
unsafe impl Sync for Callbacks {}

impl Callbacks {
    /// Takes block callbacks over. From here on `destroy` runs exactly once, however this ends.
    ///
    /// # Safety
    /// The header's rules for structs and callbacks.
    pub(crate) unsafe fn adopt(callbacks: *const qcr_block_callbacks) -> Result<Self, Fault> {
        if callbacks.is_null() {
            return Err(Fault::null(qcr_block_callbacks::NAME));
        }
        // SAFETY: as promised by the caller.
        let (owner, verbs) = unsafe { (UserData::adopt(callbacks)?, copy_in(callbacks)) };
        let verbs = verbs?;
        crate::abi::known_flags(verbs.flags, 0)?;
        let cannot_read = verbs.preadv.is_none() && verbs.submit_preadv.is_none();
        needed([("preadv", cannot_read), ("length", verbs.length.is_none())])?;
        Ok(Callbacks { owner, verbs })
    }

    /// Refuses callbacks that cannot write.
    pub(crate) fn ensure_writable(&self) -> Result<(), Fault> {
        let verbs = &self.verbs;
        let cannot_write = verbs.pwritev.is_none() && verbs.submit_pwritev.is_none();
        needed([("pwritev", cannot_write), ("flush", verbs.flush.is_none() && verbs.submit_flush.is_none())])
    }
}

/// Names the first that is missing.
fn needed(members: [(&'static str, bool); 2]) -> Result<(), Fault> {
    members.iter().find(|(_, missing)| *missing).map_or(Ok(()), |(name, _)| Err(Fault::null(name)))
}
