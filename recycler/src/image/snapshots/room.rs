//! Places for new tables.

use std::collections::VecDeque;
use std::ops::Range;

use super::super::Image;
use super::super::relocate::{Holes, Purpose};
use crate::clusters::allocator::Allocation;
use crate::device::BlockDevice;
use crate::error::Result;
use crate::units::HostCluster;

/// Clusters for new tables, counted. Given back when this is dropped, unless they were used.
pub(super) struct Room<'a, D: BlockDevice> {
    image: &'a Image<D>,
    /// Single clusters out of holes in the file; those that were handed out are in it until everything is used.
    holes: Holes<'a>,
    runs: Vec<Allocation<'a>>,
    /// Single clusters to be handed out.
    single: VecDeque<HostCluster>,
    /// Clusters that are counted twice.
    twice: Vec<HostCluster>,
}

impl<'a, D: BlockDevice> Room<'a, D> {
    /// Room for so many clusters wherever they are. The caller has the compaction's turn.
    pub(super) async fn take(image: &'a Image<D>, singles: u64) -> Result<Self> {
        let end = image.clusters.lock().end;
        let holes = image.take_holes(singles, end, Purpose::Copy).await?;
        let mut single: VecDeque<_> = holes.set.runs().flatten().map(HostCluster).collect();
        let mut runs = Vec::new();
        let rest = singles - single.len() as u64;
        if rest > 0 {
            let run = image.clusters.allocate_at_end(&image.volume, &image.meta, rest).await?;
            single.extend((run.first().0..run.first().0 + rest).map(HostCluster));
            runs.push(run);
        }
        Ok(Room { image, holes, runs, single, twice: Vec::new() })
    }

    /// One of the single clusters: there are as many as were asked for.
    pub(super) fn one(&mut self) -> Option<HostCluster> {
        self.single.pop_front()
    }

    /// The same, counted twice.
    pub(super) async fn one_shared(&mut self) -> Result<Option<HostCluster>> {
        let Some(c) = self.one() else { return Ok(None) };
        let image = self.image;
        image.meta.refcounts.lock().await.add(&image.volume, c.0..c.0 + 1, 1).await?;
        self.twice.push(c);
        Ok(Some(c))
    }

    /// Clusters that follow one another.
    pub(super) async fn run(&mut self, count: u64) -> Result<Range<u64>> {
        let image = self.image;
        let end = image.clusters.lock().end;
        let run = match image.clusters.allocate_hole(&image.volume, &image.meta, count, end).await? {
            Some(hole) => hole,
            None => image.clusters.allocate_at_end(&image.volume, &image.meta, count).await?,
        };
        let range = run.first().0..run.first().0 + count;
        self.runs.push(run);
        Ok(range)
    }

    /// Gives back the run that was taken last.
    pub(super) fn give_back(&mut self) {
        self.runs.pop();
    }

    /// Something refers to all of it now.
    pub(super) fn used(mut self) {
        let holes: Vec<_> = self.holes.set.runs().flatten().collect();
        holes.into_iter().for_each(|c| self.holes.used(HostCluster(c)));
        std::mem::take(&mut self.runs).into_iter().for_each(Allocation::linked);
        self.twice.clear();
    }
}

impl<D: BlockDevice> Drop for Room<'_, D> {
    fn drop(&mut self) {
        let mut states = self.image.clusters.lock();
        self.twice.iter().for_each(|&c| states.unlink(c, false));
    }
}
