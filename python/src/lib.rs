//! The compiled half of the Python package `qcow_recycler`.
//!
//! Every call that may wait releases the interpreter's lock first, and nothing is locked while it waits for the
//! interpreter: a Python block device or log function can therefore be called from the recycler's thread at any time.
//!
//! Whatever owns a part of the engine (`Image`, `Queue`) forgets it, instead of dropping it, in a child process: see `Image`.
#![allow(missing_docs)]

mod buffer;
mod device;
mod errors;
mod extents;
mod files;
mod image;
mod object;
mod options;
mod progress;
mod queue;
mod records;

use pyo3::prelude::*;

#[pymodule]
fn _ext(module: &Bound<'_, PyModule>) -> PyResult<()> {
    image::count_forks()?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<image::Image>()?;
    module.add_class::<extents::Extents>()?;
    module.add_class::<queue::Queue>()?;
    module.add_function(wrap_pyfunction!(files::open_path, module)?)?;
    module.add_function(wrap_pyfunction!(files::open_device, module)?)?;
    module.add_function(wrap_pyfunction!(files::create_path, module)?)?;
    module.add_function(wrap_pyfunction!(files::create_device, module)?)?;
    module.add_function(wrap_pyfunction!(files::check_path, module)?)?;
    module.add_function(wrap_pyfunction!(files::check_device, module)?)?;
    module.add_function(wrap_pyfunction!(files::commit_path, module)?)?;
    module.add_function(wrap_pyfunction!(files::upgrade_path, module)?)?;
    Ok(())
}
