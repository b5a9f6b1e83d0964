//! Writing the virtual disk.

use super::Image;
use super::discard::Access;
use super::mapping::{Purpose, RunKind};
use super::obstacles::Obstacle;
use crate::blocking::block_on;
use crate::buf::{IoBuf, IoBufMut};
use crate::clusters::allocator::Allocation;
use crate::clusters::epochs::InFlight;
use crate::device::BlockDevice;
use crate::device::volume::{Copier, PIECE, zeroes};
use crate::error::Result;
use crate::format::l2::{self, Entry, Mapping};
use crate::metadata::l2::LockedSlice;
use crate::metadata::patches::lay_over;
use crate::metadata::slice::{Entries as _, Slice};
use crate::mutation::{Mutation, broken};
use crate::units::{GuestCluster, GuestOffset, HostOffset};
use std::sync::Arc;

/// At most this many bytes are allocated in one step.
const STEP: u64 = 2 << 20;

impl<D: BlockDevice> Image<D> {
    /// Stores `buf` at byte `offset` of the virtual disk; both are multiples of 512 bytes.
    ///
    /// Durable once a [`flush`](Self::flush) that began later has completed. A power cut before that leaves, for each
    /// 512-byte sector, old or new data. A dropped future leaves the same.
    ///
    /// # Errors
    /// As [`read`](Self::read); also [`Error::ReadOnly`](crate::Error::ReadOnly) and
    /// [`Error::Failed`](crate::Error::Failed). After an error each sector holds old or new data.
    pub async fn write(&self, offset: u64, buf: IoBuf<'_>) -> Result<()> {
        let length = buf.len();
        let request = self.begin_waiting(offset, length as u64, Purpose::Write).await?;
        let done = self.write_at_once(&request, offset, buf)?;
        if done == length {
            self.end(request, length as u64, Purpose::Write);
            return Ok(());
        }
        let (at, rest) = (offset + done as u64, buf.slice(done..length));
        if !self.write_first_at_once(at, rest)? {
            self.write_rest(at, rest).await?;
        }
        self.end(request, length as u64, Purpose::Write);
        self.commit_if_due().await
    }

    /// As [`write`](Self::write), on a thread of the caller's that may sleep. A request that has nothing to heed and need not
    /// wait for anybody makes no future.
    ///
    /// # Errors
    /// As there.
    #[inline(always)]
    pub(crate) fn write_blocking(&self, offset: u64, buf: IoBuf<'_>) -> Result<()> {
        let length = buf.len();
        let Some(request) = self.begin_free(offset, length as u64, Purpose::Write) else {
            return self.write_waiting(offset, buf);
        };
        if self.write_mapped(offset, buf)? {
            self.end_here(request, length as u64, Purpose::Write);
            return Ok(());
        }
        self.write_other(request, offset, buf)
    }

    #[cold]
    fn write_waiting(&self, offset: u64, buf: IoBuf<'_>) -> Result<()> {
        block_on(self.write(offset, buf))
    }

    /// A request of another kind than [`write_mapped`](Self::write_mapped) knows. A function of its own, so that the other is
    /// short.
    #[inline(never)]
    fn write_other(&self, request: InFlight<'_>, offset: u64, buf: IoBuf<'_>) -> Result<()> {
        let length = buf.len();
        // Of the requests of one cluster that get here, most are first writes.
        if !self.write_first_at_once(offset, buf)? {
            let mut done = self.write_at_once(&request, offset, buf)?;
            if done < length
                && self.check_targets_blocking(GuestOffset(offset + done as u64), (length - done) as u64)?
            {
                done += self.write_at_once(&request, offset + done as u64, buf.slice(done..length))?;
            }
            if done == length {
                self.end_here(request, length as u64, Purpose::Write);
                return Ok(());
            }
            let (at, rest) = (offset + done as u64, buf.slice(done..length));
            if !self.write_first_at_once(at, rest)? {
                block_on(self.write_rest(at, rest))?;
            }
        }
        self.end_here(request, length as u64, Purpose::Write);
        if self.meta.l2.wants_commit() { block_on(self.commit_if_due()) } else { Ok(()) }
    }

    /// Writes; the caller is in flight.
    pub(super) async fn write_range(&self, offset: u64, buf: IoBuf<'_>, access: Access) -> Result<()> {
        self.encryption.ensure_open()?;
        let mut done = 0;
        while done < buf.len() {
            let at = GuestOffset(offset + done as u64);
            let rest = buf.slice(done..buf.len());
            let run = self.lookup(at, rest.len() as u64, Purpose::Write).await?;
            done += if let RunKind::Data { host, copied: true } = run.kind {
                self.write_data("writing guest data", host, at, rest.slice(0..run.length as usize)).await?;
                run.length as usize
            } else {
                self.write_allocating(at, rest.slice(0..run.length.min(STEP) as usize), access).await?
            };
        }
        Ok(())
    }

    /// Writes to guest clusters that cannot be written in place. Returns how many bytes were written: 0 if the clusters
    /// have changed meanwhile, and are to be looked up again.
    async fn write_allocating(&self, at: GuestOffset, buf: IoBuf<'_>, access: Access) -> Result<usize> {
        let geometry = self.meta.geometry;
        let cluster_size = geometry.cluster_size();
        let first = geometry.guest_cluster(at);
        let count = (at.0 + buf.len() as u64).div_ceil(cluster_size) - first.0;
        // Who has frozen the mapping has it for himself, and must not wait for those who wait for him with a turn in hand.
        let _turn = if access == Access::Shared || broken(Mutation::TurnWhileFrozen) {
            Some(self.allocating.take(self.turn_for(first.0..first.0 + count)).await)
        } else {
            None
        };
        let _unfrozen = self.unfrozen(access).await;
        self.prepare_changes().await?;
        let (slice, index) = self.slice_for_change(first).await?;
        if self.meta.external {
            return self.write_outside(&slice, index, at, buf).await;
        }
        self.check_targets(&slice, first, index, count).await?;

        // What the clusters are now. Of these, a discard, a move or a first write may still change them before we link ours.
        let mut old = Vec::new();
        {
            let entries = slice.read();
            for i in 0..(count as usize).min(entries.len() - index) {
                let entry = entries.get(index + i);
                let mapping = self.decode(GuestCluster(first.0 + i as u64), entry)?;
                if matches!(mapping, Mapping::Data { copied: true, .. }) {
                    break;
                }
                let preallocated = matches!(mapping.host(), Some((_, true)));
                if preallocated && i > 0 {
                    break;
                }
                old.push((entry, mapping));
                if preallocated {
                    break;
                }
            }
        }
        match old.first() {
            None => Ok(0),
            Some(&(entry, mapping)) if let Some((host, true)) = mapping.host() => {
                if geometry.extended_l2 {
                    self.write_parts(&slice, index, at, (entry, mapping), host, buf).await
                } else {
                    self.write_preallocated(&slice, index, at, entry, host, buf).await
                }
            }
            Some(_) => {
                let allocation = self.clusters.allocate(&self.volume, &self.meta, old.len() as u64).await?;
                old.truncate(allocation.len() as usize);
                self.write_new(&slice, index, at, &old, allocation, buf).await
            }
        }
    }

    /// Writes to new clusters, which are zeroes in the file, and links them.
    pub(super) async fn write_new(
        &self,
        slice: &Arc<Slice>,
        index: usize,
        at: GuestOffset,
        old: &[(Entry, Mapping)],
        allocation: Allocation<'_>,
        buf: IoBuf<'_>,
    ) -> Result<usize> {
        let geometry = self.meta.geometry;
        let first = geometry.guest_cluster(at);
        let start = first.0 << geometry.cluster_bits;
        let end = start + ((old.len() as u64) << geometry.cluster_bits);
        let length = buf.len().min((end - at.0) as usize);
        let host = geometry.host_offset(allocation.first()).0;
        // The rest of the first and of the last cluster keeps its old contents.
        let encrypted = self.encryption.is_on();
        let last = old.len() as u64 - 1;
        let written = at.0..at.0 + length as u64;
        for (rest, cluster) in [(start..at.0, 0), (written.end..end, last)] {
            let Some(&(_, mapping)) = old.get(cluster as usize) else { continue };
            let cluster_start = start + (cluster << geometry.cluster_bits);
            for part in self.to_be_copied(mapping, cluster_start, &written, rest) {
                if encrypted || !self.reads_as_zero(mapping, part.start) {
                    let mut bytes = vec![0; (part.end - part.start) as usize];
                    self.read_range(part.start, IoBufMut::new(&mut bytes)).await?;
                    let to = host + (part.start - start);
                    let (to, from) = (HostOffset(to), GuestOffset(part.start));
                    self.write_data("copying old contents", to, from, IoBuf::new(&bytes)).await?;
                }
            }
        }
        let to = HostOffset(host + (at.0 - start));
        self.write_data("writing guest data", to, at, buf.slice(0..length)).await?;
        // If the clusters read as zeroes before, they may be linked without their data: a power cut then shows zeroes, the
        // old contents. Otherwise the data must be durable first, lest neither old nor new shows. And zeroes that are not
        // durable yet must become so first, lest what the cluster once held shows. In an encrypted image the pool's zeroes
        // decrypt to garbage: the clusters were written whole, and all of it must be durable first.
        let read_as_zero = |mapping: Mapping, at: u64| {
            self.reads_as_zero(mapping, at) || mapping == Mapping::Unallocated && broken(Mutation::LinkBeforeCopyUp)
        };
        let zeroes_before = old.iter().zip(first.0..).all(|(o, g)| read_as_zero(o.1, g << geometry.cluster_bits));
        let must_show_all = encrypted && !broken(Mutation::LinkBeforeEncrypted);
        if !allocation.durable || must_show_all || !zeroes_before && !broken(Mutation::LinkBeforeData) {
            self.meta.require_barrier();
        }
        let mut entries = self.meta.l2.modify(slice);
        // Others may have changed some meanwhile: what comes before those is done.
        let linked = (0..).zip(old).take_while(|&(i, o)| entries.get(index + i) == o.0).count();
        for (i, (_, mapping)) in old.iter().take(linked).enumerate() {
            let within = (i as u64) << geometry.cluster_bits;
            entries.set(index + i, self.renewed(*mapping, start + within, &written, HostOffset(host + within)));
            self.unlink(*mapping);
        }
        let mut allocation = allocation;
        allocation.link_first(linked as u64);
        drop(entries);
        self.work.notify_one();
        Ok(length.min(((start + ((linked as u64) << geometry.cluster_bits)).saturating_sub(at.0)) as usize))
    }

    /// Writes to a cluster that reads as zeroes and has a host cluster of its own, which holds anything.
    async fn write_preallocated(
        &self,
        slice: &Arc<Slice>,
        index: usize,
        at: GuestOffset,
        old: Entry,
        host: HostOffset,
        buf: IoBuf<'_>,
    ) -> Result<usize> {
        let cluster_size = self.meta.geometry.cluster_size();
        let within = at.0 & (cluster_size - 1);
        let length = buf.len().min((cluster_size - within) as usize);
        for (from, to) in [(0, within), (within + length as u64, cluster_size)] {
            let mut from = from;
            while from < to {
                let piece = (to - from).min(PIECE as u64);
                let (to, start) = (HostOffset(host.0 + from), GuestOffset(at.0 - within + from));
                self.write_data("zeroing a preallocated cluster", to, start, zeroes(piece as usize)).await?;
                from += piece;
            }
        }
        self.write_data("writing guest data", HostOffset(host.0 + within), at, buf.slice(0..length)).await?;
        let new = Entry::data(host, self.meta.geometry);
        Ok(if self.link_own(slice, index, old, new, host) { length } else { 0 })
    }

    /// Changes the entry of a guest cluster that keeps its host cluster, in which there is more now that is to show. `false` if
    /// the entry has changed meanwhile.
    pub(super) fn link_own(&self, slice: &Arc<Slice>, index: usize, old: Entry, new: Entry, host: HostOffset) -> bool {
        // Without its data, the cluster would show what it held before it was zeroed.
        if !broken(Mutation::ShowBeforeZeroes) {
            self.meta.require_barrier();
        }
        let mut entries = self.meta.l2.modify(slice);
        if entries.get(index) != old {
            return false;
        }
        self.moves.cancel(self.meta.geometry.host_cluster(host), 1);
        entries.set(index, new);
        true
    }

    /// Whether a cluster that is mapped so reads as zeroes from byte `at` of the disk to its end.
    pub(super) fn reads_as_zero(&self, mapping: Mapping, at: u64) -> bool {
        match mapping {
            Mapping::Zero { .. } => true,
            Mapping::Unallocated => self.backing.is_zero_from(at),
            _ => false,
        }
    }

    /// A mapping was replaced: its clusters of the image lose a reference. To be called under the slice's lock.
    pub(super) fn unlink(&self, mapping: Mapping) {
        if self.meta.external {
            return;
        }
        let geometry = self.meta.geometry;
        let mut states = self.clusters.lock();
        match mapping {
            Mapping::Compressed { descriptor } => {
                let (first, count) = l2::compressed_clusters(descriptor, geometry);
                states.unlinked.shared.extend((first.0..first.0 + count).map(crate::units::HostCluster));
            }
            other => {
                if let Some((host, copied)) = other.host() {
                    let c = geometry.host_cluster(host);
                    if copied {
                        self.moves.cancel(c, 1);
                    }
                    states.unlink(c, copied);
                }
            }
        }
    }

    /// Copies an L2 table that a snapshot shares. Guests never change it; the recycler does, when it moves what the table
    /// refers to, but not while somebody has the turn for the table, as the caller has. So the copy is exact.
    async fn copy_shared_table(&self, from: HostOffset, to: HostOffset) -> Result<()> {
        let cluster_size = self.meta.geometry.cluster_size();
        let changed = self.meta.patches.within(from.0..from.0 + cluster_size);
        let mut copier = Copier::default();
        let mut at = 0;
        while at < cluster_size {
            let piece = (cluster_size - at).min(PIECE as u64);
            self.volume.copy(from.0 + at, to.0 + at, piece, &mut copier).await?;
            at += piece;
        }
        // Entries that are not written back yet: the old ones may name what is free by the time the copy is read.
        let mut changed = &changed[..];
        while let Some(&(first, _)) = changed.first() {
            let start = (first - from.0) & !511;
            let (sector, rest) = changed.split_at(changed.partition_point(|c| c.0 < from.0 + start + 512));
            changed = rest;
            let mut bytes = [0; 512];
            self.volume.read("reading an L2 table", to.0 + start, IoBufMut::new(&mut bytes)).await?;
            lay_over(&mut bytes, from.0 + start, sector);
            self.volume.write("writing an L2 table", to.0 + start, IoBuf::new(&bytes)).await?;
        }
        Ok(())
    }

    /// The slice that maps a guest cluster, locked for changes, and the cluster's index in it; `None` unless it is in memory, the
    /// L2 table is ours alone, the mapping is not frozen (nor will it be before the lock is released), and guests may write
    /// through the `count` entries from the cluster's on. The caller is in flight.
    pub(super) fn lock_at_once(&self, first: GuestCluster, count: u64) -> Result<Option<LockedSlice<'_>>> {
        let is_free = || !self.obstacles.has(Obstacle::Frozen);
        let Some((slice, entries, index)) = self.meta.l2.lock(first, is_free) else { return Ok(None) };
        if !entries.is_ours() {
            let table = self.meta.l1.get(first.0 / self.meta.geometry.l2_entries(), &self.volume)?;
            if !table.is_some_and(|t| t.copied) {
                return Ok(None);
            }
            entries.set_ours();
        }
        Ok(entries.targets().are_checked(index, count).then_some((slice, entries, index)))
    }

    /// The slice that maps a guest cluster, in an L2 table that is ours alone: the table is made, or copied if a snapshot
    /// shares it.
    pub(super) async fn slice_for_change(&self, guest: GuestCluster) -> Result<(Arc<Slice>, usize)> {
        let geometry = self.meta.geometry;
        let l1_index = guest.0 / geometry.l2_entries();
        loop {
            if self.meta.l1.get(l1_index, &self.volume)?.is_some_and(|t| t.copied)
                && let Some(found) = self.meta.l2.slice(&self.volume, &self.meta.l1, guest).await?
            {
                return Ok(found);
            }
            let _turn = self.table_turns.take(l1_index..l1_index + 1).await;
            let old = self.meta.l1.get(l1_index, &self.volume)?;
            if old.is_some_and(|t| t.copied) {
                continue;
            }
            let allocation = self.clusters.allocate(&self.volume, &self.meta, 1).await?;
            let host = geometry.host_offset(allocation.first());
            if let Some(old) = old {
                self.copy_shared_table(old.host, host).await?;
            }
            // An empty table may be linked before it is durable, since it reads as zeroes; a copy may not.
            if old.is_some() && !broken(Mutation::LinkTableCopyEarly) || !allocation.durable {
                self.meta.require_barrier();
            }
            self.meta.tables.lock().insert(allocation.first());
            self.meta.l1.set(l1_index, Some(host));
            allocation.linked();
            if let Some(old) = old {
                // The snapshot still uses it, so it stays among the tables.
                self.clusters.lock().unlink(geometry.host_cluster(old.host), false);
            }
        }
    }
}
