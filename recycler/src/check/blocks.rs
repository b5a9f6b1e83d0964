//! New refcount blocks for what no block counts: which are needed, and where they go.

use std::collections::BTreeMap;

use roaring::RoaringTreemap;

use super::findings::Findings;
use super::refcounts::{Differences, Refcounts};
use crate::clusters::counts::Counts;
use crate::format::header::MAX_REFCOUNT_TABLE_BYTES;
use crate::units::Geometry;

/// New refcount blocks, and a new refcount table if the old one is too short for them. All of it lies behind everything
/// that the file holds, so that writing it overwrites nothing.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// Cluster of the new block for each index of the refcount table.
    pub(super) blocks: BTreeMap<u64, u64>,
    /// First cluster and length in clusters of a new refcount table.
    pub(super) table: Option<(u64, u64)>,
    /// Indexes whose entry leads nowhere and whose clusters nobody refers to: the entry is emptied.
    pub(super) emptied: Vec<u64>,
    /// The cluster after the last new one.
    pub(super) end: u64,
}

impl Plan {
    pub(super) fn is_empty(&self) -> bool {
        self.blocks.is_empty() && self.emptied.is_empty()
    }

    /// The new clusters.
    pub(super) fn clusters(&self) -> impl Iterator<Item = u64> + '_ {
        let table = self.table.map_or(0..0, |(first, length)| first..first + length);
        table.chain(self.blocks.values().copied())
    }
}

/// Plans the blocks that the clusters in `differences.low` lack. A bad entry of the table is replaced only if `sure`:
/// the references found are all there are, so that nothing else was counted in the lost block.
///
/// The error says why nothing can be done.
pub(super) fn plan(
    geometry: Geometry,
    refcounts: &Refcounts,
    differences: &Differences,
    findings: &Findings,
    start: u64,
    sure: bool,
) -> Result<Plan, &'static str> {
    let per_block = geometry.refcounts_per_block();
    let is_bad = |index: u64| u32::try_from(index).is_ok_and(|i| refcounts.bad.contains(i));
    let mut plan = Plan { end: start, ..Plan::default() };
    for index in indexes(&differences.low, per_block) {
        if refcounts.block(index).is_none() && (sure || !is_bad(index)) {
            plan.blocks.insert(index, 0);
        }
    }
    if sure {
        let bad = refcounts.bad.iter().map(u64::from);
        plan.emptied = bad.filter(|index| !plan.blocks.contains_key(index)).collect();
    }
    for cluster in plan.blocks.values_mut() {
        *cluster = plan.end;
        plan.end += 1;
    }

    // New clusters are themselves counted in blocks, which may have to be new, and the table may have to be longer:
    // until nothing more is missing. Each round adds less than it covers, since a block counts 64 clusters at least.
    loop {
        let before = plan.end;
        let last = plan.blocks.keys().next_back().copied().unwrap_or(0);
        let room = plan.table.map_or(refcounts.table.len() as u64, |(_, n)| n * geometry.entries_per_cluster());
        if last >= room {
            let clusters = last / geometry.entries_per_cluster() + 2;
            if clusters << geometry.cluster_bits > MAX_REFCOUNT_TABLE_BYTES {
                return Err("the refcount table would be too long");
            }
            plan.table = Some((plan.end, clusters));
            plan.end += clusters;
        }
        if plan.end > start {
            for index in start / per_block..=(plan.end - 1) / per_block {
                match refcounts.block(index) {
                    Some(offset) if findings.overlaps.contains(offset >> geometry.cluster_bits) => {
                        return Err("the last refcount block cannot be trusted");
                    }
                    None if !plan.blocks.contains_key(&index) => {
                        if is_bad(index) && !sure {
                            return Err("the last refcount block is lost");
                        }
                        plan.blocks.insert(index, plan.end);
                        plan.emptied.retain(|&i| i != index);
                        plan.end += 1;
                    }
                    _ => {}
                }
            }
        }
        if plan.end == before {
            return Ok(plan);
        }
    }
}

/// The indexes of the blocks that count the clusters of a set, ascending, once each.
pub(super) fn indexes(clusters: &RoaringTreemap, per_block: u64) -> impl Iterator<Item = u64> + '_ {
    let mut iter = clusters.iter();
    std::iter::from_fn(move || {
        let index = iter.next()? / per_block;
        iter.advance_to((index + 1).saturating_mul(per_block));
        Some(index)
    })
}

/// The contents of a block: what is counted of its clusters.
pub(super) fn contents(geometry: Geometry, counts: &Counts, index: u64) -> Vec<u8> {
    let mut bytes = vec![0; geometry.cluster_size() as usize];
    let first = index * geometry.refcounts_per_block();
    for (cluster, count) in counts.range(first, first + geometry.refcounts_per_block()) {
        crate::format::refcount::set(&mut bytes, geometry.refcount_order, (cluster - first) as usize, count);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use roaring::RoaringBitmap;

    use super::*;

    const SMALL: Geometry = Geometry { cluster_bits: 9, refcount_order: 6, extended_l2: false };

    fn refcounts(table: Vec<u64>) -> Refcounts {
        Refcounts { table, bad: RoaringBitmap::new(), blocks: RoaringTreemap::new(), ones: RoaringTreemap::new() }
    }

    fn low(clusters: impl IntoIterator<Item = u64>) -> Differences {
        Differences { low: clusters.into_iter().collect(), ..Differences::default() }
    }

    /// Every new cluster, and every cluster that lacked a block, has one, once, within the table.
    fn assert_complete(plan: &Plan, refcounts: &Refcounts, low: &Differences, start: u64) {
        let per_block = SMALL.refcounts_per_block();
        let room = plan.table.map_or(refcounts.table.len() as u64, |(_, n)| n * SMALL.entries_per_cluster());
        for cluster in plan.clusters().chain(&low.low) {
            let index = cluster / per_block;
            assert!(index < room);
            assert!(refcounts.block(index).is_some() != plan.blocks.contains_key(&index), "{cluster}");
        }
        let clusters: Vec<u64> = plan.clusters().collect();
        let distinct: RoaringTreemap = clusters.iter().copied().collect();
        assert_eq!(distinct.len(), clusters.len() as u64);
        assert!(distinct.iter().all(|c| c >= start && c < plan.end));
    }

    #[test]
    fn a_block_that_is_missing_counts_itself_or_finds_one_that_does() {
        let refcounts = refcounts([&[512, 1024][..], &[0; 62]].concat());
        for start in [130, 127, 128, 191, 192, 1000] {
            let low = low([129]);
            let plan = plan(SMALL, &refcounts, &low, &Findings::default(), start, true).unwrap();
            assert_complete(&plan, &refcounts, &low, start);
            assert!(plan.table.is_none());
        }
    }

    #[test]
    fn the_table_grows_when_it_has_to() {
        let refcounts = refcounts(vec![512; 64]);
        let low = low(4096..9000);
        let plan = plan(SMALL, &refcounts, &low, &Findings::default(), 9000, true).unwrap();
        assert_complete(&plan, &refcounts, &low, 9000);
        assert!(plan.table.is_some());
    }

    #[test]
    fn a_lost_block_is_replaced_only_when_nothing_can_be_hidden() {
        let mut refcounts = refcounts(vec![512, 1, 1, 0]);
        refcounts.bad.insert_range(1..=2);
        let low = low([70]);
        let sure = plan(SMALL, &refcounts, &low, &Findings::default(), 10, true).unwrap();
        assert_eq!((sure.blocks.get(&1), sure.emptied), (Some(&10), vec![2]));
        assert!(plan(SMALL, &refcounts, &low, &Findings::default(), 10, false).unwrap().is_empty());
    }
}
