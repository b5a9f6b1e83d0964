//! Entries of the snapshots' tables that have been changed in memory, and wait to be written back.
//!
//! Guests never change these tables: L1 tables of snapshots, L2 tables that a snapshot refers to, the snapshot table. Only
//! the recycler does, when it moves what they refer to. So they are not cached; what is read of them is read from the
//! device and has these entries laid over it. An entry stays here until it is written durably, so a commit that fails or is
//! dropped loses nothing: the next one writes it again.
//!
//! Whoever reads such a table takes its patches *before* reading, and lays them over afterwards: then it does not matter
//! whether a commit wrote them, and forgot them here, in between.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::buf::{IoBuf, IoBufMut};
use crate::device::BlockDevice;
use crate::device::volume::Volume;
use crate::error::Result;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicUsize, Ordering};

/// Tables are read, changed and written in pieces of this many bytes, aligned to them.
const PIECE: u64 = 512;

/// Changed entries: where each is in the file, and its new value.
#[derive(Debug, Default)]
pub(crate) struct Patches {
    entries: Mutex<BTreeMap<u64, u64>>,
    /// How many there are, so that nobody takes the lock for nothing.
    count: AtomicUsize,
}

impl Patches {
    /// The entry at byte `at` of the file, a multiple of 8, is `value` from now on.
    pub(crate) fn set(&self, at: u64, value: u64) {
        let mut entries = self.entries.lock();
        entries.insert(at, value);
        self.count.store(entries.len(), Ordering::SeqCst);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.count.load(Ordering::SeqCst) == 0
    }

    /// Those within a range of the file.
    pub(crate) fn within(&self, range: Range<u64>) -> Vec<(u64, u64)> {
        if self.is_empty() {
            return Vec::new();
        }
        self.entries.lock().range(range).map(|(&at, &value)| (at, value)).collect()
    }

    /// All of them, to be written.
    pub(super) fn capture(&self) -> Vec<(u64, u64)> {
        self.within(0..u64::MAX)
    }

    /// The captured ones are durable.
    pub(super) fn written(&self, captured: &[(u64, u64)]) {
        if captured.is_empty() {
            return;
        }
        let mut entries = self.entries.lock();
        for (at, value) in captured {
            // It may have been changed again meanwhile.
            if entries.get(at) == Some(value) {
                entries.remove(at);
            }
        }
        self.count.store(entries.len(), Ordering::SeqCst);
    }
}

/// Lays patches over bytes that were read from byte `offset` of the file.
pub(crate) fn lay_over(bytes: &mut [u8], offset: u64, patches: &[(u64, u64)]) {
    for &(at, value) in patches {
        let start = at.wrapping_sub(offset) as usize;
        if let Some(entry) = start.checked_add(8).and_then(|end| bytes.get_mut(start..end)) {
            entry.copy_from_slice(&value.to_be_bytes());
        }
    }
}

/// Writes patches to their tables. A 512-byte sector is atomic, so each entry is the old or the new one at any moment.
pub(super) async fn write<D: BlockDevice>(volume: &Volume<D>, patches: &[(u64, u64)]) -> Result<u64> {
    let mut bytes = [0; PIECE as usize];
    let mut written = 0;
    for piece in patches.chunk_by(|a, b| a.0 / PIECE == b.0 / PIECE) {
        let Some(&(first, _)) = piece.first() else { continue };
        let start = first / PIECE * PIECE;
        volume.read("reading a snapshot's table", start, IoBufMut::new(&mut bytes)).await?;
        lay_over(&mut bytes, start, piece);
        volume.write("writing a snapshot's table", start, IoBuf::new(&bytes)).await?;
        written += PIECE;
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changed_while_it_was_written_stays() {
        let patches = Patches::default();
        assert!(patches.within(0..u64::MAX).is_empty());
        patches.set(512, 1);
        patches.set(1024, 2);
        let captured = patches.capture();
        patches.set(1024, 3);
        patches.written(&captured);
        assert_eq!(patches.within(0..u64::MAX), [(1024, 3)]);
        assert_eq!(patches.within(0..1024), []);
    }

    #[test]
    fn patches_are_laid_over_where_they_belong() {
        let mut bytes = [0; 24];
        lay_over(&mut bytes, 512, &[(504, 9), (520, 0x0102), (536, 9)]);
        assert_eq!(bytes[14..16], [1, 2]);
        assert_eq!(bytes.iter().map(|&b| u32::from(b)).sum::<u32>(), 3);
    }
}
