//! The device as the check sees it: reads that know where the file ends, and writes of what changed.

use std::io;

use crate::buf::{IoBuf, IoBufMut};
use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::units::Geometry;

/// Writes are whole sectors of this many bytes, each of which is old or new after a crash, never a mix.
const SECTOR: usize = 512;

pub(super) struct Source<'a, D> {
    pub(super) device: &'a D,
    /// Length of the file in bytes.
    pub(super) length: u64,
    pub(super) geometry: Geometry,
}

impl<D: BlockDevice> Source<'_, D> {
    /// Fills `bytes` from `offset`; what lies past the end of the file is zero.
    pub(super) async fn read(&self, action: &'static str, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let there = usize::try_from(self.length.saturating_sub(offset)).unwrap_or(usize::MAX).min(bytes.len());
        let (file, past) = bytes.split_at_mut(there);
        past.fill(0);
        if file.is_empty() {
            return Ok(());
        }
        self.device.read(offset, IoBufMut::new(file)).await.map_err(Error::io(action, offset))
    }

    /// Writes those sectors of `new`, which belongs at `offset`, in which it differs from `old`.
    pub(super) async fn write_changes(&self, action: &'static str, offset: u64, old: &[u8], new: &[u8]) -> Result<()> {
        let mut at = 0usize;
        let mut run: Option<usize> = None;
        let sectors = new.chunks(SECTOR).zip(old.chunks(SECTOR)).map(|(new, old)| (new.len(), new != old));
        for (length, differs) in sectors.chain(std::iter::once((0, false))) {
            match (run, differs) {
                (None, true) => run = Some(at),
                (Some(start), false) => {
                    self.write(action, offset + start as u64, new.get(start..at).unwrap_or_default()).await?;
                    run = None;
                }
                _ => {}
            }
            at += length;
        }
        Ok(())
    }

    /// Writes `bytes` at `offset`.
    pub(super) async fn write(&self, action: &'static str, offset: u64, bytes: &[u8]) -> Result<()> {
        if offset.checked_add(bytes.len() as u64).is_none_or(|end| end > self.length) {
            let source = io::Error::new(io::ErrorKind::StorageFull, "the device ends inside this cluster");
            return Err(Error::Io { action, offset, source });
        }
        self.device.write(offset, IoBuf::new(bytes)).await.map_err(Error::io(action, offset))
    }

    /// A barrier: everything before it is durable before anything after it begins.
    pub(super) async fn flush(&self) -> Result<()> {
        self.device.flush().await.map_err(Error::io("flushing the image", 0))
    }

    /// Makes the file at least `length` bytes long, if the device allows that; returns whether it is.
    pub(super) async fn reach(&mut self, length: u64) -> Result<bool> {
        if length <= self.length {
            return Ok(true);
        }
        if !self.device.features().resize {
            return Ok(false);
        }
        self.device.truncate(length).await.map_err(Error::io("growing the image file", length))?;
        self.length = length;
        Ok(true)
    }

    /// Whether a reference to `length` bytes at `offset` ends where the file does. The last cluster of a file may be
    /// there in part, so a reference may end less than a cluster past it, and no further (QEMU's rule).
    pub(super) fn holds(&self, offset: u64, length: u64) -> bool {
        let limit = self.length.saturating_add(self.geometry.cluster_size());
        offset.checked_add(length).is_some_and(|end| end < limit)
    }
}

/// The big-endian numbers of a table.
pub(super) fn entries(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.as_chunks().0.iter().map(|b| u64::from_be_bytes(*b))
}

/// Stores a number in a table; an index past its end is ignored.
pub(super) fn set_entry(bytes: &mut [u8], index: usize, value: u64) {
    if let Some(slot) = bytes.as_chunks_mut().0.get_mut(index) {
        *slot = value.to_be_bytes();
    }
}

/// A sliding view of the file, for tables whose entries have different lengths.
#[derive(Default)]
pub(super) struct Window {
    start: u64,
    bytes: Vec<u8>,
}

impl Window {
    const SIZE: usize = 64 << 10;

    /// The `N` bytes at `offset`; `N` is small.
    pub(super) async fn get<D: BlockDevice, const N: usize>(
        &mut self,
        source: &Source<'_, D>,
        action: &'static str,
        offset: u64,
    ) -> Result<[u8; N]> {
        if let Some(bytes) = self.cached(offset) {
            return Ok(bytes);
        }
        self.bytes.resize(Self::SIZE.max(N), 0);
        self.start = offset;
        source.read(action, offset, &mut self.bytes).await?;
        Ok(self.cached(offset).unwrap_or([0; N]))
    }

    fn cached<const N: usize>(&self, offset: u64) -> Option<[u8; N]> {
        let at = usize::try_from(offset.checked_sub(self.start)?).ok()?;
        self.bytes.get(at..)?.first_chunk().copied()
    }
}
