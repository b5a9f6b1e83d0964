//! The two places where an image's bytes can be, as one type.

use std::io;
use std::path::Path;
use std::sync::Arc;

use qcow_recycler::buf::{Held, IoBuf, IoBufMut, IoVec};
use qcow_recycler::device::host::HostFile;
use qcow_recycler::device::{BlockDevice, Direction, Done, Features};
use qcow_recycler::{Error, Options};

use crate::boundary::Fuse;
use crate::callbacks::{Callbacks, qcr_block_callbacks};
use crate::error::Fault;

/// Where an image's bytes are, behind the fuse of its handle.
pub(crate) struct Device {
    fuse: Arc<Fuse>,
    bytes: Bytes,
}

enum Bytes {
    File(HostFile),
    Callbacks(Box<Callbacks>),
}

impl Device {
    /// An existing host file.
    pub(crate) fn open(path: &Path, options: &Options) -> Result<Self, Fault> {
        Ok(Device { fuse: Arc::default(), bytes: Bytes::File(HostFile::open_for(path, options)?) })
    }

    /// A host file to be written anew, and whether this made it: an existing one is taken only to `replace` it.
    pub(crate) fn create(path: &Path, replace: bool) -> Result<(Self, bool), Fault> {
        if replace {
            match HostFile::open(path, false) {
                Err(e) if e.errno() == libc::ENOENT => {}
                existing => return Ok((Device { fuse: Arc::default(), bytes: Bytes::File(existing?) }, false)),
            }
        }
        Ok((Device { fuse: Arc::default(), bytes: Bytes::File(HostFile::create(path)?) }, true))
    }

    /// The program's callbacks.
    pub(crate) fn on(callbacks: Callbacks, read_only: bool) -> Result<Self, Fault> {
        if !read_only {
            callbacks.ensure_writable()?;
        }
        Ok(Device { fuse: Arc::default(), bytes: Bytes::Callbacks(Box::new(callbacks)) })
    }

    /// The same callbacks' or file's bytes, behind the fuse of the image whose data file it is.
    pub(crate) fn behind(self, fuse: Arc<Fuse>) -> Self {
        Device { fuse, ..self }
    }

    /// What stops every use of the device.
    pub(crate) fn fuse(&self) -> Arc<Fuse> {
        self.fuse.clone()
    }

    fn bytes(&self) -> io::Result<&Bytes> {
        #[cfg(feature = "test-hooks")]
        crate::hooks::panic_if_armed(&self.fuse);
        if self.fuse.is_blown() {
            return Err(io::Error::from_raw_os_error(libc::ENOTRECOVERABLE));
        }
        Ok(&self.bytes)
    }
}

impl BlockDevice for Device {
    fn features(&self) -> Features {
        match &self.bytes {
            Bytes::File(file) => file.features(),
            Bytes::Callbacks(callbacks) => {
                let qcr_block_callbacks { truncate, punch_hole, write_zeroes, copy_range, .. } = callbacks.verbs;
                Features {
                    resize: truncate.is_some(),
                    punch_hole: punch_hole.is_some(),
                    write_zeroes: write_zeroes.is_some(),
                    copy_range: copy_range.is_some(),
                }
            }
        }
    }

    fn host_file(&self) -> Option<&HostFile> {
        match &self.bytes {
            Bytes::File(file) => Some(file),
            Bytes::Callbacks(_) => None,
        }
    }

    fn beside(&self, path: &Path, read_only: bool) -> Option<Result<Self, Error>> {
        let Bytes::File(file) = &self.bytes else { return None };
        let opened = file.beside(path, read_only)?;
        Some(opened.map(|file| Device { fuse: self.fuse.clone(), bytes: Bytes::File(file) }))
    }

    fn begins(&self, direction: Direction, areas: &[IoVec]) -> bool {
        match &self.bytes {
            Bytes::File(_) => false,
            Bytes::Callbacks(callbacks) => callbacks.begins(direction, areas.len()),
        }
    }

    fn begin(&self, direction: Direction, offset: u64, memory: &Held, done: Done) {
        match self.bytes() {
            Ok(Bytes::File(_)) => done.complete(Err(io::ErrorKind::Unsupported.into())),
            Ok(Bytes::Callbacks(callbacks)) => callbacks.begin(direction, offset, memory, done),
            Err(e) => done.complete(Err(e)),
        }
    }

    async fn length(&self) -> io::Result<u64> {
        match self.bytes()? {
            Bytes::File(file) => file.length().await,
            Bytes::Callbacks(callbacks) => callbacks.length(),
        }
    }

    async fn read(&self, offset: u64, buf: IoBufMut<'_>) -> io::Result<()> {
        match self.bytes()? {
            Bytes::File(file) => file.read(offset, buf).await,
            Bytes::Callbacks(callbacks) => callbacks.read(offset, buf).await,
        }
    }

    async fn write(&self, offset: u64, buf: IoBuf<'_>) -> io::Result<()> {
        match self.bytes()? {
            Bytes::File(file) => file.write(offset, buf).await,
            Bytes::Callbacks(callbacks) => callbacks.write(offset, buf).await,
        }
    }

    #[inline(always)]
    fn read_now(&self, offset: u64, buf: IoBufMut<'_>) -> Option<io::Result<()>> {
        match self.bytes() {
            Ok(Bytes::File(file)) => file.read_now(offset, buf),
            Ok(Bytes::Callbacks(callbacks)) => callbacks.read_now(offset, buf),
            Err(e) => Some(Err(e)),
        }
    }

    #[inline(always)]
    fn write_now(&self, offset: u64, buf: IoBuf<'_>) -> Option<io::Result<()>> {
        match self.bytes() {
            Ok(Bytes::File(file)) => file.write_now(offset, buf),
            Ok(Bytes::Callbacks(callbacks)) => callbacks.write_now(offset, buf),
            Err(e) => Some(Err(e)),
        }
    }

    async fn flush(&self) -> io::Result<()> {
        match self.bytes()? {
            Bytes::File(file) => file.flush().await,
            Bytes::Callbacks(callbacks) => callbacks.flush().await,
        }
    }

    async fn truncate(&self, length: u64) -> io::Result<()> {
        match self.bytes()? {
            Bytes::File(file) => file.truncate(length).await,
            Bytes::Callbacks(callbacks) => callbacks.truncate(length),
        }
    }

    async fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        match self.bytes()? {
            Bytes::File(file) => file.punch_hole(offset, length).await,
            Bytes::Callbacks(callbacks) => callbacks.punch_hole(offset, length),
        }
    }

    async fn write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        match self.bytes()? {
            Bytes::File(file) => file.write_zeroes(offset, length).await,
            Bytes::Callbacks(callbacks) => callbacks.write_zeroes(offset, length),
        }
    }

    fn will_read(&self, offset: u64, length: u64) {
        if let Bytes::File(file) = &self.bytes {
            file.will_read(offset, length);
        }
    }

    fn will_flush(&self, offset: u64, length: u64) {
        if let Bytes::File(file) = &self.bytes {
            file.will_flush(offset, length);
        }
    }

    async fn copy_range(&self, from: u64, to: u64, length: u64) -> io::Result<()> {
        match self.bytes()? {
            Bytes::File(file) => file.copy_range(from, to, length).await,
            Bytes::Callbacks(callbacks) => callbacks.copy_range(from, to, length),
        }
    }
}
