//! Image files on the host: regular files and block devices.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::num::NonZeroU64;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{Advice, FallocateFlags, OFlags};
use rustix::io::{Errno, retry_on_intr};

use super::direct::Direct;
use super::lock::{self, LockMode};
use super::{BlockDevice, Direction, Features, positioned};
use crate::buf::{IoBuf, IoBufMut, IoVec};
use crate::error::{Error, Result};
use crate::options::Options;

/// A regular file or a block device. Every call is nothing but its system calls, on the caller's thread.
///
/// The image's locks (see [`lock`]) are held as long as this value, or a duplicate of its descriptor, lives.
#[derive(Debug)]
pub struct HostFile {
    file: File,
    kind: Kind,
    features: Features,
    copies_bytes: bool,
    direct: Option<Direct>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Regular,
    BlockDevice,
}

impl HostFile {
    /// Opens an image file and takes its locks.
    ///
    /// # Errors
    /// [`Error::Locked`] if somebody uses the image in a way that excludes ours; [`Error::Unsupported`] for anything
    /// but a regular file or a block device; [`Error::Io`].
    pub fn open(path: impl AsRef<Path>, read_only: bool) -> Result<HostFile> {
        Self::open_with(path, read_only, LockMode::Enforce)
    }

    /// Opens an image file.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with(path: impl AsRef<Path>, read_only: bool, locks: LockMode) -> Result<HostFile> {
        // Without O_NONBLOCK a FIFO would hold us up before it can be refused.
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .map_err(Error::io("opening the image file", 0))?;
        let device = Self::from_file(file, read_only, locks)?;
        rustix::fs::fcntl_setfl(&device.file, OFlags::empty())
            .map_err(|e| Error::io("opening the image file", 0)(e.into()))?;
        Ok(device)
    }

    /// Opens an image file as an image's options say.
    ///
    /// # Errors
    /// As [`open`](Self::open) and [`into_direct`](Self::into_direct).
    pub fn open_for(path: impl AsRef<Path>, options: &Options) -> Result<HostFile> {
        let file = Self::open(path, options.read_only)?;
        if options.direct { file.into_direct() } else { Ok(file) }
    }

    /// Makes a new, empty file, which must not exist yet, and takes its locks.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn create(path: impl AsRef<Path>) -> Result<HostFile> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .map_err(Error::io("creating the image file", 0))?;
        Self::from_file(file, false, LockMode::Enforce)
    }

    /// Takes over a file that is open already, for reading and, unless `read_only`, for writing.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_file(file: File, read_only: bool, locks: LockMode) -> Result<HostFile> {
        let metadata = file.metadata().map_err(Error::io("looking at the image file", 0))?;
        let kind = match metadata.file_type() {
            t if t.is_file() => Kind::Regular,
            t if t.is_block_device() => Kind::BlockDevice,
            t => {
                let what = if t.is_dir() { "a directory" } else { "this kind of file" };
                return Err(Error::unsupported(format!(
                    "an image in {what}: it must be a regular file or a block device"
                )));
            }
        };
        if locks == LockMode::Enforce {
            lock::acquire(&file, read_only)?;
        }
        let features = if read_only { Features::default() } else { features(&file, kind, metadata.len()) };
        let copies_bytes = copies_bytes(&file);
        Ok(HostFile { file, kind, features, copies_bytes, direct: None })
    }

    /// Has transfers pass the host's page cache (O_DIRECT) from now on. Callers need not care for alignment: what the kernel
    /// does not take as it is costs a copy.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the file system has no such transfers; [`Error::Io`].
    pub fn into_direct(self) -> Result<HostFile> {
        let read_only = !rustix::fs::fcntl_getfl(&self.file).map(|f| f.contains(OFlags::RDWR)).unwrap_or_default();
        let direct = Direct::new(&self.file, read_only).map_err(|e| match e.kind() {
            io::ErrorKind::Unsupported => Error::unsupported("transfers past the page cache on this file system"),
            _ => Error::io("opening the image file", 0)(e),
        })?;
        // A copy inside the kernel fills the page cache.
        let features = Features { copy_range: false, ..self.features };
        Ok(HostFile { direct: Some(direct), features, ..self })
    }

    /// The block that direct transfers start and end with, if transfers are direct.
    #[must_use]
    pub fn direct_block(&self) -> Option<u64> {
        self.direct.as_ref().map(Direct::block)
    }

    /// The file again, for transfers by the kernel, which may keep it for a while after it was told to let it go: so not
    /// the one that has the locks, where another can be had.
    ///
    /// # Errors
    /// There is no descriptor left.
    pub(crate) fn for_kernel(&self) -> io::Result<File> {
        if let Some(direct) = &self.direct {
            return direct.file().try_clone();
        }
        let write = rustix::fs::fcntl_getfl(&self.file)?.contains(OFlags::RDWR);
        let again = OpenOptions::new().read(true).write(write).open(format!("/proc/self/fd/{}", self.file.as_raw_fd()));
        again.or_else(|_| self.file.try_clone())
    }

    /// Whether the kernel takes a transfer to or from this memory at this place as it is.
    pub(crate) fn takes(&self, direction: Direction, offset: u64, areas: &[IoVec]) -> bool {
        self.direct.as_ref().is_none_or(|direct| {
            (direction == Direction::Read || direct.writes_freely()) && direct.takes(offset, areas)
        })
    }

    #[inline(always)]
    fn transfer_in(&self, offset: u64, buf: IoBufMut<'_>) -> io::Result<()> {
        match &self.direct {
            None => positioned::read(&self.file, offset, buf),
            Some(direct) => direct.read(offset, buf),
        }
    }

    #[inline(always)]
    fn transfer_out(&self, offset: u64, buf: IoBuf<'_>) -> io::Result<()> {
        match &self.direct {
            None => positioned::write(&self.file, offset, buf),
            Some(direct) => direct.write(&self.file, offset, buf),
        }
    }

    /// The file itself. Its offset is not used.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether the file at `path` is this one, by whatever name.
    #[must_use]
    pub fn is_at(&self, path: &Path) -> bool {
        let same = |ours: &Metadata, theirs: &Metadata| match self.kind {
            Kind::Regular => (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()),
            Kind::BlockDevice => theirs.file_type().is_block_device() && ours.rdev() == theirs.rdev(),
        };
        matches!((self.file.metadata(), std::fs::metadata(path)), (Ok(ours), Ok(theirs)) if same(&ours, &theirs))
    }

    fn allocate(&self, mode: FallocateFlags, offset: u64, length: u64) -> io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        retry_on_intr(|| rustix::fs::fallocate(&self.file, mode | FallocateFlags::KEEP_SIZE, offset, length))
            .map_err(|e| unsupported(e, self.kind))
    }
}

/// What can be told without changing anything. The rest is found out by the first call that is refused as unsupported.
fn features(file: &File, kind: Kind, length: u64) -> Features {
    let regular = kind == Kind::Regular;
    let punch_hole = match kind {
        // A hole beyond the end of the file changes nothing.
        Kind::Regular => {
            let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let beyond = length.next_multiple_of(1 << 21);
            retry_on_intr(|| rustix::fs::fallocate(file, mode, beyond, 4096)).is_ok()
        }
        Kind::BlockDevice => true,
    };
    Features { resize: regular, punch_hole, write_zeroes: true, copy_range: regular }
}

/// Whether the file system is one that can only copy byte for byte.
fn copies_bytes(file: &File) -> bool {
    const EXT: u64 = 0xef53;
    const TMPFS: u64 = 0x0102_1994;
    rustix::fs::fstatfs(file).is_ok_and(|fs| matches!(fs.f_type as u64, EXT | TMPFS))
}

/// Tells the caller to do it by other means wherever the system says that it does not do this, or not so.
fn unsupported(error: Errno, kind: Kind) -> io::Error {
    match error {
        Errno::OPNOTSUPP | Errno::NOSYS => io::ErrorKind::Unsupported.into(),
        // A block device whose sectors are larger than the range.
        Errno::INVAL if kind == Kind::BlockDevice => io::ErrorKind::Unsupported.into(),
        // A file system that writes zeroes or holes only to some files (compressed, encrypted, sealed ones).
        Errno::PERM | Errno::TXTBSY => io::ErrorKind::Unsupported.into(),
        e => e.into(),
    }
}

impl BlockDevice for HostFile {
    fn features(&self) -> Features {
        self.features
    }

    fn host_file(&self) -> Option<&HostFile> {
        Some(self)
    }

    fn beside(&self, path: &Path, read_only: bool) -> Option<Result<Self>> {
        let opened = Self::open(path, read_only);
        Some(if self.direct.is_some() { opened.and_then(Self::into_direct) } else { opened })
    }

    async fn length(&self) -> io::Result<u64> {
        match self.kind {
            Kind::Regular => Ok(self.file.metadata()?.len()),
            // Nobody uses the descriptor's own offset.
            Kind::BlockDevice => (&self.file).seek(SeekFrom::End(0)),
        }
    }

    async fn read(&self, offset: u64, buf: IoBufMut<'_>) -> io::Result<()> {
        self.transfer_in(offset, buf)
    }

    #[inline(always)]
    fn read_now(&self, offset: u64, buf: IoBufMut<'_>) -> Option<io::Result<()>> {
        Some(self.transfer_in(offset, buf))
    }

    #[inline(always)]
    fn write_now(&self, offset: u64, buf: IoBuf<'_>) -> Option<io::Result<()>> {
        Some(self.transfer_out(offset, buf))
    }

    async fn write(&self, offset: u64, buf: IoBuf<'_>) -> io::Result<()> {
        self.transfer_out(offset, buf)
    }

    async fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    async fn truncate(&self, length: u64) -> io::Result<()> {
        match self.kind {
            Kind::Regular => self.file.set_len(length),
            Kind::BlockDevice => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    async fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        self.allocate(FallocateFlags::PUNCH_HOLE, offset, length)
    }

    async fn write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.allocate(FallocateFlags::ZERO_RANGE, offset, length)
    }

    fn will_read(&self, offset: u64, length: u64) {
        // Past the page cache nothing is read ahead. Nothing is lost if the system does not take the hint.
        if self.direct.is_some() {
            return;
        }
        let _ = rustix::fs::fadvise(&self.file, offset, NonZeroU64::new(length), Advice::WillNeed);
    }

    fn will_flush(&self, offset: u64, length: u64) {
        // Past the page cache hardly anything is left to do. (No length means all there is.)
        if self.direct.is_none() && length > 0 {
            positioned::write_out(&self.file, offset, length);
        }
    }

    fn is_hole(&self, offset: u64, length: u64) -> bool {
        // As with the length: the descriptor's own offset is nobody's.
        match rustix::fs::seek(&self.file, rustix::fs::SeekFrom::Data(offset)) {
            Ok(data) => data >= offset.saturating_add(length),
            // No data from there on.
            Err(Errno::NXIO) => true,
            Err(_) => false,
        }
    }

    fn copies_bytes(&self) -> bool {
        self.copies_bytes
    }

    // Also where nothing is shared: the system copies once, from cache to cache, and not twice through our memory.
    async fn copy_range(&self, from: u64, to: u64, length: u64) -> io::Result<()> {
        let (mut from, mut to, mut left) = (from, to, length);
        while left > 0 {
            let piece = usize::try_from(left).unwrap_or(usize::MAX);
            // The kernel advances both offsets.
            let copied = retry_on_intr(|| {
                rustix::fs::copy_file_range(&self.file, Some(&mut from), &self.file, Some(&mut to), piece)
            });
            match copied {
                // Some file systems answer so instead of saying that they cannot; a real end of file shows when the
                // caller copies by other means.
                Ok(0) => return Err(io::ErrorKind::Unsupported.into()),
                Ok(count) => left -= (count as u64).min(left),
                Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                    return Err(io::ErrorKind::Unsupported.into());
                }
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }
}
