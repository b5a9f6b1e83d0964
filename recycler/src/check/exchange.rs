//! Lowering refcounts to one, together with the COPIED flags that this turns on.
//!
//! A flag must say whether its cluster's refcount is one, and the two stand in different sectors: changed in place, one is
//! durable first, and a power cut in between makes an image that merely leaked one with errors. So the L1 table, the L2
//! tables with such flags, the refcount table and the blocks with such refcounts are written anew, where nothing is, and
//! the header's first sector, which names both top tables, exchanges them all.
//!
//! - Cut before that sector is durable: the old tables stand, as they were. The new ones are leaks, each counted once.
//! - Cut after: the new ones stand, durable since the flush before it. Each flag in them agrees with its refcount. The
//!   clusters of the old ones, and others that nobody refers to, may still be counted: leaks.

use std::collections::BTreeMap;
use std::io;

use roaring::RoaringTreemap;

use super::Repair;
use super::blocks;
use super::flags::Flags;
use super::regions::L1;
use super::repair::Repairing;
use super::source::set_entry;
use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::format::header::{patch_l1, patch_refcount_table};
use crate::format::l2::{COPIED, OFFSET};
use crate::units::HostOffset;

/// Tables that are written anew, and the first clusters of their new places.
struct Exchange {
    l1: L1,
    new_l1: u64,
    new_refcount_table: u64,
    /// By the index of the block.
    blocks: BTreeMap<u64, u64>,
    /// By the cluster of the L2 table.
    tables: BTreeMap<u64, u64>,
}

impl<D: BlockDevice> Repairing<'_, '_, D> {
    /// Lowers what is to be lowered to one, if flags depend on it, and turns these on. The clusters of the old tables are
    /// added to `lowered`. Returns whether no flag is left to change. If there is no room for new tables, nothing is done; if
    /// the disk turns out to be full when they are written, those that flags depend on are taken out of `lowered`: they stay
    /// leaks.
    ///
    /// Only where nothing but leaks was found: everything that is read here is sound then, and each cluster that is left
    /// to one owner has just that one reference. Of the leaks, `spare` have a refcount of one.
    pub(super) async fn exchange(&mut self, lowered: &mut RoaringTreemap, spare: &RoaringTreemap) -> Result<bool> {
        let Some(&l1) = self.l1.filter(|_| self.findings.report.errors() == 0) else { return Ok(false) };
        let geometry = self.source.geometry;
        let singles: RoaringTreemap = lowered.iter().filter(|&c| self.counts.get(c) == 1).collect();
        if singles.is_empty() {
            return Ok(true);
        }
        let Some(tables) = self.tables_with_flags(l1, lowered).await? else { return Ok(true) };
        let Some((exchange, new)) = self.find_room(l1, &singles, &tables, spare) else { return Ok(false) };
        let old = self.old_places(&exchange);
        new.iter().for_each(|c| _ = self.counts.add(c, 1));
        old.iter().for_each(|c| self.counts.subtract(c));
        self.begin().await?;
        // Not its flushes: one that fails is never a matter of room.
        let written = self.write_anew(&exchange, &(&*lowered | &new | &old), &new).await;
        if written.as_ref().is_err_and(is_full) {
            // Nothing refers to the new tables. Without them the rest can be repaired all the same.
            new.iter().for_each(|c| self.counts.subtract(c));
            old.iter().for_each(|c| _ = self.counts.add(c, 1));
            *lowered |= new;
            // Leaks are no reason to risk more than leaks.
            *lowered -= &singles;
            self.postponed = true;
            let left = singles.len();
            self.findings.say(|| format!("{left} clusters stay counted too often: the disk is full"));
            return Ok(true);
        }
        written?;
        self.source.flush().await?;
        let Exchange { new_l1, new_refcount_table, .. } = exchange;
        let at = |cluster: u64| HostOffset(cluster << geometry.cluster_bits);
        let table_clusters = self.header.refcount_table_clusters;
        self.patch_header(|sector| {
            patch_l1(sector, at(new_l1), l1.entries as u32);
            patch_refcount_table(sector, at(new_refcount_table), table_clusters);
        })
        .await?;
        self.refcounts.table = self.table_of(&exchange);
        *lowered |= old;
        Ok(true)
    }

    /// What the flags of references to `lowered` must say, or all flags.
    fn flags_of<'s>(&'s self, lowered: &'s RoaringTreemap) -> Flags<'s> {
        let only = (self.mode != Repair::All).then_some(lowered);
        Flags { layout: self.layout, ones: &self.refcounts.ones, counts: self.counts, only }
    }

    /// The active L2 tables in which flags are to be turned on; `None` if there are none, nor in the L1 table.
    async fn tables_with_flags(&self, l1: L1, lowered: &RoaringTreemap) -> Result<Option<RoaringTreemap>> {
        let mut found = RoaringTreemap::new();
        for (cluster, _) in self.tables.active.range(0, u64::MAX) {
            let (old, new) = self.new_l2_table(cluster, lowered).await?;
            if old != new {
                found.insert(cluster);
            }
        }
        let (old, new) = self.new_l1_table(l1, lowered, &BTreeMap::new()).await?;
        Ok((!found.is_empty() || old != new).then_some(found))
    }

    /// Finds room for what is to be written anew: these L2 tables, and the blocks that count `singles`. Also returns all
    /// clusters of it.
    fn find_room(
        &self,
        l1: L1,
        singles: &RoaringTreemap,
        tables: &RoaringTreemap,
        spare: &RoaringTreemap,
    ) -> Option<(Exchange, RoaringTreemap)> {
        let geometry = self.source.geometry;
        let indexes: Vec<u64> = blocks::indexes(singles, geometry.refcounts_per_block()).collect();
        let two = [geometry.clusters_for(l1.entries * 8), u64::from(self.header.refcount_table_clusters)];
        let others = indexes.len() + tables.len() as usize;
        let lengths = two.into_iter().chain(std::iter::repeat_n(1, others));
        let places = self.places(lengths.clone(), spare)?;
        let new = places.iter().zip(lengths).flat_map(|(&first, n)| first..first + n).collect();
        let mut places = places.into_iter();
        let (new_l1, new_refcount_table) = (places.next()?, places.next()?);
        let blocks = indexes.into_iter().zip(&mut places).collect();
        let tables = tables.iter().zip(places).collect();
        Some((Exchange { l1, new_l1, new_refcount_table, blocks, tables }, new))
    }

    /// An L2 table as it is, and as it is to be.
    async fn new_l2_table(&self, cluster: u64, lowered: &RoaringTreemap) -> Result<(Vec<u8>, Vec<u8>)> {
        let geometry = self.source.geometry;
        let mut old = vec![0; geometry.cluster_size() as usize];
        self.source.read("reading an L2 table", cluster << geometry.cluster_bits, &mut old).await?;
        let mut new = old.clone();
        self.flags_of(lowered).l2_table(&old, &mut new, true);
        Ok((old, new))
    }

    /// The active L1 table as it is, and as it is to be if these L2 tables stand at new places.
    async fn new_l1_table(
        &self,
        l1: L1,
        lowered: &RoaringTreemap,
        moved: &BTreeMap<u64, u64>,
    ) -> Result<(Vec<u8>, Vec<u8>)> {
        let geometry = self.source.geometry;
        let mut old = vec![0; (geometry.clusters_for(l1.entries * 8) << geometry.cluster_bits) as usize];
        let (entries, _) = old.split_at_mut((l1.entries * 8) as usize);
        self.source.read("reading the L1 table", l1.offset, entries).await?;
        let mut new = old.clone();
        self.flags_of(lowered).l1_entries(geometry, &old, &mut new, true);
        for (index, entry) in super::source::entries(&old).enumerate() {
            if let Some(&to) = moved.get(&((entry & OFFSET) >> geometry.cluster_bits)) {
                // The table was this entry's alone, and is again.
                set_entry(&mut new, index, to << geometry.cluster_bits | COPIED);
            }
        }
        Ok((old, new))
    }

    /// Where runs of clusters of these lengths find room: the first clusters that nothing refers to and that a block can
    /// count, if it does not count them yet or, `spare` ones, just once.
    fn places(&self, lengths: impl Iterator<Item = u64>, spare: &RoaringTreemap) -> Option<Vec<u64>> {
        let geometry = self.source.geometry;
        let per_block = geometry.refcounts_per_block();
        let resize = self.source.device.features().resize;
        let end = if resize { u64::MAX } else { self.source.length >> geometry.cluster_bits };
        let mut free = (0..self.refcounts.table.len() as u64)
            .filter(|&index| self.refcounts.block(index).is_some())
            .flat_map(|index| index * per_block..(index + 1) * per_block)
            .take_while(|&c| c < end)
            .filter(|&c| self.counts.get(c) == 0 && (!self.differences.high.contains(c) || spare.contains(c)));
        lengths
            .map(|length| {
                let mut run = 0..0;
                while run.end - run.start < length {
                    let c = free.next()?;
                    run = if c == run.end { run.start..c + 1 } else { c..c + 1 };
                }
                Some(run.start)
            })
            .collect()
    }

    /// The clusters that the tables leave.
    fn old_places(&self, exchange: &Exchange) -> RoaringTreemap {
        let geometry = self.source.geometry;
        let first = exchange.l1.offset >> geometry.cluster_bits;
        let l1 = first..first + geometry.clusters_for(exchange.l1.entries * 8);
        let blocks = exchange.blocks.keys().filter_map(|&index| self.refcounts.block(index));
        let blocks = blocks.map(|offset| offset >> geometry.cluster_bits);
        l1.chain(self.refcount_table_clusters()).chain(exchange.tables.keys().copied()).chain(blocks).collect()
    }

    fn table_of(&self, exchange: &Exchange) -> Vec<u64> {
        let mut table = self.refcounts.table.clone();
        for (&index, &cluster) in &exchange.blocks {
            if let Some(entry) = usize::try_from(index).ok().and_then(|i| table.get_mut(i)) {
                *entry = cluster << self.source.geometry.cluster_bits;
            }
        }
        table
    }

    /// Writes the new tables. In the new blocks `exact` clusters have the refcounts that they are to
    /// have; the clusters `new` are counted in the old blocks, too.
    async fn write_anew(&mut self, exchange: &Exchange, exact: &RoaringTreemap, new: &RoaringTreemap) -> Result<()> {
        let geometry = self.source.geometry;
        let at = |cluster: u64| cluster << geometry.cluster_bits;
        let end = new.max().map_or(0, |c| c + 1);
        if !self.source.reach(at(end)).await? {
            let source = io::Error::from(io::ErrorKind::StorageFull);
            return Err(Error::Io { action: "growing the image file", offset: at(end), source });
        }
        for index in blocks::indexes(new, geometry.refcounts_per_block()).collect::<Vec<_>>() {
            self.write_block(index, new, "counting new tables", u64::max).await?;
        }
        for (&from, &to) in &exchange.tables {
            let (_, table) = self.new_l2_table(from, exact).await?;
            self.source.write("writing a new L2 table", at(to), &table).await?;
        }
        let (_, l1) = self.new_l1_table(exchange.l1, exact, &exchange.tables).await?;
        self.source.write("writing a new L1 table", at(exchange.new_l1), &l1).await?;
        for (&index, &to) in &exchange.blocks {
            if let Some(offset) = self.refcounts.block(index) {
                let (_, block) = self.changed_block(index, offset, exact, |_, found| found).await?;
                self.source.write("writing a new refcount block", at(to), &block).await?;
            }
        }
        let table: Vec<u8> = self.table_of(exchange).iter().flat_map(|e| e.to_be_bytes()).collect();
        self.source.write("writing a new refcount table", at(exchange.new_refcount_table), &table).await
    }
}

/// Whether the device has no room left.
fn is_full(error: &Error) -> bool {
    let full = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded];
    matches!(error, Error::Io { source, .. } if full.contains(&source.kind()))
}
