//! Errors
//!
//! A function that can fail returns 0 or a negative errno value. It also takes a `struct qcr_error *` as its last
//! argument, the caller's own, which it fills when it fails and leaves alone otherwise. NULL: the caller wants no
//! details. Nothing about errors is kept in the library or in a thread.
//!
//! The values have these meanings everywhere; a block callback's own error is passed on with its own value:
//!
//! | value            | meaning |
//! |------------------|---------|
//! | -EINVAL          | an argument, option or struct is unusable: `field` names it |
//! | -E2BIG           | a struct asks for something that only a newer library knows |
//! | -EUCLEAN         | the image contradicts its format: `field` and `offset` say where |
//! | -EOPNOTSUPP      | the image or the device needs something that is not supported; nothing was changed |
//! | -EROFS           | the image is open read-only, or an earlier failure made it so |
//! | -EAGAIN          | another process uses the image |
//! | -EPERM           | the image has a backing file that the options do not allow to be opened |
//! | -ENOKEY          | the image is encrypted, and the options name no passphrase |
//! | -EKEYREJECTED    | the passphrase is wrong; nothing was changed |
//! | -ENOSPC          | the file system or the device is full; nothing that was durable has changed |
//! | -EBADF           | the image is closed |
//! | -EBUSY           | something that excludes this call is under way |
//! | -ECANCELED       | the caller cancelled the work; the image is consistent |
//! | -ENOTRECOVERABLE | the library found a fault of its own: see qcr_close() |

use std::ffi::{c_char, c_int};

use crate::abi::{self, Out, Shared};

/// What went wrong, in detail. Set struct_size (see QCR_INIT) once; the struct can then be used again and again.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct qcr_error {
    /// sizeof(struct qcr_error), set by the caller.
    pub struct_size: u32,
    /// The value the function returned: a negative errno.
    pub code: i32,
    /// The byte that the error speaks of: in the image file, or on the virtual disk for a request that does not fit
    /// it; -1 if it speaks of none.
    pub offset: i64,
    /// The header field, table entry, option or argument that the error speaks of, or "".
    pub field: [c_char; 48],
    /// One line for a person to read, UTF-8.
    pub message: [c_char; 448],
}

// SAFETY: integers only, no padding.
unsafe impl Shared for qcr_error {
    const NAME: &'static str = "error";
}

/// Why a call fails. In a box, so that calls which do not fail return little.
#[derive(Clone, Debug)]
pub(crate) struct Fault(Box<Details>);

#[derive(Clone, Debug)]
struct Details {
    errno: i32,
    offset: Option<u64>,
    field: String,
    message: String,
}

impl Fault {
    pub(crate) fn new(errno: i32, message: impl Into<String>) -> Self {
        Fault(Box::new(Details { errno, offset: None, field: String::new(), message: message.into() }))
    }

    pub(crate) fn field(mut self, field: &str) -> Self {
        field.clone_into(&mut self.0.field);
        self
    }

    /// An argument, or a member of one, that cannot be used.
    pub(crate) fn argument(name: &str, reason: impl AsRef<str>) -> Self {
        Fault::new(libc::EINVAL, format!("{name}: {}", reason.as_ref())).field(name)
    }

    /// A NULL where something is needed.
    pub(crate) fn null(name: &str) -> Self {
        Fault::argument(name, "is NULL")
    }

    #[cfg(test)]
    pub(crate) fn errno(&self) -> i32 {
        self.0.errno
    }

    /// Fills the caller's details, if there are any, and gives the value to return.
    pub(crate) fn report(self, details: Option<Out<qcr_error>>) -> c_int {
        let Details { errno, offset, field, message } = *self.0;
        let code = -errno;
        if let Some(details) = details {
            let mut ours = qcr_error {
                code,
                offset: offset.map_or(-1, |o| i64::try_from(o).unwrap_or(i64::MAX)),
                ..qcr_error::zeroed()
            };
            abi::store_text(&mut ours.field, &field);
            abi::store_text(&mut ours.message, &message);
            details.store(ours);
        }
        code
    }
}

impl From<qcow_recycler::Error> for Fault {
    #[cold]
    fn from(e: qcow_recycler::Error) -> Self {
        // 0 would read as success, and beyond 4095 the kernel itself sees no errno.
        let errno = Some(e.errno()).filter(|n| (1..4096).contains(n)).unwrap_or(libc::EIO);
        let field = e.field().unwrap_or_default().to_owned();
        Fault(Box::new(Details { errno, offset: e.offset(), field, message: e.to_string() }))
    }
}

impl From<std::io::Error> for Fault {
    fn from(source: std::io::Error) -> Self {
        let message = source.to_string();
        let errno = qcow_recycler::Error::Io { action: "", offset: 0, source }.errno();
        Fault::new(errno, message)
    }
}
