//! Moving clusters: the steps that touch the image. What is moved where, and when, the recycler decides.

use std::ops::Range;

use super::Image;
use super::encryption::Contents;
use crate::clusters::Clusters;
use crate::clusters::moves::{Move, Reference};
use crate::clusters::scan;
use crate::clusters::set::ClusterSet;
use crate::device::BlockDevice;
use crate::device::volume::{Copier, PIECE};
use crate::error::{Error, Result};
use crate::metadata::commit::L1Move;
use crate::metadata::refcounts::Refcounts;
use crate::metadata::slice::Entries as _;
use crate::mutation::{Mutation, broken};
use crate::units::HostCluster;

/// What holes are taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// To be destinations of moves: Copies.
    Copy,
    /// To be erased: Roots.
    Erase,
}

/// Clusters taken out of Junk, counted. What is still in it when it is dropped takes the way of freed clusters, back to Junk.
#[must_use]
pub(crate) struct Holes<'a> {
    clusters: &'a Clusters,
    pub(crate) set: ClusterSet,
}

impl Holes<'_> {
    /// A move refers to the hole now: it is Used.
    pub(crate) fn used(&mut self, c: HostCluster) {
        self.set.remove(c);
        self.clusters.lock().copies.remove(c);
    }

    /// The holes have been erased.
    pub(crate) fn erased(&mut self, range: Range<u64>) {
        self.set.remove_range(range.clone());
        let mut states = self.clusters.lock();
        states.roots.remove_range(range.clone());
        states.erase(range);
    }
}

impl Drop for Holes<'_> {
    fn drop(&mut self) {
        if !self.set.is_empty() {
            let mut states = self.clusters.lock();
            states.roots.remove_all(&self.set);
            states.copies.remove_all(&self.set);
            states.unlinked.clusters.add_all(&self.set);
        }
    }
}

impl<D: BlockDevice> Image<D> {
    /// Puts what was free when the image was opened into Junk. The caller has the compaction's turn, or the image to itself.
    pub(crate) async fn find_junk(&self, manners: &mut impl scan::Manners) -> Result<()> {
        self.note_snapshot_tables().await?;
        let (_, mut snapshots) = self.snapshot_l1_tables();
        let contradictions = scan::find_junk(&self.volume, &self.meta, &self.clusters, &mut snapshots, manners).await?;
        if contradictions > 0 {
            let reason = format!("{contradictions} clusters are in use and not counted: check it");
            self.background_error("looking for free clusters", &Error::invalid("image", 0, reason));
        }
        Ok(())
    }

    /// Junk → Copies, or Roots to be erased: takes the lowest `count` holes below `limit`, or as many as there are, and
    /// counts them. The caller has the compaction's turn.
    pub(crate) async fn take_holes(&self, count: u64, limit: u64, purpose: Purpose) -> Result<Holes<'_>> {
        self.prepare_changes().await?;
        let mut refcounts = self.meta.refcounts.lock().await;
        // Only who has the refcounts takes from Junk, so the holes stay while they are counted.
        let free = self.countable_junk(&refcounts, count, limit);
        let mut holes = self.count_holes(&mut refcounts, free, purpose).await?;
        if purpose == Purpose::Copy && holes.set.len() < count {
            // Then the pool, which is counted already: what it held near the start of the file would stay there as holes
            // when it is given back. New clusters for guests can be made at the end.
            let states = &mut *self.clusters.lock();
            for set in [&mut states.available, &mut states.erased] {
                let taken = set.lowest(count - holes.set.len(), limit);
                set.remove_all(&taken);
                states.copies.add_all(&taken);
                holes.set.add_all(&taken);
            }
        }
        Ok(holes)
    }

    /// What [`take_holes`](Self::take_holes) would take out of Junk, for somebody who [chooses](Self::take_chosen).
    pub(crate) async fn offer_holes(&self, count: u64, limit: u64) -> Vec<Range<u64>> {
        let refcounts = self.meta.refcounts.lock().await;
        self.countable_junk(&refcounts, count, limit)
    }

    /// Junk → Copies: those that are Junk, still, and counts them. The caller has the compaction's turn.
    pub(crate) async fn take_chosen(&self, chosen: &ClusterSet) -> Result<Holes<'_>> {
        self.prepare_changes().await?;
        let mut refcounts = self.meta.refcounts.lock().await;
        let free = chosen.intersection(&self.clusters.lock().junk);
        let free = free.runs().filter(|run| refcounts.can_count(run)).collect();
        self.count_holes(&mut refcounts, free, Purpose::Copy).await
    }

    /// Takes these out of Junk.
    async fn count_holes(
        &self,
        refcounts: &mut Refcounts,
        free: Vec<Range<u64>>,
        purpose: Purpose,
    ) -> Result<Holes<'_>> {
        let mut holes = Holes { clusters: &self.clusters, set: ClusterSet::default() };
        for run in free {
            refcounts.add(&self.volume, run.clone(), 1).await?;
            holes.set.insert_range(run.clone());
            let mut states = self.clusters.lock();
            states.junk.remove_range(run.clone());
            match purpose {
                Purpose::Copy => states.copies.insert_range(run),
                Purpose::Erase => states.roots.insert_range(run),
            }
        }
        Ok(holes)
    }

    /// The lowest `count` clusters of Junk below `limit`, or as many as there are, without those that no refcount block counts:
    /// a block that was dropped with the end of the file leaves such clusters if guests made the file longer again before it
    /// was cut.
    fn countable_junk(&self, refcounts: &Refcounts, count: u64, limit: u64) -> Vec<Range<u64>> {
        let per_block = self.meta.geometry.refcounts_per_block();
        let mut found: Vec<Range<u64>> = Vec::new();
        // Whether the block of the last one can.
        let mut can_count = (u64::MAX, false);
        let states = self.clusters.lock();
        // Not run by run: the first may be as long as the file, and guests wait for the lock.
        let countable = states.junk.iter().take_while(|&c| c < limit).filter(|&c| {
            if can_count.0 != c / per_block {
                can_count = (c / per_block, refcounts.can_count(&(c..c + 1)));
            }
            can_count.1
        });
        for c in countable.take(usize::try_from(count).unwrap_or(usize::MAX)) {
            match found.last_mut() {
                Some(run) if run.end == c && c % per_block != 0 => run.end = c + 1,
                _ => found.push(c..c + 1),
            }
        }
        found
    }

    /// Copies moves whose destinations follow one another.
    pub(crate) async fn copy_moves(&self, moves: &[Move], contents: Contents, copier: &mut Copier) -> Result<()> {
        let Some(first) = moves.first() else { return Ok(()) };
        let bits = self.meta.geometry.cluster_bits;
        let mut sources: Vec<Range<u64>> = Vec::new();
        for m in moves {
            match sources.last_mut() {
                Some(run) if run.end == m.src.0 << bits => run.end += 1 << bits,
                _ => sources.push(m.src.0 << bits..(m.src.0 + 1) << bits),
            }
        }
        if (moves.len() as u64) << bits <= PIECE as u64 {
            return self.gather(contents, &sources, first.dst.0 << bits, copier).await;
        }
        let mut dst = first.dst;
        for run in sources {
            let count = (run.end - run.start) >> bits;
            self.copy_clusters((HostCluster(run.start >> bits), dst), count, contents, copier).await?;
            dst.0 += count;
        }
        Ok(())
    }

    /// Copies clusters that follow one another, at both ends: at most [`PIECE`] bytes at a time.
    pub(crate) async fn copy_clusters(
        &self,
        (src, dst): (HostCluster, HostCluster),
        count: u64,
        contents: Contents,
        copier: &mut Copier,
    ) -> Result<()> {
        let bits = self.meta.geometry.cluster_bits;
        let (src, dst, length) = (src.0 << bits, dst.0 << bits, count << bits);
        let mut done = 0;
        while done < length {
            let piece = (length - done).min(PIECE as u64);
            let source = src + done..src + done + piece;
            self.gather(contents, std::slice::from_ref(&source), dst + done, copier).await?;
            done += piece;
        }
        Ok(())
    }

    /// Copies a table; from now on it is written at both places. `false` if it is not there any more.
    ///
    /// The copy is made while nobody writes metadata back, so it is what is on disk; what is changed in memory follows to
    /// both places.
    pub(crate) async fn copy_table(&self, m: &Move, copier: &mut Copier) -> Result<bool> {
        let geometry = self.meta.geometry;
        let _turn = self.meta.exclusive_turn().await;
        if !self.is_referenced(m).await? {
            return Ok(false);
        }
        self.copy_moves(std::slice::from_ref(m), Contents::Tables, copier).await?;
        self.meta.tables.lock().insert(m.dst);
        self.meta.mirrors.lock().begin(geometry.host_offset(m.src), geometry.host_offset(m.dst));
        Ok(true)
    }

    /// Whether a table is where the move takes it from.
    async fn is_referenced(&self, m: &Move) -> Result<bool> {
        let src = self.meta.geometry.host_offset(m.src);
        Ok(match m.reference {
            Reference::L2Entry(_) => true,
            Reference::L1Entry(index) => {
                self.meta.l1.get(index, &self.volume)?.is_some_and(|t| t.copied && t.host == src)
            }
            Reference::RefcountTable(index) => self.meta.refcounts.lock().await.block(index)? == Some(src),
        })
    }

    /// Flushed → Referenced: rewrites the reference, if the move still stands. The copy is durable, so the new reference may
    /// become durable at any time; the old one may, until it is, so the source stays as it is.
    pub(crate) async fn rewrite_reference(&self, m: &Move) -> Result<bool> {
        let geometry = self.meta.geometry;
        let dst = geometry.host_offset(m.dst);
        match m.reference {
            Reference::L2Entry(guest) => {
                let Some((slice, index)) = self.meta.l2.slice(&self.volume, &self.meta.l1, guest).await? else {
                    return Ok(false);
                };
                let l1_index = guest.0 / geometry.l2_entries();
                if !self.meta.l1.get(l1_index, &self.volume)?.is_some_and(|t| t.copied) {
                    return Ok(false);
                }
                let mut entries = self.meta.l2.modify(&slice);
                let entry = entries.get(index);
                let names_src = self
                    .decode(guest, entry)?
                    .host()
                    .is_some_and(|(h, copied)| copied && geometry.host_cluster(h) == m.src);
                // The mark is looked for under the lock under which writers set it.
                let cancelled = self.moves.is_cancelled(m.src) && !broken(Mutation::CommitCancelledMove);
                if !names_src || cancelled {
                    return Ok(false);
                }
                entries.set(index, entry.moved_to(dst));
                self.clusters.lock().unlink(m.src, true);
            }
            Reference::L1Entry(index) => {
                if !self.is_referenced(m).await? {
                    return Ok(false);
                }
                self.meta.l1.set(index, Some(dst));
            }
            Reference::RefcountTable(index) => {
                let mut refcounts = self.meta.refcounts.lock().await;
                if refcounts.block(index)? != Some(geometry.host_offset(m.src)) {
                    return Ok(false);
                }
                refcounts.set_block(index, Some(dst));
            }
        }
        Ok(true)
    }

    /// The new reference is durable. A data cluster was freed when its reference was rewritten; a table stood twice until
    /// now, and its old place is freed here.
    pub(crate) fn finish_move(&self, m: &Move) {
        if !matches!(m.reference, Reference::L2Entry(_)) {
            self.end_mirror(m);
            self.meta.tables.lock().remove(m.src);
            self.clusters.lock().unlink(m.src, true);
        }
    }

    /// The move is given up before its reference was rewritten.
    pub(crate) fn give_up(&self, m: &Move) {
        if !matches!(m.reference, Reference::L2Entry(_)) {
            self.end_mirror(m);
            self.meta.tables.lock().remove(m.dst);
        }
    }

    fn end_mirror(&self, m: &Move) {
        let geometry = self.meta.geometry;
        self.meta.mirrors.lock().end(geometry.host_offset(m.src), geometry.host_offset(m.dst));
    }

    /// Moves the L1 table and the refcount table into holes below cluster `limit`, if they lie past it and there are holes
    /// that are large enough.
    pub(crate) async fn move_header_tables(&self, limit: u64) -> Result<()> {
        // Holes are counted before anything refers to them.
        self.prepare_changes().await?;
        self.release_bitmaps(limit).await?;
        let geometry = self.meta.geometry;
        let old = self.meta.l1.clusters();
        if old.end > limit
            && let Some(hole) =
                self.clusters.allocate_hole(&self.volume, &self.meta, old.end - old.start, limit).await?
        {
            let new = hole.first().0..hole.first().0 + hole.len();
            let mut turn = self.meta.exclusive_turn().await;
            let to = geometry.host_offset(HostCluster(new.start));
            let l1_move = L1Move { to, entries: self.meta.l1.len(), patch: &|_| {} };
            self.commit_in_turn(&mut turn, Some(l1_move)).await?;
            hole.linked();
            self.table_moved(old, new);
        }
        let _length = self.clusters.length_turn.lock().await;
        let old = self.meta.refcounts.lock().await.table_range();
        if old.end > limit
            && let Some(hole) =
                self.clusters.allocate_hole(&self.volume, &self.meta, old.end - old.start, limit).await?
        {
            let mut refcounts = self.meta.refcounts.lock().await;
            // No await from here on: a hole that is given back is no table.
            self.meta.tables.lock().insert_range(hole.first().0..hole.first().0 + hole.len());
            // Written with the next commit, which frees the old place when the header names the new one.
            refcounts.move_table(hole.first());
            hole.linked();
            drop(refcounts);
            drop(_length);
            self.commit().await?;
        }
        Ok(())
    }

    /// A table in consecutive clusters stands at a new place, which the header names durably.
    pub(super) fn table_moved(&self, old: Range<u64>, new: Range<u64>) {
        let old = self.undisputed(ClusterSet::from(old));
        let mut tables = self.meta.tables.lock();
        tables.remove_all(&old);
        tables.insert_range(new);
        drop(tables);
        self.clusters.lock().unlinked.clusters.add_all(&old);
    }
}
