//! Walking over how a disk is stored.

use std::sync::atomic::{AtomicU64, Ordering};

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use crate::image::Image;
use crate::records;

/// The extents of a range of the virtual disk, in order; made by Image.extents().
///
/// Each is looked up when it is asked for. A position is all the state there is: threads that share an iterator may see
/// an extent twice, never a wrong one.
#[pyclass(frozen, module = "qcow_recycler._ext")]
pub(crate) struct Extents {
    image: Py<Image>,
    position: AtomicU64,
    end: u64,
}

impl Extents {
    pub(crate) fn new(image: Py<Image>, start: u64, end: u64) -> Self {
        Extents { image, position: AtomicU64::new(start), end }
    }
}

#[pymethods]
impl Extents {
    fn __iter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    fn __next__<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let offset = self.position.load(Ordering::Relaxed);
        if offset >= self.end {
            return Ok(None);
        }
        let extent = self.image.get().call(py, |disk| disk.extent(offset, self.end - offset))?;
        if extent.length == 0 {
            return Err(PyRuntimeError::new_err("the image reported an empty extent"));
        }
        self.position.store(offset.saturating_add(extent.length), Ordering::Relaxed);
        records::extent(py, offset, extent).map(Some)
    }
}
