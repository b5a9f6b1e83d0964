//! Opening, creating and checking images.

use std::path::{Path, PathBuf};

use pyo3::prelude::*;
use pyo3::types::PyDict;
use qcow_recycler::blocking::block_on;
use qcow_recycler::device::host::HostFile;
use qcow_recycler::{BlockDevice, CreateOptions, Disk, Error, Options, Repair, Result};

use crate::device::Device;
use crate::image::Image;
use crate::object::PyDevice;
use crate::progress::Watcher;
use crate::{errors, options, records};

/// A path as exceptions and `Image.name` show it.
fn display(path: &Path) -> String {
    path.display().to_string()
}

fn finish(py: Python<'_>, opened: Result<Disk<Device>>, filename: Option<String>, id: String) -> PyResult<Image> {
    match opened {
        Ok(disk) => Ok(Image::new(disk, filename, id)),
        Err(e) => Err(errors::to_python(py, e, filename.as_deref())),
    }
}

/// Opens the image file `path`; the options are those of qcow_recycler.OpenOptions.
#[pyfunction]
pub(crate) fn open_path(py: Python<'_>, path: PathBuf, options: &Bound<'_, PyDict>) -> PyResult<Image> {
    // `parent` of a bare name is the empty path, which a relative name can be joined to as well.
    let options: Options = options::open_options(options, path.parent())?;
    let id = if options.id.is_empty() { display(&path) } else { options.id.clone() };
    let filename = Some(display(&path));
    let opened = py.detach(move || {
        let file = HostFile::open_for(&path, &options)?;
        Disk::open(Device::File(file), options)
    });
    finish(py, opened, filename, id)
}

/// Opens the image on the block device `device`; `data` is the block device of its external data file, or None.
#[pyfunction]
pub(crate) fn open_device(
    py: Python<'_>,
    device: &Bound<'_, PyAny>,
    data: &Bound<'_, PyAny>,
    options: &Bound<'_, PyDict>,
) -> PyResult<Image> {
    let options = options::open_options(options, None)?;
    let id = options.id.clone();
    let device = Device::Object(PyDevice::new(device)?);
    let data = data_device(data)?;
    let opened = py.detach(move || match data {
        None => Disk::open(device, options),
        Some(data) => Disk::open_with_data(device, data, options),
    });
    finish(py, opened, None, id)
}

fn data_device(object: &Bound<'_, PyAny>) -> PyResult<Option<Device>> {
    if object.is_none() { Ok(None) } else { Ok(Some(Device::Object(PyDevice::new(object)?))) }
}

fn create<D: BlockDevice>(device: &D, options: &CreateOptions) -> Result<()> {
    block_on(qcow_recycler::image::create(device, options))
}

/// Makes the data file at `path`, which must not exist either, too.
fn create_both(file: &HostFile, path: &Path, options: &CreateOptions) -> Result<()> {
    let failed = |source| Error::DataFile { path: display(path), source: Box::new(source) };
    let data = HostFile::create(path).map_err(failed)?;
    let result = block_on(qcow_recycler::image::create_with_data(file, &data, options));
    if result.is_err() {
        let _ = std::fs::remove_file(path);
    }
    result
}

/// Creates the image file `path`, which must not exist; the options are those of qcow_recycler.CreateOptions.
#[pyfunction]
pub(crate) fn create_path(py: Python<'_>, path: PathBuf, size: u64, options: &Bound<'_, PyDict>) -> PyResult<()> {
    let options = options::create_options(size, options)?;
    let filename = display(&path);
    py.detach(move || {
        let file = HostFile::create(&path)?;
        let result = match &options.data_file {
            None => create(&file, &options),
            Some(data_file) => create_both(&file, &path.with_file_name(&data_file.name), &options),
        };
        if result.is_err() {
            // Nobody can want half an image; the reason for the failure matters more than one of removing it.
            let _ = std::fs::remove_file(&path);
        }
        result
    })
    .map_err(|e| errors::to_python(py, e, Some(&filename)))
}

/// Creates an image on the block device `device`, with its data file on `data` if that is not None, whatever they held before.
#[pyfunction]
pub(crate) fn create_device(
    py: Python<'_>,
    device: &Bound<'_, PyAny>,
    data: &Bound<'_, PyAny>,
    size: u64,
    options: &Bound<'_, PyDict>,
) -> PyResult<()> {
    let options = options::create_options(size, options)?;
    let device = Device::Object(PyDevice::new(device)?);
    let data = data_device(data)?;
    py.detach(move || match data {
        None => create(&device, &options),
        Some(data) => block_on(qcow_recycler::image::create_with_data(&device, &data, &options)),
    })
    .map_err(|e| errors::to_python(py, e, None))
}

/// Checks, and with repair="leaks" or "all" repairs, the image file `path`, which nobody may be using.
#[pyfunction]
#[pyo3(signature = (path, repair="no"))]
pub(crate) fn check_path<'py>(py: Python<'py>, path: PathBuf, repair: &str) -> PyResult<Bound<'py, PyAny>> {
    let repair = options::repair(repair)?;
    let filename = display(&path);
    let report = py
        .detach(move || {
            let file = HostFile::open(&path, repair == Repair::No)?;
            block_on(qcow_recycler::check::check(&file, repair))
        })
        .map_err(|e| errors::to_python(py, e, Some(&filename)))?;
    records::check_report(py, report)
}

/// Checks and repairs the image on the block device `device`.
#[pyfunction]
#[pyo3(signature = (device, repair="no"))]
pub(crate) fn check_device<'py>(
    py: Python<'py>,
    device: &Bound<'py, PyAny>,
    repair: &str,
) -> PyResult<Bound<'py, PyAny>> {
    let repair = options::repair(repair)?;
    let device = Device::Object(PyDevice::new(device)?);
    let report = py
        .detach(move || block_on(qcow_recycler::check::check(&device, repair)))
        .map_err(|e| errors::to_python(py, e, None))?;
    records::check_report(py, report)
}

/// Writes what the image file `path` holds into its backing file, and empties it; nobody may be using either. `progress` is
/// called with records between pieces; returning False cancels.
#[pyfunction]
#[pyo3(signature = (path, options, progress=None))]
pub(crate) fn commit_path<'py>(
    py: Python<'py>,
    path: PathBuf,
    options: &Bound<'py, PyDict>,
    progress: Option<Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let options = options::open_options(options, path.parent())?;
    let filename = display(&path);
    let mut watcher = Watcher::new(progress.map(Bound::unbind));
    let result = py.detach(|| {
        let mut show = |now| watcher.show(|py| records::commit_report(py, now));
        block_on(qcow_recycler::image::commit(&path, &options, &mut show))
    });
    watcher.finish()?;
    records::commit_report(py, result.map_err(|e| errors::to_python(py, e, Some(&filename)))?)
}

/// Makes the image file `path`, which nobody may be using, one of version 3.
#[pyfunction]
pub(crate) fn upgrade_path(py: Python<'_>, path: PathBuf) -> PyResult<()> {
    let filename = display(&path);
    py.detach(move || block_on(qcow_recycler::image::upgrade(HostFile::open(&path, false)?, &Options::default())))
        .map_err(|e| errors::to_python(py, e, Some(&filename)))
}
