//! Discards and zeroes.

use std::ops::Range;

use super::Image;
use super::mapping::{Purpose, RunKind};
use crate::blocking::block_on;
use crate::clusters::epochs::Counter;
use crate::device::BlockDevice;
use crate::device::volume::{PIECE, zeroes};
use crate::error::{Error, Result};
use crate::format::l2::{self, Entry, Mapping};
use crate::metadata::l2::LockedSlice;
use crate::metadata::slice::Entries as _;
use crate::mutation::{Mutation, broken};
use crate::sync::AsyncRwLockReadGuard;
use crate::sync::atomic::Ordering;
use crate::units::{GuestCluster, GuestOffset};

/// What becomes of whole clusters that are to read as zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Clear {
    /// Give the host clusters back.
    Unmap,
    /// Keep the host clusters for later writes.
    Keep,
    /// Give the host clusters back, and let the backing file show through: for what is past the end of the disk.
    Forget,
}

/// Whether the one who changes the mapping has frozen it for all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Not: it waits while somebody has.
    Shared,
    /// It has.
    Frozen,
}

impl<D: BlockDevice> Image<D> {
    /// Frees a range of the virtual disk, in bytes, multiples of 512: it reads as zeroes afterwards, and the clusters that
    /// lie in it whole go back to the recycler. Pieces of clusters are overwritten with zeroes where they hold data.
    ///
    /// # Errors
    /// As [`write`](Self::write); [`Error::Unsupported`] without the option `discard`, and for an image of version 2 with a
    /// backing file, whose contents would show through.
    pub async fn discard(&self, offset: u64, length: u64) -> Result<()> {
        self.ensure_discards()?;
        self.clear_request(offset, length, Clear::Unmap).await
    }

    /// As [`discard`](Self::discard), on a thread of the caller's that may sleep. A request that need not wait for anybody
    /// makes no future.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn discard_blocking(&self, offset: u64, length: u64) -> Result<()> {
        self.ensure_discards()?;
        if let Some(request) = self.begin(offset, length, Purpose::Write)?
            && self.unmap_at_once(offset, length)?
        {
            request.count_here((Counter::Discards, Counter::DiscardBytes), length);
            drop(request);
            self.work.notify_one();
            return if self.meta.l2.wants_commit() { block_on(self.commit_if_due()) } else { Ok(()) };
        }
        block_on(self.clear_request(offset, length, Clear::Unmap))
    }

    fn ensure_discards(&self) -> Result<()> {
        if !self.options.discard {
            return Err(Error::unsupported("discard is turned off by option"));
        }
        if self.meta.version < 3 && self.backing.exists() {
            return Err(Error::unsupported("discard in a version 2 image with a backing file"));
        }
        Ok(())
    }

    /// Unmaps a range of the commonest kind at once: whole clusters that one slice maps, which is in memory and the disk's
    /// alone. `false` if it is not of that kind, or if somebody must be waited for; then nothing was done.
    fn unmap_at_once(&self, offset: u64, length: u64) -> Result<bool> {
        let geometry = self.meta.geometry;
        let (bits, per_slice) = (geometry.cluster_bits, self.meta.l2.per_slice());
        let clusters = offset >> bits..(offset + length) >> bits;
        let whole = (offset | length) & (geometry.cluster_size() - 1) == 0 && !clusters.is_empty();
        if !whole
            || clusters.start / per_slice != (clusters.end - 1) / per_slice
            || self.meta.external
            || self.meta.version < 3 && !self.can_unmap_v2(Clear::Unmap)
            || broken(Mutation::ReuseFreedAtOnce)
            || !self.prepared.load(Ordering::Acquire)
        {
            return Ok(false);
        }
        let first = GuestCluster(clusters.start);
        let Some(own) = self.lock_at_once(first, clusters.end - clusters.start)? else { return Ok(false) };
        self.clear_entries(own, clusters, Clear::Unmap)?;
        Ok(true)
    }

    /// Makes a range of the virtual disk read as zeroes, in bytes, multiples of 512. With `may_unmap` whole clusters go
    /// back to the recycler; without it they stay allocated for later writes.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub async fn write_zeroes(&self, offset: u64, length: u64, may_unmap: bool) -> Result<()> {
        self.clear_request(offset, length, if may_unmap { Clear::Unmap } else { Clear::Keep }).await
    }

    async fn clear_request(&self, offset: u64, length: u64, clear: Clear) -> Result<()> {
        let request = self.begin_waiting(offset, length, Purpose::Write).await?;
        self.ensure_data()?;
        if clear != Clear::Unmap || !self.unmap_at_once(offset, length)? {
            // A cluster that reaches past the end of the disk is whole if the request has all of it that is on the disk.
            let end = offset + length;
            let is_end = end == self.virtual_size();
            let whole_end = if is_end { end.next_multiple_of(self.meta.geometry.cluster_size()) } else { end };
            self.clear_range(offset, end, whole_end, clear, Access::Shared).await?;
        }
        request.count(Counter::Discards, 1);
        request.count(Counter::DiscardBytes, length);
        drop(request);
        if broken(Mutation::ReuseFreedAtOnce) {
            self.reap().await;
        }
        self.work.notify_one();
        self.commit_if_due().await
    }

    /// Makes `offset..end` read as zeroes; clusters within `offset..whole_end` are treated as whole. The caller is in
    /// flight.
    pub(super) async fn clear_range(
        &self,
        offset: u64,
        end: u64,
        whole_end: u64,
        clear: Clear,
        access: Access,
    ) -> Result<()> {
        let cluster_size = self.meta.geometry.cluster_size();
        let bits = self.meta.geometry.cluster_bits;
        let first = offset.div_ceil(cluster_size);
        let last = whole_end >> bits;
        if first >= last {
            return self.zero_piece(offset..end, access).await;
        }
        self.zero_piece(offset..first << bits, access).await?;
        self.clear_clusters(first..last, clear, access).await?;
        if last << bits < end { self.zero_piece(last << bits..end, access).await } else { Ok(()) }
    }

    /// Makes a piece of a cluster read as zeroes: it is overwritten, or unmapped where subclusters allow that.
    async fn zero_piece(&self, range: Range<u64>, access: Access) -> Result<()> {
        if self.meta.geometry.extended_l2 && !self.data_is_disk() {
            self.zero_parts(range, access).await
        } else {
            self.overwrite_with_zeroes(range, access).await
        }
    }

    /// Overwrites a part of the disk with zeroes where it does not read so already.
    pub(super) async fn overwrite_with_zeroes(&self, range: Range<u64>, access: Access) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let run = self.lookup(GuestOffset(at), range.end - at, Purpose::Read).await?;
            let zero = match run.kind {
                RunKind::Zero => true,
                RunKind::Unallocated => self.backing.is_zero_from(at),
                RunKind::Data { .. } | RunKind::Compressed { .. } => false,
            };
            let length = run.length.min(PIECE as u64);
            if !zero {
                self.write_range(at, zeroes(length as usize), access).await?;
            }
            at += length;
        }
        Ok(())
    }

    /// Clears whole clusters. The caller is in flight.
    pub(super) async fn clear_clusters(&self, clusters: Range<u64>, clear: Clear, access: Access) -> Result<()> {
        let per_slice = self.meta.l2.per_slice();
        let mut at = clusters.start;
        while at < clusters.end {
            let end = clusters.end.min((at / per_slice + 1) * per_slice);
            if clear != Clear::Forget && self.data_is_disk() {
                // Somebody may be making the same clusters zero, to take them into use. Who has frozen the mapping has it for
                // himself.
                let _turn = match access {
                    Access::Shared => Some(self.allocating.take(self.turn_for(at..end)).await),
                    Access::Frozen => None,
                };
                self.clear_raw(at..end, clear).await?;
            } else if self.meta.version < 3 && clear != Clear::Forget && !self.can_unmap_v2(clear) {
                // Version 2 has no zero flag: only real zeroes read as zeroes.
                let bits = self.meta.geometry.cluster_bits;
                self.zero_piece(at << bits..end << bits, access).await?;
            } else {
                self.clear_in_slice(at..end, clear, access).await?;
            }
            at = end;
            // A request may be as long as the disk, and what it changes must not all be in memory at once.
            if matches!(access, Access::Shared) {
                self.commit_if_due().await?;
            }
        }
        Ok(())
    }

    /// Whether an unallocated cluster of a version 2 image reads as zeroes, so that clusters may be unmapped.
    fn can_unmap_v2(&self, clear: Clear) -> bool {
        clear == Clear::Unmap && !self.backing.exists()
    }

    /// Clears clusters that one slice maps.
    async fn clear_in_slice(&self, clusters: Range<u64>, clear: Clear, access: Access) -> Result<()> {
        let first = GuestCluster(clusters.start);
        // A look first: a table that says so already is neither made, nor copied, nor written.
        match self.meta.l2.slice(&self.volume, &self.meta.l1, first).await? {
            None if clear == Clear::Forget
                || self.backing.is_zero_from(clusters.start << self.meta.geometry.cluster_bits) =>
            {
                return Ok(());
            }
            None => {}
            Some((slice, index)) => {
                let entries = slice.read();
                let mut change = false;
                for (i, guest) in clusters.clone().enumerate() {
                    let entry = entries.get(index + i);
                    let mapping = self.decode(GuestCluster(guest), entry)?;
                    change |= self.cleared(guest, entry, mapping, clear) != entry;
                }
                if !change {
                    return Ok(());
                }
            }
        }
        let _unfrozen = self.unfrozen(access).await;
        self.prepare_changes().await?;
        let (slice, index) = self.slice_for_change(first).await?;
        self.check_targets(&slice, first, index, clusters.end - clusters.start).await?;
        if self.meta.external && clear == Clear::Unmap && !self.encryption.is_on() {
            self.punch_outside(&slice, index, clusters.clone()).await?;
        }
        self.clear_entries((&slice, slice.write(), index), clusters, clear)
    }

    /// The entry of a guest cluster that is cleared.
    fn cleared(&self, guest: u64, entry: Entry, mapping: Mapping, clear: Clear) -> Entry {
        let geometry = self.meta.geometry;
        // The first cluster of an external data file is like any other; but with the zero flag nothing would name it.
        let names = |entry: Entry| !self.meta.external || geometry.extended_l2 || entry.word & l2::OFFSET != 0;
        // Version 3 marks what was discarded, as QEMU does: should the image get a backing file, it must not show.
        let zero = |word| if self.meta.version >= 3 { Entry::zero(word, geometry) } else { Entry::default() };
        match (mapping, clear) {
            (_, Clear::Forget) => Entry::default(),
            (Mapping::Unallocated, _) if self.backing.is_zero_from(guest << geometry.cluster_bits) => entry,
            (Mapping::Zero { .. }, Clear::Keep) => entry,
            (_, Clear::Keep) if matches!(mapping.host(), Some((_, true))) && names(entry) => zero(entry.word),
            _ => zero(0),
        }
    }

    /// Clears clusters whose entries have been checked, in a slice of a table that is the disk's alone. The mapping is not
    /// frozen, or by the caller.
    fn clear_entries(
        &self,
        (slice, mut entries, index): LockedSlice<'_>,
        clusters: Range<u64>,
        clear: Clear,
    ) -> Result<()> {
        let geometry = self.meta.geometry;
        let vacates = self.meta.external && clear == Clear::Unmap && self.encryption.is_on();
        for (i, guest) in clusters.enumerate() {
            let entry = entries.get(index + i);
            let mapping = self.decode(GuestCluster(guest), entry)?;
            let new = self.cleared(guest, entry, mapping, clear);
            if new == entry {
                continue;
            }
            self.meta.l2.will_change(slice);
            entries.set(index + i, new);
            match mapping.host() {
                // The host cluster stays, but what is in it is not shown any more.
                Some((host, true)) if new.word & l2::OFFSET == host.0 && !self.meta.external => {
                    self.moves.cancel(geometry.host_cluster(host), 1);
                }
                _ => self.unlink(mapping),
            }
            if vacates && mapping.host().is_some() {
                self.vacate(guest << geometry.cluster_bits..(guest + 1) << geometry.cluster_bits);
            }
        }
        Ok(())
    }

    /// Changes of the mapping wait while somebody has frozen it, except for those of the one who did.
    pub(super) async fn unfrozen(&self, access: Access) -> Option<AsyncRwLockReadGuard<'_, ()>> {
        match access {
            Access::Shared => Some(self.structure.share().await),
            Access::Frozen => None,
        }
    }
}
