//! A Python object as a block device.

use std::io;

use pyo3::exceptions::{PyEOFError, PyRuntimeError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes, PyMemoryView};
use qcow_recycler::buf::{IoBuf, IoBufMut};
use qcow_recycler::device::Features;

use crate::errors;

/// A Python object with the methods of `qcow_recycler.BlockDevice`.
///
/// The object never sees the library's own memory: it may keep the memoryview it is given for ever, and no view of
/// borrowed memory could be taken back from it. Hence one copy for each transfer.
pub(crate) struct PyDevice {
    object: Py<PyAny>,
    features: Features,
}

impl PyDevice {
    /// Looks once for the optional methods; the mandatory ones are missed when they are called.
    pub(crate) fn new(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let has = |name: &str| object.hasattr(name);
        let features = Features {
            resize: has("truncate")?,
            punch_hole: has("punch_hole")?,
            write_zeroes: has("write_zeroes")?,
            copy_range: has("copy_range")?,
        };
        Ok(PyDevice { object: object.clone().unbind(), features })
    }

    pub(crate) fn features(&self) -> Features {
        self.features
    }

    pub(crate) fn length(&self) -> io::Result<u64> {
        attached(|py| self.object.bind(py).call_method0(intern!(py, "length"))?.extract())
    }

    pub(crate) fn read(&self, offset: u64, mut buf: IoBufMut<'_>) -> io::Result<()> {
        attached(|py| {
            let bytes = PyByteArray::new_with(py, buf.len(), |_| Ok(()))?;
            let view = PyMemoryView::from(&bytes)?;
            let moved = self.object.bind(py).call_method1(intern!(py, "pread"), (offset, &view))?;
            whole("pread", &moved, buf.len())?;
            if bytes.len() != buf.len() {
                return Err(PyRuntimeError::new_err("pread() has resized its buffer"));
            }
            // SAFETY: no Python code runs before the slice is gone, since this thread is attached and calls none; so
            // nothing resizes the array or writes to it.
            buf.copy_from(unsafe { bytes.as_bytes() });
            Ok(())
        })
    }

    pub(crate) fn write(&self, offset: u64, buf: IoBuf<'_>) -> io::Result<()> {
        attached(|py| {
            let bytes = PyBytes::new_with(py, buf.len(), |out| {
                buf.copy_to(out);
                Ok(())
            })?;
            let view = PyMemoryView::from(&bytes)?;
            let moved = self.object.bind(py).call_method1(intern!(py, "pwrite"), (offset, view))?;
            whole("pwrite", &moved, buf.len())
        })
    }

    pub(crate) fn flush(&self) -> io::Result<()> {
        attached(|py| self.object.bind(py).call_method0(intern!(py, "flush")).map(drop))
    }

    pub(crate) fn truncate(&self, length: u64) -> io::Result<()> {
        attached(|py| self.object.bind(py).call_method1(intern!(py, "truncate"), (length,)).map(drop))
    }

    pub(crate) fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        attached(|py| self.object.bind(py).call_method1(intern!(py, "punch_hole"), (offset, length)).map(drop))
    }

    pub(crate) fn write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        attached(|py| self.object.bind(py).call_method1(intern!(py, "write_zeroes"), (offset, length)).map(drop))
    }

    pub(crate) fn copy_range(&self, from: u64, to: u64, length: u64) -> io::Result<()> {
        attached(|py| self.object.bind(py).call_method1(intern!(py, "copy_range"), (from, to, length)).map(drop))
    }
}

/// Runs `call` attached to the interpreter, from whatever thread this is.
fn attached<T>(call: impl for<'py> FnOnce(Python<'py>) -> PyResult<T>) -> io::Result<T> {
    Python::try_attach(|py| call(py).map_err(|raised| errors::to_io(py, raised)))
        .unwrap_or_else(|| Err(io::Error::other("the Python interpreter is shutting down")))
}

/// A method that returns a count, as `os.preadv` does, must have moved everything.
fn whole(method: &str, moved: &Bound<'_, PyAny>, length: usize) -> PyResult<()> {
    if moved.is_none() || moved.extract::<usize>()? == length {
        return Ok(());
    }
    Err(PyEOFError::new_err(format!("{method}() moved {moved} of {length} bytes")))
}
