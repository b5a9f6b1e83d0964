//! The raw file: what the loops cost without a library.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Mutex;
use std::time::Instant;

use bench_work::Disk;
use bench_work::buffer::Buffer;
use bench_work::protocol::{Bound, Extra, Opening, Work};
use serde_json::{Value, json};

use crate::ring::Ring;

pub struct File {
    file: std::fs::File,
    ring: Mutex<Option<Ring>>,
}

/// The most that one transfer of the bound moves, and how far ahead of it the kernel is asked to read.
const CHUNK: u64 = 1 << 20;
const READ_AHEAD: usize = 64;

fn whole(moved: isize, wanted: usize) -> io::Result<()> {
    match usize::try_from(moved) {
        Ok(bytes) if bytes == wanted => Ok(()),
        Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

fn check(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

impl File {
    pub fn open(opening: &Opening) -> io::Result<Self> {
        let flags = if opening.direct { libc::O_DIRECT } else { 0 };
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&opening.path)?;
        Ok(Self { file, ring: Mutex::new(None) })
    }

    #[inline]
    fn pread(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let fd = self.file.as_raw_fd();
        // SAFETY: the buffer is ours until the call returns.
        whole(unsafe { libc::pread(fd, buffer.as_mut_ptr().cast(), buffer.len(), offset as i64) }, buffer.len())
    }

    #[inline]
    fn pwrite(&self, buffer: &[u8], offset: u64) -> io::Result<()> {
        let fd = self.file.as_raw_fd();
        // SAFETY: as above.
        whole(unsafe { libc::pwrite(fd, buffer.as_ptr().cast(), buffer.len(), offset as i64) }, buffer.len())
    }

    /// What a compaction cannot do without.
    fn bound(&self, bound: &Bound) -> io::Result<Value> {
        let mut buffer = Buffer::new(CHUNK as usize, 0);
        let started = Instant::now();
        let mut moved = 0;
        for (number, &(from, to, length)) in bound.copies.iter().enumerate() {
            if let Some(&(ahead, _, length)) = bound.copies.get(number + READ_AHEAD)
                && !bound.share
            {
                // SAFETY: no memory is involved.
                unsafe {
                    libc::posix_fadvise(self.file.as_raw_fd(), ahead as i64, length as i64, libc::POSIX_FADV_WILLNEED)
                };
            }
            if bound.share {
                self.copy_range(from, to, length)?;
            } else {
                for done in (0..length).step_by(CHUNK as usize) {
                    let part = &mut buffer[..(length - done).min(CHUNK) as usize];
                    self.pread(part, from + done)?;
                    self.pwrite(part, to + done)?;
                }
            }
            moved += length;
        }
        self.file.sync_data()?;
        self.file.set_len(bound.length)?;
        Ok(
            json!({ "nanoseconds": started.elapsed().as_nanos() as u64, "after": bound.length, "moved": moved, "flushes": 1 }),
        )
    }

    fn copy_range(&self, from: u64, to: u64, length: u64) -> io::Result<()> {
        let (mut from, mut to, mut left) = (from as i64, to as i64, length as usize);
        let fd = self.file.as_raw_fd();
        while left > 0 {
            // SAFETY: the two offsets are ours until the call returns.
            match unsafe { libc::copy_file_range(fd, &mut from, fd, &mut to, left, 0) } {
                moved @ 1.. => left -= moved as usize,
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                _ => return Err(io::Error::last_os_error()),
            }
        }
        Ok(())
    }
}

impl Disk for File {
    #[inline]
    async fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.pread(buffer, offset)
    }

    #[inline]
    async fn write(&self, buffer: &[u8], offset: u64) -> io::Result<()> {
        self.pwrite(buffer, offset)
    }

    #[inline]
    async fn flush(&self) -> io::Result<()> {
        // SAFETY: no memory is involved.
        check(unsafe { libc::fdatasync(self.file.as_raw_fd()) })
    }

    #[inline]
    async fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: no memory is involved.
        check(unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset as i64, length as i64) })
    }

    fn queue(&self, work: &Work, offsets: &[u64], buffers: &mut [Buffer]) -> Option<io::Result<()>> {
        let mut ring = self.ring.lock().ok()?;
        let ring = match &mut *ring {
            Some(ring) => ring,
            none => match Ring::new(&self.file, buffers.len()) {
                Ok(new) => none.insert(new),
                Err(error) => return Some(Err(error)),
            },
        };
        Some(ring.go_through(work, offsets, buffers))
    }

    fn extra(&mut self, extra: &Extra) -> io::Result<Value> {
        match extra {
            Extra::Compact(Some(bound)) => self.bound(bound),
            other => Err(io::Error::other(format!("a raw file has no {other:?}"))),
        }
    }

    async fn close(self) -> io::Result<()> {
        Ok(())
    }
}
