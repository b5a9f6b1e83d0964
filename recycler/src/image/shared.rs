//! Moving what snapshots use: the steps that touch the image.
//!
//! A cluster that snapshots use is never written in place, so its copy is exact whenever it is made. It has n references,
//! in L2 tables (or L1 tables) of the disk and of snapshots: refcounts count paths, so an entry of an L2 table that m L1
//! tables refer to counts m times. From before the copy is durable until the rewritten references are, *both* places are
//! counted for every reference that may name them:
//!
//! 1. The destination is counted n times and copied to; **flush**. Cut before: every reference names the source, and the
//!    destination is a leak, whatever its count.
//! 2. The references are rewritten, in any order, each sector atomically. Cut in between: each names the source or the
//!    destination. Both hold the same, and both are counted n times, so each is counted at least as often as it is referred
//!    to: leaks at worst. COPIED is clear in the disk's entries and both counts are n ≥ 2 as long as the disk refers to
//!    either: the flags are right at every moment. Then **flush**.
//! 3. The source is uncounted as often as references were rewritten, and the destination as often as references were not,
//!    because guests dropped them meanwhile. Cut before: leaks. Cut after: nothing.
//!
//! A guest that drops the disk's reference in the middle (by writing, which makes a new cluster, or by discarding) unlinks
//! the cluster that the reference named at that moment, and step 3 counts only those that it did not drop. A guest that
//! copies an L2 table in the middle moves one path to the copy: it has the turn for the table meanwhile, as has the
//! rewriting, so the copy names the source for a path that was not counted as rewritten, or the destination for one that was.
//!
//! All references to one cluster are rewritten in one moment of memory: what could fail is done before. Their entries in
//! snapshots' tables go to `Metadata::patches`, those in the disk's own tables to the cache; both are written by the next
//! commit, which also takes the unlinked sources with it.

use super::Image;
use super::relocate::Holes;
use crate::clusters::moves::{Place, SharedSource};
use crate::device::BlockDevice;
use crate::error::Result;
use crate::format::l2::{Entry, Mapping};
use crate::metadata::slice::Entries as _;
use crate::units::HostCluster;

/// A cluster that snapshots use, on its way to another place.
#[derive(Debug)]
pub(crate) struct SharedMove<'a> {
    pub(crate) src: HostCluster,
    pub(crate) dst: HostCluster,
    /// What snapshots refer to it with.
    references: &'a [SharedSource],
    /// How often the destination is counted.
    counted: u64,
}

/// Moves of a batch. What the destinations are counted too often when this is dropped, for whatever reason, is uncounted
/// after the next commit.
pub(crate) struct SharedMoves<'a, D: BlockDevice> {
    image: &'a Image<D>,
    holes: Holes<'a>,
    /// Not rewritten yet.
    pub(crate) moves: Vec<SharedMove<'a>>,
}

impl<'a, D: BlockDevice> SharedMoves<'a, D> {
    /// `holes` are the destinations, counted once.
    pub(crate) fn new(image: &'a Image<D>, holes: Holes<'a>) -> Self {
        SharedMoves { image, holes, moves: Vec::new() }
    }

    /// Adds a move to one of the holes, which is counted for every reference there is.
    pub(crate) async fn count(&mut self, dst: HostCluster, references: &'a [SharedSource]) -> Result<()> {
        let Some(first) = references.first() else { return Ok(()) };
        let paths: u64 = references.iter().map(|r| u64::from(r.entry.paths)).sum();
        let counted = paths + u64::from(first.entry.active);
        let image = self.image;
        if counted > 1 {
            let more = (counted - 1) as i64;
            image.meta.refcounts.lock().await.add(&image.volume, dst.0..dst.0 + 1, more).await?;
        }
        self.moves.push(SharedMove { src: first.cluster, dst, references, counted });
        Ok(())
    }

    /// The last of the moves has ended: so many references name the copy.
    pub(crate) fn settle_last(&mut self, rewritten: u64) {
        if let Some(m) = self.moves.pop() {
            self.settle(&m, rewritten);
        }
    }

    fn settle(&mut self, m: &SharedMove<'_>, rewritten: u64) {
        // A hole that is not used stays in `holes`, which uncounts it once.
        let kept = rewritten.max(1);
        if rewritten > 0 {
            self.holes.used(m.dst);
        }
        let mut states = self.image.clusters.lock();
        (kept..m.counted).for_each(|_| states.unlink(m.dst, false));
    }
}

impl<D: BlockDevice> Drop for SharedMoves<'_, D> {
    fn drop(&mut self) {
        for m in std::mem::take(&mut self.moves) {
            self.settle(&m, 0);
        }
    }
}

impl<D: BlockDevice> Image<D> {
    /// Rewrites the references to a cluster whose copy is durable. Returns how many of those that are counted name the copy
    /// now: 0 if nothing was changed, as after an error.
    pub(crate) async fn rewrite_shared(&self, m: &SharedMove<'_>) -> Result<u64> {
        let Some(&SharedSource { place, .. }) = m.references.first() else { return Ok(0) };
        let l1_index = place.l1_index(self.meta.geometry);
        // No guest copies the L2 table meanwhile. Guests wait for the turn no longer than this waits for the slice, which
        // they would read themselves.
        let _turn = self.table_turns.take(l1_index..l1_index + 1).await;
        let rewritten = match place {
            Place::Data(_) => self.rewrite_shared_data(m, place).await?,
            Place::Table(index) => self.rewrite_shared_table(m, index)?,
        };
        // The commit that takes these with it was not asked for before the references were changed.
        let mut states = self.clusters.lock();
        (0..rewritten).for_each(|_| states.unlink(m.src, false));
        Ok(rewritten)
    }

    async fn rewrite_shared_data(&self, m: &SharedMove<'_>, place: Place) -> Result<u64> {
        let Place::Data(guest) = place else { return Ok(0) };
        let geometry = self.meta.geometry;
        let dst = geometry.host_offset(m.dst);
        let table = self.meta.l1.get(place.l1_index(geometry), &self.volume)?;
        let active = m.references.iter().any(|r| r.entry.active);
        let slice = match table {
            Some(_) if active => self.meta.l2.slice(&self.volume, &self.meta.l1, guest).await?,
            _ => None,
        };
        // From here on nothing waits and nothing fails.
        let mut rewritten = 0;
        for SharedSource { entry, .. } in m.references {
            self.meta.patches.set(entry.at, entry.naming(dst));
            rewritten += u64::from(entry.paths);
            let in_table = |t: &crate::metadata::l1::L2Ref| entry.at & !(geometry.cluster_size() - 1) == t.host.0;
            if let (Some(_), Some((slice, index))) = (table.filter(|t| !t.copied && in_table(t)), &slice) {
                self.meta.l2.amend(slice, *index, |e| Entry { word: entry.naming(dst), ..e });
                rewritten += 1;
            }
        }
        if let (Some(_), Some((slice, index))) = (table.filter(|t| t.copied), slice) {
            let mut entries = self.meta.l2.modify(&slice);
            let entry = entries.get(index);
            let named = Mapping::of(entry, self.meta.version, geometry).ok().and_then(|m| m.host());
            let names_src = named.is_some_and(|(h, copied)| !copied && geometry.host_cluster(h) == m.src);
            if names_src {
                entries.set(index, entry.moved_to(dst));
                rewritten += 1;
            }
        }
        Ok(rewritten)
    }

    fn rewrite_shared_table(&self, m: &SharedMove<'_>, index: u64) -> Result<u64> {
        let geometry = self.meta.geometry;
        let dst = geometry.host_offset(m.dst);
        let active = self.meta.l1.get(index, &self.volume)?;
        let mut rewritten = 0;
        for SharedSource { entry, .. } in m.references {
            self.meta.patches.set(entry.at, entry.naming(dst));
            rewritten += 1;
        }
        if active.is_some_and(|t| !t.copied && t.host == geometry.host_offset(m.src)) {
            self.meta.l1.set_shared(index, dst);
            rewritten += 1;
        }
        // Guests may not write to it, whatever an L2 entry says.
        let mut tables = self.meta.tables.lock();
        tables.remove(m.src);
        tables.insert(m.dst);
        Ok(rewritten)
    }
}
