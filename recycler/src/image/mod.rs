//! The guest's disk.
pub mod create;
pub use create::{CreateOptions, create};
use crate::buf::{IoBuf, IoBufMut};
use crate::check::CheckReport;
use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::options::{Logger, Options};
use crate::stats::Stats;

/// How a range of the virtual disk is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, from the offset that was asked for.
    pub length: u64,
    /// What it is.
    pub kind: ExtentKind,
}

/// How bytes of the virtual disk are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// In the image file, from this byte on.
    Data {
        /// Offset in the image file.
        host_offset: u64,
    },
    /// They read as zeroes, whatever the backing file has; nothing is read from the file.
    Zero,
    /// Not allocated: they read as the backing file does, or as zeroes without one.
    Unallocated,
}

/// What an image is. Sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Info {
    /// qcow2 version, 2 or 3.
    pub version: u32,
    /// Size of the virtual disk.
    pub virtual_size: u64,
    /// Cluster size.
    pub cluster_size: u64,
    /// Width of a refcount in bits.
    pub refcount_bits: u32,
    /// Length of the image file.
    pub file_size: u64,
    /// Whether the image was made with lazy refcounts.
    pub lazy_refcounts: bool,
    /// Internal snapshots.
    pub snapshots: u32,
    /// The name of the backing file as the image records it.
    pub backing_file: Option<String>,
    /// The backing file's format as the image records it.
    pub backing_format: Option<String>,
    /// Whether the handle refuses changes.
    pub read_only: bool,
    /// What keeps parts of the image where they are: one reason each.
    pub pinned: Vec<String>,
}

/// An open image.
pub struct Image<D: BlockDevice> {
    device: D,
}

#[allow(missing_docs, clippy::unused_async)]
impl<D: BlockDevice> Image<D> {
    pub async fn open(_device: D, _options: Options) -> Result<Self> { Err(Error::unsupported("not yet")) }
    pub fn info(&self) -> Info { loop {} }
    pub async fn read(&self, _offset: u64, _buf: IoBufMut<'_>) -> Result<()> { Ok(()) }
    pub async fn write(&self, _offset: u64, _buf: IoBuf<'_>) -> Result<()> { Ok(()) }
    pub async fn discard(&self, _offset: u64, _length: u64) -> Result<()> { Ok(()) }
    pub async fn write_zeroes(&self, _offset: u64, _length: u64, _may_unmap: bool) -> Result<()> { Ok(()) }
    pub async fn flush(&self) -> Result<()> { Ok(()) }
    pub async fn resize(&self, _size: u64, _shrink: bool) -> Result<()> { Ok(()) }
    pub async fn extent(&self, _offset: u64, _length: u64) -> Result<Extent> { Err(Error::Closed) }
    pub async fn check(&self) -> Result<CheckReport> { Err(Error::Closed) }
    pub async fn close(&self) -> Result<()> { Ok(()) }
    pub fn stats(&self) -> Stats { Stats::default() }
    pub fn device(&self) -> &D { &self.device }
    pub fn ensure_writable(&self) -> Result<()> { Ok(()) }
    pub fn logger(&self) -> &Logger { loop {} }
}
