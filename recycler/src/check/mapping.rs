//! The walk over L1 and L2 tables: which clusters they refer to, and what is wrong with their entries.

use std::collections::BTreeMap;

use roaring::RoaringTreemap;

use super::findings::Findings;
use super::regions::{L1, Regions, overflow};
use super::source::{Source, entries};
use crate::clusters::counts::Counts;
use crate::device::BlockDevice;
use crate::error::Result;
use crate::format::header::{Header, incompatible};
use crate::format::l2::{COMPRESSED, COPIED, OFFSET, ZERO};

/// Bits of an L1 entry that must be zero.
const L1_RESERVED: u64 = !(COPIED | OFFSET);
/// Bits of a standard L2 entry that must be zero: 1 to 8 and 56 to 61.
const L2_RESERVED: u64 = !(COPIED | COMPRESSED | OFFSET | ZERO);
/// Bytes of tables that are read together when they are adjacent.
pub(super) const RUN: u64 = 1 << 20;

/// What L2 entries of an image look like.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) cluster_bits: u32,
    version: u32,
    pub(super) extended: bool,
    /// Guest data is in a file of its own: entries refer to no cluster of this one.
    pub(super) data_file: bool,
}

/// A cluster, or several, that an L2 entry refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// Nothing.
    None,
    /// `length` bytes of compressed data at `offset`.
    Compressed { offset: u64, length: u64 },
    /// The cluster at this offset: data, or kept for a cluster that reads as zeroes.
    Standard(u64),
}

impl Layout {
    pub(super) fn new(header: &Header) -> Self {
        Layout {
            cluster_bits: header.geometry.cluster_bits,
            version: header.version,
            extended: header.incompatible & incompatible::EXTENDED_L2 != 0,
            data_file: header.incompatible & incompatible::DATA_FILE != 0,
        }
    }

    /// What an entry refers to, however wrong it is otherwise.
    pub(super) fn target(&self, entry: u64) -> Target {
        if entry & COMPRESSED != 0 {
            // Bits 0 to x-1 are the offset, the rest up to bit 61 the number of further sectors of 512 bytes.
            let x = 62 - (self.cluster_bits - 8);
            let offset = entry & ((1 << x) - 1);
            let sectors = (entry & (COMPRESSED - 1)) >> x;
            return Target::Compressed { offset, length: (sectors + 1) * 512 - (offset & 511) };
        }
        let zero = entry & ZERO != 0 && !self.extended;
        match entry & OFFSET {
            // In an external data file, cluster 0 is as good as any, and COPIED tells it from an empty entry.
            0 if self.data_file && entry & COPIED != 0 && !zero => Target::Standard(0),
            0 => Target::None,
            offset => Target::Standard(offset),
        }
    }

    /// What is wrong with an entry of an L2 table, references apart. `subclusters` is the second half of an extended
    /// entry.
    fn flaw(&self, entry: u64, subclusters: u64) -> Option<&'static str> {
        let allocated = subclusters & 0xffff_ffff;
        match self.target(entry) {
            Target::Compressed { .. } if self.data_file => {
                Some("is compressed, in an image with an external data file")
            }
            Target::Compressed { .. } if subclusters != 0 => Some("is compressed and has subclusters"),
            Target::Compressed { .. } => None,
            _ if entry & L2_RESERVED != 0 => Some("has reserved bits set"),
            _ if entry & ZERO != 0 && self.version < 3 => Some("has the zero flag, which version 2 does not have"),
            _ if entry & ZERO != 0 && self.extended => Some("has the zero flag, which extended entries do not have"),
            Target::None if allocated != 0 => Some("has allocated subclusters, but no cluster"),
            Target::Standard(_) if subclusters >> 32 & allocated != 0 => {
                Some("has subclusters that are both allocated and zero")
            }
            _ => None,
        }
    }

    /// Whether an entry is right but for its place, which no cluster has, and nothing is stored there: what it reads as does not
    /// depend on the place. Then this is the entry without one.
    pub(super) fn without_place(&self, entry: u64, subclusters: u64) -> Option<(u64, u64)> {
        let Target::Standard(offset) = self.target(entry) else { return None };
        if offset & ((1 << self.cluster_bits) - 1) == 0 || self.flaw(entry, subclusters).is_some() {
            return None;
        }
        if self.extended {
            (subclusters & 0xffff_ffff == 0).then_some((0, subclusters))
        } else {
            (entry & ZERO != 0).then_some((ZERO, 0))
        }
    }

    /// Bytes of one entry.
    pub(super) fn entry_size(&self) -> usize {
        if self.extended { 16 } else { 8 }
    }
}

/// The L2 tables, each with the number of its L1 entries.
///
/// A table that several L1 entries share is read once, and everything in it counts once for each of them: that bounds
/// the work by the file's length, however often a hostile image refers to a table.
pub(super) struct Tables {
    /// L1 entries of all tables.
    pub(super) all: Counts,
    /// L1 entries of the active L1 table.
    pub(super) active: Counts,
    /// With an external data file: the first L1 entry of each table of the active L1 table, by the table's cluster. It says
    /// where on the disk, and so in the data file, the table's clusters are.
    first: BTreeMap<u64, u64>,
}

impl Tables {
    /// Walks the L1 tables and claims the L2 tables they refer to.
    pub(super) async fn find<D: BlockDevice>(
        source: &Source<'_, D>,
        layout: Layout,
        l1_tables: &[L1],
        ones: &RoaringTreemap,
        regions: &mut Regions,
        counts: &mut Counts,
        findings: &mut Findings,
    ) -> Result<Self> {
        // An L1 table has at most 2^22 entries, and 2^16 snapshots have one each: 64 bits hold every sum.
        let mut this = Tables { all: Counts::new(6), active: Counts::new(6), first: BTreeMap::new() };
        let mut tables = RoaringTreemap::new();
        let mut bytes = Vec::new();
        for l1 in l1_tables {
            let mut done = 0;
            while done < l1.entries * 8 {
                bytes.resize(RUN.min(l1.entries * 8 - done) as usize, 0);
                source.read("reading an L1 table", l1.offset + done, &mut bytes).await?;
                for (index, entry) in (done / 8..).zip(entries(&bytes)).filter(|&(_, e)| e != 0) {
                    this.l1_entry(source, layout, l1, (index, entry), ones, regions, &mut tables, counts, findings);
                }
                done += bytes.len() as u64;
            }
        }
        regions.claimed |= tables;
        Ok(this)
    }

    #[allow(clippy::too_many_arguments, reason = "the parts of the check that an entry bears on, each borrowed apart")]
    fn l1_entry<D: BlockDevice>(
        &mut self,
        source: &Source<'_, D>,
        layout: Layout,
        l1: &L1,
        (index, entry): (u64, u64),
        ones: &RoaringTreemap,
        regions: &Regions,
        tables: &mut RoaringTreemap,
        counts: &mut Counts,
        findings: &mut Findings,
    ) {
        let cluster_size = source.geometry.cluster_size();
        let name = || format!("entry {index} ({entry:#x}) of the L1 table at {:#x}", l1.offset);
        if entry & L1_RESERVED != 0 {
            findings.corruption(1, || format!("{} has reserved bits set", name()));
        }
        let offset = entry & OFFSET;
        if offset == 0 {
            return;
        }
        if offset & (cluster_size - 1) != 0 {
            findings.hiding(1, || format!("{} is not aligned to a cluster", name()));
            return;
        }
        let cluster = offset >> source.geometry.cluster_bits;
        if l1.active && ones.contains(cluster) != (entry & COPIED != 0) {
            findings.flag(1, || format!("{} has a wrong COPIED flag", name()));
        }
        if !source.holds(offset, cluster_size) {
            findings.hiding(1, || format!("{} lies past the end of the file", name()));
            return;
        }
        let excess = counts.add(cluster, 1);
        if excess > 0 {
            findings.corruption(excess, || overflow(offset));
        }
        if regions.claimed.contains(cluster) {
            findings.overlap(cluster, || format!("{} leads to other metadata", name()));
            return;
        }
        tables.insert(cluster);
        self.all.add(cluster, 1);
        if l1.active {
            self.active.add(cluster, 1);
            if layout.data_file {
                self.first.entry(cluster).or_insert(index);
            }
        }
    }

    /// Walks the L2 tables in the file's order, adjacent ones in one read, and counts what they refer to.
    pub(super) async fn walk<D: BlockDevice>(
        &self,
        source: &Source<'_, D>,
        layout: Layout,
        ones: &RoaringTreemap,
        regions: &Regions,
        counts: &mut Counts,
        findings: &mut Findings,
    ) -> Result<()> {
        let geometry = source.geometry;
        let cluster_size = geometry.cluster_size();
        let most = (RUN >> geometry.cluster_bits).max(1);
        let mut bytes = Vec::new();
        let mut tables = self.all.range(0, u64::MAX).peekable();
        let mut run = Vec::new();
        while let Some((first, references)) = tables.next() {
            run.clear();
            run.push(references);
            while let Some((_, n)) =
                tables.next_if(|&(c, _)| c == first + run.len() as u64 && (run.len() as u64) < most)
            {
                run.push(n);
            }
            bytes.resize(run.len() << geometry.cluster_bits, 0);
            source.read("reading L2 tables", first << geometry.cluster_bits, &mut bytes).await?;
            for ((cluster, &shares), table) in (first..).zip(&run).zip(bytes.chunks(cluster_size as usize)) {
                let active = self.active.get(cluster);
                let shares = Shares { all: shares, active };
                let first = self.first.get(&cluster).copied();
                let mut table_walk =
                    Table { source, layout, ones, regions, counts, findings, cluster, shares, first, run: None };
                table_walk.walk(table);
            }
        }
        Ok(())
    }
}

/// How many of `length` clusters are in a set. A single one is by far the cheaper question.
fn members(set: &RoaringTreemap, first: u64, length: u64) -> u64 {
    if length == 1 { u64::from(set.contains(first)) } else { set.range_cardinality(first..first + length) }
}

/// How many L1 entries lead to a table: of all L1 tables, and of the active one.
#[derive(Clone, Copy, Debug)]
struct Shares {
    all: u64,
    active: u64,
}

/// Consecutive data clusters that consecutive entries of a table refer to, all with or all without COPIED.
#[derive(Clone, Copy, Debug)]
struct Run {
    first: u64,
    length: u64,
    copied: bool,
}

/// The walk over one L2 table.
struct Table<'a, 'b, D> {
    source: &'a Source<'b, D>,
    layout: Layout,
    ones: &'a RoaringTreemap,
    regions: &'a Regions,
    counts: &'a mut Counts,
    findings: &'a mut Findings,
    /// The table's own cluster.
    cluster: u64,
    shares: Shares,
    /// See [`Tables::first`].
    first: Option<u64>,
    run: Option<Run>,
}

impl<D: BlockDevice> Table<'_, '_, D> {
    fn walk(&mut self, table: &[u8]) {
        let cluster_size = self.source.geometry.cluster_size();
        // Where the next data cluster would be if the guest's clusters stood in order: QEMU's measure of fragmentation,
        // which starts anew in every table.
        let mut next = None;
        for (index, bytes) in table.chunks(self.layout.entry_size()).enumerate() {
            let mut halves = entries(bytes);
            let (entry, subclusters) = (halves.next().unwrap_or(0), halves.next().unwrap_or(0));
            if entry == 0 && subclusters == 0 {
                continue;
            }
            if let Some(flaw) = self.layout.flaw(entry, subclusters) {
                self.wrong(index, entry, flaw);
            }
            self.findings.misplaced_zeroes |= self.layout.without_place(entry, subclusters).is_some();
            match self.layout.target(entry) {
                Target::None => {}
                Target::Compressed { offset, length } => {
                    if entry & COPIED != 0 {
                        let Shares { all, active } = self.shares;
                        let name = self.name(index, entry);
                        let message = || format!("{name} is compressed and has the COPIED flag");
                        // Only the flags of active tables are ever repaired.
                        if active > 0 {
                            self.findings.flag(active, message);
                        } else {
                            self.findings.corruption(all, message);
                        }
                    }
                    if self.layout.data_file || subclusters != 0 {
                        continue;
                    }
                    self.refer(index, entry, offset, length);
                    let report = &mut self.findings.report;
                    report.allocated_clusters = report.allocated_clusters.saturating_add(self.shares.active);
                    report.fragmented_clusters = report.fragmented_clusters.saturating_add(self.shares.active);
                }
                Target::Standard(offset) => {
                    let report = &mut self.findings.report;
                    report.allocated_clusters = report.allocated_clusters.saturating_add(self.shares.active);
                    if next.is_some_and(|next| next != offset) {
                        report.fragmented_clusters = report.fragmented_clusters.saturating_add(self.shares.active);
                    }
                    next = Some(offset + cluster_size);
                    self.standard(index, entry, offset);
                }
            }
        }
        self.end_run();
    }

    fn standard(&mut self, index: usize, entry: u64, offset: u64) {
        let geometry = self.source.geometry;
        let copied = entry & COPIED != 0;
        if offset & (geometry.cluster_size() - 1) != 0 {
            let name = self.name(index, entry);
            self.findings.hiding(self.shares.all, || format!("{name} is not aligned to a cluster"));
            self.check_flag(offset >> geometry.cluster_bits, copied);
            if !self.layout.data_file {
                self.refer(index, entry, offset, geometry.cluster_size());
            }
            return;
        }
        let cluster = offset >> geometry.cluster_bits;
        if self.layout.data_file {
            self.check_flag(cluster, copied);
            let per_table = geometry.cluster_size() / self.layout.entry_size() as u64;
            let on_disk = self.first.map(|l1_index| (l1_index * per_table + index as u64) << geometry.cluster_bits);
            if on_disk.is_some_and(|on_disk| on_disk != offset) {
                self.wrong(index, entry, "has another offset in the external data file than on the disk");
            }
            return;
        }
        if !self.source.holds(offset, geometry.cluster_size()) {
            self.refer(index, entry, offset, geometry.cluster_size());
            self.check_flag(cluster, copied);
            return;
        }
        match &mut self.run {
            Some(run) if run.first + run.length == cluster && run.copied == copied => run.length += 1,
            _ => {
                self.end_run();
                self.run = Some(Run { first: cluster, length: 1, copied });
            }
        }
    }

    /// Counts a run of clusters, which is inside the file; by far most of an image is counted here.
    fn end_run(&mut self) {
        let Some(Run { first, length, copied }) = self.run.take() else { return };
        let range = first..first + length;
        let excess = self.counts.add_run(first, length, self.shares.all);
        if excess > 0 {
            self.findings.corruption(excess, || overflow(first << self.source.geometry.cluster_bits));
        }
        if members(&self.regions.claimed, first, length) > 0 {
            for cluster in range.clone().filter(|&c| self.regions.claimed.contains(c)) {
                self.overlap(cluster);
            }
        }
        let right = if copied { length } else { 0 };
        if self.shares.active > 0 && members(self.ones, first, length) != right {
            range.for_each(|cluster| self.check_flag(cluster, copied));
        }
    }

    fn refer(&mut self, index: usize, entry: u64, offset: u64, length: u64) {
        if !self.source.holds(offset, length) {
            let name = self.name(index, entry);
            self.findings.hiding(self.shares.all, || format!("{name} lies past the end of the file"));
            return;
        }
        let bits = self.source.geometry.cluster_bits;
        for cluster in offset >> bits..=(offset + length - 1) >> bits {
            let excess = self.counts.add(cluster, self.shares.all);
            if excess > 0 {
                self.findings.corruption(excess, || overflow(cluster << bits));
            }
            if self.regions.claimed.contains(cluster) {
                self.overlap(cluster);
            }
        }
    }

    fn overlap(&mut self, cluster: u64) {
        let bits = self.source.geometry.cluster_bits;
        let (at, table) = (cluster << bits, self.cluster << bits);
        self.findings.overlap(cluster, || format!("the L2 table at {table:#x} refers to metadata at {at:#x}"));
    }

    /// COPIED must say whether the refcount on disk is one. In an external data file every cluster has one reference.
    fn check_flag(&mut self, cluster: u64, copied: bool) {
        let one = self.layout.data_file || self.ones.contains(cluster);
        if self.shares.active > 0 && one != copied {
            let bits = self.source.geometry.cluster_bits;
            let (at, table) = (cluster << bits, self.cluster << bits);
            self.findings.flag(self.shares.active, || {
                format!("the L2 table at {table:#x} refers to {at:#x} with a wrong COPIED flag")
            });
        }
    }

    fn wrong(&mut self, index: usize, entry: u64, flaw: &'static str) {
        let name = self.name(index, entry);
        self.findings.corruption(self.shares.all, || format!("{name} {flaw}"));
    }

    fn name(&self, index: usize, entry: u64) -> String {
        let at = self.cluster << self.source.geometry.cluster_bits;
        format!("entry {index} ({entry:#x}) of the L2 table at {at:#x}")
    }
}
