//! The keyword arguments of `open`, `open_device`, `create` and `create_device`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use qcow_recycler::{
    BackingFormat, BackingPolicy, CreateOptions, DataFileOptions, DataFilePolicy, LogLevel, Logger, Options,
    Passphrase, Repair,
};

/// What `qcow_recycler.OpenOptions` says, on top of the library's defaults; `None` stands for the default. `home` is the
/// image's own directory, from where relative names of backing files start.
///
/// # Errors
/// `TypeError` for an unknown name or a wrong type; [`crate::errors`] for an unusable value.
pub(crate) fn open_options(given: &Bound<'_, PyDict>, home: Option<&Path>) -> PyResult<Options> {
    let py = given.py();
    let mut options = Options::default();
    if let Some(config) = value::<String>(given, "config")? {
        options.apply_config(&config).map_err(|e| crate::errors::to_python(py, e, None))?;
    }
    let mut backing = None;
    let mut directory = home.map(Path::to_path_buf);
    let mut unrecorded = None;
    let mut data_file = None;
    for (key, item) in given {
        let key: String = key.extract()?;
        if item.is_none() {
            continue;
        }
        match key.as_str() {
            // Applied above, so that the other arguments win over it.
            "config" => {}
            "read_only" => options.read_only = item.extract()?,
            "direct" => options.direct = item.extract()?,
            "discard" => options.discard = item.extract()?,
            "keep_erased" => options.keep_erased = item.extract()?,
            "compact_after_unmaps" => options.compact_after_unmaps = Some(item.extract()?).filter(|&n| n > 0),
            "settle_time" => options.settle_time = seconds(&key, &item)?,
            "flush_after" => options.flush_after = seconds(&key, &item)?,
            "rate_limit" => options.rate_limit = Some(item.extract()?).filter(|&n| n > 0),
            "punch_junk" => options.punch_junk = item.extract()?,
            "l2_cache_size" => options.l2_cache_size = item.extract()?,
            "check_on_connect" => options.check_on_connect = item.extract()?,
            "runtime_asserts" => options.runtime_asserts = item.extract()?,
            "backing" => backing = Some(item.extract::<String>()?),
            "backing_directory" => directory = Some(item.extract::<PathBuf>()?),
            "backing_format" => unrecorded = Some(backing_format(&item.extract::<String>()?)?),
            "data_file" => data_file = Some(item.extract::<String>()?),
            "passphrase" => options.passphrase = Some(passphrase(&item)?),
            "id" => options.id = item.extract()?,
            "log" => options.logger = logger(&item)?,
            _ => return Err(PyTypeError::new_err(format!("unknown option {key:?}"))),
        }
    }
    options.data_file = match data_file.as_deref() {
        None | Some("refuse") => DataFilePolicy::Refuse,
        Some("skip") => DataFilePolicy::Skip,
        Some("allow") => DataFilePolicy::Allow {
            directory: directory.clone().ok_or_else(|| {
                PyValueError::new_err(
                    "data_file='allow' is for images that are opened by their path: give data= instead",
                )
            })?,
        },
        Some(other) => {
            return Err(PyValueError::new_err(format!("data_file must be 'refuse', 'skip' or 'allow', not {other:?}")));
        }
    };
    options.backing = match backing.as_deref() {
        None | Some("refuse") => BackingPolicy::Refuse,
        Some("skip") => BackingPolicy::Skip,
        Some("allow") => BackingPolicy::Allow {
            directory: directory.ok_or_else(|| {
                PyValueError::new_err(
                    "backing='allow' needs backing_directory= when the image is not opened by its path",
                )
            })?,
            unrecorded,
        },
        Some(other) => {
            return Err(PyValueError::new_err(format!("backing must be 'refuse', 'skip' or 'allow', not {other:?}")));
        }
    };
    Ok(options)
}

/// What `qcow_recycler.CreateOptions` says.
///
/// # Errors
/// `TypeError` for an unknown name or a wrong type.
pub(crate) fn create_options(size: u64, given: &Bound<'_, PyDict>) -> PyResult<CreateOptions> {
    let mut options = CreateOptions::new(size);
    let (mut file, mut format) = (None, None);
    let (mut data_file, mut raw) = (None, false);
    for (key, item) in given {
        let key: String = key.extract()?;
        if item.is_none() {
            continue;
        }
        match key.as_str() {
            "cluster_size" => options.cluster_size = item.extract()?,
            "refcount_bits" => options.refcount_bits = item.extract()?,
            "version" => {
                options.version = item.extract()?;
            }
            "lazy_refcounts" => options.lazy_refcounts = item.extract()?,
            "extended_l2" => options.extended_l2 = item.extract()?,
            "data_file" => data_file = Some(item.extract::<String>()?),
            "data_file_raw" => raw = item.extract()?,
            "backing_file" => file = Some(item.extract::<String>()?),
            "backing_format" => format = Some(item.extract::<String>()?),
            _ => return Err(PyTypeError::new_err(format!("unknown option {key:?}"))),
        }
    }
    options.backing = match (file, format) {
        (None, None) => None,
        (Some(file), Some(format)) => Some((file, format)),
        _ => return Err(PyValueError::new_err("backing_file and backing_format go together")),
    };
    if raw && data_file.is_none() {
        return Err(PyValueError::new_err("data_file_raw needs a data_file"));
    }
    options.data_file = data_file.map(|name| DataFileOptions { name, raw });
    Ok(options)
}

/// # Errors
/// `TypeError` for anything but text and bytes.
fn passphrase(item: &Bound<'_, PyAny>) -> PyResult<Passphrase> {
    match item.cast::<PyBytes>() {
        Ok(bytes) => Ok(Passphrase::new(bytes.as_bytes())),
        Err(_) => item.extract::<String>().map(Passphrase::new),
    }
}

/// # Errors
/// `ValueError` for anything but `raw` and `qcow2`.
fn backing_format(name: &str) -> PyResult<BackingFormat> {
    BackingFormat::from_name(name)
        .ok_or_else(|| PyValueError::new_err(format!("backing_format must be 'raw' or 'qcow2', not {name:?}")))
}

/// # Errors
/// `ValueError` for anything but `no`, `leaks` and `all`.
pub(crate) fn repair(name: &str) -> PyResult<Repair> {
    match name {
        "no" => Ok(Repair::No),
        "leaks" => Ok(Repair::Leaks),
        "all" => Ok(Repair::All),
        _ => Err(PyValueError::new_err(format!("repair must be 'no', 'leaks' or 'all', not {name:?}"))),
    }
}

fn value<'py, T>(given: &Bound<'py, PyDict>, key: &str) -> PyResult<Option<T>>
where
    T: pyo3::conversion::FromPyObjectOwned<'py>,
{
    match given.get_item(key)? {
        Some(item) if !item.is_none() => item.extract().map(Some).map_err(Into::into),
        _ => Ok(None),
    }
}

/// # Errors
/// `ValueError` for what is negative, infinite, not a number, or more than a `Duration` can be.
fn seconds(key: &str, item: &Bound<'_, PyAny>) -> PyResult<Duration> {
    let seconds: f64 = item.extract()?;
    Duration::try_from_secs_f64(seconds).map_err(|_| {
        PyValueError::new_err(format!("{key} must be a number of seconds, from 0 to less than 2**64, not {seconds}"))
    })
}

/// Messages go to a Python function `(level, message)`. What it raises cannot reach anybody, so it is reported as
/// unraisable.
fn logger(function: &Bound<'_, PyAny>) -> PyResult<Logger> {
    if !function.is_callable() {
        return Err(PyTypeError::new_err("log must be callable"));
    }
    let function = function.clone().unbind();
    Ok(Logger::new(move |level, message| {
        let level = match level {
            LogLevel::Error => "error",
            LogLevel::Warning => "warning",
            LogLevel::Info => "info",
            LogLevel::Debug => "debug",
        };
        Python::try_attach(|py| {
            let function = function.bind(py);
            if let Err(raised) = function.call1((level, message)) {
                raised.write_unraisable(py, Some(function));
            }
        });
    }))
}
