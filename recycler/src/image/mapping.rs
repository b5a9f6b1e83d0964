//! From the virtual disk to the file: what the L2 tables say about a range.

use std::ops::Range;
use std::sync::Arc;

use super::Image;
use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::format::l2::Mapping;
use crate::metadata::l2::Slice;
use crate::units::{GuestCluster, GuestOffset, HostCluster, HostOffset};

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
            Some((slice, index)) => {
                if purpose == Purpose::Write {
                    self.check_targets(&slice, guest, index, self.clusters_of(at, max)).await?;
                }
                self.lookup_in_slice(&slice, index, at, max, purpose)
            }
            // No table: nothing is allocated up to the end of what the missing slice would map.
            None => {
                let length = self.slice_bytes() - at.0 % self.slice_bytes();
                Ok(Run { kind: RunKind::Unallocated, length: length.min(max) })
            }
        }
    }

    /// The same, as far as it is in memory. `None` if the first slice is not, or if its entries must be checked before a write:
    /// then tables must be read.
    pub(crate) fn lookup_cached(&self, at: GuestOffset, max: u64, purpose: Purpose) -> Result<Option<Run>> {
        let geometry = self.meta.geometry;
        let Some((slice, index)) = self.meta.l2.cached(geometry.guest_cluster(at)) else { return Ok(None) };
        let writable = |slice: &Slice, index: usize, at: GuestOffset, max: u64| {
            purpose == Purpose::Read || slice.targets.are_checked(index, self.clusters_of(at, max))
        };
        if !writable(&slice, index, at, max) {
            return Ok(None);
        }
        let mut run = self.lookup_in_slice(&slice, index, at, max, purpose)?;
        // On into the next slices.
        loop {
            let next = GuestOffset(at.0 + run.length);
            if run.length == max || !next.0.is_multiple_of(self.slice_bytes()) {
                break;
            }
            let Some((slice, index)) = self.meta.l2.cached(geometry.guest_cluster(next)) else { break };
            if !writable(&slice, index, next, max - run.length) {
                break;
            }
            // An error there is left to the request that needs it: this one may end before, or comes again.
            match self.lookup_in_slice(&slice, index, next, max - run.length, purpose) {
                Ok(more) if run.continues(&more) => run.length += more.length,
                _ => break,
            }
        }
        Ok(Some(run))
    }

    /// How many clusters a range of the disk touches.
    fn clusters_of(&self, at: GuestOffset, length: u64) -> u64 {
        let cluster_size = self.meta.geometry.cluster_size();
        ((at.0 & (cluster_size - 1)) + length).div_ceil(cluster_size)
    }

    /// How many bytes of the virtual disk one slice maps.
    fn slice_bytes(&self) -> u64 {
        self.meta.l2.per_slice() << self.meta.geometry.cluster_bits
    }

    /// Within one slice, whose entries have been checked if this is for a write.
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

    /// Refuses to write through entries of a slice that a damaged image points at a free cluster, which the next write may be
    /// given, or at one of the image's own tables, which a guest write would destroy. Done once for each entry; entries set
    /// later are right by construction.
    pub(crate) async fn check_targets(
        &self,
        slice: &Arc<Slice>,
        guest: GuestCluster,
        index: usize,
        count: u64,
    ) -> Result<()> {
        if slice.targets.are_checked(index, count) {
            return Ok(());
        }
        let range = index..index.saturating_add(count as usize);
        // In a box, lest the future of every request be as large as this one.
        Box::pin(self.check_targets_now(slice, guest, index, range)).await
    }

    #[cold]
    async fn check_targets_now(
        &self,
        slice: &Arc<Slice>,
        guest: GuestCluster,
        index: usize,
        range: Range<usize>,
    ) -> Result<()> {
        let invalid = |i: usize, entry: u64, reason: &str| {
            self.invalid_entry(GuestCluster(guest.0 - index as u64 + i as u64), entry, reason)
        };
        loop {
            let mut next = None;
            {
                let entries = slice.read();
                let tables = self.meta.tables.lock();
                for i in (0..entries.len()).filter(|&i| !slice.targets.is_checked(i)) {
                    let entry = entries.get(i);
                    match self.targets(entry) {
                        // One such entry is reason enough to trust none of the slice.
                        Some((hosts, true)) if tables.contains(HostCluster(hosts.start)) => {
                            return Err(invalid(i, entry, "it points at one of the image's own tables"));
                        }
                        Some((hosts, _)) if range.contains(&i) && next.is_none() => next = Some(hosts),
                        Some(_) => {}
                        None => slice.targets.set_checked(i),
                    }
                }
                if (0..entries.len()).all(|i| slice.targets.is_checked(i)) {
                    slice.targets.set_all_checked();
                }
            }
            let Some(hosts) = next else { return Ok(()) };
            // What tells the counts of this entry's clusters tells those of their neighbours, too: where the clusters of
            // a slice lie together, one read of 4 KiB is all that this ever costs.
            let mut refcounts = self.meta.refcounts.lock().await;
            refcounts.load_range(&self.volume, &hosts).await?;
            let entries = slice.read();
            let states = self.clusters.lock();
            for i in (0..entries.len()).filter(|&i| !slice.targets.is_checked(i)) {
                let entry = entries.get(i);
                let Some((hosts, _)) = self.targets(entry) else { continue };
                match refcounts.all_counted(&hosts) {
                    Some(true) if !states.any_free(&hosts) => slice.targets.set_checked(i),
                    Some(_) if range.contains(&i) => return Err(invalid(i, entry, "it points at a free cluster")),
                    _ => {}
                }
            }
        }
    }

    /// The host clusters that an entry names, and whether they are the guest cluster's own, not compressed; `None` if it names
    /// none, or cannot be decoded, which is reported to the request that needs it.
    fn targets(&self, entry: u64) -> Option<(Range<u64>, bool)> {
        let geometry = self.meta.geometry;
        let mapping = Mapping::decode(entry, self.meta.version, geometry.cluster_size()).ok()?;
        Some((mapping.host_clusters(geometry)?, !matches!(mapping, Mapping::Compressed { .. })))
    }
}
