//! Making the file shorter.

use super::Image;
use crate::clusters::States;
use crate::clusters::set::ClusterSet;
use crate::device::BlockDevice;
use crate::device::steps::Steps;
use crate::error::Result;
use crate::mutation::{Mutation, broken};
use crate::sync::atomic::Ordering;
use crate::units::HostCluster;

impl<D: BlockDevice> Image<D> {
    /// Cuts off what is free at the end of the file. The caller has the compaction's turn.
    ///
    /// Order: what is cut off is Junk, that is, its unlinking is durable, so the length may change at any time: cut before
    /// or after the truncation is durable, nothing refers to what was past the new end.
    pub(crate) async fn shorten(&self) -> Result<()> {
        self.prepare_changes().await?;
        if broken(Mutation::TruncateBeforeDurable) {
            self.uncount(|states| &mut states.unlinked).await?;
            self.truncate_to(0).await?;
        }
        // The counts of what is Junk, before the clusters vanish.
        self.settle_once().await?;
        loop {
            self.return_tail().await?;
            if !self.drop_empty_blocks(0).await? {
                break;
            }
            self.settle_once().await?;
        }
        self.commit().await?;
        let end = self.clusters.lock().last_needed();
        self.truncate_to(end).await
    }

    /// Cuts off the Junk at the end of the file, and the pool with it; the rest of [`shorten`](Self::shorten) is for the end
    /// of a compaction, after which the file will end near cluster `limit`. The caller has the compaction's turn.
    ///
    /// Order: nothing refers to Junk, durably. Cut before or after the truncation is durable, with or without the counts,
    /// which may say that the clusters are in use until the next commit: what is counted past the end is a leak.
    pub(crate) async fn cut_junk(&self, limit: u64) -> Result<()> {
        self.return_tail().await?;
        // A refcount block often lies among what it counts, and would hold the end of the file there. No flush is made for
        // this: the next commit makes Junk of the blocks. (Those that count clusters below the limit will be needed.)
        self.drop_empty_blocks(limit).await?;
        self.cut_tail().await
    }

    /// The same without looking for more: only the Junk that is there.
    pub(crate) async fn cut_tail(&self) -> Result<()> {
        let end = self.clusters.lock().junk_tail();
        self.truncate_to(end).await
    }

    async fn settle_once(&self) -> Result<()> {
        self.commit().await?;
        self.reap().await;
        self.commit().await.map(|_| ())
    }

    /// Makes Junk of pool clusters at the end of the file: they can be made anew when they are needed.
    async fn return_tail(&self) -> Result<()> {
        let mut refcounts = self.meta.refcounts.lock().await;
        loop {
            let pool_run = |states: &States| {
                let tail = states.last_needed();
                [&states.available, &states.erased].into_iter().find_map(|set| set.runs_from(tail).next())
            };
            let Some(run) = pool_run(&self.clusters.lock()) else { return Ok(()) };
            refcounts.load_range(&self.volume, &run).await?;
            // Nothing waits from here on. Guests may have been given clusters meanwhile: look again.
            let states = &mut *self.clusters.lock();
            let Some(now) = pool_run(states).filter(|now| run.start <= now.start && now.end <= run.end) else {
                continue;
            };
            let free = refcounts.release_loaded(now.clone())?;
            states.available.remove_range(now.clone());
            states.erased.remove_range(now);
            free.into_iter().for_each(|r| states.junk.insert_range(r));
        }
    }

    /// Drops refcount blocks at the end of the table that count nothing but blocks that are dropped, and nothing below cluster
    /// `from`. Whether there were any.
    async fn drop_empty_blocks(&self, from: u64) -> Result<bool> {
        let geometry = self.meta.geometry;
        // No file growth meanwhile: it would count clusters in a block that is about to go.
        let _length = self.clusters.length_turn.lock().await;
        let mut refcounts = self.meta.refcounts.lock().await;
        let per_block = geometry.refcounts_per_block();
        let mut blocks: Vec<_> = refcounts.blocks().filter(|(index, _)| index * per_block >= from).collect();
        let mut dropped: Vec<(u64, HostCluster)> = Vec::new();
        let mut hosts = ClusterSet::default();
        while let Some((index, block)) = blocks.pop() {
            let host = geometry.host_cluster(block);
            hosts.insert(host);
            if !refcounts.counts_only(&self.volume, index, &hosts).await? {
                break;
            }
            dropped.push((index, host));
        }
        let Some(&(lowest, _)) = dropped.last() else { return Ok(false) };
        // Cut before the next commit: the table names the blocks, which are counted, and the file still has them. After
        // it: they are not referred to. Those that were counted in one of them are not counted any more either, so
        // they are Junk then; the others take the way of all freed clusters.
        let mut states = self.clusters.lock();
        let mut tables = self.meta.tables.lock();
        for (index, host) in dropped {
            refcounts.set_block(index, None);
            tables.remove(host);
            if host.0 >= lowest * per_block {
                states.unlinked.uncounted.insert(host);
            } else {
                states.unlink(host, true);
            }
        }
        Ok(true)
    }

    /// Makes the file end at cluster `end`, or higher if something past it is in use.
    async fn truncate_to(&self, end: u64) -> Result<()> {
        {
            let _length = self.clusters.length_turn.lock().await;
            let mut states = self.clusters.lock();
            let needed = states.last_needed().max(end);
            let cut = needed..states.end;
            if !cut.is_empty() && states.junk.count_in(cut.clone()) == cut.end - cut.start {
                // From here on these clusters do not exist: nobody erases, copies to or allocates what is being cut off. If the
                // device refuses, the file is longer than it need be until the next attempt, no more.
                states.junk.remove_range(cut);
                states.end = needed;
            }
        }
        let mut steps = Steps::default();
        while self.cut_step(&mut steps).await? {
            // Let guests in between.
            tokio::task::yield_now().await;
        }
        Ok(())
    }

    /// Cuts off some of what lies past the last cluster. Whether there is more.
    ///
    /// Guests that need a longer file wait for one step; what they take of what is still there they erase.
    async fn cut_step(&self, steps: &mut Steps) -> Result<bool> {
        let _length = self.clusters.length_turn.lock().await;
        let (old, end) = (self.volume.length(), self.clusters.lock().end << self.meta.geometry.cluster_bits);
        if !self.volume.can_resize() || old <= end {
            return Ok(false);
        }
        let to = end.max(old.saturating_sub(steps.size(self.epochs.quiet())));
        steps.take(old - to, self.volume.truncate(to)).await?;
        self.counters.truncated_bytes.fetch_add(old - to, Ordering::Relaxed);
        Ok(to > end)
    }
}
