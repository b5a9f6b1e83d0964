//! The library's plain values as the records of `qcow_recycler.records`.

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use qcow_recycler::image::CommitReport;
use qcow_recycler::recycler::{CompactReport, Progress};
use qcow_recycler::{BitmapInfo, CheckReport, Extent, ExtentKind, Info, SnapshotInfo, Stats};

fn class<'py>(py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
    py.import("qcow_recycler.records")?.getattr(name)
}

macro_rules! record {
    ($py:expr, $class:literal, $($field:ident = $value:expr),+ $(,)?) => {{
        let fields = PyDict::new($py);
        $(fields.set_item(stringify!($field), $value)?;)+
        class($py, $class)?.call((), Some(&fields))
    }};
}

pub(crate) fn info(py: Python<'_>, info: Info) -> PyResult<Bound<'_, PyAny>> {
    record!(
        py,
        "Info",
        version = info.version,
        virtual_size = info.virtual_size,
        cluster_size = info.cluster_size,
        refcount_bits = info.refcount_bits,
        file_size = info.file_size,
        lazy_refcounts = info.lazy_refcounts,
        extended_l2 = info.extended_l2,
        encryption = info.encryption,
        snapshots = info.snapshots,
        backing_file = info.backing_file,
        backing_format = info.backing_format,
        data_file = info.data_file,
        data_file_raw = info.data_file_raw,
        read_only = info.read_only,
        pinned = PyTuple::new(py, info.pinned)?,
    )
}

pub(crate) fn stats<'py>(py: Python<'py>, stats: &Stats) -> PyResult<Bound<'py, PyAny>> {
    let fields = PyDict::new(py);
    for (name, _, _, value) in stats.fields() {
        fields.set_item(name, value)?;
    }
    class(py, "Stats")?.call((), Some(&fields))
}

pub(crate) fn check_report(py: Python<'_>, report: CheckReport) -> PyResult<Bound<'_, PyAny>> {
    record!(
        py,
        "CheckReport",
        corruptions = report.corruptions,
        leaks = report.leaks,
        corruptions_fixed = report.corruptions_fixed,
        leaks_fixed = report.leaks_fixed,
        allocated_clusters = report.allocated_clusters,
        total_clusters = report.total_clusters,
        fragmented_clusters = report.fragmented_clusters,
        image_end_offset = report.image_end_offset,
        messages = PyTuple::new(py, report.messages)?,
    )
}

pub(crate) fn compact_report<'py>(py: Python<'py>, report: &CompactReport) -> PyResult<Bound<'py, PyAny>> {
    record!(
        py,
        "CompactReport",
        file_size_before = report.file_size_before,
        file_size_after = report.file_size_after,
        moved = report.moved,
        cancelled = report.cancelled,
    )
}

pub(crate) fn bitmap(py: Python<'_>, bitmap: BitmapInfo) -> PyResult<Bound<'_, PyAny>> {
    record!(
        py,
        "Bitmap",
        name = bitmap.name,
        granularity = bitmap.granularity,
        recording = bitmap.recording,
        inconsistent = bitmap.inconsistent,
        dirty = bitmap.dirty,
    )
}

pub(crate) fn snapshot(py: Python<'_>, snapshot: SnapshotInfo) -> PyResult<Bound<'_, PyAny>> {
    record!(
        py,
        "Snapshot",
        id = snapshot.id,
        name = snapshot.name,
        created = snapshot.created.as_secs_f64(),
        vm_clock = snapshot.vm_clock.as_secs_f64(),
        vm_state_size = snapshot.vm_state_size,
        virtual_size = snapshot.virtual_size,
    )
}

pub(crate) fn commit_report(py: Python<'_>, report: CommitReport) -> PyResult<Bound<'_, PyAny>> {
    class(py, "CommitReport")?.call1((report.done, report.total, report.written, report.zeroed))
}

pub(crate) fn progress(py: Python<'_>, progress: Progress) -> PyResult<Bound<'_, PyAny>> {
    class(py, "Progress")?.call1((progress.done, progress.total, progress.file_size))
}

pub(crate) fn extent(py: Python<'_>, offset: u64, extent: Extent) -> PyResult<Bound<'_, PyAny>> {
    let (kind, host_offset) = match extent.kind {
        ExtentKind::Data { host_offset } => ("data", Some(host_offset)),
        ExtentKind::Compressed => ("compressed", None),
        ExtentKind::Zero => ("zero", None),
        ExtentKind::Unallocated => ("unallocated", None),
    };
    class(py, "Extent")?.call1((offset, extent.length, kind, host_offset))
}
