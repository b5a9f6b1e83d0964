//! The two places where an image's bytes can be, as one type.

use std::ffi::c_int;
use std::io;
use std::path::Path;
use std::sync::Arc;

use qcow_recycler::Options;
use qcow_recycler::buf::{IoBuf, IoBufMut, IoVec};
use qcow_recycler::device::host::HostFile;
use qcow_recycler::device::{BlockDevice, Features};

use crate::boundary::Fuse;
use crate::callbacks::{Callbacks, QCR_IOV_MAX, qcr_block_callbacks};
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

    async fn length(&self) -> io::Result<u64> {
        match self.bytes()? {
            Bytes::File(file) => file.length().await,
            Bytes::Callbacks(callbacks) => callbacks.length(),
        }
    }

    async fn read(&self, offset: u64, buf: IoBufMut<'_>) -> io::Result<()> {
        match self.bytes()? {
            Bytes::File(file) => file.read(offset, buf).await,
            Bytes::Callbacks(callbacks) => callbacks.read(offset, buf),
        }
    }

    async fn write(&self, offset: u64, buf: IoBuf<'_>) -> io::Result<()> {
        match self.bytes()? {
            Bytes::File(file) => file.write(offset, buf).await,
            Bytes::Callbacks(callbacks) => callbacks.write(offset, buf),
        }
    }

    #[inline]
    fn read_now(&self, offset: u64, buf: IoBufMut<'_>) -> Option<io::Result<()>> {
        match self.bytes() {
            Ok(Bytes::File(file)) => file.read_now(offset, buf),
            Ok(Bytes::Callbacks(callbacks)) => Some(callbacks.read(offset, buf)),
            Err(e) => Some(Err(e)),
        }
    }

    #[inline]
    fn write_now(&self, offset: u64, buf: IoBuf<'_>) -> Option<io::Result<()>> {
        match self.bytes() {
            Ok(Bytes::File(file)) => file.write_now(offset, buf),
            Ok(Bytes::Callbacks(callbacks)) => Some(callbacks.write(offset, buf)),
            Err(e) => Some(Err(e)),
        }
    }

    async fn flush(&self) -> io::Result<()> {
        match self.bytes()? {
            Bytes::File(file) => file.flush().await,
            Bytes::Callbacks(callbacks) => callbacks.flush(),
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

    async fn copy_range(&self, from: u64, to: u64, length: u64) -> io::Result<()> {
        match self.bytes()? {
            Bytes::File(file) => file.copy_range(from, to, length).await,
            Bytes::Callbacks(callbacks) => callbacks.copy_range(from, to, length),
        }
    }
}

/// What a callback returned. A positive value may be a count of bytes, so a short transfer: it must not pass.
fn outcome(verb: &str, returned: c_int) -> io::Result<()> {
    match returned {
        0 => Ok(()),
        -4095..=-1 => Err(io::Error::from_raw_os_error(-returned)),
        other => Err(io::Error::other(format!("the {verb} callback returned {other}, neither 0 nor a negative errno"))),
    }
}

fn absent<T>(verb: Option<T>) -> io::Result<T> {
    verb.ok_or_else(|| io::ErrorKind::Unsupported.into())
}

const NO_AREA: IoVec = IoVec { iov_base: std::ptr::null_mut(), iov_len: 0 };
type Areas = [IoVec; QCR_IOV_MAX as usize];

/// Every call below relies on the header's rules for callbacks, which the program promised to keep when it handed
/// them over; `owner` keeps `user` alive.
impl Callbacks {
    fn length(&self) -> io::Result<u64> {
        let mut length = 0;
        // SAFETY: see the impl; `length` outlives the call.
        outcome("length", unsafe { absent(self.verbs.length)?(self.owner.user(), &raw mut length) })?;
        Ok(length)
    }

    fn read(&self, offset: u64, mut buf: IoBufMut<'_>) -> io::Result<()> {
        let preadv = absent(self.verbs.preadv)?;
        let mut areas: Areas = [NO_AREA; _];
        let (mut done, end) = (0, buf.len());
        while done < end {
            let count = buf.slice(done..end).fill_iovecs(&mut areas);
            let moved: usize = areas.iter().take(count).map(|area| area.iov_len).sum();
            // SAFETY: see the impl; the first `count` areas are filled, and writable while `buf` lives.
            let returned = unsafe { preadv(self.owner.user(), areas.as_ptr(), count as c_int, offset + done as u64) };
            outcome("preadv", returned)?;
            done += moved;
        }
        Ok(())
    }

    fn write(&self, offset: u64, buf: IoBuf<'_>) -> io::Result<()> {
        let pwritev = absent(self.verbs.pwritev)?;
        let mut areas: Areas = [NO_AREA; _];
        let (mut done, end) = (0, buf.len());
        while done < end {
            let count = buf.slice(done..end).fill_iovecs(&mut areas);
            let moved: usize = areas.iter().take(count).map(|area| area.iov_len).sum();
            // SAFETY: see the impl; the first `count` areas are filled, and readable while `buf` lives.
            let returned = unsafe { pwritev(self.owner.user(), areas.as_ptr(), count as c_int, offset + done as u64) };
            outcome("pwritev", returned)?;
            done += moved;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        // SAFETY: see the impl.
        outcome("flush", unsafe { absent(self.verbs.flush)?(self.owner.user()) })
    }

    fn truncate(&self, length: u64) -> io::Result<()> {
        // SAFETY: see the impl.
        outcome("truncate", unsafe { absent(self.verbs.truncate)?(self.owner.user(), length) })
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: see the impl.
        outcome("punch_hole", unsafe { absent(self.verbs.punch_hole)?(self.owner.user(), offset, length) })
    }

    fn write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: see the impl.
        outcome("write_zeroes", unsafe { absent(self.verbs.write_zeroes)?(self.owner.user(), offset, length) })
    }

    fn copy_range(&self, from: u64, to: u64, length: u64) -> io::Result<()> {
        // SAFETY: see the impl.
        outcome("copy_range", unsafe { absent(self.verbs.copy_range)?(self.owner.user(), from, to, length) })
    }
}
