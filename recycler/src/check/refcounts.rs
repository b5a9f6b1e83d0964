//! The refcounts on disk: which blocks can be believed, and where they differ from the references found.

use roaring::{RoaringBitmap, RoaringTreemap};

use super::findings::Findings;
use super::regions::{Regions, overflow};
use super::source::{Source, entries};
use crate::clusters::counts::Counts;
use crate::device::BlockDevice;
use crate::error::Result;
use crate::format::header::Header;
use crate::format::refcount;

/// Bytes of a block that are skipped together when they are zero.
const STRIDE: usize = 64;

/// The refcount table and what is known of its blocks.
pub(super) struct Refcounts {
    /// The refcount table's entries as they are on disk.
    pub(super) table: Vec<u64>,
    /// Indexes of entries that lead to no block of their own: what they counted is unknown, and taken for zero.
    pub(super) bad: RoaringBitmap,
    /// Clusters of the blocks that are believed.
    pub(super) blocks: RoaringTreemap,
    /// Clusters whose refcount on disk is one.
    pub(super) ones: RoaringTreemap,
}

/// Where refcounts and references differ.
#[derive(Default)]
pub(super) struct Differences {
    /// Clusters with more references than their refcount says.
    pub(super) low: RoaringTreemap,
    /// Clusters with fewer: leaks.
    pub(super) high: RoaringTreemap,
    /// The last cluster of the file that is counted or referred to.
    pub(super) highest: Option<u64>,
}

impl Refcounts {
    /// Reads the table and all blocks, once each; counts the references that the table makes.
    pub(super) async fn load<D: BlockDevice>(
        source: &Source<'_, D>,
        header: &Header,
        regions: &mut Regions,
        counts: &mut Counts,
        findings: &mut Findings,
    ) -> Result<Self> {
        let geometry = source.geometry;
        let cluster_size = geometry.cluster_size();
        let mut bytes = vec![0; (u64::from(header.refcount_table_clusters) << geometry.cluster_bits) as usize];
        source.read("reading the refcount table", header.refcount_table_offset.0, &mut bytes).await?;
        let mut table: Vec<u64> = entries(&bytes).collect();
        let used = table.iter().rposition(|&e| e != 0).map_or(0, |last| last + 1);
        let room = table.len();
        table.truncate(used);
        let mut this =
            Refcounts { table, bad: RoaringBitmap::new(), blocks: RoaringTreemap::new(), ones: RoaringTreemap::new() };

        let mut block = vec![0; cluster_size as usize];
        for (index, entry) in this.table.clone().into_iter().enumerate().filter(|&(_, e)| e != 0) {
            if let Some(reason) = this.unusable(source, entry, regions, counts, findings) {
                this.bad.insert(index as u32);
                findings.corruption(1, || format!("refcount table entry {index} ({entry:#x}) {reason}"));
                continue;
            }
            this.blocks.insert(entry >> geometry.cluster_bits);
            source.read("reading a refcount block", entry, &mut block).await?;
            this.note_ones(geometry.refcount_order, index as u64 * geometry.refcounts_per_block(), &block);
        }
        // The rest is room to grow.
        this.table.resize(room, 0);
        Ok(this)
    }

    /// Why an entry leads to no block of its own. A block that does is claimed and counted.
    fn unusable<D: BlockDevice>(
        &self,
        source: &Source<'_, D>,
        entry: u64,
        regions: &mut Regions,
        counts: &mut Counts,
        findings: &mut Findings,
    ) -> Option<&'static str> {
        if entry & !refcount::TABLE_OFFSET != 0 {
            return Some("has reserved bits set");
        }
        if entry & (source.geometry.cluster_size() - 1) != 0 {
            return Some("is not aligned to a cluster");
        }
        if entry >= source.length {
            return Some("lies past the end of the file");
        }
        let cluster = entry >> source.geometry.cluster_bits;
        let excess = counts.add(cluster, 1);
        if excess > 0 {
            findings.corruption(excess, || overflow(entry));
        }
        (!regions.claimed.insert(cluster)).then_some("leads to a cluster that holds other metadata")
    }

    fn note_ones(&mut self, order: u32, first: u64, block: &[u8]) {
        let mut run: Option<u64> = None;
        let mut end = first;
        for (cluster, count) in nonzero(order, first, block) {
            if let Some(start) = run.filter(|_| count != 1 || cluster != end) {
                self.ones.insert_range(start..end);
                run = None;
            }
            if count == 1 {
                run = run.or(Some(cluster));
                end = cluster + 1;
            }
        }
        if let Some(start) = run {
            self.ones.insert_range(start..end);
        }
    }

    /// The offset of the block with this index, if it is there and can be believed.
    pub(super) fn block(&self, index: u64) -> Option<u64> {
        let index = u32::try_from(index).ok()?;
        let entry = *self.table.get(index as usize)?;
        (entry != 0 && !self.bad.contains(index)).then_some(entry)
    }

    /// Compares every refcount with the references counted.
    pub(super) async fn compare<D: BlockDevice>(&self, source: &Source<'_, D>, counts: &Counts) -> Result<Differences> {
        let geometry = source.geometry;
        let per_block = geometry.refcounts_per_block();
        let end = geometry.clusters_for(source.length).max(counts.highest().map_or(0, |c| c + 1));
        let mut found = Differences { highest: counts.highest(), ..Differences::default() };
        let mut references = counts.range(0, u64::MAX).peekable();
        let mut block = vec![0; geometry.cluster_size() as usize];
        for (index, _) in self.table.iter().enumerate().filter(|&(_, &e)| e != 0) {
            let index = index as u64;
            let Some(offset) = self.block(index) else { continue };
            let first = index * per_block;
            source.read("reading a refcount block", offset, &mut block).await?;
            for (cluster, count) in nonzero(geometry.refcount_order, first, &block) {
                while let Some((uncounted, _)) = references.next_if(|&(c, _)| c < cluster) {
                    found.low.insert(uncounted);
                }
                let wanted = references.next_if(|&(c, _)| c == cluster).map_or(0, |(_, n)| n);
                if count < wanted {
                    found.low.insert(cluster);
                } else if count > wanted {
                    found.high.insert(cluster);
                }
                if cluster < end {
                    found.highest = found.highest.max(Some(cluster));
                }
            }
        }
        found.low.extend(references.map(|(c, _)| c));
        Ok(found)
    }
}

/// The refcounts of a block that are not zero, each with its cluster, ascending. `first` is the block's first cluster.
pub(super) fn nonzero(order: u32, first: u64, block: &[u8]) -> impl Iterator<Item = (u64, u64)> + '_ {
    let per_stride = (STRIDE << 3) >> order;
    block.chunks(STRIDE).enumerate().filter(|(_, bytes)| bytes.iter().any(|&b| b != 0)).flat_map(
        move |(stride, bytes)| {
            (0..per_stride).filter_map(move |at| match refcount::get(bytes, order, at) {
                0 => None,
                count => Some((first + (stride * per_stride + at) as u64, count)),
            })
        },
    )
}
