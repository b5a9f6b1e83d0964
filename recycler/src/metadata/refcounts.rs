//! Refcount blocks, cached in slices, and the refcount table.
//!
//! The cache never runs ahead of what may be durable in one direction: a decrement enters it only when the unlinking it
//! accounts for is durable. So whatever part of it is written back at whatever moment, no count on disk is lower than the
//! number of references that a crash could leave.

mod exchange;

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::sync::Arc;

use crate::sync::Mutex;

use super::Writes;
use super::mirror::Mirrors;
use crate::buf::IoBufMut;
use crate::clusters::set::ClusterSet;
use crate::device::BlockDevice;
use crate::device::volume::Volume;
use crate::error::{Error, Result};
use crate::format::refcount;
use crate::units::{Geometry, HostCluster, HostOffset};

/// Refcounts are read, cached and written back in pieces of at most this many bytes.
const SLICE: u64 = 4096;
/// Clean slices kept in memory.
const CACHED_SLICES: usize = 512;

/// The refcount structures of one image. Access is serialised: see [`super::Metadata::refcounts`].
pub(crate) struct Refcounts {
    geometry: Geometry,
    slice_size: u64,
    /// Where the refcount block of each index is; 0: there is none, its clusters count 0.
    table: Vec<u64>,
    table_offset: HostOffset,
    table_clusters: u32,
    /// The clusters of every table, which must be counted.
    tables: Arc<Mutex<ClusterSet>>,
    slices: HashMap<u64, Box<[u8]>>,
    dirty: BTreeSet<u64>,
    /// Slices that the commit under way is writing; they must not be forgotten before it has.
    writing: BTreeSet<u64>,
    /// Table entries changed since they were last written, by index.
    dirty_table: BTreeSet<u64>,
    /// If the table stands at a place that the header does not name yet: where it was before, the place that the header
    /// names first, then places in between.
    moved: Vec<Range<u64>>,
}

/// What a commit writes of the refcounts, copied at its start.
#[derive(Default)]
pub(crate) struct RefcountWrites {
    /// Blocks, new ones included.
    pub(crate) blocks: Writes,
    /// Table entries. To be written when the blocks are durable.
    pub(crate) table: Writes,
    /// The table's new place, for the header: to be written when the table is durable. Then the old places, in clusters.
    pub(crate) moved: Option<(HostOffset, u32, Vec<Range<u64>>)>,
    slices: BTreeSet<u64>,
    table_entries: BTreeSet<u64>,
}

impl Refcounts {
    /// Reads the refcount table.
    pub(crate) async fn open<D: BlockDevice>(
        volume: &Volume<D>,
        geometry: Geometry,
        table_offset: HostOffset,
        table_clusters: u32,
        tables: Arc<Mutex<ClusterSet>>,
    ) -> Result<Self> {
        let mut bytes = vec![0u8; (u64::from(table_clusters) << geometry.cluster_bits) as usize];
        volume.read("reading the refcount table", table_offset.0, IoBufMut::new(&mut bytes)).await?;
        let table = super::decode_table(&bytes);
        Ok(Refcounts {
            geometry,
            slice_size: SLICE.min(geometry.cluster_size()),
            table,
            table_offset,
            table_clusters,
            tables,
            slices: HashMap::new(),
            dirty: BTreeSet::new(),
            writing: BTreeSet::new(),
            dirty_table: BTreeSet::new(),
            moved: Vec::new(),
        })
    }

    /// Clusters that one slice counts.
    fn per_slice(&self) -> u64 {
        (self.slice_size * 8) >> self.geometry.refcount_order
    }

    fn slices_per_block(&self) -> u64 {
        self.geometry.cluster_size() / self.slice_size
    }

    /// Where a block is; `None` if there is none.
    pub(crate) fn block(&self, index: u64) -> Result<Option<HostOffset>> {
        let Some(&entry) = self.table.get(index as usize) else { return Ok(None) };
        let offset = entry & refcount::TABLE_OFFSET;
        if offset == 0 && entry == 0 {
            return Ok(None);
        }
        let at = self.table_offset.0 + index * 8;
        if entry != offset || offset & (self.geometry.cluster_size() - 1) != 0 || offset == 0 {
            return Err(Error::invalid(
                "refcount table entry",
                at,
                format!("{entry:#x} is not the offset of a cluster"),
            ));
        }
        Ok(Some(HostOffset(offset)))
    }

    /// Every block's index and offset; unusable entries are left out.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = (u64, HostOffset)> + '_ {
        (0..self.table.len() as u64).filter_map(|i| Some((i, self.block(i).ok()??)))
    }

    /// The clusters that the table occupies.
    pub(crate) fn table_range(&self) -> Range<u64> {
        let start = self.geometry.host_cluster(self.table_offset).0;
        start..start + u64::from(self.table_clusters)
    }

    /// Blocks that the table could name without growing.
    pub(crate) fn table_len(&self) -> u64 {
        self.table.len() as u64
    }

    fn slice_offset(&self, slice: u64) -> Result<Option<u64>> {
        let block = self.block(slice / self.slices_per_block())?;
        Ok(block.map(|b| b.0 + slice % self.slices_per_block() * self.slice_size))
    }

    async fn load<D: BlockDevice>(&mut self, volume: &Volume<D>, slice: u64) -> Result<()> {
        if self.slices.contains_key(&slice) {
            return Ok(());
        }
        let mut bytes = vec![0u8; self.slice_size as usize].into_boxed_slice();
        if let Some(offset) = self.slice_offset(slice)? {
            if offset >= volume.length() {
                let field = "refcount table entry";
                return Err(Error::invalid(
                    field,
                    self.table_offset.0,
                    format!("the block at {offset:#x} is outside the file"),
                ));
            }
            volume.read("reading a refcount block", offset, IoBufMut::new(&mut bytes)).await?;
        }
        let counted = slice * self.per_slice()..(slice + 1) * self.per_slice();
        for c in self.tables.lock().runs_from(counted.start).flatten().take_while(|&c| c < counted.end) {
            let index = (c - counted.start) as usize;
            if refcount::get(&bytes, self.geometry.refcount_order, index) == 0 {
                // Free clusters are told by their counts: with counts like these we would hand out what is in use.
                let at = self.slice_offset(slice)?.unwrap_or(self.table_offset.0);
                return Err(Error::invalid(
                    "refcount block entry",
                    at,
                    format!("cluster {c:#x} holds a table and is not counted"),
                ));
            }
        }
        self.slices.insert(slice, bytes);
        Ok(())
    }

    /// Whether the table has holes: clusters that no block counts, below others that one does.
    pub(crate) fn has_holes(&self) -> bool {
        let mut ended = false;
        for &entry in &self.table {
            if entry == 0 {
                ended = true;
            } else if ended {
                return true;
            }
        }
        false
    }

    /// Clusters up to here could be counted by the blocks that there are.
    pub(crate) fn coverage(&self) -> u64 {
        let blocks = self.table.iter().rposition(|&e| e != 0).map_or(0, |i| i as u64 + 1);
        blocks * self.geometry.refcounts_per_block()
    }

    /// Forgets clean slices when there are too many. Everything clean goes at once: work on refcounts is local, so what is
    /// needed again comes back quickly.
    fn evict(&mut self) {
        if self.slices.len() >= CACHED_SLICES {
            let (dirty, writing) = (&self.dirty, &self.writing);
            self.slices.retain(|s, _| dirty.contains(s) || writing.contains(s));
        }
    }

    /// The refcount of a cluster whose slice is loaded.
    fn cached(&self, c: HostCluster) -> u64 {
        let per_slice = self.per_slice();
        let index = (c.0 % per_slice) as usize;
        self.slices.get(&(c.0 / per_slice)).map_or(0, |s| refcount::get(s, self.geometry.refcount_order, index))
    }

    /// The refcount of a cluster.
    pub(crate) async fn count<D: BlockDevice>(&mut self, volume: &Volume<D>, c: HostCluster) -> Result<u64> {
        self.load_range(volume, &(c.0..c.0 + 1)).await?;
        Ok(self.cached(c))
    }

    /// Loads what counts the range.
    pub(crate) async fn load_range<D: BlockDevice>(&mut self, volume: &Volume<D>, range: &Range<u64>) -> Result<()> {
        self.evict();
        for slice in range.start / self.per_slice()..range.end.div_ceil(self.per_slice()) {
            self.load(volume, slice).await?;
        }
        Ok(())
    }

    /// Whether every cluster of the range is counted, if the slices that tell are in memory.
    pub(crate) fn all_counted(&self, range: &Range<u64>) -> Option<bool> {
        let mut all = true;
        for piece in self.by_slice(range.clone()) {
            all &= self.counts_in(piece)?.all(|count| count > 0);
        }
        Some(all)
    }

    /// A range, cut where another slice counts what follows.
    fn by_slice(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
        let (per_slice, mut at) = (self.per_slice(), range.start);
        std::iter::from_fn(move || {
            let piece = at..range.end.min((at / per_slice + 1) * per_slice);
            at = piece.end;
            (!piece.is_empty()).then_some(piece)
        })
    }

    /// The refcounts of a range that one slice counts, if that is in memory.
    fn counts_in(&self, range: Range<u64>) -> Option<impl Iterator<Item = u64> + '_> {
        let (per_slice, order) = (self.per_slice(), self.geometry.refcount_order);
        let bytes = self.slices.get(&(range.start / per_slice))?;
        Some(range.map(move |c| refcount::get(bytes, order, (c % per_slice) as usize)))
    }

    /// Adds `delta` (1 or -1) to the refcount of every cluster in the range. All or nothing: an overflow, or a count
    /// that would fall below zero, is an error and changes nothing, and a dropped future changes nothing. The blocks must
    /// exist.
    pub(crate) async fn add<D: BlockDevice>(
        &mut self,
        volume: &Volume<D>,
        range: Range<u64>,
        delta: i64,
    ) -> Result<()> {
        self.load_range(volume, &range).await?;
        self.add_loaded(range, delta)
    }

    /// The same, when everything is loaded.
    fn add_loaded(&mut self, range: Range<u64>, delta: i64) -> Result<()> {
        let max = self.geometry.refcount_max();
        let (order, per_slice) = (self.geometry.refcount_order, self.per_slice());
        // The first pass checks, the second changes.
        for pass in 0..2 {
            let mut at = range.start;
            while at < range.end {
                let slice = at / per_slice;
                let end = range.end.min((slice + 1) * per_slice);
                let offset = self.slice_offset(slice)?;
                let (Some(offset), Some(bytes)) = (offset, self.slices.get_mut(&slice)) else {
                    let reason = format!("no block counts cluster {at:#x}");
                    return Err(Error::invalid("refcount table entry", self.table_offset.0, reason));
                };
                for c in at..end {
                    let index = (c % per_slice) as usize;
                    let new = refcount::get(bytes, order, index).checked_add_signed(delta).filter(|&n| n <= max);
                    let Some(new) = new else {
                        let reason = format!("the count of cluster {c:#x} would leave the range 0 to {max}");
                        return Err(Error::invalid("refcount block entry", offset, reason));
                    };
                    if pass == 1 {
                        refcount::set(bytes, order, index, new);
                    }
                }
                if pass == 1 {
                    self.dirty.insert(slice);
                }
                at = end;
            }
        }
        Ok(())
    }

    /// Takes one reference from every cluster in the range; returns those that have none left.
    pub(crate) async fn release<D: BlockDevice>(
        &mut self,
        volume: &Volume<D>,
        range: Range<u64>,
    ) -> Result<Vec<Range<u64>>> {
        self.load_range(volume, &range).await?;
        self.release_loaded(range)
    }

    /// The same, when everything is loaded.
    pub(crate) fn release_loaded(&mut self, range: Range<u64>) -> Result<Vec<Range<u64>>> {
        self.add_loaded(range.clone(), -1)?;
        let mut free: Vec<Range<u64>> = Vec::new();
        for c in range.filter(|&c| self.cached(HostCluster(c)) == 0) {
            extend_runs(&mut free, c);
        }
        Ok(free)
    }

    /// What must be appended to the file, from cluster `start` on, so that `count` clusters after it can be counted:
    /// first the clusters of a larger table (0 if it suffices), then new blocks.
    pub(crate) fn plan_growth(&self, start: u64, count: u64) -> Result<Growth> {
        let per_block = self.geometry.refcounts_per_block();
        let per_cluster = self.geometry.entries_per_cluster();
        let mut growth = Growth { table: 0, blocks: 0, count };
        loop {
            let end = start + growth.total();
            let (first, last) = (start / per_block, (end - 1) / per_block);
            let mut missing = 0;
            for index in first..=last {
                missing += u64::from(self.block(index)?.is_none());
            }
            let table = if last < self.table_len() {
                0
            } else {
                // Half as much again, so that growing stays rare.
                let entries = (last + 1) * 3 / 2;
                entries.div_ceil(per_cluster)
            };
            if missing <= growth.blocks && table <= growth.table {
                return Ok(growth);
            }
            growth.blocks = growth.blocks.max(missing);
            growth.table = growth.table.max(table);
        }
    }

    /// Installs what [`plan_growth`](Self::plan_growth) asked for in the clusters from `start` on, which read as zeroes,
    /// and counts them and the `growth.count` clusters after them once each. Returns the clusters that are left to use.
    pub(crate) async fn grow<D: BlockDevice>(
        &mut self,
        volume: &Volume<D>,
        start: u64,
        growth: Growth,
    ) -> Result<Range<u64>> {
        let geometry = self.geometry;
        let per_block = geometry.refcounts_per_block();
        if growth.table * geometry.cluster_size() > 8 << 20 {
            let what = "an image that needs a refcount table of more than 8 MiB".to_owned();
            return Err(Error::Unsupported { what });
        }
        // Everything is looked at and loaded before anything changes: an error here, or a dropped future, changes nothing.
        let end = start + growth.total();
        let mut missing = Vec::new();
        for index in start / per_block..=(end - 1) / per_block {
            if self.block(index)?.is_none() {
                missing.push(index);
            }
        }
        // (Slices of blocks that do not exist yet are loaded as zeroes, which is what they will be.)
        self.load_range(volume, &(start..end)).await?;
        let (old_table, old_entries) = ((self.table_offset, self.table_clusters), self.table.len());
        if growth.table > 0 {
            self.table.resize((growth.table * geometry.entries_per_cluster()) as usize, 0);
            self.table_offset = geometry.host_offset(HostCluster(start));
            self.table_clusters = growth.table as u32;
        }
        let spare = start + growth.table;
        for (block, &index) in (spare..spare + growth.blocks).zip(&missing) {
            if let Some(entry) = self.table.get_mut(index as usize) {
                *entry = geometry.host_offset(HostCluster(block)).0;
            }
        }
        if let Err(e) = self.add_loaded(start..end, 1) {
            // Nothing on disk knows of this yet: take it back.
            for &index in &missing {
                if let Some(entry) = self.table.get_mut(index as usize) {
                    *entry = 0;
                }
            }
            self.table.truncate(old_entries);
            (self.table_offset, self.table_clusters) = old_table;
            return Err(e);
        }
        let left = spare + missing.len() as u64..end;
        self.tables.lock().insert_range(start..left.start);
        self.dirty_table.extend(missing);
        if growth.table > 0 {
            let old = geometry.host_cluster(old_table.0).0;
            self.moved.push(old..old + u64::from(old_table.1));
            self.dirty_table.extend(0..self.table.len() as u64);
        }
        Ok(left)
    }

    /// Points a table entry at the block's copy, or at nothing.
    pub(crate) fn set_block(&mut self, index: u64, to: Option<HostOffset>) {
        if let Some(entry) = self.table.get_mut(index as usize) {
            *entry = to.map_or(0, |o| o.0);
            self.dirty_table.insert(index);
        }
        if to.is_none() {
            let slices = index * self.slices_per_block()..(index + 1) * self.slices_per_block();
            for slice in slices {
                self.slices.remove(&slice);
                self.dirty.remove(&slice);
            }
        }
    }

    /// The table stands at a new place from now on, where it is to be written whole.
    pub(crate) fn move_table(&mut self, to: HostCluster) {
        let old = self.table_range();
        self.table_offset = self.geometry.host_offset(to);
        self.moved.push(old);
        self.dirty_table.extend(0..self.table.len() as u64);
    }

    /// Copies what changed, to be written; it counts as clean from now on. `mirrors` are blocks that stand twice.
    pub(crate) fn capture(&mut self, mirrors: &Mirrors) -> Result<RefcountWrites> {
        let mut writes = RefcountWrites { slices: std::mem::take(&mut self.dirty), ..RefcountWrites::default() };
        for &slice in &writes.slices {
            let block = self.block(slice / self.slices_per_block())?;
            let (Some(block), Some(bytes)) = (block, self.slices.get(&slice)) else { continue };
            let within = slice % self.slices_per_block() * self.slice_size;
            for place in mirrors.places(block) {
                writes.blocks.push(place.0 + within, bytes);
            }
        }
        writes.table_entries = std::mem::take(&mut self.dirty_table);
        let sectors: BTreeSet<u64> = writes.table_entries.iter().map(|i| i / 64).collect();
        for sector in sectors {
            super::push_table_sector(&mut writes.table, self.table_offset, &self.table, sector);
        }
        if !self.moved.is_empty() {
            writes.moved = Some((self.table_offset, self.table_clusters, std::mem::take(&mut self.moved)));
        }
        self.writing.extend(&writes.slices);
        Ok(writes)
    }

    /// The captured changes are on disk.
    pub(crate) fn captured_written(&mut self) {
        self.writing.clear();
    }

    /// The captured changes could not be written: they are as dirty as before.
    pub(crate) fn restore(&mut self, writes: RefcountWrites) {
        self.writing.clear();
        self.dirty.extend(writes.slices);
        self.dirty_table.extend(writes.table_entries);
        if let Some((_, _, old)) = writes.moved {
            // The table may have moved on since.
            self.moved.splice(0..0, old);
        }
    }

    /// The clusters with a count of 0 among those that block `index` counts, below `end`; none if there is no block.
    pub(crate) async fn free_in_block<D: BlockDevice>(
        &mut self,
        volume: &Volume<D>,
        index: u64,
        end: u64,
    ) -> Result<Vec<Range<u64>>> {
        let per_block = self.geometry.refcounts_per_block();
        let clusters = index * per_block..((index + 1) * per_block).min(end);
        if self.block(index)?.is_none() {
            if !self.tables.lock().meets(&clusters) {
                // Not free for us: nothing could count them.
                return Ok(Vec::new());
            }
            let at = self.table_offset.0 + index * 8;
            let reason = "there is no block, but tables that it must count";
            return Err(Error::invalid("refcount table entry", at, reason));
        }
        let mut free: Vec<Range<u64>> = Vec::new();
        for piece in self.by_slice(clusters) {
            self.evict();
            self.load(volume, piece.start / self.per_slice()).await?;
            let counts = self.counts_in(piece.clone()).into_iter().flatten();
            piece.zip(counts).filter(|&(_, count)| count == 0).for_each(|(c, _)| extend_runs(&mut free, c));
        }
        Ok(free)
    }

    /// Whether block `index` counts nothing but clusters among `allowed`, once each.
    pub(crate) async fn counts_only<D: BlockDevice>(
        &mut self,
        volume: &Volume<D>,
        index: u64,
        allowed: &ClusterSet,
    ) -> Result<bool> {
        let per_slice = self.per_slice();
        for slice in index * self.slices_per_block()..(index + 1) * self.slices_per_block() {
            self.evict();
            self.load(volume, slice).await?;
            let others = (slice * per_slice..(slice + 1) * per_slice)
                .any(|c| self.cached(HostCluster(c)) > u64::from(allowed.contains(HostCluster(c))));
            if others {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether there are blocks that count every cluster of the range.
    pub(crate) fn can_count(&self, range: &Range<u64>) -> bool {
        let per_block = self.geometry.refcounts_per_block();
        (range.start / per_block..range.end.div_ceil(per_block)).all(|index| matches!(self.block(index), Ok(Some(_))))
    }

    /// The end of the last cluster that is counted.
    pub(crate) async fn counted_end<D: BlockDevice>(&mut self, volume: &Volume<D>) -> Result<u64> {
        let per_block = self.geometry.refcounts_per_block();
        let blocks: Vec<u64> = self.blocks().map(|(index, _)| index).collect();
        for index in blocks.into_iter().rev() {
            let end = (index + 1) * per_block;
            let free = self.free_in_block(volume, index, end).await?;
            let counted = free.last().filter(|run| run.end == end).map_or(end, |run| run.start);
            if counted > index * per_block {
                return Ok(counted);
            }
        }
        Ok(0)
    }
}

fn extend_runs(runs: &mut Vec<Range<u64>>, c: u64) {
    match runs.last_mut() {
        Some(run) if run.end == c => run.end = c + 1,
        _ => runs.push(c..c + 1),
    }
}

/// What growing the file by `count` clusters needs besides them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Growth {
    /// Clusters of a larger refcount table.
    pub(crate) table: u64,
    /// New refcount blocks.
    pub(crate) blocks: u64,
    /// Clusters to be counted after them.
    pub(crate) count: u64,
}

impl Growth {
    /// Clusters in all.
    pub(crate) fn total(&self) -> u64 {
        self.table + self.blocks + self.count
    }
}
