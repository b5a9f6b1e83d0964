//! New tables for old ones, in one sector of the header: how snapshots come, go, and are gone back to.
//!
//! A snapshot changes the refcounts of all that the disk refers to, and with them the COPIED flags of the disk's tables, which
//! must say whether a refcount is one. Changed in place, one of the two would be durable first, and a power cut in between
//! make an image with errors. So everything that changes is written anew, where nothing is: the disk's L1 table, its L2
//! tables with flags that change, the refcount blocks with counts that change, the refcount table and the snapshot table.
//! The header's first sector, which names the tables at the top, exchanges them all:
//!
//! 1. The new places are counted, and what the file says is what the memory says: **flush**. Cut before or after: the old
//!    tables stand; the new places are leaks.
//! 2. The new tables are written; **flush**. Cut before or after: the same, since nothing names them.
//! 3. The header's sector is written; **flush**. Cut before it is durable: the same. Cut after: the new tables stand, durable
//!    since the flush before. In them each count is as high as there are references, or higher: what nothing refers to any
//!    more, the old tables and clusters that only they referred to, is counted once, and freed as everything else is. Each
//!    flag of the disk's tables says whether the count beside it is one.
//!
//! The disk's guests stand still meanwhile: nobody changes tables or counts, and no write in place is under way, which
//! would go to a cluster that is a snapshot's by then.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::super::Image;
use super::references::{L1, References, flagged};
use super::room::Room;
use super::{Snapshots, encode_table};
use crate::buf::IoBuf;
use crate::clusters::set::ClusterSet;
use crate::clusters::snapshots::read_table;
use crate::device::BlockDevice;
use crate::device::volume::PIECE;
use crate::error::{Error, Result};
use crate::format::l2;
use crate::format::snapshot::Snapshot;
use crate::format::{header, refcount};
use crate::metadata::refcounts::Refcounts;
use crate::mutation::{Mutation, broken};
use crate::units::{HostCluster, HostOffset};

/// What is to change.
pub(super) struct Change {
    /// The disk's L1 table as it is to be, but for the places of tables that are written anew and for flags.
    pub(super) l1: L1,
    /// L1 entries whose L2 tables are written anew, since flags in them change.
    pub(super) anew: BTreeSet<u64>,
    /// Whether the disk referred to those tables before, so that their old places lose a reference.
    pub(super) leaves: bool,
    /// References that come and go.
    pub(super) come: References,
    pub(super) gone: References,
    /// The snapshots that stay, in their order.
    pub(super) stay: Vec<Snapshot>,
    /// A new one, which gets a copy of the disk's new L1 table.
    pub(super) new: Option<Snapshot>,
    /// Clusters of the snapshots' L1 tables that go.
    pub(super) l1_gone: Range<u64>,
    /// The size of the disk.
    pub(super) size: u64,
}

/// What becomes of the counts.
pub(super) struct NewCounts {
    /// Clusters that are counted once afterwards, among those whose references change.
    pub(super) ones: ClusterSet,
    /// Clusters that nothing refers to afterwards. Their count stays one until they are freed.
    pub(super) free: ClusterSet,
}

/// Where the new tables go.
struct Places {
    l1: Range<u64>,
    /// The new snapshot's.
    copy: Option<Range<u64>>,
    snapshots: Range<u64>,
    refcount_table: Range<u64>,
    blocks: BTreeMap<u64, HostCluster>,
    /// By the index of the L1 entry.
    tables: BTreeMap<u64, HostCluster>,
}

impl Change {
    /// The references of a range of clusters that change: how many come and how many go.
    fn within(&self, range: Range<u64>) -> BTreeMap<u64, (u64, u64)> {
        let mut all = BTreeMap::<u64, (u64, u64)>::new();
        self.come.within(range.clone()).for_each(|(c, n)| all.entry(c).or_default().0 = n);
        self.gone.within(range).for_each(|(c, n)| all.entry(c).or_default().1 = n);
        all
    }

    fn touches(&self, c: HostCluster) -> bool {
        self.come.to(c) > 0 || self.gone.to(c) > 0
    }

    /// The first word of an L2 entry with the flag that it is to have, in a table that is written anew. `sole`: the table
    /// is the disk's alone.
    fn entry(&self, entry: u64, counts: &NewCounts, sole: bool, geometry: crate::units::Geometry) -> u64 {
        match flagged(entry, geometry) {
            Some((c, _)) if self.touches(c) => {
                let one = sole && counts.ones.contains(c);
                entry & !l2::COPIED | if one { l2::COPIED } else { 0 }
            }
            _ => entry,
        }
    }
}

impl<D: BlockDevice> Image<D> {
    /// What becomes of the counts. Nothing is changed.
    ///
    /// # Errors
    /// [`Error::Invalid`] if something is counted less often than it is referred to; [`Error::Unsupported`] if a count would
    /// pass what the image's refcounts can hold.
    pub(super) async fn new_counts(&self, change: &Change) -> Result<NewCounts> {
        let mut counts = NewCounts { ones: ClusterSet::default(), free: ClusterSet::default() };
        let mut refcounts = self.meta.refcounts.lock().await;
        for index in self.blocks_of(change) {
            self.new_block(&mut refcounts, change, index, Some(&mut counts)).await?;
        }
        Ok(counts)
    }

    fn blocks_of(&self, change: &Change) -> BTreeSet<u64> {
        let geometry = self.meta.geometry;
        &change.come.blocks(geometry) | &change.gone.blocks(geometry)
    }

    /// A refcount block as it is to be.
    async fn new_block(
        &self,
        refcounts: &mut Refcounts,
        change: &Change,
        index: u64,
        mut counts: Option<&mut NewCounts>,
    ) -> Result<Vec<u8>> {
        let geometry = self.meta.geometry;
        let (per_block, order) = (geometry.refcounts_per_block(), geometry.refcount_order);
        let first = index * per_block;
        let mut bytes = refcounts.block_bytes(&self.volume, index).await?;
        for (c, (come, gone)) in change.within(first..first + per_block) {
            let place = (c - first) as usize;
            let old = refcount::get(&bytes, order, place);
            let new = old.checked_add(come).and_then(|n| n.checked_sub(gone)).filter(|_| old > 0);
            let Some(new) = new else {
                let reason = format!("cluster {c:#x} is counted {old} times, and referred to more often: check it");
                let block = refcounts.block(index)?.map_or(0, |b| b.0);
                return Err(Error::invalid("refcount block entry", block, reason));
            };
            if new > geometry.refcount_max() {
                let what =
                    format!("{new} references to one cluster in an image with refcounts of {} bits", 1u32 << order);
                return Err(Error::unsupported(what));
            }
            if let Some(counts) = &mut counts {
                match new {
                    0 => _ = counts.free.insert(HostCluster(c)),
                    1 => _ = counts.ones.insert(HostCluster(c)),
                    _ => {}
                }
            }
            refcount::set(&mut bytes, order, place, new.max(1));
        }
        Ok(bytes)
    }

    /// Carries out a change. The caller has the compaction's turn, nobody writes, and the mapping is frozen. After an error
    /// nothing has changed (unless the header's sector could not be written: then the image takes no changes any more).
    pub(super) async fn exchange(&self, change: &mut Change, counts: &NewCounts) -> Result<()> {
        let geometry = self.meta.geometry;
        self.check_still()?;
        let blocks = self.blocks_of(change);
        let mut room = Room::take(self, blocks.len() as u64 + change.anew.len() as u64).await?;
        let mut places = self.find_places(change, &blocks, &mut room).await?;
        let (turn, mut refcounts) = loop {
            let mut turn = self.meta.exclusive_turn().await;
            self.commit_in_turn(&mut turn, None).await?;
            let refcounts = self.meta.refcounts.lock().await;
            let table = refcounts.table_range();
            let long_enough = table.end - table.start == places.refcount_table.end - places.refcount_table.start;
            if long_enough && refcounts.table_is_written() {
                break (turn, refcounts);
            }
            drop((turn, refcounts));
            if !long_enough {
                // Making room for the tables made the refcount table larger.
                room.give_back();
                places.refcount_table = room.run(table.end - table.start).await?;
            }
        };
        self.check_still()?;
        let l1 = self.write_anew(change, counts, &places, &mut refcounts).await?;
        let table = self.place_snapshots(change, &places).await?;
        if !broken(Mutation::HeaderBeforeSnapshot) {
            self.volume.flush().await?;
        }
        // Nobody reads an old table into memory after it was forgotten there.
        let kept_out = self.meta.l2.keep_out().await;
        let at = |range: &Range<u64>| geometry.host_offset(HostCluster(range.start));
        turn.switch_header(&self.volume, |sector| {
            header::patch_l1(sector, at(&places.l1), l1.entries.len() as u32);
            header::patch_refcount_table(
                sector,
                at(&places.refcount_table),
                (places.refcount_table.end - places.refcount_table.start) as u32,
            );
            header::patch_snapshots(sector, table.table, table.entries.len() as u32);
            header::patch_virtual_size(sector, change.size);
        })
        .await?;
        // No await from here on: the memory follows the header.
        self.follow(change, counts, &places, &mut refcounts, l1, table);
        room.used();
        drop(kept_out);
        Ok(())
    }

    /// Whether the L2 tables in the file are those in memory. They are; if they were not, something would be lost.
    fn check_still(&self) -> Result<()> {
        if self.meta.l2.is_dirty() || !self.meta.patches.is_empty() {
            return Err(Error::invalid("L2 table", 0, "it changed while tables were exchanged"));
        }
        Ok(())
    }

    async fn find_places(&self, change: &Change, blocks: &BTreeSet<u64>, room: &mut Room<'_, D>) -> Result<Places> {
        let geometry = self.meta.geometry;
        let full = || Error::invalid("refcount table", 0, "there is no room for new tables");
        let mut tables = BTreeMap::new();
        for &index in &change.anew {
            let place = if change.new.is_some() { room.one_shared().await? } else { room.one() };
            tables.insert(index, place.ok_or_else(full)?);
        }
        let mut new_blocks = BTreeMap::new();
        for &index in blocks {
            new_blocks.insert(index, room.one().ok_or_else(full)?);
        }
        let l1_clusters = geometry.clusters_for(change.l1.entries.len() as u64 * 8);
        let l1 = room.run(l1_clusters).await?;
        let copy = if change.new.is_some() { Some(room.run(l1_clusters).await?) } else { None };
        let length = change.stay.iter().chain(&change.new).map(Snapshot::encoded_len).sum::<usize>();
        let snapshots = if length == 0 { 0..0 } else { room.run(geometry.clusters_for(length as u64)).await? };
        // Last, since all else may make that table larger.
        let table = self.meta.refcounts.lock().await.table_range();
        let refcount_table = room.run(table.end - table.start).await?;
        Ok(Places { l1, copy, snapshots, refcount_table, blocks: new_blocks, tables })
    }

    /// Writes the new tables, but for the snapshot table. Returns the disk's L1 table.
    async fn write_anew(
        &self,
        change: &Change,
        counts: &NewCounts,
        places: &Places,
        refcounts: &mut Refcounts,
    ) -> Result<L1> {
        let geometry = self.meta.geometry;
        let sole = change.new.is_none();
        let copied = |one: bool| if one { l2::COPIED } else { 0 };
        let offset = geometry.host_offset(HostCluster(places.l1.start));
        let mut l1 = L1 { offset, entries: change.l1.entries.clone() };
        let mut words = Vec::new();
        for ((index, old, place), entry) in change.l1.each().zip(&mut l1.entries) {
            let Some(table) = self.table_of(old, place)? else { continue };
            let c = geometry.host_cluster(table.host);
            if let Some(&to) = places.tables.get(&index) {
                read_table(&self.volume, &self.meta, table.host, &mut words).await?;
                let firsts = words.iter_mut().step_by(geometry.l2_entry_words());
                firsts.for_each(|e| *e = change.entry(*e, counts, sole, geometry));
                self.write_table("writing an L2 table", geometry.host_offset(to), &words).await?;
                *entry = geometry.host_offset(to).0 | copied(sole);
            } else if change.touches(c) {
                *entry = table.host.0 | copied(counts.ones.contains(c));
            }
        }
        self.write_table("writing the L1 table", l1.offset, &l1.entries).await?;
        if let Some(copy) = &places.copy {
            self.write_table("writing an L1 table", geometry.host_offset(HostCluster(copy.start)), &l1.entries).await?;
        }
        for (&index, &to) in &places.blocks {
            let block = self.new_block(refcounts, change, index, None).await?;
            self.write_pieces("writing a refcount block", geometry.host_offset(to), &block).await?;
        }
        let table = refcounts.table_with(&places.blocks);
        let to = geometry.host_offset(HostCluster(places.refcount_table.start));
        self.write_table("writing the refcount table", to, &table).await?;
        Ok(l1)
    }

    /// Writes the new snapshot table, and returns it.
    async fn place_snapshots(&self, change: &mut Change, places: &Places) -> Result<Snapshots> {
        let geometry = self.meta.geometry;
        let mut entries = change.stay.clone();
        if let (Some(mut new), Some(copy)) = (change.new.take(), &places.copy) {
            new.l1_offset = geometry.host_offset(HostCluster(copy.start));
            entries.push(new);
        }
        let at = geometry.host_offset(HostCluster(places.snapshots.start));
        let bytes = encode_table(&entries);
        self.write_snapshot_table(at, &bytes).await?;
        let mut table = Snapshots::new(entries, at);
        table.moved_to(at);
        Ok(table)
    }

    /// Writes a table whole, with zeroes to the end of its last cluster.
    async fn write_table(&self, action: &'static str, to: HostOffset, entries: &[u64]) -> Result<()> {
        let mut bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_be_bytes()).collect();
        bytes.resize(bytes.len().next_multiple_of(self.meta.geometry.cluster_size() as usize), 0);
        self.write_pieces(action, to, &bytes).await
    }

    async fn write_pieces(&self, action: &'static str, to: HostOffset, bytes: &[u8]) -> Result<()> {
        let mut at = to.0;
        for piece in bytes.chunks(PIECE) {
            self.volume.write(action, at, IoBuf::new(piece)).await?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// The header names the new tables, durably: so does the memory, and what only the old ones named is freed.
    fn follow(
        &self,
        change: &Change,
        counts: &NewCounts,
        places: &Places,
        refcounts: &mut Refcounts,
        l1: L1,
        table: Snapshots,
    ) {
        let geometry = self.meta.geometry;
        let mut snapshots = self.snapshots.lock();
        // What nothing refers to any more: the old tables at the top...
        let mut old = ClusterSet::default();
        old.insert_range(self.meta.l1.clusters());
        old.insert_range(refcounts.table_range());
        old.insert_range(snapshots.clusters(geometry));
        old.insert_range(change.l1_gone.clone());
        // ...the blocks that were written anew...
        for &index in places.blocks.keys() {
            if let Ok(Some(block)) = refcounts.block(index) {
                old.insert(geometry.host_cluster(block));
            }
        }
        let mut states = self.clusters.lock();
        let mut tables = self.meta.tables.lock();
        // ...the L2 tables that were, unless a snapshot has them...
        for &index in places.tables.keys().filter(|_| change.leaves) {
            let Some(&entry) = change.l1.entries.get(index as usize) else { continue };
            let Ok(Some(table)) = self.table_of(entry, change.l1.place_of(index)) else { continue };
            let c = geometry.host_cluster(table.host);
            let sole = if change.touches(c) { counts.ones.contains(c) } else { table.copied };
            if sole { _ = old.insert(c) } else { states.unlink(c, false) }
        }
        // ...and what was a snapshot's, or the disk's, alone.
        tables.remove_all(&change.gone.tables.intersection(&counts.free));
        let old = self.undisputed(old);
        tables.remove_all(&old);
        states.unlinked.clusters.add_all(&old);
        states.unlinked.clusters.add_all(&counts.free);
        drop(states);
        for range in [&places.l1, &places.refcount_table, &places.snapshots].into_iter().chain(&places.copy) {
            tables.insert_range(range.clone());
        }
        places.blocks.values().for_each(|&c| _ = tables.insert(c));
        for table in l1.each().filter_map(|(_, entry, place)| self.table_of(entry, place).ok().flatten()) {
            tables.insert(geometry.host_cluster(table.host));
        }
        drop(tables);
        let at = |range: &Range<u64>| geometry.host_offset(HostCluster(range.start));
        refcounts.exchanged(&places.blocks, at(&places.refcount_table));
        self.meta.l1.exchanged(l1.offset, l1.entries);
        self.meta.l2.forget(0..u64::MAX);
        snapshots.exchange(table);
    }
}
