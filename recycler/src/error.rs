//! What can go wrong, once for the whole library: each variant is something a caller can act on.

use std::io;

/// The library's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call failed. [`Error::errno`] gives the C code, [`Error::offset`] and [`Error::field`] the place.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device failed a transfer. Nothing that was durable has changed.
    #[error("{action} at offset {offset:#x} of the image file failed: {source}")]
    Io {
        /// What was tried, e.g. `"reading an L2 table"`.
        action: &'static str,
        /// Where in the image file, in bytes.
        offset: u64,
        /// The device's error.
        source: io::Error,
    },
    /// The image contradicts the format, or itself.
    #[error("the image is invalid: {field} at offset {offset:#x}: {reason}")]
    Invalid {
        /// The field's name in QEMU's qcow2 specification.
        field: &'static str,
        /// Where the field stands in the image file, in bytes.
        offset: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// The image (or device) needs something that is not supported; nothing was changed.
    #[error("not supported: {what}")]
    Unsupported {
        /// The feature, by the format's own name.
        what: String,
    },
    /// A write to an image that was opened read-only.
    #[error("the image is open read-only")]
    ReadOnly,
    /// An earlier failure left the handle read-only: what it wrote since the last flush may be lost. Reopen the image.
    #[error("the image has become read-only: {reason}; close and open it again")]
    Failed {
        /// The failure that did it.
        reason: String,
    },
    /// A request reaches past the end of the virtual disk.
    #[error("the request of {length} bytes at {offset:#x} reaches past the end of the disk ({size} bytes)")]
    OutOfRange {
        /// Start of the request on the virtual disk, in bytes.
        offset: u64,
        /// Length of the request in bytes.
        length: u64,
        /// Size of the virtual disk in bytes.
        size: u64,
    },
    /// A request that is not aligned to 512 bytes.
    #[error("the request of {length} bytes at {offset:#x} is not aligned to 512 bytes")]
    Misaligned {
        /// Start of the request on the virtual disk, in bytes.
        offset: u64,
        /// Length of the request in bytes.
        length: u64,
    },
    /// Somebody else uses the image file.
    #[error("the image is in use: {holder}")]
    Locked {
        /// Who holds which lock, as far as the system tells.
        holder: String,
    },
    /// A backing file that the caller did not allow to be opened.
    #[error("the image has the backing file {path:?}, and opening it is not allowed ({reason})")]
    BackingNotAllowed {
        /// The name as the image gives it.
        path: String,
        /// Which permission is missing.
        reason: String,
    },
    /// The backing file could not be opened, or is no image that can be.
    #[error("the backing file {path:?}: {source}")]
    Backing {
        /// Its path, or the name as the image gives it.
        path: String,
        /// What went wrong with it.
        source: Box<Error>,
    },
    /// An external data file that the caller did not allow to be opened.
    #[error("the image has the external data file {path:?}, and opening it is not allowed ({reason})")]
    DataFileNotAllowed {
        /// The name as the image gives it.
        path: String,
        /// Which permission is missing.
        reason: String,
    },
    /// The external data file could not be opened.
    #[error("the external data file {path:?}: {source}")]
    DataFile {
        /// Its path.
        path: String,
        /// What went wrong with it.
        source: Box<Error>,
    },
    /// The image is encrypted, and was opened without its passphrase: what it holds can neither be read nor written.
    #[error("the image is encrypted, and no passphrase was given: its contents can neither be read nor written")]
    PassphraseNeeded,
    /// The passphrase opens none of the image's key slots. Nothing was changed.
    #[error("the passphrase is wrong: it opens none of the image's key slots")]
    WrongPassphrase,
    /// An option with an unknown name or an unusable value.
    #[error("option {name}: {reason}")]
    BadOption {
        /// The option's name.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The handle is closed.
    #[error("the image is closed")]
    Closed,
    /// The caller cancelled the work; the image is consistent.
    #[error("cancelled")]
    Cancelled,
}

impl Error {
    /// Whether the device has no room for more.
    pub(crate) fn is_lack_of_space(&self) -> bool {
        use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        matches!(self, Error::Io { source, .. } if matches!(source.kind(), StorageFull | QuotaExceeded | FileTooLarge))
    }

    /// The positive errno value that names this error in C.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Error::Io { source, .. } => source.raw_os_error().unwrap_or(match source.kind() {
                io::ErrorKind::UnexpectedEof => libc::EIO,
                io::ErrorKind::StorageFull => libc::ENOSPC,
                io::ErrorKind::Unsupported => libc::EOPNOTSUPP,
                io::ErrorKind::NotFound => libc::ENOENT,
                io::ErrorKind::PermissionDenied => libc::EACCES,
                io::ErrorKind::InvalidInput => libc::EINVAL,
                _ => libc::EIO,
            }),
            Error::Invalid { .. } => libc::EUCLEAN,
            Error::Unsupported { .. } => libc::EOPNOTSUPP,
            Error::ReadOnly | Error::Failed { .. } => libc::EROFS,
            Error::OutOfRange { .. } | Error::Misaligned { .. } | Error::BadOption { .. } => libc::EINVAL,
            Error::Locked { .. } => libc::EAGAIN,
            Error::BackingNotAllowed { .. } | Error::DataFileNotAllowed { .. } => libc::EPERM,
            Error::Backing { source, .. } | Error::DataFile { source, .. } => source.errno(),
            Error::PassphraseNeeded => libc::ENOKEY,
            Error::WrongPassphrase => libc::EKEYREJECTED,
            Error::Closed => libc::EBADF,
            Error::Cancelled => libc::ECANCELED,
        }
    }

    /// The offset (bytes) that the error speaks of: in the image file, or on the virtual disk for requests out of range.
    #[must_use]
    pub fn offset(&self) -> Option<u64> {
        match self {
            Error::Io { offset, .. }
            | Error::Invalid { offset, .. }
            | Error::OutOfRange { offset, .. }
            | Error::Misaligned { offset, .. } => Some(*offset),
            _ => None,
        }
    }

    /// The header field, table entry or option that the error speaks of.
    #[must_use]
    pub fn field(&self) -> Option<&str> {
        match self {
            Error::Invalid { field, .. } => Some(field),
            Error::BadOption { name, .. } => Some(name),
            _ => None,
        }
    }

    pub(crate) fn invalid(field: &'static str, offset: u64, reason: impl Into<String>) -> Self {
        Error::Invalid { field, offset, reason: reason.into() }
    }

    pub(crate) fn unsupported(what: impl Into<String>) -> Self {
        Error::Unsupported { what: what.into() }
    }

    pub(crate) fn io(action: &'static str, offset: u64) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io { action, offset, source }
    }
}
