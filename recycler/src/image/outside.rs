//! Guest requests to external data files: the guest's data in a file of its own, each cluster at the offset that it has on the
//! disk.
//!
//! Nothing counts clusters there, and they never move; the image holds tables only. An entry says whether a cluster of the
//! data file is in use. One that is not may hold anything: what it held before it was discarded, or before the image was
//! made. So a cluster is written whole before its entry shows it, and a commit flushes the data file before it writes
//! entries (see `metadata/commit.rs`).
//!
//! A discard makes its clusters zero in the data file at once, where that gives space back, and then takes them out of use.
//! Nobody else's data can ever be in their place, so no flush is needed in between:
//!
//! - Cut with the entry and without the zeroes: the cluster is not in use, and reads as zeroes.
//! - Cut with the zeroes, or part of them, and without the entry: sector by sector what it held, or zeroes.
//!
//! The data is gone once it is zero, though, so where something else than zeroes is to show afterwards (a backing file into
//! which the image was committed), the entries are durable first.
//!
//! With extended entries all this holds for subclusters: one that is not in use is written whole before its entry shows
//! it, those beside it are not touched, and what is discarded is made zero and taken out of use.
//!
//! An *encrypted* data file does not read as zeroes where it is zero. There what is discarded keeps its contents until
//! that is durable and older requests have ended: see `vacated`.
//!
//! A *raw* data file reads as the disk does, without the image, at any moment. There discards and zeroes are nothing
//! but zeroes in the data file, and no entry changes. Whoever writes to a cluster that is not in use lets all those
//! that one slice maps be zero in the data file, takes them into use, and makes that durable before he writes: cut at
//! any point, the data file has zeroes wherever an entry says so. An encrypted one never reads as the disk does, so it
//! is used as if it were not raw.

use std::ops::Range;
use std::sync::Arc;

use super::Image;
use super::discard::Clear;
use crate::buf::{IoBuf, IoBufMut};
use crate::device::BlockDevice;
use crate::device::volume::Volume;
use crate::error::Result;
use crate::format::l2::{Entry, Mapping};
use crate::metadata::slice::{Entries as _, Slice};
use crate::mutation::{Mutation, broken};
use crate::units::{GuestCluster, GuestOffset, HostOffset};

/// Holes are punched, and zeroes made, in pieces of at most this many bytes: other requests wait meanwhile.
pub(super) const PIECE: u64 = 32 << 20;

impl<D: BlockDevice> Image<D> {
    /// As [`place_of`](Self::place_of), in the data file.
    #[inline(never)]
    pub(super) fn place_outside(&self, at: GuestOffset, length: u64) -> Option<(&Volume<D>, HostOffset)> {
        let volume = self.data.volume()?;
        let guest = self.meta.geometry.guest_cluster(at);
        let (view, index) = self.meta.l2.view(guest)?;
        let mapping = self.meta.decode(guest, view.get(index)).ok()?;
        let plain = matches!(mapping, Mapping::Data { .. }) && view.still() && at.0 + length <= volume.length();
        plain.then_some((volume, HostOffset(at.0)))
    }

    /// Writes to clusters of the data file that are not in use, and takes them into use. The caller has the turn for them.
    /// Returns how many bytes were written: 0 if the clusters have changed meanwhile.
    pub(super) async fn write_outside(
        &self,
        slice: &Arc<Slice>,
        index: usize,
        at: GuestOffset,
        buf: IoBuf<'_>,
    ) -> Result<usize> {
        if self.data_is_disk() {
            self.use_slice(slice, at).await?;
            // In place now.
            return Ok(0);
        }
        let geometry = self.meta.geometry;
        let cluster_size = geometry.cluster_size();
        let volume = self.data_volume()?;
        let first = geometry.guest_cluster(at);
        let count = (at.0 + buf.len() as u64).div_ceil(cluster_size) - first.0;
        let mut old = Vec::new();
        {
            let entries = slice.read();
            for i in 0..(count as usize).min(entries.len() - index) {
                let entry = entries.get(index + i);
                match self.decode(GuestCluster(first.0 + i as u64), entry)? {
                    Mapping::Data { .. } => break,
                    mapping => old.push((entry, mapping)),
                }
            }
        }
        if old.is_empty() {
            return Ok(0);
        }
        let start = first.0 * cluster_size;
        let end = start + old.len() as u64 * cluster_size;
        let length = buf.len().min((end - at.0) as usize);
        let written = at.0..at.0 + length as u64;
        // What is taken into use: whole clusters, or subclusters.
        let unit = self.unit_size();
        let taken = written.start & !(unit - 1)..written.end.next_multiple_of(unit);
        // The last cluster of the disk may be cut short, and so is the file.
        let visible = taken.end.min(self.virtual_size().max(written.end));
        for (around, cluster) in [(taken.start..written.start, 0), (written.end..visible, old.len() - 1)] {
            if let Some(&(_, mapping)) = old.get(cluster)
                && !around.is_empty()
                && !self.is_stored(mapping, start + cluster as u64 * cluster_size, &around)
                && !broken(Mutation::KeepStaleAround)
            {
                self.keep_around(volume, around, mapping).await?;
            }
        }
        self.write_data("writing guest data", HostOffset(at.0), at, buf.slice(0..length)).await?;
        // Whatever they show now has been written, and a commit that has the entries flushes it before them.
        let mut entries = self.meta.l2.modify(slice);
        if old.iter().enumerate().any(|(i, o)| entries.get(index + i) != o.0) {
            return Ok(0);
        }
        for (i, (_, mapping)) in old.iter().enumerate() {
            let start = start + i as u64 * cluster_size;
            entries.set(index + i, self.renewed(*mapping, start, &written, HostOffset(start)));
        }
        self.retake(taken);
        drop(entries);
        self.work.notify_one();
        Ok(length)
    }

    /// The clusters for which somebody who writes to `clusters` of them needs the turn.
    pub(super) fn turn_for(&self, clusters: Range<u64>) -> Range<u64> {
        if !self.data_is_disk() {
            return clusters;
        }
        let per_slice = self.meta.l2.per_slice();
        clusters.start / per_slice * per_slice..clusters.end.next_multiple_of(per_slice)
    }

    /// Takes every cluster of a raw data file into use that the slice maps which maps `at`. The caller has the turn for them, so
    /// that none is written to meanwhile.
    async fn use_slice(&self, slice: &Arc<Slice>, at: GuestOffset) -> Result<()> {
        let bits = self.meta.geometry.cluster_bits;
        let per_slice = self.meta.l2.per_slice();
        let first = (at.0 >> bits) / per_slice * per_slice;
        let mut unused = Vec::new();
        let mut ranges: Vec<(Range<u64>, Clear)> = Vec::new();
        {
            let entries = slice.read();
            let size = self.meta.geometry.clusters_for(self.virtual_size());
            for (i, guest) in (first..size.min(first + per_slice)).enumerate() {
                let entry = entries.get(i);
                let mapping = self.decode(GuestCluster(guest), entry)?;
                let clear = match mapping {
                    Mapping::Data { .. } => continue,
                    Mapping::Zero { preallocated: Some(_) } => Clear::Keep,
                    _ => Clear::Unmap,
                };
                unused.push((i, entry));
                for part in self.not_stored(mapping, guest << bits) {
                    match ranges.last_mut() {
                        Some((range, c)) if range.end == part.start && *c == clear => range.end = part.end,
                        _ => ranges.push((part, clear)),
                    }
                }
            }
        }
        let size = self.virtual_size();
        for (range, clear) in ranges {
            self.clear_outside(range.start..range.end.min(size), clear).await?;
        }
        {
            let mut entries = self.meta.l2.modify(slice);
            for (i, entry) in unused {
                if entries.get(i) == entry {
                    entries.set(i, Entry::data(HostOffset((first + i as u64) << bits), self.meta.geometry));
                }
            }
        }
        self.commit().await.map(|_| ())
    }

    /// Lets a piece of a cluster that is about to be used hold what it reads as.
    async fn keep_around(&self, volume: &Volume<D>, piece: Range<u64>, mapping: Mapping) -> Result<()> {
        let length = piece.end - piece.start;
        let encrypted = self.encryption.is_on();
        match mapping {
            // Kept for writes, so its space is.
            Mapping::Zero { preallocated: Some(_) } if !encrypted => volume.zero(piece.start, length).await,
            mapping if !encrypted && self.reads_as_zero(mapping, piece.start) => {
                volume.erase(piece.start, length).await
            }
            _ => {
                let mut bytes = vec![0; length as usize];
                self.read_range(piece.start, IoBufMut::new(&mut bytes)).await?;
                let (to, from) = (HostOffset(piece.start), GuestOffset(piece.start));
                self.write_data("copying old contents", to, from, IoBuf::new(&bytes)).await
            }
        }
    }

    /// Clears whole clusters in a raw data file: only their contents change.
    pub(super) async fn clear_raw(&self, clusters: Range<u64>, clear: Clear) -> Result<()> {
        let cluster_size = self.meta.geometry.cluster_size();
        let end = (clusters.end * cluster_size).min(self.virtual_size());
        self.clear_outside(clusters.start * cluster_size..end, clear).await
    }

    /// Makes a range of the data file read as zeroes.
    pub(super) async fn clear_outside(&self, range: Range<u64>, clear: Clear) -> Result<()> {
        let volume = self.data_volume()?;
        for piece in pieces(range) {
            match clear {
                Clear::Keep => volume.zero(piece.start, piece.end - piece.start).await?,
                Clear::Unmap | Clear::Forget => volume.erase(piece.start, piece.end - piece.start).await?,
            }
        }
        Ok(())
    }

    /// Gives the space of clusters back that one slice maps, as far as anything of them is in use or kept, and is the
    /// disk's. They read as zeroes then, where anything has happened at all.
    pub(super) async fn punch_outside(&self, slice: &Arc<Slice>, index: usize, clusters: Range<u64>) -> Result<()> {
        let volume = self.data_volume()?;
        let bits = self.meta.geometry.cluster_bits;
        let mut runs: Vec<Range<u64>> = Vec::new();
        {
            let entries = slice.read();
            for (i, guest) in clusters.enumerate() {
                let mapping = self.decode(GuestCluster(guest), entries.get(index + i))?;
                if mapping.host().is_none() {
                    continue;
                }
                match runs.last_mut() {
                    Some(run) if run.end == guest => run.end += 1,
                    _ => runs.push(guest..guest + 1),
                }
            }
        }
        let size = self.virtual_size();
        for run in runs {
            for piece in pieces(run.start << bits..(run.end << bits).min(size)) {
                volume.punch(piece.start, piece.end - piece.start).await?;
            }
        }
        Ok(())
    }
}

/// A range of bytes in pieces.
pub(super) fn pieces(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    range.clone().step_by(PIECE as usize).map(move |start| start..range.end.min(start + PIECE))
}
