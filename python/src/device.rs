//! The devices that Python can open an image on.

use std::io;
use std::path::Path;

use qcow_recycler::buf::{IoBuf, IoBufMut};
use qcow_recycler::device::Features;
use qcow_recycler::device::host::HostFile;
use qcow_recycler::{BlockDevice, Result};

use crate::object::PyDevice;

/// One type, so that there is one class of images; which device it is costs a comparison a call.
pub(crate) enum Device {
    File(HostFile),
    Object(PyDevice),
}

impl BlockDevice for Device {
    fn features(&self) -> Features {
        match self {
            Device::File(file) => file.features(),
            Device::Object(object) => object.features(),
        }
    }

    fn host_file(&self) -> Option<&HostFile> {
        match self {
            Device::File(file) => Some(file),
            Device::Object(_) => None,
        }
    }

    fn beside(&self, path: &Path, read_only: bool) -> Option<Result<Self>> {
        match self {
            Device::File(file) => Some(file.beside(path, read_only)?.map(Device::File)),
            Device::Object(_) => None,
        }
    }

    async fn length(&self) -> io::Result<u64> {
        match self {
            Device::File(file) => file.length().await,
            Device::Object(object) => object.length(),
        }
    }

    async fn read(&self, offset: u64, buf: IoBufMut<'_>) -> io::Result<()> {
        match self {
            Device::File(file) => file.read(offset, buf).await,
            Device::Object(object) => object.read(offset, buf),
        }
    }

    async fn write(&self, offset: u64, buf: IoBuf<'_>) -> io::Result<()> {
        match self {
            Device::File(file) => file.write(offset, buf).await,
            Device::Object(object) => object.write(offset, buf),
        }
    }

    fn read_now(&self, offset: u64, buf: IoBufMut<'_>) -> Option<io::Result<()>> {
        match self {
            Device::File(file) => file.read_now(offset, buf),
            Device::Object(object) => Some(object.read(offset, buf)),
        }
    }

    fn write_now(&self, offset: u64, buf: IoBuf<'_>) -> Option<io::Result<()>> {
        match self {
            Device::File(file) => file.write_now(offset, buf),
            Device::Object(object) => Some(object.write(offset, buf)),
        }
    }

    async fn flush(&self) -> io::Result<()> {
        match self {
            Device::File(file) => file.flush().await,
            Device::Object(object) => object.flush(),
        }
    }

    async fn truncate(&self, length: u64) -> io::Result<()> {
        match self {
            Device::File(file) => file.truncate(length).await,
            Device::Object(object) => object.truncate(length),
        }
    }

    async fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        match self {
            Device::File(file) => file.punch_hole(offset, length).await,
            Device::Object(object) => object.punch_hole(offset, length),
        }
    }

    async fn write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        match self {
            Device::File(file) => file.write_zeroes(offset, length).await,
            Device::Object(object) => object.write_zeroes(offset, length),
        }
    }

    fn will_read(&self, offset: u64, length: u64) {
        if let Device::File(file) = self {
            file.will_read(offset, length);
        }
    }

    fn will_flush(&self, offset: u64, length: u64) {
        if let Device::File(file) = self {
            file.will_flush(offset, length);
        }
    }

    async fn copy_range(&self, from: u64, to: u64, length: u64) -> io::Result<()> {
        match self {
            Device::File(file) => file.copy_range(from, to, length).await,
            Device::Object(object) => object.copy_range(from, to, length),
        }
    }
}
