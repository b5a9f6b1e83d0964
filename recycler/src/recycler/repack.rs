//! Batches of compressed data: from the clusters at the end of the file, and from those that hardly hold any, to where it is
//! dense. What each step leaves if it is cut is argued in `image/packed.rs`.

use std::collections::VecDeque;

use super::compact::{Compaction, Progress};
use super::pacing::Paced;
use crate::clusters::packed::{Extent, Packed};
use crate::clusters::snapshots::L1Tables;
use crate::device::BlockDevice;
use crate::error::Result;
use crate::format::l2;
use crate::image::packed::Repack;
use crate::image::relocate::Purpose;
use crate::mutation::{Mutation, broken};
use crate::sync::atomic::Ordering;
use crate::units::Geometry;

/// A batch takes about so many bytes.
const BATCH_BYTES: u64 = 4 << 20;

impl<D: BlockDevice> Compaction<'_, D> {
    /// Empties the clusters with compressed data that are worth it into holes below `floor`. `false` if the caller cancelled.
    pub(super) async fn repack(
        &mut self,
        packed: &Packed,
        snapshots: &mut L1Tables,
        floor: u64,
        progress: &mut (dyn FnMut(Progress) -> bool + Send),
    ) -> Result<bool> {
        let image = self.image;
        let geometry = image.meta.geometry;
        let mut chosen = packed.past(floor);
        if !std::mem::replace(&mut self.gathered, true) {
            chosen.add_all(&packed.sparse(geometry));
        }
        let so_far = self.searching();
        let paced = &mut Paced { image, pacer: &mut self.pacer, is_wanted: &mut || progress(so_far) };
        let sole = image.sole_packed(packed, &chosen, snapshots, paced).await?;
        let mut waiting: VecDeque<Extent> = VecDeque::new();
        let mut tables = packed.tables.iter().filter(|_| !sole.is_empty());
        // Whether something was moved since what was moved before was made Junk.
        let mut emptied = false;
        loop {
            while waiting.iter().map(|e| length(e, geometry)).sum::<u64>() < BATCH_BYTES
                && let Some(&l1_index) = tables.next()
            {
                waiting.extend(image.packed_in(l1_index, &chosen, &sole).await?);
            }
            if waiting.is_empty() {
                break;
            }
            if !progress(self.searching()) {
                return Ok(false);
            }
            self.yield_turn().await?;
            let mut bytes = 0;
            let batch = waiting.iter().take_while(|e| {
                bytes += length(e, geometry);
                bytes <= BATCH_BYTES
            });
            let batch: Vec<Extent> = batch.copied().collect();
            let placed = self.repack_batch(&batch, floor).await?;
            waiting.drain(..placed);
            emptied |= placed > 0;
            if placed < batch.len() {
                // The holes are full. Those that were emptied are the next ones, as long as there are any.
                if !std::mem::take(&mut emptied) {
                    break;
                }
                self.settle().await?;
                image.cut_junk(floor).await?;
            }
        }
        if emptied {
            self.settle().await?;
        }
        Ok(true)
    }

    /// Moves the first of these extents, as many as there is room for: returns how many that was.
    async fn repack_batch(&mut self, batch: &[Extent], floor: u64) -> Result<usize> {
        let image = self.image;
        let geometry = image.meta.geometry;
        let bytes: u64 = batch.iter().map(|e| length(e, geometry) + 512).sum();
        // A little more, for the gaps between holes: what is not needed goes back.
        let count = bytes.div_ceil(geometry.cluster_size()) * 5 / 4 + 1;
        let holes = image.take_holes(count, floor, Purpose::Copy).await?;
        let mut repack = Repack::new(image, holes, batch).await?;
        let placed = repack.extents.len();
        if placed == 0 {
            return Ok(0);
        }
        for e in &repack.extents {
            self.spend(length(e, geometry)).await;
            image.copy_packed(e, &mut self.copier).await?;
        }
        // The copies and their counts are durable after this.
        if !broken(Mutation::RewritePackedBeforeFlush) {
            image.commit().await?;
        }
        if repack.rewrite().await? > 0 {
            let clusters = (bytes >> geometry.cluster_bits).max(1);
            self.moved += clusters;
            image.moves.completed.fetch_add(clusters, Ordering::Relaxed);
        }
        Ok(placed)
    }
}

fn length(e: &Extent, geometry: Geometry) -> u64 {
    l2::compressed_extent(e.descriptor, geometry).1
}
