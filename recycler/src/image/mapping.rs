//! From the virtual disk to the file: what the L2 tables say about a range.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Image;
use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::format::l2::Mapping;
use crate::metadata::l2::Slice;
use crate::units::{GuestCluster, GuestOffset, HostOffset};

/// How a run of bytes of the virtual disk is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RunKind {
    /// In the file, in one piece, from this byte on. `copied`: ours alone, so it may be written in place.
    Data { host: HostOffset, copied: bool },
    /// Reads as zeroes.
    Zero,
    /// Reads as the backing file does.
    Unallocated,
    /// Part of one compressed cluster.
    Compressed { descriptor: u64 },
}

/// A run of bytes of the virtual disk that is stored in one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) kind: RunKind,
    /// In bytes.
    pub(crate) length: u64,
}

/// Why a mapping is looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    Read,
    /// To write in place where that is possible: moves of the clusters found are cancelled.
    Write,
}

impl Run {
    /// Whether `next`, which is stored right after this on the virtual disk, is so in the file, too.
    fn continues(&self, next: &Run) -> bool {
        match (self.kind, next.kind) {
            (RunKind::Data { host, copied }, RunKind::Data { host: h, copied: c }) => {
                host.0 + self.length == h.0 && copied == c
            }
            (RunKind::Compressed { .. }, _) => false,
            (a, b) => a == b,
        }
    }
}

impl<D: BlockDevice> Image<D> {
    /// What is stored from `at` on, for at most `max` bytes. Clusters that follow one another in the file are one run, as
    /// far as the slices in memory tell.
    ///
    /// The caller must be in flight (see `Epochs`), which keeps the clusters from being reused.
    pub(crate) async fn lookup(&self, at: GuestOffset, max: u64, purpose: Purpose) -> Result<Run> {
        if let Some(run) = self.lookup_cached(at, max, purpose)? {
            return Ok(run);
        }
        let guest = self.meta.geometry.guest_cluster(at);
        match self.meta.l2.slice(&self.volume, &self.meta.l1, guest).await? {
            Some((slice, index)) => self.lookup_in_slice(&slice, index, at, max, purpose),
            // No table: nothing is allocated up to the end of what the missing slice would map.
            None => {
                let length = self.slice_bytes() - at.0 % self.slice_bytes();
                Ok(Run { kind: RunKind::Unallocated, length: length.min(max) })
            }
        }
    }

    /// The same, as far as it is in memory. `None` if the first slice is not: then an L2 table must be read.
    pub(crate) fn lookup_cached(&self, at: GuestOffset, max: u64, purpose: Purpose) -> Result<Option<Run>> {
        let geometry = self.meta.geometry;
        let Some((slice, index)) = self.meta.l2.cached(geometry.guest_cluster(at)) else { return Ok(None) };
        let mut run = self.lookup_in_slice(&slice, index, at, max, purpose)?;
        // On into the next slices.
        loop {
            let next = GuestOffset(at.0 + run.length);
            if run.length == max || !next.0.is_multiple_of(self.slice_bytes()) {
                break;
            }
            let Some((slice, index)) = self.meta.l2.cached(geometry.guest_cluster(next)) else { break };
            // An error there is left to the request that needs it: this one may end before, or comes again.
            match self.lookup_in_slice(&slice, index, next, max - run.length, purpose) {
                Ok(more) if run.continues(&more) => run.length += more.length,
                _ => break,
            }
        }
        Ok(Some(run))
    }

    /// How many bytes of the virtual disk one slice maps.
    fn slice_bytes(&self) -> u64 {
        self.meta.l2.per_slice() << self.meta.geometry.cluster_bits
    }

    /// Within one slice.
    fn lookup_in_slice(
        &self,
        slice: &Arc<Slice>,
        index: usize,
        at: GuestOffset,
        max: u64,
        purpose: Purpose,
    ) -> Result<Run> {
        let geometry = self.meta.geometry;
        let cluster_size = geometry.cluster_size();
        let guest = geometry.guest_cluster(at);
        let within = at.0 & (cluster_size - 1);
        if purpose == Purpose::Write {
            self.check_targets(slice, guest, index)?;
        }
        let entries = slice.read();
        let first = self.decode(guest, entries.get(index))?;
        let mut length = (cluster_size - within).min(max);
        let mut next = index + 1;
        // Decoding errors of later entries are left to the request that needs them.
        let mut follow = |expected: &dyn Fn(Mapping, u64) -> bool| {
            while length < max && next < entries.len() {
                let clusters = (next - index) as u64;
                match Mapping::decode(entries.get(next), self.meta.version, cluster_size) {
                    Ok(m) if expected(m, clusters) => {}
                    _ => break,
                }
                length = (length + cluster_size).min(max);
                next += 1;
            }
        };
        let kind = match first {
            Mapping::Data { host, copied } => {
                follow(&|m, n| m == Mapping::Data { host: HostOffset(host.0 + n * cluster_size), copied });
                RunKind::Data { host: HostOffset(host.0 + within), copied }
            }
            Mapping::Zero { .. } => {
                follow(&|m, _| matches!(m, Mapping::Zero { .. }));
                RunKind::Zero
            }
            Mapping::Unallocated => {
                follow(&|m, _| m == Mapping::Unallocated);
                RunKind::Unallocated
            }
            Mapping::Compressed { descriptor } => RunKind::Compressed { descriptor },
        };
        if let RunKind::Data { host, copied } = kind {
            let end = self.volume.length().next_multiple_of(cluster_size);
            if host.0 + length > end {
                let reason = format!("a data cluster lies outside the file of {} bytes", self.volume.length());
                return Err(self.invalid_entry(guest, entries.get(index), &reason));
            }
            if purpose == Purpose::Write && copied {
                // Still under the slice's lock: the reference cannot be rewritten between this and our write, whatever
                // state the move was in.
                let last = geometry.host_cluster(HostOffset(host.0 + length - 1));
                let first = geometry.host_cluster(host);
                self.moves.cancel(first, last.0 - first.0 + 1);
            }
        }
        Ok(Run { kind, length })
    }

    /// Decodes an entry, with an error that names its place.
    pub(crate) fn decode(&self, guest: GuestCluster, entry: u64) -> Result<Mapping> {
        Mapping::decode(entry, self.meta.version, self.meta.geometry.cluster_size())
            .map_err(|reason| self.invalid_entry(guest, entry, reason))
    }

    pub(crate) fn invalid_entry(&self, guest: GuestCluster, entry: u64, reason: &str) -> Error {
        self.meta.l2.invalid_entry(&self.volume, &self.meta.l1, guest, entry, reason)
    }

    /// Refuses a slice in which an entry points at one of the image's own tables: a guest write there would destroy it.
    /// Done once, before the first write through the slice; entries set later are right by construction.
    #[inline]
    pub(crate) fn check_targets(&self, slice: &Arc<Slice>, guest: GuestCluster, index: usize) -> Result<()> {
        if slice.targets_checked.load(Ordering::Acquire) { Ok(()) } else { self.check_targets_now(slice, guest, index) }
    }

    #[cold]
    fn check_targets_now(&self, slice: &Arc<Slice>, guest: GuestCluster, index: usize) -> Result<()> {
        let geometry = self.meta.geometry;
        let entries = slice.read();
        for i in 0..entries.len() {
            let host = match Mapping::decode(entries.get(i), self.meta.version, geometry.cluster_size()) {
                Ok(Mapping::Data { host, .. }) => host,
                Ok(Mapping::Zero { preallocated: Some((host, _)) }) => host,
                _ => continue,
            };
            let c = geometry.host_cluster(host);
            if self.meta.tables.lock().contains(c) {
                let entry_of = GuestCluster(guest.0 - index as u64 + i as u64);
                return Err(self.invalid_entry(entry_of, entries.get(i), "it points at one of the image's own tables"));
            }
        }
        slice.targets_checked.store(true, Ordering::Release);
        Ok(())
    }
}
