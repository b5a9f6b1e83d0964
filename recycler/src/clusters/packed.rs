//! Clusters that hold compressed data, several extents in each: which of them to empty, and where the extents go.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::set::ClusterSet;
use crate::format::l2;
use crate::units::{Geometry, GuestCluster, HostCluster};

/// So many clusters are remembered at most; what does not fit is found by the next scan.
const MAX_CLUSTERS: usize = 1 << 16;
/// A cluster may be worth emptying if less than this share of it is in use,
const SPARSE: (u64, u64) = (3, 4);
/// and is if of all these no more than this share is in use.
const GAIN: (u64, u64) = (2, 3);

/// What the disk's compressed clusters take of a host cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Use {
    /// Bytes of it.
    bytes: u64,
    /// Extents that touch it. Each counts once.
    pub(crate) extents: u64,
}

/// The highest host clusters with compressed data.
#[derive(Debug, Default)]
pub(crate) struct Packed {
    pub(crate) clusters: BTreeMap<HostCluster, Use>,
    /// L1 indexes of the L2 tables with compressed clusters.
    pub(crate) tables: BTreeSet<u64>,
}

impl Packed {
    /// The disk refers to this data.
    pub(crate) fn add(&mut self, descriptor: u64, l1_index: u64, geometry: Geometry) {
        let (offset, length) = l2::compressed_extent(descriptor, geometry);
        let (first, count) = l2::compressed_clusters(descriptor, geometry);
        for c in (first.0..first.0 + count).map(HostCluster) {
            let start = geometry.host_offset(c).0;
            let bytes = (offset + length).min(start + geometry.cluster_size()) - offset.max(start);
            let used = self.clusters.entry(c).or_default();
            (used.bytes, used.extents) = (used.bytes + bytes, used.extents + 1);
        }
        self.tables.insert(l1_index);
        while self.clusters.len() > MAX_CLUSTERS {
            self.clusters.pop_first();
        }
    }

    /// The clusters from `floor` on, where the file could end.
    pub(crate) fn past(&self, floor: u64) -> ClusterSet {
        self.clusters.keys().copied().filter(|c| c.0 >= floor).collect()
    }

    /// The clusters that hold so little that all of it would fit into far fewer of them.
    pub(crate) fn sparse(&self, geometry: Geometry) -> ClusterSet {
        let cluster_size = geometry.cluster_size();
        let used = |u: &Use| u.bytes + 512 * u.extents;
        let sparse: Vec<_> =
            self.clusters.iter().filter(|(_, u)| used(u) * SPARSE.1 < cluster_size * SPARSE.0).collect();
        let bytes: u64 = sparse.iter().map(|(_, u)| used(u)).sum();
        if bytes * GAIN.1 < sparse.len() as u64 * cluster_size * GAIN.0 {
            sparse.into_iter().map(|(c, _)| *c).collect()
        } else {
            ClusterSet::default()
        }
    }
}

/// Data of a compressed cluster, on its way to another place in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) guest: GuestCluster,
    /// What the L2 entry says, without the flag.
    pub(crate) descriptor: u64,
    /// Where the data goes, in bytes; [`place`] says.
    pub(crate) to: u64,
}

/// Places extents one after the other into runs of host clusters. Returns those that had room; each keeps its offset within
/// a sector, so that it takes as many sectors as before, and shares no sector with another.
pub(crate) fn place(extents: &[Extent], runs: &[Range<u64>], max_count: u64, geometry: Geometry) -> Vec<Extent> {
    let bits = geometry.cluster_bits;
    let mut placed = Vec::new();
    let mut runs = runs.iter().map(|run| run.start << bits..run.end << bits);
    let Some(mut room) = runs.next() else { return placed };
    // How many extents touch the cluster that is being filled.
    let mut count = 0;
    'extents: for e in extents {
        let (offset, length) = l2::compressed_extent(e.descriptor, geometry);
        let within = offset & 511;
        loop {
            let sector = room.start.next_multiple_of(512);
            let to = sector + within;
            let new_cluster = to >> bits != room.start.saturating_sub(1) >> bits;
            if to + length > room.end {
                let Some(next) = runs.next() else { break 'extents };
                (room, count) = (next, 0);
                continue;
            }
            if !new_cluster && count == max_count {
                // The count of this cluster has reached what its width can hold.
                (room.start, count) = (((to >> bits) + 1) << bits, 0);
                continue;
            }
            let last = (to + length - 1) >> bits;
            count = if last != to >> bits || new_cluster { 1 } else { count + 1 };
            room.start = to + length;
            placed.push(Extent { to, ..*e });
            break;
        }
    }
    placed
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GEOMETRY: Geometry = Geometry { cluster_bits: 12, refcount_order: 4, extended_l2: false };

    fn extent(offset: u64, sectors: u64) -> Extent {
        let bits = 62 - (GEOMETRY.cluster_bits - 8);
        Extent { guest: GuestCluster(0), descriptor: (sectors - 1) << bits | offset, to: 0 }
    }

    #[test]
    fn uses_add_up_over_clusters_that_an_extent_straddles() {
        let mut packed = Packed::default();
        packed.add(extent(4096 + 100, 2).descriptor, 0, GEOMETRY);
        packed.add(extent(8192 - 200, 3).descriptor, 0, GEOMETRY);
        let uses: Vec<_> = packed.clusters.iter().map(|(c, u)| (c.0, u.bytes, u.extents)).collect();
        assert_eq!(uses, [(1, 924 + 200, 2), (2, 1024, 1)]);
        assert_eq!(packed.past(2).runs().next(), Some(2..3));
        assert_eq!(packed.sparse(GEOMETRY).runs().next(), Some(1..3));
        assert_eq!(packed.tables.len(), 1);
    }

    proptest! {
        #[test]
        fn placed_extents_stay_within_the_room_and_overlap_nowhere(
            extents in prop::collection::vec((0u64..1 << 20, 1u64..9), 0..40),
            runs in prop::collection::vec((1u64..4, 1u64..4), 0..10),
            max_count in 1u64..5,
        ) {
            let mut end = 0;
            let runs: Vec<_> = runs.iter().map(|(gap, len)| {
                let start = end + gap;
                end = start + len;
                start..end
            }).collect();
            let extents: Vec<_> = extents.iter().map(|&(offset, sectors)| extent(offset, sectors)).collect();
            let placed = place(&extents, &runs, max_count, GEOMETRY);
            let (mut at, mut counts) = (0, BTreeMap::<u64, u64>::new());
            for (e, from) in placed.iter().zip(&extents) {
                let (offset, length) = l2::compressed_extent(from.descriptor, GEOMETRY);
                prop_assert!(e.to & !511 >= at && e.to & 511 == offset & 511);
                at = e.to + length;
                prop_assert!(runs.iter().any(|r| r.start << 12 <= e.to && at <= r.end << 12));
                let moved = l2::compressed_at(e.descriptor, e.to, GEOMETRY);
                prop_assert_eq!(l2::compressed_extent(moved, GEOMETRY), (e.to, length));
                (e.to >> 12..=(at - 1) >> 12).for_each(|c| *counts.entry(c).or_default() += 1);
            }
            prop_assert!(counts.values().all(|&n| n <= max_count));
        }
    }
}
