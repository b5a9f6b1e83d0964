//! Batches of clusters that snapshots use: data and L2 tables, each with all its references.
//!
//! Durable steps, where n counts the references to a cluster: copy it, count the destination n times → **flush** → rewrite
//! the n references → **flush** → uncount the source n times. What each step leaves is argued in `image/shared.rs`.

use super::compact::{Compaction, Ended, Progress};
use super::plan::Plan;
use crate::clusters::moves::{Place, SharedSource};
use crate::device::BlockDevice;
use crate::error::Result;
use crate::image::encryption::Contents;
use crate::image::relocate::Purpose;
use crate::image::shared::{SharedMove, SharedMoves};
use crate::mutation::{Mutation, broken};
use crate::sync::atomic::Ordering;
use crate::units::HostCluster;

impl<D: BlockDevice> Compaction<'_, D> {
    /// Moves what the plan says of the clusters that snapshots use. `generation` says which snapshots the plan is about.
    /// `false` if the caller cancelled.
    pub(super) async fn move_shared(
        &mut self,
        plan: &Plan,
        mut generation: u64,
        progress: &mut (dyn FnMut(Progress) -> bool + Send),
    ) -> Result<bool> {
        let image = self.image;
        // First the data, then the tables that refer to it: a table that moves is copied as it is in the file.
        for tables in [false, true] {
            let mut sources: Vec<&[SharedSource]> = plan
                .shared
                .chunk_by(|a, b| a.cluster == b.cluster)
                .filter(|s| s.iter().any(|s| matches!(s.place, Place::Table(_)) == tables))
                .collect();
            // In the guest's order into ascending holes, batch by batch.
            let is_sparse = self.takes_space();
            let batch = self.batch_size(is_sparse);
            for sources in sources.chunks_mut(batch) {
                // They are in descending order until here.
                let from = sources.last().and_then(|s| s.first()).map_or(plan.limit, |s| s.cluster.0);
                sources.sort_by_key(|s| s.first().map(|s| s.place));
                self.progress.file_size = image.file_size();
                if !progress(self.progress) {
                    return Ok(false);
                }
                self.yield_turn().await?;
                if image.snapshot_generation() != generation {
                    // Another compaction has moved something: what the plan says of references may be wrong.
                    return Ok(true);
                }
                generation = image.snapshot_tables_change();
                match self.shared_batch(sources, plan.limit, tables, progress).await? {
                    Ended::Whole => self.progress.done += sources.len() as u64,
                    Ended::NoHoles => return Ok(true),
                    Ended::Cancelled => return Ok(false),
                }
                self.cut_batch(plan.limit, is_sparse.then_some(from)).await?;
            }
        }
        Ok(true)
    }

    async fn shared_batch(
        &mut self,
        sources: &[&[SharedSource]],
        limit: u64,
        tables: bool,
        progress: &mut (dyn FnMut(Progress) -> bool + Send),
    ) -> Result<Ended> {
        let image = self.image;
        if tables {
            // Changed entries of the tables are in the file after this, and nobody changes more of them meanwhile.
            image.commit().await?;
        }
        let holes = image.take_holes(sources.len() as u64, limit, Purpose::Copy).await?;
        if holes.set.is_empty() {
            return Ok(Ended::NoHoles);
        }
        let destinations: Vec<u64> = holes.set.runs().flatten().collect();
        let all = destinations.len() == sources.len();
        let mut moves = SharedMoves::new(image, holes);
        for (dst, source) in destinations.into_iter().zip(sources) {
            moves.count(HostCluster(dst), source).await?;
        }
        let contents = if tables { Contents::Tables } else { Contents::Data };
        let copied = self.copy_shared(&moves.moves, contents, progress).await?;
        if !copied {
            return Ok(Ended::Cancelled);
        }
        // The copies and their counts are durable after this.
        if !broken(Mutation::RewriteSharedBeforeFlush) {
            image.commit().await?;
        }
        let mut error = None;
        while let Some(m) = moves.moves.last() {
            match image.rewrite_shared(m).await {
                // No await from here on: a compaction that is dropped must not forget a move.
                Ok(rewritten) => {
                    moves.settle_last(rewritten);
                    if rewritten > 0 {
                        self.moved += 1;
                        image.moves.completed.fetch_add(1, Ordering::Relaxed);
                    }
                }
                Err(e) => {
                    moves.settle_last(0);
                    error.get_or_insert(e);
                }
            }
        }
        match error {
            Some(e) => Err(e),
            None => Ok(if all { Ended::Whole } else { Ended::NoHoles }),
        }
    }

    /// Copies; nobody writes to clusters that are shared. `false` if the caller cancelled.
    async fn copy_shared(
        &mut self,
        moves: &[SharedMove<'_>],
        contents: Contents,
        progress: &mut (dyn FnMut(Progress) -> bool + Send),
    ) -> Result<bool> {
        let image = self.image;
        let cluster_size = image.meta.geometry.cluster_size();
        let mut rest = moves;
        while let Some(first) = rest.first() {
            let done = self.progress.done + (moves.len() - rest.len()) as u64;
            if !progress(Progress { done, ..self.progress }) {
                return Ok(false);
            }
            let follows = |(n, m): (usize, &SharedMove<'_>)| {
                m.src.0 == first.src.0 + n as u64
                    && m.dst.0 == first.dst.0 + n as u64
                    && (n as u64) * cluster_size < super::compact::COPY_BYTES
            };
            let count = rest.iter().enumerate().take_while(|&x| follows(x)).count().max(1);
            self.spend(count as u64 * cluster_size).await;
            image.copy_clusters((first.src, first.dst), count as u64, contents, &mut self.copier).await?;
            rest = rest.get(count..).unwrap_or_default();
        }
        Ok(true)
    }
}
