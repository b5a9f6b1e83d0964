//! Where the bytes of an image live.

mod direct;
mod done;
pub mod host;
pub mod lock;
mod positioned;
pub(crate) mod steps;
pub(crate) mod volume;

use std::future::Future;
use std::io;
use std::path::Path;

use crate::buf::{Held, IoBuf, IoBufMut, IoVec};
use crate::error::Result;

pub(crate) use done::Addressee;
pub use done::{Done, Ended, Ending, ending};

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the device to memory.
    Read,
    /// From memory to the device.
    Write,
}

/// What a device can do beyond reading, writing and flushing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// [`BlockDevice::truncate`] works, both ways; bytes that appear when the device grows read as zeroes, also when the
    /// same range held other bytes before it was cut off.
    pub resize: bool,
    /// [`BlockDevice::punch_hole`] works.
    pub punch_hole: bool,
    /// [`BlockDevice::write_zeroes`] works, and is cheaper than writing zeroes.
    pub write_zeroes: bool,
    /// [`BlockDevice::copy_range`] works.
    pub copy_range: bool,
}

/// The bytes of an image file: a host file, a logical volume, a network store, memory.
///
/// All offsets and lengths are in bytes. Calls may come from several threads at once and overlap in time; the library
/// never lets two calls whose ranges overlap run at once if one of them writes, unless the guest itself does so; a guest's
/// write may also come while the same range is copied elsewhere, and the copy is not used then.
/// Transfers are whole: a call that moved fewer bytes than asked is an error. The library never reads or writes past
/// the length it knows (that of [`length`](Self::length) at the start, and what it truncated to since).
///
/// **Durability.** What a completed write, truncate, punch or copy did may be lost, in any subset and order of 512-byte
/// sectors, until a [`flush`](Self::flush) *that began after it completed* has completed. Nothing else is assumed.
///
/// A future that completes at its first poll makes the library's synchronous calls run on the caller's own thread
/// without any hand-over. A dropped future must leave no transfer behind that still uses its buffer.
pub trait BlockDevice: Send + Sync + 'static {
    /// What the device can do. Must not change while the image is open.
    fn features(&self) -> Features {
        Features::default()
    }

    /// The device's length.
    fn length(&self) -> impl Future<Output = io::Result<u64>> + Send;

    /// Fills `buf` from `offset`.
    fn read(&self, offset: u64, buf: IoBufMut<'_>) -> impl Future<Output = io::Result<()>> + Send;

    /// Stores `buf` at `offset`.
    fn write(&self, offset: u64, buf: IoBuf<'_>) -> impl Future<Output = io::Result<()>> + Send;

    /// As [`read`](Self::read), for a device that need not wait for anybody: the transfer happens during the call, on the
    /// caller's thread. `None`: not so, and nothing was done; the library then calls `read`.
    ///
    /// This spares requests of [`Disk`](crate::Disk) the making of a future.
    fn read_now(&self, offset: u64, buf: IoBufMut<'_>) -> Option<io::Result<()>> {
        let _ = (offset, buf);
        None
    }

    /// As [`write`](Self::write), in the way of [`read_now`](Self::read_now).
    fn write_now(&self, offset: u64, buf: IoBuf<'_>) -> Option<io::Result<()>> {
        let _ = (offset, buf);
        None
    }

    /// The host's file behind the device, if transfers may be done by whatever means directly on it: a queue then has them
    /// done by the kernel.
    fn host_file(&self) -> Option<&host::HostFile> {
        None
    }

    /// Another file of the host, opened as this one is, but for writing or not: for an image whose guest data is in a file of
    /// its own. The caller has made sure that it may be opened. `None`: this device is no file of the host.
    fn beside(&self, path: &Path, read_only: bool) -> Option<Result<Self>>
    where
        Self: Sized,
    {
        let _ = (path, read_only);
        None
    }

    /// Whether [`begin`](Self::begin) takes a transfer of these areas, none of which is empty.
    fn begins(&self, direction: Direction, areas: &[IoVec]) -> bool {
        let _ = (direction, areas);
        false
    }

    /// Begins a transfer and returns; `done` is completed once when it has ended, on any thread, perhaps before this
    /// returns. The memory and the list of its areas stay valid until then. A queue uses this so that no thread waits for
    /// the device; it holds itself meanwhile, so the device must not call it.
    fn begin(&self, direction: Direction, offset: u64, memory: &Held, done: Done) {
        let _ = (direction, offset, memory);
        done.complete(Err(io::ErrorKind::Unsupported.into()));
    }

    /// Whether a range is known to occupy no space, so that writing there takes some.
    fn is_hole(&self, offset: u64, length: u64) -> bool {
        self.host_file().is_some_and(|file| file.is_hole(offset, length))
    }

    /// Whether [`copy_range`](Self::copy_range) only reads and writes, so that it is worth no more than that. Must not change
    /// while the image is open.
    fn copies_bytes(&self) -> bool {
        self.host_file().is_some_and(host::HostFile::copies_bytes)
    }

    /// Makes everything that completed before this call durable. After an error, nothing is assumed about any of it.
    fn flush(&self) -> impl Future<Output = io::Result<()>> + Send;

    /// Makes the device `length` bytes long.
    fn truncate(&self, length: u64) -> impl Future<Output = io::Result<()>> + Send {
        let _ = length;
        std::future::ready(Err(io::ErrorKind::Unsupported.into()))
    }

    /// Makes a range read as zeroes and gives its space back.
    fn punch_hole(&self, offset: u64, length: u64) -> impl Future<Output = io::Result<()>> + Send {
        let _ = (offset, length);
        std::future::ready(Err(io::ErrorKind::Unsupported.into()))
    }

    /// Makes a range read as zeroes, keeping its space.
    fn write_zeroes(&self, offset: u64, length: u64) -> impl Future<Output = io::Result<()>> + Send {
        let _ = (offset, length);
        std::future::ready(Err(io::ErrorKind::Unsupported.into()))
    }

    /// A hint: the range will be read soon, by `read` or `copy_range`. Must not wait for it to be there.
    fn will_read(&self, offset: u64, length: u64) {
        let _ = (offset, length);
    }

    /// A hint: the range was written, and a flush will follow soon, so whatever the flush has to do for it may begin. Must not
    /// wait until that is done; makes nothing durable.
    fn will_flush(&self, offset: u64, length: u64) {
        let _ = (offset, length);
    }

    /// Copies `length` bytes inside the device; the ranges do not overlap.
    fn copy_range(&self, from: u64, to: u64, length: u64) -> impl Future<Output = io::Result<()>> + Send {
        let _ = (from, to, length);
        std::future::ready(Err(io::ErrorKind::Unsupported.into()))
    }
}
