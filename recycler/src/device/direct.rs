//! Transfers past the host's page cache (O_DIRECT), whatever the alignment of what the caller has.
//!
//! Memory that the kernel does not take is bounced through memory that it does, and so is a read that does not start or
//! end where the kernel wants it: more is read than asked for. A write that does not start or end there goes through the
//! page cache, since only the kernel can replace part of a block without a race; while it is under way, and its page
//! dirty in the cache, no direct write of ours may be: hence a lock, for devices with blocks that are larger than the
//! sectors in which guests and the library write.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use crate::sync::RwLock;
use rustix::fs::{AtFlags, StatxFlags, statx};

use super::positioned;
use crate::buf::{IoBuf, IoBufMut, IoVec};
use crate::device::volume::PIECE;

/// What every file system and device can be expected to take, where none is told.
const PAGE: usize = 4096;
/// Everything that the library writes starts and ends with one.
const SECTOR: usize = 512;

/// The same file without the page cache.
#[derive(Debug)]
pub(super) struct Direct {
    file: File,
    /// Addresses of memory must be multiples of this.
    memory: usize,
    /// Offsets and lengths must be multiples of this.
    block: usize,
    /// Shared by direct writes, exclusive for those through the page cache. Only needed for blocks larger than a sector.
    cache: RwLock<()>,
}

/// Bytes at an aligned address.
struct Bounce {
    bytes: Vec<u8>,
    start: usize,
}

impl Bounce {
    fn new(length: usize, alignment: usize) -> Self {
        let bytes = vec![0u8; length + alignment];
        let start = bytes.as_ptr().align_offset(alignment).min(alignment);
        Bounce { bytes, start }
    }

    fn part(&mut self, length: usize) -> &mut [u8] {
        let end = (self.start + length).min(self.bytes.len());
        self.bytes.get_mut(self.start..end).unwrap_or_default()
    }
}

impl Direct {
    /// Opens the file that `cached` is once more.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] if the file system has no direct transfers.
    pub(super) fn new(cached: &File, read_only: bool) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_DIRECT)
            .open(format!("/proc/self/fd/{}", cached.as_raw_fd()))
            .map_err(|e| if e.raw_os_error() == Some(libc::EINVAL) { io::ErrorKind::Unsupported.into() } else { e })?;
        let (mut memory, mut block) = (PAGE, PAGE);
        // Kernels before 6.1 do not tell.
        if let Ok(told) = statx(&file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
            && told.stx_mask & StatxFlags::DIOALIGN.bits() != 0
        {
            (memory, block) = (told.stx_dio_mem_align as usize, told.stx_dio_offset_align as usize);
            if block == 0 {
                return Err(io::ErrorKind::Unsupported.into());
            }
        }
        Ok(Direct {
            file,
            memory: memory.next_power_of_two(),
            block: block.next_power_of_two(),
            cache: RwLock::new(()),
        })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Offsets and lengths of direct transfers must be multiples of this.
    pub(super) fn block(&self) -> u64 {
        self.block as u64
    }

    fn is_aligned(&self, value: u64) -> bool {
        value & (self.block as u64 - 1) == 0
    }

    /// Whether the kernel takes such a transfer as it is.
    pub(super) fn takes(&self, offset: u64, areas: &[IoVec]) -> bool {
        self.is_aligned(offset)
            && areas
                .iter()
                .all(|area| area.iov_base.addr() & (self.memory - 1) == 0 && self.is_aligned(area.iov_len as u64))
    }

    /// Whether direct writes need not keep clear of anything.
    pub(super) fn writes_freely(&self) -> bool {
        self.block <= SECTOR
    }

    fn takes_all(&self, offset: u64, length: usize, fill: impl FnOnce(&mut [IoVec]) -> usize) -> bool {
        let mut areas = [IoVec { iov_base: std::ptr::null_mut(), iov_len: 0 }; positioned::AREAS];
        let count = fill(&mut areas);
        let areas = areas.get(..count).unwrap_or_default();
        // More areas than fit are bounced.
        self.takes(offset, areas) && areas.iter().map(|area| area.iov_len).sum::<usize>() == length
    }

    /// As [`positioned::read`].
    pub(super) fn read(&self, offset: u64, mut buf: IoBufMut<'_>) -> io::Result<()> {
        let length = buf.len();
        if length == 0 || self.takes_all(offset, length, |areas| buf.fill_iovecs(areas)) {
            return positioned::read(&self.file, offset, buf);
        }
        let mut bounce = Bounce::new(length.min(PIECE) + 2 * self.block, self.memory.max(self.block));
        let mut done = 0;
        while done < length {
            let at = offset.saturating_add(done as u64);
            let skip = (at & (self.block as u64 - 1)) as usize;
            let piece = (length - done).min(PIECE);
            let around = bounce.part((skip + piece).next_multiple_of(self.block));
            // The file may end before the last block does.
            positioned::read_least(&self.file, at - skip as u64, IoBufMut::new(around), skip + piece)?;
            buf.slice(done..done + piece).copy_from(around.get(skip..skip + piece).unwrap_or_default());
            done += piece;
        }
        Ok(())
    }

    /// As [`positioned::write`]; `cached` is the file with the page cache.
    pub(super) fn write(&self, cached: &File, offset: u64, buf: IoBuf<'_>) -> io::Result<()> {
        let length = buf.len();
        if !self.is_aligned(offset | length as u64) {
            let _alone = self.cache.write();
            // A direct write that comes later finds the page written back and gone: the kernel sees to that.
            return positioned::write(cached, offset, buf);
        }
        let _clear = (!self.writes_freely()).then(|| self.cache.read());
        if length == 0 || self.takes_all(offset, length, |areas| buf.fill_iovecs(areas)) {
            return positioned::write(&self.file, offset, buf);
        }
        let mut bounce = Bounce::new(length.min(PIECE), self.memory);
        let mut done = 0;
        while done < length {
            let piece = (length - done).min(PIECE);
            let bytes = bounce.part(piece);
            buf.slice(done..done + piece).copy_to(bytes);
            positioned::write(&self.file, offset.saturating_add(done as u64), IoBuf::new(bytes))?;
            done += piece;
        }
        Ok(())
    }
}
