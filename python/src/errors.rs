//! The library's errors as the exceptions of `qcow_recycler.errors`.

use std::io;

use pyo3::exceptions::PyException;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use qcow_recycler::Error;

fn class_name(error: &Error) -> &'static str {
    match error {
        Error::Io { source, .. } => match source.kind() {
            io::ErrorKind::NotFound => "NotFound",
            io::ErrorKind::PermissionDenied => "PermissionDenied",
            io::ErrorKind::AlreadyExists => "AlreadyExists",
            _ => "DeviceError",
        },
        Error::Invalid { .. } => "InvalidImage",
        Error::Unsupported { .. } => "Unsupported",
        Error::ReadOnly => "ReadOnly",
        Error::Failed { .. } => "Failed",
        Error::OutOfRange { .. } => "OutOfRange",
        Error::Misaligned { .. } => "Misaligned",
        Error::Locked { .. } => "Locked",
        Error::BackingNotAllowed { .. } => "BackingNotAllowed",
        Error::DataFileNotAllowed { .. } => "DataFileNotAllowed",
        Error::BadOption { .. } => "BadOption",
        Error::PassphraseNeeded => "PassphraseNeeded",
        Error::WrongPassphrase => "WrongPassphrase",
        Error::Closed => "Closed",
        Error::Cancelled => "Cancelled",
        Error::Backing { .. } => "BackingError",
        Error::DataFile { .. } => "DataFileError",
        _ => "Error",
    }
}

/// The exception for `error`, about the image file `filename`. What a Python block device raised becomes its cause; an
/// interrupt or exit request that a device passed on is raised itself.
pub(crate) fn to_python(py: Python<'_>, error: Error, filename: Option<&str>) -> PyErr {
    let cause = match &error {
        Error::Io { source, .. } => source.get_ref().and_then(|e| e.downcast_ref::<PyErr>()).map(|e| e.clone_ref(py)),
        _ => None,
    };
    if let Some(raised) = &cause
        && !raised.is_instance_of::<PyException>(py)
    {
        return raised.clone_ref(py);
    }
    match build(py, &error, cause.as_ref(), filename) {
        Ok(exception) => {
            exception.set_cause(py, cause);
            exception
        }
        Err(failure) => failure,
    }
}

fn build(py: Python<'_>, error: &Error, cause: Option<&PyErr>, filename: Option<&str>) -> PyResult<PyErr> {
    let class = py.import("qcow_recycler.errors")?.getattr(class_name(error))?;
    let errno = cause.and_then(|raised| errno_of(py, raised)).unwrap_or_else(|| error.errno());
    let details = PyDict::new(py);
    details.set_item("offset", error.offset())?;
    details.set_item("field", error.field())?;
    Ok(PyErr::from_value(class.call((errno, error.to_string(), filename), Some(&details))?))
}

fn errno_of(py: Python<'_>, raised: &PyErr) -> Option<i32> {
    raised.value(py).getattr("errno").ok()?.extract::<i32>().ok().filter(|&errno| errno > 0)
}

/// The exception for the use of an image that belongs to the parent process.
pub(crate) fn inherited(py: Python<'_>, filename: Option<&str>) -> PyErr {
    let message = "the image was opened before fork(), and this child process must not use it";
    let build =
        || py.import("qcow_recycler.errors")?.getattr("Closed")?.call1((Error::Closed.errno(), message, filename));
    build().map_or_else(|failure| failure, PyErr::from_value)
}

/// What a Python block device raised, as the device error that carries it through the library.
pub(crate) fn to_io(py: Python<'_>, raised: PyErr) -> io::Error {
    let kind = errno_of(py, &raised).map_or(io::ErrorKind::Other, |errno| io::Error::from_raw_os_error(errno).kind());
    io::Error::new(kind, raised)
}
