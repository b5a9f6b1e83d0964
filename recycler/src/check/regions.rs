//! The metadata whose place is known before any table is walked: header, tables, snapshots, bitmaps.

use roaring::RoaringTreemap;

use super::findings::Findings;
use super::source::Source;
use crate::clusters::counts::Counts;
use crate::device::BlockDevice;
use crate::error::Result;
use crate::format::header::Header;

/// An L1 table.
#[derive(Clone, Copy, Debug)]
pub(super) struct L1 {
    /// Where it starts, in bytes.
    pub(super) offset: u64,
    /// Its length in entries.
    pub(super) entries: u64,
    /// Whether it is the disk's, not a snapshot's.
    pub(super) active: bool,
}

/// Clusters that hold metadata. Every claim is disjoint from those before it or refused, so all that is walked because
/// of claims is no more than the file is long, whatever the tables claim of their sizes and however often.
pub(super) struct Regions {
    /// All clusters claimed so far.
    pub(super) claimed: RoaringTreemap,
}

impl Regions {
    pub(super) fn new() -> Self {
        Regions { claimed: RoaringTreemap::new() }
    }

    /// Counts a reference to each cluster of a region of metadata. Returns whether it may be read: it lies inside the
    /// file and nothing else claimed any of it.
    pub(super) fn claim<D: BlockDevice>(
        &mut self,
        source: &Source<'_, D>,
        counts: &mut Counts,
        findings: &mut Findings,
        what: &'static str,
        (offset, length): (u64, u64),
    ) -> bool {
        if length == 0 {
            return true;
        }
        if !source.holds(offset, length) {
            findings.hiding(1, || format!("the {what} at {offset:#x} reaches past the end of the file"));
            return false;
        }
        let bits = source.geometry.cluster_bits;
        for cluster in offset >> bits..=(offset + length - 1) >> bits {
            let excess = counts.add(cluster, 1);
            if excess > 0 {
                findings.corruption(excess, || overflow(cluster << bits));
            }
            if !self.claimed.insert(cluster) {
                let at = cluster << bits;
                findings.overlap(cluster, || format!("the {what} at {offset:#x} overlaps other metadata at {at:#x}"));
                return false;
            }
        }
        true
    }

    /// Claims what the header describes. The header's parser has refused tables that overlap or leave the file.
    pub(super) async fn claim_header<D: BlockDevice>(
        &mut self,
        source: &Source<'_, D>,
        header: &Header,
        counts: &mut Counts,
        findings: &mut Findings,
    ) -> Result<Vec<L1>> {
        let cluster_size = source.geometry.cluster_size();
        let active = L1 { offset: header.l1_offset.0, entries: u64::from(header.l1_entries), active: true };
        let mut tables = Vec::new();
        self.claim(source, counts, findings, "header", (0, cluster_size));
        if self.claim(source, counts, findings, "L1 table", (active.offset, active.entries * 8)) {
            tables.push(active);
        }
        let table_length = u64::from(header.refcount_table_clusters) * cluster_size;
        self.claim(source, counts, findings, "refcount table", (header.refcount_table_offset.0, table_length));
        if let Some((offset, length)) = header.crypto_header {
            self.claim(source, counts, findings, "encryption header", (offset.0, length));
        }
        if header.snapshot_count > 0 {
            super::snapshots::claim(self, source, header, counts, findings, &mut tables).await?;
        }
        super::bitmaps::claim(self, source, header, counts, findings).await?;
        Ok(tables)
    }
}

/// What is said of a counter that is full.
pub(super) fn overflow(offset: u64) -> String {
    format!("the cluster at {offset:#x} has more references than its refcount can hold")
}
