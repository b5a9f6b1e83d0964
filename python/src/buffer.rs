//! Guest buffers that belong to Python objects.

use std::ffi::c_void;

use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::PyBufferError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use qcow_recycler::buf::{IoBuf, IoBufMut, IoVec};

/// The memory of a Python object, held by the buffer protocol: it can neither move nor go away before this is dropped.
/// Other Python threads may change its bytes meanwhile, as a guest may change its memory.
pub(crate) struct Memory {
    held: PyUntypedBuffer,
    area: IoVec,
}

impl Memory {
    /// # Errors
    /// `TypeError` without the buffer protocol, `BufferError` if the bytes are not one contiguous run.
    pub(crate) fn readable(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let held = PyUntypedBuffer::get(object)?;
        if !held.is_c_contiguous() {
            return Err(PyBufferError::new_err("the buffer is not contiguous"));
        }
        let area = IoVec { iov_base: held.buf_ptr().cast::<c_void>(), iov_len: held.len_bytes() };
        Ok(Memory { held, area })
    }

    /// # Errors
    /// As [`readable`](Self::readable), and `BufferError` if the object is read-only.
    pub(crate) fn writable(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let memory = Self::readable(object)?;
        if memory.held.readonly() {
            return Err(PyBufferError::new_err("the buffer is read-only"));
        }
        Ok(memory)
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.area.iov_len
    }

    /// Where the bytes are.
    pub(crate) fn area(&self) -> IoVec {
        self.area
    }

    /// What keeps the bytes where they are.
    pub(crate) fn into_held(self) -> PyUntypedBuffer {
        self.held
    }

    /// The bytes, as the source of a write.
    pub(crate) fn source(&self) -> IoBuf<'_> {
        // SAFETY: `held` keeps the one area readable for as long as `self` is borrowed.
        unsafe { IoBuf::from_iovecs(std::slice::from_ref(&self.area)) }
    }

    /// The bytes, as the destination of a read. Only for [`writable`](Self::writable) memory.
    pub(crate) fn destination(&mut self) -> IoBufMut<'_> {
        debug_assert!(!self.held.readonly());
        // SAFETY: `held` keeps the one area writable for as long as `self` is borrowed, and Python forms no Rust
        // reference to it.
        unsafe { IoBufMut::from_iovecs(std::slice::from_ref(&self.area)) }
    }
}

/// A bytes object that nobody else has yet, and where its bytes are. They may be written as long as that is so.
pub(crate) fn new_bytes(py: Python<'_>, length: usize) -> PyResult<(Py<PyBytes>, IoVec)> {
    let bytes = PyBytes::new_with(py, length, |_| Ok(()))?;
    // SAFETY: it is a bytes object.
    let start = unsafe { pyo3::ffi::PyBytes_AsString(bytes.as_ptr()) };
    Ok((bytes.unbind(), IoVec { iov_base: start.cast(), iov_len: length }))
}
