//! Handing out clusters to guest writes and to new tables.

use std::ops::Range;

use super::Clusters;
use crate::device::BlockDevice;
use crate::device::volume::Volume;
use crate::error::{Error, Result};
use crate::metadata::Metadata;
use crate::mutation::{Mutation, broken};
use crate::units::HostCluster;

/// The file grows by about an eighth, within these bounds in bytes.
const GROW_MIN: u64 = 64 << 10;
const GROW_MAX: u64 = 4 << 20;

/// Consecutive clusters that were handed out, read as zeroes, and are counted once. Linked by the caller, or free again
/// when this is dropped.
#[must_use]
pub(crate) struct Allocation<'a> {
    clusters: &'a Clusters,
    range: Range<u64>,
    /// Whether zeroes and count are durable. If not, a barrier must stand before the reference.
    pub(crate) durable: bool,
}

impl Allocation<'_> {
    pub(crate) fn first(&self) -> HostCluster {
        HostCluster(self.range.start)
    }

    pub(crate) fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// Something refers to the clusters now: they are Used.
    pub(crate) fn linked(mut self) {
        self.clusters.lock().roots.remove_range(self.range.clone());
        self.range.end = self.range.start;
    }

    /// The clusters, which nobody has written to, go back to the pool.
    pub(crate) fn put_back(mut self) {
        let range = std::mem::replace(&mut self.range, 0..0);
        let mut states = self.clusters.lock();
        states.roots.remove_range(range.clone());
        if self.durable { states.available.insert_range(range) } else { states.erase(range) }
    }

    /// The clusters stay Roots, and are the caller's to link or give back.
    pub(crate) fn keep(mut self) -> Range<u64> {
        let start = std::mem::replace(&mut self.range.start, self.range.end);
        start..self.range.end
    }

    /// The first `count` of the clusters are linked; the rest stays in hand.
    pub(crate) fn link_first(&mut self, count: u64) {
        let linked = self.range.start..(self.range.start + count).min(self.range.end);
        self.range.start = linked.end;
        self.clusters.lock().roots.remove_range(linked);
    }
}

impl Drop for Allocation<'_> {
    /// The clusters may hold part of a write: they take the way of freed ones, back to Junk.
    fn drop(&mut self) {
        if !self.range.is_empty() {
            let mut states = self.clusters.lock();
            states.roots.remove_range(self.range.clone());
            states.unlinked.clusters.insert_range(self.range.clone());
        }
    }
}

impl Clusters {
    /// Takes up to `wanted` consecutive clusters: Available ones, else Erased ones, else new ones at the end of the file, else, if it
    /// cannot become longer, Junk.
    pub(crate) async fn allocate<D: BlockDevice>(
        &self,
        volume: &Volume<D>,
        meta: &Metadata,
        wanted: u64,
    ) -> Result<Allocation<'_>> {
        loop {
            if let Some(allocation) = self.take(wanted) {
                return Ok(allocation);
            }
            let _turn = self.length_turn.lock().await;
            if let Some(allocation) = self.take(wanted) {
                return Ok(allocation);
            }
            let size = self.lock().end << meta.geometry.cluster_bits;
            let bytes = (size / 8).clamp(GROW_MIN, GROW_MAX);
            match self.grow(volume, meta, wanted.max(meta.geometry.clusters_for(bytes)), wanted).await {
                Ok(fresh) => self.lock().erase(fresh),
                Err(full) if full.is_lack_of_space() => {
                    return self.allocate_junk(volume, meta, wanted).await?.ok_or(full);
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Takes up to `wanted` consecutive clusters of Junk. The caller has the length turn, so none of it is being cut off.
    async fn allocate_junk<D: BlockDevice>(
        &self,
        volume: &Volume<D>,
        meta: &Metadata,
        wanted: u64,
    ) -> Result<Option<Allocation<'_>>> {
        let mut count = wanted;
        while count > 0 {
            if let Some(hole) = self.allocate_hole(volume, meta, count, u64::MAX).await? {
                return Ok(Some(hole));
            }
            count /= 2;
        }
        Ok(None)
    }

    /// Makes the file longer ahead of the guests, if they have taken clusters since this was last called and the pool runs low.
    /// To be called where a flush of the device is about to be made: it makes the new clusters Available, and guests need no
    /// flush of their own for them.
    ///
    /// Only an offer: whoever needs clusters and finds none makes the file longer himself, and is told if that fails.
    pub(crate) async fn replenish<D: BlockDevice>(&self, volume: &Volume<D>, meta: &Metadata) -> Result<()> {
        let bits = meta.geometry.cluster_bits;
        let wanted = {
            let mut states = self.lock();
            // Not into what is being cut off: it would have to be erased.
            if volume.length() > states.end << bits {
                return Ok(());
            }
            let step = meta.geometry.clusters_for(((states.end << bits) / 8).clamp(GROW_MIN, GROW_MAX));
            let pool = states.available.len() + states.erased.len();
            let taken = std::mem::take(&mut states.taken);
            // Where the length is fixed, zeroes would have to be written.
            if !taken || pool > step / 2 || !volume.can_resize() {
                return Ok(());
            }
            step
        };
        // Not worth a wait.
        let Ok(_turn) = self.length_turn.try_lock() else { return Ok(()) };
        let fresh = self.grow(volume, meta, wanted, wanted).await?;
        self.lock().erase(fresh);
        Ok(())
    }

    /// Takes exactly `count` consecutive clusters below `limit` out of Junk, counted and zeroed; `None` if there is no
    /// such hole. The caller puts a barrier before the reference.
    pub(crate) async fn allocate_hole<D: BlockDevice>(
        &self,
        volume: &Volume<D>,
        meta: &Metadata,
        count: u64,
        limit: u64,
    ) -> Result<Option<Allocation<'_>>> {
        let mut refcounts = meta.refcounts.lock().await;
        let hole = self.lock().junk.find_run(count, limit).filter(|range| refcounts.can_count(range));
        let Some(range) = hole else { return Ok(None) };
        // Only who has the refcounts takes from Junk, so the hole stays where it is while it is counted.
        refcounts.add(volume, range.clone(), 1).await?;
        let allocation = {
            let mut states = self.lock();
            states.junk.remove_range(range.clone());
            states.roots.insert_range(range.clone());
            Allocation { clusters: self, range: range.clone(), durable: false }
        };
        drop(refcounts);
        let bits = meta.geometry.cluster_bits;
        volume.erase(range.start << bits, (range.end - range.start) << bits).await?;
        Ok(Some(allocation))
    }

    /// Takes exactly `count` consecutive new clusters at the end of the file.
    pub(crate) async fn allocate_at_end<D: BlockDevice>(
        &self,
        volume: &Volume<D>,
        meta: &Metadata,
        count: u64,
    ) -> Result<Allocation<'_>> {
        let _turn = self.length_turn.lock().await;
        let mut fresh = self.grow(volume, meta, count, count).await?;
        let mut states = self.lock();
        let range = fresh.start..fresh.start + count;
        fresh.start = range.end;
        states.erase(fresh);
        states.roots.insert_range(range.clone());
        Ok(Allocation { clusters: self, range, durable: false })
    }

    /// Takes up to `wanted` consecutive clusters, if the pool has any.
    pub(crate) fn take(&self, wanted: u64) -> Option<Allocation<'_>> {
        let mut states = self.lock();
        let (range, durable) = match states.available.take_run(wanted) {
            Some(range) => (range, true),
            None => (states.erased.take_run(wanted)?, broken(Mutation::ErasedAsAvailable)),
        };
        states.roots.insert_range(range.clone());
        states.taken = true;
        Some(Allocation { clusters: self, range, durable })
    }

    /// Appends `wanted` clusters to the file, or as many as there is room for but no fewer than `least`, that read as
    /// zeroes and are counted, with the refcount structures they need. The caller has the length turn.
    async fn grow<D: BlockDevice>(
        &self,
        volume: &Volume<D>,
        meta: &Metadata,
        wanted: u64,
        least: u64,
    ) -> Result<Range<u64>> {
        let bits = meta.geometry.cluster_bits;
        let mut refcounts = meta.refcounts.lock().await;
        let start = self.lock().end;
        let mut growth = refcounts.plan_growth(start, wanted)?;
        let length = |growth: &crate::metadata::refcounts::Growth| (start + growth.total()) << bits;
        if (start + growth.total()) >> (56 - bits) != 0 {
            return Err(Error::unsupported("an image file of 2^56 bytes or more"));
        }
        if volume.can_resize() {
            // If something is left of what is being cut off, or could not be, it stays. The device is told that length, too: a
            // truncation that failed may have been made.
            let there = volume.length();
            // A long step may not fit where a short one does.
            if let Err(e) = volume.truncate(length(&growth).max(there)).await {
                if wanted == least {
                    return Err(e);
                }
                growth = refcounts.plan_growth(start, least)?;
                volume.truncate(length(&growth).max(there)).await?;
            }
            // Only what appears anew is zero. Power cut before the next flush: these clusters may hold anything, and nothing refers to
            // them, since entries that name Erased clusters, the table that names refcount blocks, and the header that names the
            // table are written after it. Cut after it: they are zero.
            let old = there.min(length(&growth)).saturating_sub(start << bits);
            if !broken(Mutation::KeepCutOff) {
                volume.erase(start << bits, old).await?;
            }
        } else {
            if length(&growth) > volume.length() {
                growth = refcounts.plan_growth(start, least)?;
            }
            volume.truncate(length(&growth)).await?;
            // What a device of fixed length holds past the image's end is arbitrary.
            volume.erase(start << bits, growth.total() << bits).await?;
        }
        let fresh = refcounts.grow(volume, start, growth).await?;
        self.lock().end = start + growth.total();
        Ok(fresh)
    }
}
