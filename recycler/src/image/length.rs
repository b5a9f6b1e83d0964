//! Making the file shorter.

use std::sync::atomic::Ordering;

use super::Image;
use crate::device::BlockDevice;
use crate::error::Result;
use crate::mutation::{Mutation, broken};
use crate::units::HostCluster;

/// The file is cut in steps of this many bytes: one large truncation can hold a file for seconds, and guest requests with
/// it.
const TRUNCATE_STEP: u64 = 64 << 20;

impl<D: BlockDevice> Image<D> {
    /// Cuts off what is free at the end of the file. The caller has the compaction's turn.
    ///
    /// Order: what is cut off is Junk, that is, its unlinking is durable, so the length may change at any time: cut before
    /// or after the truncation is durable, nothing refers to what was past the new end.
    pub(crate) async fn shorten(&self) -> Result<()> {
        // The counts of what is Junk, before the clusters vanish.
        if broken(Mutation::TruncateBeforeDurable) {
            let mut states = self.clusters.lock();
            let unlinked = std::mem::take(&mut states.unlinked.clusters);
            states.junk.add_all(&unlinked);
            drop(states);
            return self.truncate_to(0).await;
        }
        self.settle_once().await?;
        loop {
            self.return_tail().await?;
            if !self.drop_empty_blocks().await? {
                break;
            }
        }
        self.commit().await?;
        let end = self.clusters.lock().last_needed();
        self.truncate_to(end).await
    }

    async fn settle_once(&self) -> Result<()> {
        self.commit().await?;
        self.reap().await;
        self.commit().await.map(|_| ())
    }

    /// Makes Junk of pool clusters at the end of the file: they can be made anew when they are needed.
    async fn return_tail(&self) -> Result<()> {
        loop {
            let mut refcounts = self.meta.refcounts.lock().await;
            let run = {
                let mut states = self.clusters.lock();
                let tail = states.last_needed()..states.end;
                let run = [&states.available, &states.erased]
                    .into_iter()
                    .flat_map(|set| set.runs_from(tail.start).next())
                    .next();
                let Some(run) = run else { return Ok(()) };
                // Out of the pool before the lock is released, so that no guest is given them.
                states.available.remove_range(run.clone());
                states.erased.remove_range(run.clone());
                states.roots.insert_range(run.clone());
                run
            };
            let released = refcounts.release(&self.volume, run.clone()).await;
            let mut states = self.clusters.lock();
            states.roots.remove_range(run.clone());
            match released {
                Ok(free) => free.into_iter().for_each(|r| states.junk.insert_range(r)),
                Err(e) => {
                    states.erased.insert_range(run);
                    return Err(e);
                }
            }
        }
    }

    /// Drops refcount blocks at the end of the table that count nothing but themselves. Whether there were any.
    async fn drop_empty_blocks(&self) -> Result<bool> {
        let geometry = self.meta.geometry;
        let per_block = geometry.refcounts_per_block();
        let mut dropped: Vec<HostCluster> = Vec::new();
        {
            // No file growth meanwhile: it would count clusters in a block that is about to go.
            let _length = self.clusters.length_turn.lock().await;
            let mut refcounts = self.meta.refcounts.lock().await;
            let blocks: Vec<_> = refcounts.blocks().collect();
            for (index, block) in blocks.into_iter().rev() {
                let host = geometry.host_cluster(block);
                let covered = index * per_block..(index + 1) * per_block;
                if !covered.contains(&host.0) || !refcounts.counts_only(&self.volume, index, host).await? {
                    break;
                }
                refcounts.set_block(index, None);
                dropped.push(host);
            }
        }
        if dropped.is_empty() {
            return Ok(false);
        }
        // Cut before this commit: the table names the block, which counts itself, and the file still has it. After it: the
        // block is not referred to, and not counted, since its count was in itself.
        self.commit().await?;
        let mut states = self.clusters.lock();
        for c in dropped {
            self.meta.tables.lock().remove(c);
            states.junk.insert(c);
        }
        Ok(true)
    }

    /// Makes the file end at cluster `end`, or higher if something past it is in use.
    async fn truncate_to(&self, end: u64) -> Result<()> {
        let bits = self.meta.geometry.cluster_bits;
        let _length = self.clusters.length_turn.lock().await;
        let length = {
            let mut states = self.clusters.lock();
            let needed = states.last_needed().max(end);
            let cut = needed..states.end;
            if !cut.is_empty() && states.junk.count_in(cut.clone()) == cut.end - cut.start {
                // From here on these clusters do not exist: nobody erases, copies to or allocates what is being cut off,
                // and growing waits for its turn at the length. If the device refuses, the file is longer than it need
                // be until the next attempt, no more.
                states.junk.remove_range(cut);
                states.end = needed;
            }
            states.end << bits
        };
        while self.volume.can_resize() && self.volume.length() > length {
            let step = length.max(self.volume.length().saturating_sub(TRUNCATE_STEP));
            let before = self.volume.length();
            self.volume.truncate(step).await?;
            self.counters.truncated_bytes.fetch_add(before - step, Ordering::Relaxed);
            // Let guests in between.
            tokio::task::yield_now().await;
        }
        Ok(())
    }
}
