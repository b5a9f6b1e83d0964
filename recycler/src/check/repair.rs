//! Repair: the writes that make refcounts and flags agree with the references found.
//!
//! The order of the writes makes every step safe to be cut off. Before the first, a flush makes durable what was found: the
//! last user of the image may have let go of clusters without one, and a reference that a power cut brings back must not be one
//! to a cluster that was freed here.
//!
//! 0. *Entries that store nothing and have a place that no cluster has* lose it; flush. Each reads as before, whether its
//!    sector reaches the disk or not, and what it seemed to refer to keeps its refcount for now. Then the image is looked at
//!    again from the start.
//! 1. *Raise* refcounts that are too low, in the blocks that exist and in new ones that nothing refers to yet; flush;
//!    then hook the new blocks into the refcount table; flush. A refcount that is too high only withholds a cluster from
//!    being allocated, so whichever of these sectors reach the disk, no cluster in use becomes free. A new block counts
//!    nothing before it is hooked in, and is complete on disk when it is.
//! 2. *COPIED flags*; flush. A flag is set only where a single reference was found, and its cluster's refcount is one or
//!    is about to be lowered to it: a write in place meets no other owner, before and after. A flag is cleared because
//!    the refcount, durable since step 1, allows more owners: clearing it never loses data. Where nothing but leaks was
//!    found, flags and the refcounts that they depend on change at once (`exchange`), so that leaks are all there is
//!    at any moment; in place only if there is no room for that. If the disk turns out to be full meanwhile, they stay
//!    leaks, and the dirty bit stays set.
//! 3. *Lower* refcounts that are too high; flush. This is the only step that frees anything. It comes when everything
//!    that protects other clusters is durable, and any subset of it leaves leaks at worst.
//! 4. *The dirty and corrupt bits* are cleared; flush. They vouch for all of the above, so they go last.
//!
//! A repair that was cut off is completed by the next one.

use roaring::RoaringTreemap;

use super::blocks::{self, Plan};
use super::findings::Findings;
use super::flags::Flags;
use super::mapping::{Layout, Tables};
use super::refcounts::{Differences, Refcounts};
use super::regions::L1;
use super::source::{Source, entries, set_entry};
use super::{CheckReport, Repair};
use crate::clusters::counts::Counts;
use crate::device::BlockDevice;
use crate::error::Result;
use crate::format::header::{
    AUTOCLEAR_BITMAPS, AUTOCLEAR_RAW_DATA_FILE, Header, incompatible, patch_autoclear, patch_incompatible,
    patch_refcount_table,
};
use crate::format::refcount;
use crate::units::HostOffset;

/// Autoclear features that this check understands: no other feature's clusters are known to it.
const KNOWN_AUTOCLEAR: u64 = AUTOCLEAR_BITMAPS | AUTOCLEAR_RAW_DATA_FILE;

/// Everything the check found, on its way to being repaired.
pub(super) struct Repairing<'a, 'b, D> {
    pub(super) source: &'a mut Source<'b, D>,
    pub(super) header: &'a Header,
    pub(super) mode: Repair,
    pub(super) layout: Layout,
    /// The active L1 table, if it may be read.
    pub(super) l1: Option<&'a L1>,
    pub(super) tables: &'a Tables,
    pub(super) refcounts: &'a mut Refcounts,
    pub(super) counts: &'a mut Counts,
    pub(super) differences: &'a mut Differences,
    pub(super) findings: &'a mut Findings,
    /// The autoclear features that the image had before this repair.
    pub(super) autoclear: u64,
    /// Whether anything was written yet.
    pub(super) begun: bool,
    /// Whether leaks were left that another repair may do away with.
    pub(super) postponed: bool,
}

/// What step 0 did.
#[derive(Default)]
pub(super) struct Cleared {
    /// L2 entries; one of a table that several L1 entries lead to counts for each of them.
    pub(super) entries: u64,
    pub(super) messages: Vec<String>,
    /// The header's autoclear features before.
    pub(super) autoclear: u64,
}

impl Cleared {
    pub(super) fn is_empty(&self) -> bool {
        self.entries == 0
    }
}

impl<D: BlockDevice> Repairing<'_, '_, D> {
    /// Step 0, if the mode allows it.
    pub(super) async fn clear_misplaced_zeroes(&mut self) -> Result<Cleared> {
        let mut cleared = Cleared { autoclear: self.autoclear, ..Cleared::default() };
        if self.mode != Repair::All || !self.findings.misplaced_zeroes {
            return Ok(cleared);
        }
        self.begin().await?;
        let bits = self.source.geometry.cluster_bits;
        let mut old = vec![0; self.source.geometry.cluster_size() as usize];
        for (cluster, shares) in self.tables.all.range(0, u64::MAX) {
            if self.findings.overlaps.contains(cluster) {
                continue;
            }
            let table = cluster << bits;
            self.source.read("reading an L2 table", table, &mut old).await?;
            let mut new = old.clone();
            for (index, bytes) in old.chunks(self.layout.entry_size()).enumerate() {
                let mut halves = entries(bytes);
                let (entry, subclusters) = (halves.next().unwrap_or(0), halves.next().unwrap_or(0));
                let Some((word, rest)) = self.layout.without_place(entry, subclusters) else { continue };
                let at = index * self.layout.entry_size() / 8;
                set_entry(&mut new, at, word);
                if self.layout.extended {
                    set_entry(&mut new, at + 1, rest);
                }
                cleared.entries = cleared.entries.saturating_add(shares);
                if cleared.messages.len() < CheckReport::MAX_MESSAGES {
                    cleared.messages.push(format!(
                        "entry {index} ({entry:#x}) of the L2 table at {table:#x} was not aligned to a cluster, in which \
                         nothing is stored"
                    ));
                }
            }
            self.source.write_changes("clearing entries of an L2 table", table, &old, &new).await?;
        }
        self.source.flush().await?;
        Ok(cleared)
    }

    /// Repairs what the mode allows.
    pub(super) async fn run(mut self) -> Result<()> {
        let leaks = self.differences.high.len();
        let withheld = self.why_leaks_stay();
        if let Some(reason) = withheld.filter(|_| leaks > 0) {
            self.findings.say(|| format!("the {leaks} leaked clusters are left alone: {reason}"));
        }
        let sure = withheld.is_none();
        // Clusters that this repair itself gave up; they are free whatever else is unsure.
        let mut released = RoaringTreemap::new();
        let mut changed = RoaringTreemap::new();
        if self.mode == Repair::All {
            let plan = self.plan_blocks(sure).await?;
            changed |= self.raise(&plan).await?;
            self.hook(&plan, &mut released).await?;
        }
        let mut lowered = if sure { self.differences.high.clone() } else { RoaringTreemap::new() };
        lowered |= &released;
        self.drop_unwritable(&mut lowered);
        let spare = &lowered & &self.refcounts.ones;
        for cluster in &lowered {
            let one = self.counts.get(cluster) == 1;
            if one {
                self.refcounts.ones.insert(cluster)
            } else {
                self.refcounts.ones.remove(cluster)
            };
        }
        changed |= &lowered;
        if !self.exchange(&mut lowered, &spare).await? {
            self.flags(&changed, &lowered).await?;
        }
        self.lower(&lowered).await?;
        self.findings.report.leaks_fixed = lowered.intersection_len(&(&self.differences.high - &released));
        self.differences.high -= &lowered;
        self.mark_clean().await
    }

    fn why_leaks_stay(&self) -> Option<&'static str> {
        if self.findings.doubtful {
            return Some("an error above may hide what refers to them");
        }
        if !self.header.unknown_extensions.is_empty() {
            return Some("an unknown header extension may refer to them");
        }
        (self.autoclear & !KNOWN_AUTOCLEAR != 0).then_some("an unknown autoclear feature may refer to them")
    }

    /// Before the first write: whoever changes an image clears the autoclear bits that it does not know, and a last
    /// cluster that is there in part is completed, so that whole clusters can be written. And what was found is made durable.
    pub(super) async fn begin(&mut self) -> Result<()> {
        if self.begun {
            return Ok(());
        }
        let whole = self.source.length.next_multiple_of(self.source.geometry.cluster_size());
        self.source.reach(whole).await?;
        self.source.flush().await?;
        if self.header.autoclear & !KNOWN_AUTOCLEAR != 0 {
            let bits = self.header.autoclear & KNOWN_AUTOCLEAR;
            self.patch_header(|sector| patch_autoclear(sector, bits)).await?;
        }
        self.begun = true;
        Ok(())
    }

    pub(super) async fn patch_header(&self, patch: impl FnOnce(&mut [u8; 512])) -> Result<()> {
        let mut sector = [0; 512];
        self.source.read("reading the header", 0, &mut sector).await?;
        let old = sector;
        patch(&mut sector);
        self.source.write_changes("writing the header", 0, &old, &sector).await?;
        self.source.flush().await
    }

    /// Plans the new refcount blocks and counts what the plan changes of the references.
    async fn plan_blocks(&mut self, sure: bool) -> Result<Plan> {
        let geometry = self.source.geometry;
        let resize = self.source.device.features().resize;
        // Behind the end of the file nothing can be hidden; inside it, only if the references found are all there are.
        let start = if resize {
            geometry.clusters_for(self.source.length)
        } else {
            self.differences.highest.map_or(0, |c| c + 1)
        };
        let planned =
            blocks::plan(geometry, self.refcounts, self.differences, self.findings, start, sure).and_then(|plan| {
                let shared = self.refcount_table_clusters();
                match () {
                    () if plan.is_empty() => Ok(plan),
                    () if !resize && !sure => Err("there is no room that is certainly free"),
                    () if self.findings.overlaps.range_cardinality(shared) > 0 => {
                        Err("the refcount table is not alone")
                    }
                    () => Ok(plan),
                }
            });
        let plan = match planned {
            Ok(plan) if plan.is_empty() => return Ok(plan),
            Ok(plan) => plan,
            Err(reason) => {
                self.findings.say(|| format!("refcount blocks are missing and cannot be made: {reason}"));
                return Ok(Plan::default());
            }
        };
        self.begin().await?;
        if !self.source.reach(plan.end << geometry.cluster_bits).await? {
            self.findings.say(|| "refcount blocks are missing and the device has no room for them".to_owned());
            return Ok(Plan::default());
        }
        for cluster in plan.clusters() {
            self.counts.add(cluster, 1);
        }
        for &index in plan.blocks.keys().chain(&plan.emptied) {
            // The reference that a bad entry made, if it was one, goes with it.
            let entry = usize::try_from(index).ok().and_then(|i| self.refcounts.table.get(i)).copied().unwrap_or(0);
            let counted = entry & !refcount::TABLE_OFFSET == 0
                && entry & (geometry.cluster_size() - 1) == 0
                && entry != 0
                && self.source.holds(entry, geometry.cluster_size());
            if counted {
                self.counts.subtract(entry >> geometry.cluster_bits);
            }
        }
        Ok(plan)
    }

    pub(super) fn refcount_table_clusters(&self) -> std::ops::Range<u64> {
        let first = self.header.refcount_table_offset.0 >> self.source.geometry.cluster_bits;
        first..first + u64::from(self.header.refcount_table_clusters)
    }

    /// The offset of a block that may be written: nothing but the refcount table refers to it.
    fn writable_block(&self, index: u64) -> Option<u64> {
        let offset = self.refcounts.block(index)?;
        (!self.findings.overlaps.contains(offset >> self.source.geometry.cluster_bits)).then_some(offset)
    }

    fn drop_unwritable(&self, clusters: &mut RoaringTreemap) {
        let per_block = self.source.geometry.refcounts_per_block();
        let lost: Vec<u64> =
            blocks::indexes(clusters, per_block).filter(|&i| self.writable_block(i).is_none()).collect();
        for index in lost {
            clusters.remove_range(index * per_block..(index + 1) * per_block);
        }
    }

    /// Step 1, first half. Returns the clusters whose refcount is right now, or will be once the plan is hooked in.
    async fn raise(&mut self, plan: &Plan) -> Result<RoaringTreemap> {
        let geometry = self.source.geometry;
        let per_block = geometry.refcounts_per_block();
        let mut targets = self.differences.low.clone();
        targets.extend(plan.clusters());
        let mut existing = targets.clone();
        self.drop_unwritable(&mut existing);
        targets &= planned(plan, per_block) | &existing;
        if targets.is_empty() && plan.is_empty() {
            return Ok(targets);
        }
        self.begin().await?;
        for index in blocks::indexes(&existing, per_block).collect::<Vec<_>>() {
            self.write_block(index, &existing, "raising refcounts", u64::max).await?;
        }
        for (&index, &cluster) in &plan.blocks {
            let bytes = blocks::contents(geometry, self.counts, index);
            self.source.write("writing a new refcount block", cluster << geometry.cluster_bits, &bytes).await?;
        }
        if let Some((first, _)) = plan.table {
            let bytes = self.table_with(plan);
            self.source.write("writing a new refcount table", first << geometry.cluster_bits, &bytes).await?;
        }
        self.source.flush().await?;

        for cluster in &targets {
            let one = self.counts.get(cluster) == 1;
            if one {
                self.refcounts.ones.insert(cluster)
            } else {
                self.refcounts.ones.remove(cluster)
            };
        }
        // Metadata that something else refers to stays an error, however high its refcount.
        let fixed = &(&targets & &self.differences.low) - &self.findings.overlaps;
        self.findings.report.corruptions_fixed += fixed.len();
        Ok(targets)
    }

    /// Writes the block's refcounts of those of its clusters that are in `clusters`, each made of the old refcount and
    /// of the references found by `choose`.
    pub(super) async fn write_block(
        &self,
        index: u64,
        clusters: &RoaringTreemap,
        action: &'static str,
        choose: fn(u64, u64) -> u64,
    ) -> Result<()> {
        let Some(offset) = self.writable_block(index) else { return Ok(()) };
        let (old, new) = self.changed_block(index, offset, clusters, choose).await?;
        self.source.write_changes(action, offset, &old, &new).await
    }

    /// The block as it is, and with those refcounts.
    pub(super) async fn changed_block(
        &self,
        index: u64,
        offset: u64,
        clusters: &RoaringTreemap,
        choose: fn(u64, u64) -> u64,
    ) -> Result<(Vec<u8>, Vec<u8>)> {
        let geometry = self.source.geometry;
        let mut old = vec![0; geometry.cluster_size() as usize];
        self.source.read("reading a refcount block", offset, &mut old).await?;
        let mut new = old.clone();
        let first = index * geometry.refcounts_per_block();
        let mut iter = clusters.iter();
        iter.advance_to(first);
        for cluster in iter.take_while(|&c| c < first + geometry.refcounts_per_block()) {
            let at = (cluster - first) as usize;
            let count = choose(refcount::get(&old, geometry.refcount_order, at), self.counts.get(cluster));
            refcount::set(&mut new, geometry.refcount_order, at, count);
        }
        Ok((old, new))
    }

    /// The bytes of the refcount table as the plan wants it.
    fn table_with(&self, plan: &Plan) -> Vec<u8> {
        let geometry = self.source.geometry;
        let mut table = self.refcounts.table.clone();
        if let Some((_, clusters)) = plan.table {
            table.resize((clusters * geometry.entries_per_cluster()) as usize, 0);
        }
        let emptied = plan.emptied.iter().map(|&i| (i, 0));
        for (index, entry) in plan.blocks.iter().map(|(&i, &c)| (i, c << geometry.cluster_bits)).chain(emptied) {
            if let Some(slot) = usize::try_from(index).ok().and_then(|i| table.get_mut(i)) {
                *slot = entry;
            }
        }
        table.iter().flat_map(|e| e.to_be_bytes()).collect()
    }

    /// Step 1, second half. Each entry of the table is written whole or not, and so are the header's two fields, which
    /// share a sector.
    async fn hook(&mut self, plan: &Plan, released: &mut RoaringTreemap) -> Result<()> {
        if plan.is_empty() {
            return Ok(());
        }
        let new = self.table_with(plan);
        if let Some((first, clusters)) = plan.table {
            let offset = HostOffset(first << self.source.geometry.cluster_bits);
            self.patch_header(|sector| patch_refcount_table(sector, offset, clusters as u32)).await?;
            for cluster in self.refcount_table_clusters() {
                self.counts.subtract(cluster);
                released.insert(cluster);
            }
        } else {
            let old: Vec<u8> = self.refcounts.table.iter().flat_map(|e| e.to_be_bytes()).collect();
            let offset = self.header.refcount_table_offset.0;
            self.source.write_changes("writing the refcount table", offset, &old, &new).await?;
            self.source.flush().await?;
        }
        self.refcounts.table = entries(&new).collect();
        let replaced = plan.blocks.keys().chain(&plan.emptied).filter_map(|&i| u32::try_from(i).ok());
        for index in replaced {
            self.findings.report.corruptions_fixed += u64::from(self.refcounts.bad.remove(index));
        }
        Ok(())
    }

    /// Step 2.
    async fn flags(&mut self, changed: &RoaringTreemap, lowered: &RoaringTreemap) -> Result<()> {
        let all = self.mode == Repair::All;
        // Most leaks have no reference at all, and then no flag either.
        if !(all && self.findings.flags > 0) && changed.iter().all(|c| self.counts.get(c) == 0) {
            return Ok(());
        }
        self.begin().await?;
        let flags = Flags {
            layout: self.layout,
            ones: &self.refcounts.ones,
            counts: self.counts,
            only: (!all).then_some(lowered),
        };
        let left = flags.repair(self.source, self.l1, self.tables, self.findings).await?;
        let found = self.findings.flags;
        self.findings.report.corruptions_fixed += found.saturating_sub(left);
        if left > found {
            // In tables that may not be written, flags that agreed with a wrong refcount now disagree with the right
            // one.
            self.findings.corruption(left - found, || format!("{} COPIED flags cannot be corrected", left - found));
        }
        self.source.flush().await
    }

    /// Step 3.
    async fn lower(&mut self, clusters: &RoaringTreemap) -> Result<()> {
        if clusters.is_empty() {
            return Ok(());
        }
        self.begin().await?;
        let per_block = self.source.geometry.refcounts_per_block();
        for index in blocks::indexes(clusters, per_block).collect::<Vec<_>>() {
            self.write_block(index, clusters, "lowering refcounts", |_, found| found).await?;
        }
        self.source.flush().await
    }

    /// Step 4.
    async fn mark_clean(&mut self) -> Result<()> {
        let marks = incompatible::DIRTY | incompatible::CORRUPT;
        let bits = self.header.incompatible;
        let report = &self.findings.report;
        // Leaks that are left on purpose are no inconsistency. Others are what the dirty bit announces.
        let consistent = report.errors_left() == 0 && !self.postponed;
        if self.mode != Repair::All || bits & marks == 0 || !consistent {
            return Ok(());
        }
        self.begin().await?;
        self.patch_header(|sector| patch_incompatible(sector, bits & !marks)).await
    }
}

/// The clusters that the plan's new blocks count.
fn planned(plan: &Plan, per_block: u64) -> RoaringTreemap {
    let mut clusters = RoaringTreemap::new();
    for &index in plan.blocks.keys() {
        clusters.insert_range(index * per_block..(index + 1) * per_block);
    }
    clusters
}
