//! Writing changed metadata back, in an order that any power cut survives.

use std::collections::BTreeSet;
use std::ops::Range;

use super::refcounts::RefcountWrites;
use super::{Metadata, l2, patches};
use crate::buf::IoBuf;
use crate::device::BlockDevice;
use crate::device::volume::Volume;
use crate::error::Result;
use crate::format::header;
use crate::mutation::{Mutation, broken};
use crate::sync::AsyncMutexGuard;
use crate::sync::atomic::Ordering;
use crate::units::HostOffset;

/// A point in the order of commits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Stamp(u64);

/// Proof of a completed device flush. Only a commit makes one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FlushToken {
    began: Stamp,
}

impl FlushToken {
    /// Whether the flush began after the moment `stamp` was taken: then what was complete at that moment is durable.
    pub(crate) fn covers(&self, stamp: Stamp) -> bool {
        stamp < self.began || broken(Mutation::PromoteLateWork)
    }
}

impl FlushToken {
    /// A token without a flush, for the mutation that shows what that leads to.
    pub(crate) fn unproven() -> Self {
        FlushToken { began: Stamp(u64::MAX) }
    }
}

/// A commit that completed.
pub(crate) struct Committed {
    pub(crate) token: FlushToken,
    /// The old places of the refcount table, in clusters, if it moved: nothing refers to them any more.
    pub(crate) old_tables: Vec<Range<u64>>,
}

impl Metadata {
    /// This moment, to be compared with a flush token later.
    pub(crate) fn stamp(&self) -> Stamp {
        Stamp(self.clock.load(Ordering::SeqCst))
    }

    /// Asks that what was written and counted so far be durable before any table change made from now on is written
    /// back. To be called before the change is made.
    pub(crate) fn require_barrier(&self) {
        self.barrier.store(true, Ordering::SeqCst);
    }

    /// Waits for the turn to write metadata back. `Err` is the token of a commit that began after this call did, and
    /// completed: the work is done.
    pub(crate) async fn commit_turn(&self) -> std::result::Result<CommitTurn<'_>, FlushToken> {
        let asked = self.stamp();
        let turn = self.commit_turn.lock().await;
        match *self.completed.lock() {
            Some(began) if asked < began => Err(FlushToken { began }),
            _ => Ok(CommitTurn { metadata: self, unfinished: turn }),
        }
    }

    /// Waits until nobody is writing metadata back, and keeps it so.
    pub(crate) async fn exclusive_turn(&self) -> CommitTurn<'_> {
        CommitTurn { metadata: self, unfinished: self.commit_turn.lock().await }
    }
}

/// What a commit has copied and not finished writing. A commit that fails, or whose caller drops it half-way, leaves this
/// behind; then everything in it is dirty again before anything else happens.
#[derive(Default)]
pub(crate) struct Unfinished {
    l2: Option<l2::Captured>,
    l1: BTreeSet<u64>,
    counts: Option<RefcountWrites>,
}

/// A new place for the L1 table.
pub(crate) struct L1Move<'a> {
    /// Where it goes: enough consecutive clusters, counted.
    pub(crate) to: HostOffset,
    /// How many entries it has there.
    pub(crate) entries: u64,
    /// Further header fields to change in the same step.
    pub(crate) patch: &'a (dyn Fn(&mut [u8; 512]) + Sync),
}

/// Stands for a header that may name other tables than those in memory: if it is dropped like this, the image takes no
/// changes any more.
pub(crate) struct HeaderInDoubt<'a, D: BlockDevice> {
    pub(crate) volume: &'a Volume<D>,
    pub(crate) settled: bool,
}

impl<D: BlockDevice> Drop for HeaderInDoubt<'_, D> {
    fn drop(&mut self) {
        if !self.settled {
            self.volume.fail(|| "a change of the header was given up half-way".to_owned());
        }
    }
}

/// The turn to write metadata back.
pub(crate) struct CommitTurn<'a> {
    metadata: &'a Metadata,
    unfinished: AsyncMutexGuard<'a, Unfinished>,
}

impl CommitTurn<'_> {
    /// Writes back every change made before this call, and makes durable whatever the device completed before it.
    ///
    /// What was freed must be taken note of *before* this call: its unlinking is then in the copy taken here.
    ///
    /// With `l1_move` the L1 table moves too; its old place is not referred to any more when this returns. `data` is where guest
    /// data is, if that is not `volume`.
    pub(crate) async fn write_back<D: BlockDevice>(
        &mut self,
        volume: &Volume<D>,
        data: Option<&Volume<D>>,
        l1_move: Option<L1Move<'_>>,
    ) -> Result<Committed> {
        let meta = self.metadata;
        volume.ensure_sound()?;
        self.restore_unfinished().await;
        let began = Stamp(meta.clock.fetch_add(1, Ordering::SeqCst) + 1);

        // Copies are written, not the live tables: an entry that a guest sets while we wait for a flush below belongs to
        // the next commit, since what it depends on may have come too late for that flush.
        //
        // The tables are copied before the barrier mark is read: a change in the copy that needs the barrier set the mark
        // before it was made. If an earlier commit consumed the mark, its flush covered what the change depends on.
        // The counts are copied last, so that they include those of every cluster that the copied tables refer to.
        let (l2_writes, l1_writes) = {
            let mirrors = meta.mirrors.lock();
            let (l2_writes, captured) = meta.l2.capture(&meta.l1, &mirrors, volume)?;
            self.unfinished.l2 = Some(captured);
            let (l1_writes, l1_entries) = meta.l1.capture(l1_move.as_ref().map(|m| (m.to, m.entries)));
            self.unfinished.l1 = l1_entries;
            (l2_writes, l1_writes)
        };
        // What these refer to was made durable before they were set, by an earlier commit.
        let changed = meta.patches.capture();
        let barrier = meta.barrier.swap(false, Ordering::SeqCst);
        let counts = {
            let mut refcounts = meta.refcounts.lock().await;
            let captured = refcounts.capture(&meta.mirrors.lock());
            drop(refcounts);
            match captured {
                Ok(counts) => self.unfinished.counts.insert(counts),
                Err(e) => {
                    self.restore_unfinished().await;
                    return Err(e);
                }
            }
        };

        let mut header_in_doubt = HeaderInDoubt { volume, settled: true };
        let written = async {
            if let Some(data) = data.filter(|_| !broken(Mutation::EntryBeforeDataFile)) {
                // An entry is set when all of its cluster has been written to the data file. So this flush, which begins after
                // the entries were copied, covers what any of them shows. Cut before it: no entry was written, so the old
                // ones stand, and none of them shows what was written to clusters of the data file that were not in use.
                // Cut after it: whichever entries become durable, their clusters hold what they must hold.
                if let Err(e) = data.flush().await {
                    volume.fail(|| e.to_string());
                    return Err(e);
                }
            }
            if broken(Mutation::TablesBeforeCounts) {
                l2_writes.submit(volume, "writing an L2 table").await?;
                l1_writes.submit(volume, "writing the L1 table").await?;
            }
            let mut bytes = counts.blocks.submit(volume, "writing a refcount block").await?;
            if !counts.table.is_empty() {
                // A block must be durable before the table names it. Cut before: the table names the old block or none,
                // and what only the new one counts is not referred to. Cut after: the block is there.
                if !broken(Mutation::EntryBeforeBlock) {
                    volume.flush().await?;
                }
                bytes += counts.table.submit(volume, "writing the refcount table").await?;
            }
            if let Some((offset, clusters, _)) = &counts.moved {
                // The same one level up: the whole new table is durable before the header's one sector names it.
                if !broken(Mutation::HeaderBeforeTable) {
                    volume.flush().await?;
                }
                meta.write_header(volume, |sector| header::patch_refcount_table(sector, *offset, *clusters)).await?;
            }
            let tables = !l2_writes.is_empty() || !l1_writes.is_empty();
            let barrier = barrier && !broken(Mutation::SkipBarrier);
            let names_blocks = !counts.table.is_empty() || counts.moved.is_some();
            let skip = names_blocks && broken(Mutation::ReferenceBeforeEntry);
            if tables && !skip && (barrier || l1_move.is_some() || names_blocks) {
                // Cut before this flush: no reference was written, so new clusters are leaks, and the guest sees old data.
                // Cut after it: the clusters are counted and hold what they must hold, so any subset of the references
                // may become durable.
                volume.flush().await?;
            }
            // From here on any subset is right. An L2 entry refers to a durably counted cluster, which reads as zeroes if
            // zeroes stood there before and has its data durable otherwise. An L1 entry refers to a table that is zeroes
            // (nothing allocated, as before) or a durable copy. An entry that is unlinked leaves its cluster counted.
            bytes += l2_writes.submit(volume, "writing an L2 table").await?;
            bytes += l1_writes.submit(volume, "writing the L1 table").await?;
            // An entry of a snapshot's table names the old place or the new one of what moved. Both hold the same, and both
            // are counted for as many references as could name them: see `image/shared.rs`.
            bytes += patches::write(volume, &changed).await?;
            if l1_move.is_none() || !broken(Mutation::HeaderBeforeL1) {
                volume.flush().await?;
            }
            if let Some(m) = &l1_move {
                header_in_doubt.settled = false;
                // Cut before the header's sector is written: the old L1 table stands, as it was at the last commit. After
                // it: the new one, which the flush above made durable with all that it refers to.
                meta.write_header(volume, |sector| {
                    header::patch_l1(sector, m.to, m.entries as u32);
                    (m.patch)(sector);
                })
                .await?;
                volume.flush().await?;
            }
            Ok((bytes, meta.refcounts.lock().await))
        }
        .await;

        match written {
            Ok((bytes, refcounts)) => {
                let mut refcounts = refcounts;
                // From here on nothing waits: a caller that drops the commit drops it before or after, not in between.
                if let Some(m) = l1_move {
                    meta.l1.moved_to(m.to, m.entries);
                }
                header_in_doubt.settled = true;
                refcounts.captured_written();
                meta.patches.written(&changed);
                meta.written.fetch_add(bytes, Ordering::Relaxed);
                let counts = self.unfinished.counts.take();
                let old_tables = counts.and_then(|c| c.moved).map(|(_, _, old)| old).unwrap_or_default();
                *self.unfinished = Unfinished::default();
                *meta.completed.lock() = Some(began);
                Ok(Committed { token: FlushToken { began }, old_tables })
            }
            Err(e) => {
                self.restore_unfinished().await;
                Err(e)
            }
        }
    }

    /// Makes dirty again what an earlier commit copied and did not finish writing, with its need of a barrier.
    async fn restore_unfinished(&mut self) {
        let meta = self.metadata;
        if self.unfinished.l2.is_none() && self.unfinished.counts.is_none() {
            return;
        }
        if broken(Mutation::ForgetFailedCommit) {
            *self.unfinished = Unfinished::default();
            return;
        }
        meta.require_barrier();
        let mut refcounts = meta.refcounts.lock().await;
        if let Some(captured) = self.unfinished.l2.take() {
            meta.l2.restore(captured);
        }
        meta.l1.restore(std::mem::take(&mut self.unfinished.l1));
        if let Some(counts) = self.unfinished.counts.take() {
            refcounts.restore(counts);
        }
    }

    /// Replaces fields of the header, in one sector, and makes that durable. What the new fields name must be durable.
    pub(crate) async fn rewrite_header<D: BlockDevice>(
        &self,
        volume: &Volume<D>,
        patch: impl FnOnce(&mut [u8; 512]),
    ) -> Result<()> {
        self.metadata.write_header(volume, patch).await?;
        volume.flush().await
    }

    /// The same, for fields that the memory follows when this returns: given up half-way, nobody knows what the header says,
    /// and the image takes no changes any more.
    pub(crate) async fn switch_header<D: BlockDevice>(
        &self,
        volume: &Volume<D>,
        patch: impl FnOnce(&mut [u8; 512]),
    ) -> Result<()> {
        let mut doubt = HeaderInDoubt { volume, settled: false };
        self.rewrite_header(volume, patch).await?;
        doubt.settled = true;
        Ok(())
    }
}

impl Metadata {
    /// Replaces fields of the header, in one sector. Whoever needs that durable flushes.
    pub(crate) async fn write_header<D: BlockDevice>(
        &self,
        volume: &Volume<D>,
        patch: impl FnOnce(&mut [u8; 512]),
    ) -> Result<()> {
        let mut sector = *self.header.lock();
        patch(&mut sector);
        if let Err(e) = volume.write("writing the header", 0, IoBuf::new(&sector)).await {
            // Nobody knows which header the disk has now, so nothing may be written that depends on it.
            volume.fail(|| e.to_string());
            return Err(e);
        }
        *self.header.lock() = sector;
        Ok(())
    }
}
