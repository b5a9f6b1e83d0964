//! The class `Image`.

use std::ffi::c_int;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use pyo3::exceptions::{PyMemoryError, PyResourceWarning};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};
use qcow_recycler::buf::IoBufMut;
use qcow_recycler::{Disk, Error, Result};

use crate::buffer::Memory;
use crate::device::Device;
use crate::extents::Extents;
use crate::progress::Watcher;
use crate::{errors, records};

/// Reads longer than this are held against the disk's size before memory is taken for them.
const UNCHECKED_READ: usize = 1 << 20;

/// How many forks this process is away from the one that loaded the module. Not a process ID: those come again, and a child
/// in a new PID namespace may have its parent's.
static FORKS: AtomicU64 = AtomicU64::new(0);

/// Runs in every child, before anything else does.
extern "C" fn forked() {
    FORKS.fetch_add(1, Ordering::Relaxed);
}

unsafe extern "C" {
    fn pthread_atfork(
        prepare: Option<extern "C" fn()>,
        parent: Option<extern "C" fn()>,
        child: Option<extern "C" fn()>,
    ) -> c_int;
}

/// Lets images know when they are in a child process. Called once, before the first is opened.
///
/// # Errors
/// There is no memory.
pub(crate) fn count_forks() -> io::Result<()> {
    // SAFETY: the module is never unloaded, and `forked` does nothing that is forbidden after fork().
    match unsafe { pthread_atfork(None, None, Some(forked)) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// An open image; made by open() and open_device().
///
/// All offsets, lengths and sizes are in bytes; those of requests are multiples of 512. Any number of threads may use
/// one image. Every method raises qcow_recycler.Error, and Closed after close().
///
/// fork(): the child must not use an image that was opened before; what it inherits is left alone. There close(), and the end
/// of the object or of the child, do nothing, and every other call raises Closed. The file stays open in the child, and so
/// locked, until the child ends or executes another program. A function that the library calls (a device's method, a
/// progress function) may fork, but must not return in the child.
#[pyclass(frozen, weakref, module = "qcow_recycler._ext")]
pub(crate) struct Image {
    /// Taken out by `close`, so that the file and its locks go when the last call in flight has ended. Never locked
    /// while anything is waited for.
    disk: Mutex<Option<Arc<Disk<Device>>>>,
    filename: Option<String>,
    id: String,
    /// `FORKS` in the process that opened the image. In its children the image's threads do not exist, its locks may be
    /// held for ever, and what it believes of the file is no longer true: nothing of it is touched there, not even to free it.
    owner: u64,
}

impl Image {
    pub(crate) fn new(disk: Disk<Device>, filename: Option<String>, id: String) -> Self {
        Image { disk: Mutex::new(Some(Arc::new(disk))), filename, id, owner: FORKS.load(Ordering::Relaxed) }
    }

    /// Whether this process is a child of the one that opened the image.
    pub(crate) fn is_inherited(&self) -> bool {
        FORKS.load(Ordering::Relaxed) != self.owner
    }

    /// # Errors
    /// `Closed` in a child of the process that opened the image.
    pub(crate) fn ensure_own(&self, py: Python<'_>) -> PyResult<()> {
        if self.is_inherited() { Err(errors::inherited(py, self.filename.as_deref())) } else { Ok(()) }
    }

    fn disk(&self, py: Python<'_>) -> PyResult<Arc<Disk<Device>>> {
        self.ensure_own(py)?;
        let disk = self.disk.lock().clone();
        disk.ok_or_else(|| self.raise(py, Error::Closed))
    }

    pub(crate) fn raise(&self, py: Python<'_>, error: Error) -> PyErr {
        errors::to_python(py, error, self.filename.as_deref())
    }

    /// Before memory is taken for a read: whether the disk has so much there.
    pub(crate) fn check_length(&self, py: Python<'_>, offset: u64, length: usize) -> PyResult<()> {
        if length > UNCHECKED_READ {
            let size = self.disk(py)?.info().virtual_size;
            if (length as u64).checked_add(offset).is_none_or(|end| end > size) {
                return Err(self.raise(py, Error::OutOfRange { offset, length: length as u64, size }));
            }
        }
        if isize::try_from(length).is_err() {
            return Err(PyMemoryError::new_err(()));
        }
        Ok(())
    }

    /// Runs `work` with the interpreter's lock released.
    pub(crate) fn call<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&Disk<Device>) -> Result<T> + Send,
    ) -> PyResult<T> {
        let disk = self.disk(py)?;
        // The last user of a closed image drops it, which may wait for a thread that wants the interpreter's lock.
        py.detach(move || {
            let result = work(&disk);
            drop(disk);
            result
        })
        .map_err(|e| self.raise(py, e))
    }
}

#[pymethods]
impl Image {
    /// Returns `length` bytes from `offset`.
    fn read<'py>(&self, py: Python<'py>, offset: u64, length: usize) -> PyResult<Bound<'py, PyBytes>> {
        self.check_length(py, offset, length)?;
        PyBytes::new_with(py, length, |bytes| self.call(py, |disk| disk.read(offset, IoBufMut::new(bytes))))
    }

    /// Fills a writable buffer from `offset`, without a copy in between; returns its length.
    fn readinto(&self, py: Python<'_>, offset: u64, buffer: &Bound<'_, PyAny>) -> PyResult<usize> {
        let mut memory = Memory::writable(buffer)?;
        let destination = memory.destination();
        self.call(py, |disk| disk.read(offset, destination))?;
        Ok(memory.len())
    }

    /// Stores a buffer at `offset`, without a copy in between; returns its length.
    fn write(&self, py: Python<'_>, offset: u64, buffer: &Bound<'_, PyAny>) -> PyResult<usize> {
        let memory = Memory::readable(buffer)?;
        let source = memory.source();
        self.call(py, |disk| disk.write(offset, source))?;
        Ok(memory.len())
    }

    /// Stores whole clusters at `offset`, compressed as far as that saves room; returns the buffer's length.
    fn write_compressed(&self, py: Python<'_>, offset: u64, buffer: &Bound<'_, PyAny>) -> PyResult<usize> {
        let memory = Memory::readable(buffer)?;
        let source = memory.source();
        self.call(py, |disk| disk.write_compressed(offset, source))?;
        Ok(memory.len())
    }

    /// Frees a range: it reads as zeroes afterwards, or as the backing file where a discard means that.
    fn discard(&self, py: Python<'_>, offset: u64, length: u64) -> PyResult<()> {
        self.call(py, |disk| disk.discard(offset, length))
    }

    /// Makes a range read as zeroes; with `may_unmap` its clusters may be freed.
    #[pyo3(signature = (offset, length, may_unmap=true))]
    fn write_zeroes(&self, py: Python<'_>, offset: u64, length: u64, may_unmap: bool) -> PyResult<()> {
        self.call(py, |disk| disk.write_zeroes(offset, length, may_unmap))
    }

    /// Makes every completed write durable.
    fn flush(&self, py: Python<'_>) -> PyResult<()> {
        self.call(py, Disk::flush)
    }

    /// Changes the size of the virtual disk; cutting data off needs `shrink`.
    #[pyo3(signature = (size, shrink=false))]
    fn resize(&self, py: Python<'_>, size: u64, shrink: bool) -> PyResult<()> {
        self.call(py, |disk| disk.resize(size, shrink))
    }

    /// Iterates over how a range is stored: one record for each run of the same kind. The whole disk by default.
    #[pyo3(signature = (offset=0, length=None))]
    fn extents(slf: &Bound<'_, Self>, offset: u64, length: Option<u64>) -> PyResult<Extents> {
        let this = slf.get();
        let size = this.disk(slf.py())?.info().virtual_size;
        let length = length.unwrap_or_else(|| size.saturating_sub(offset));
        match offset.checked_add(length) {
            Some(end) if end <= size => Ok(Extents::new(slf.clone().unbind(), offset, end)),
            _ => Err(this.raise(slf.py(), Error::OutOfRange { offset, length, size })),
        }
    }

    /// Compacts the image now, on this thread, while others go on using it.
    ///
    /// `progress` is called with a Progress record, for each table that is searched and each MiB that is copied. Returning
    /// False cancels the work, which raises Cancelled; so does raising, and that exception goes on. Ctrl-C cancels too. A
    /// cancelled image is consistent.
    #[pyo3(signature = (progress=None))]
    fn compact<'py>(&self, py: Python<'py>, progress: Option<Py<PyAny>>) -> PyResult<Bound<'py, PyAny>> {
        let mut watcher = Watcher::new(progress);
        let result = self.call(py, |disk| disk.compact(|now| watcher.show(|py| records::progress(py, now))));
        watcher.finish()?;
        records::compact_report(py, &result?)
    }

    /// Compresses what the disk holds plainly, on this thread, while others go on using it; returns how many bytes of the disk
    /// are compressed now that were not. The file gets shorter with the next compaction. `progress` as for compact().
    #[pyo3(signature = (progress=None))]
    fn compress(&self, py: Python<'_>, progress: Option<Py<PyAny>>) -> PyResult<u64> {
        let mut watcher = Watcher::new(progress);
        let result = self.call(py, |disk| disk.compress(|now| watcher.show(|py| records::progress(py, now))));
        watcher.finish()?;
        Ok(result?.compressed)
    }

    /// The persistent bitmaps, in the image's order.
    fn bitmaps<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let found = self.call(py, Disk::bitmaps)?;
        let records: PyResult<Vec<_>> = found.into_iter().map(|bitmap| records::bitmap(py, bitmap)).collect();
        PyTuple::new(py, records?)
    }

    /// Adds an empty bitmap that marks what is written, in units of `granularity` bytes, if it is `recording`.
    #[pyo3(signature = (name, granularity=65536, recording=true))]
    fn add_bitmap(&self, py: Python<'_>, name: &str, granularity: u64, recording: bool) -> PyResult<()> {
        self.call(py, |disk| disk.add_bitmap(name, granularity, recording))
    }

    /// Removes a bitmap, also an inconsistent one.
    fn remove_bitmap(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        self.call(py, |disk| disk.image().remove_bitmap(name))
    }

    /// Takes all marks off a bitmap.
    fn clear_bitmap(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        self.call(py, |disk| disk.clear_bitmap(name))
    }

    /// Lets a bitmap mark what is written from now on, or stop to.
    fn record_bitmap(&self, py: Python<'_>, name: &str, recording: bool) -> PyResult<()> {
        self.call(py, |disk| disk.record_bitmap(name, recording))
    }

    /// Marks in `target` whatever `source` marks.
    fn merge_bitmap(&self, py: Python<'_>, target: &str, source: &str) -> PyResult<()> {
        self.call(py, |disk| disk.image().merge_bitmap(target, source))
    }

    /// The first range from byte `start` on that a bitmap marks, as (offset, length), or None.
    #[pyo3(signature = (name, start=0))]
    fn next_dirty(&self, py: Python<'_>, name: &str, start: u64) -> PyResult<Option<(u64, u64)>> {
        let found = self.call(py, |disk| disk.image().next_dirty(name, start))?;
        Ok(found.map(|range| (range.start, range.end - range.start)))
    }

    /// The internal snapshots, in the image's order.
    fn snapshots<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let found = self.call(py, Disk::snapshots)?;
        let records: PyResult<Vec<_>> = found.into_iter().map(|snapshot| records::snapshot(py, snapshot)).collect();
        PyTuple::new(py, records?)
    }

    /// Makes a snapshot of the disk, inside the image, and returns its description; others may go on using the image.
    fn create_snapshot<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
        let made = self.call(py, |disk| disk.create_snapshot(name))?;
        records::snapshot(py, made)
    }

    /// Deletes the snapshot with this ID or, if there is none, this name.
    fn delete_snapshot(&self, py: Python<'_>, id_or_name: &str) -> PyResult<()> {
        self.call(py, |disk| disk.delete_snapshot(id_or_name))
    }

    /// Lets the disk be what it was when a snapshot was made, its size included. The guest must not be running.
    fn apply_snapshot(&self, py: Python<'_>, id_or_name: &str) -> PyResult<()> {
        self.call(py, |disk| disk.apply_snapshot(id_or_name))
    }

    /// Checks the image while it is open.
    fn check<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let report = self.call(py, Disk::check)?;
        records::check_report(py, report)
    }

    /// What the image and its recycler are doing.
    #[getter]
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let stats = self.call(py, |disk| Ok(disk.stats()))?;
        records::stats(py, &stats)
    }

    /// The stats as Prometheus text, labelled with the image's id.
    fn prometheus(&self, py: Python<'_>) -> PyResult<String> {
        self.call(py, |disk| Ok(disk.stats().prometheus(&self.id)))
    }

    /// What the image is.
    #[getter]
    fn info<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let info = self.call(py, |disk| Ok(disk.info()))?;
        records::info(py, info)
    }

    /// Starts the recycler; does nothing if it runs already.
    fn start(&self, py: Python<'_>) -> PyResult<()> {
        self.call(py, Disk::start)
    }

    /// Lets the recycler finish its step, then rest.
    fn pause(&self, py: Python<'_>) -> PyResult<()> {
        self.call(py, |disk| {
            disk.pause();
            Ok(())
        })
    }

    /// Lets a paused recycler go on.
    fn resume(&self, py: Python<'_>) -> PyResult<()> {
        self.call(py, |disk| {
            disk.resume();
            Ok(())
        })
    }

    /// Stops the recycler and waits until it has ended.
    fn stop(&self, py: Python<'_>) -> PyResult<()> {
        self.call(py, |disk| {
            disk.stop();
            Ok(())
        })
    }

    /// Stops the recycler, writes everything back and closes the image, even if that fails; a second time does nothing.
    ///
    /// The file and its locks are let go when the last call that another thread is in has ended. Does nothing in a child of the
    /// process that opened the image.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        if self.is_inherited() {
            return Ok(());
        }
        let Some(disk) = self.disk.lock().take() else { return Ok(()) };
        py.detach(move || {
            let result = disk.close();
            drop(disk);
            result
        })
        .map_err(|e| self.raise(py, e))
    }

    /// Whether close() has been called, or this is a child of the process that opened the image.
    #[getter]
    fn closed(&self) -> bool {
        self.is_inherited() || self.disk.lock().is_none()
    }

    /// The path of the image file, or None when it was opened on a block device.
    #[getter]
    fn name(&self) -> Option<&str> {
        self.filename.as_deref()
    }

    fn __enter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    #[pyo3(signature = (exc_type, exc_value, traceback))]
    fn __exit__(
        &self,
        py: Python<'_>,
        exc_type: Option<&Bound<'_, PyAny>>,
        exc_value: Option<&Bound<'_, PyAny>>,
        traceback: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let _ = (exc_type, exc_value, traceback);
        self.close(py)
    }

    fn __repr__(&self) -> String {
        let state = if self.closed() { "closed" } else { "open" };
        match &self.filename {
            Some(name) => format!("<qcow_recycler.Image {name:?}, {state}>"),
            None => format!("<qcow_recycler.Image on a block device, {state}>"),
        }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let Some(disk) = self.disk.get_mut().take() else { return };
        if self.is_inherited() {
            std::mem::forget(disk);
            return;
        }
        Python::try_attach(|py| {
            let message = c"an image was not closed; use it as a context manager, or call close()";
            if let Err(raised) = PyErr::warn(py, &py.get_type::<PyResourceWarning>(), message, 1) {
                raised.write_unraisable(py, None);
            }
            // Closing waits for the recycler, which may be waiting for the interpreter's lock.
            py.detach(move || drop(disk));
        });
    }
}
