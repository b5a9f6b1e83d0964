//! Which clusters to move: a pure function of the cluster sets and of who refers to what.

use crate::clusters::States;
use crate::clusters::moves::{Reference, SharedSource};
use crate::clusters::scan::Scan;
use crate::clusters::set::ClusterSet;
use crate::units::HostCluster;

/// What a compaction is to do.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Plan {
    /// Where the file could end: everything that can be moved fits below this cluster.
    pub(crate) limit: u64,
    /// Clusters to move below the limit, in descending order, each with its reference.
    pub(crate) sources: Vec<(HostCluster, Reference)>,
    /// The references to the clusters that snapshots use and that move below the limit, too.
    pub(crate) shared: Vec<SharedSource>,
}

/// The lowest cluster at which the file could end if everything could be moved: what is in use takes the place below it.
/// `empty_blocks` counts the refcount blocks that will not be needed then.
pub(crate) fn floor(states: &States, empty_blocks: u64) -> u64 {
    states.end.saturating_sub(states.unused_len()).saturating_sub(empty_blocks)
}

/// The clusters from `from` on that are in use; not those that somebody was given and has not linked yet.
pub(crate) fn in_use(states: &States, from: u64) -> ClusterSet {
    let mut used = ClusterSet::default();
    used.insert_range(from..states.end);
    let freed = [&states.unlinked, &states.committing].into_iter().chain(states.grace.iter().map(|(_, b)| b));
    for set in [&states.junk, &states.erased, &states.available, &states.roots, &states.copies] {
        used.remove_all(set);
    }
    for batch in freed {
        used.remove_all(&batch.clusters);
    }
    used
}

/// Chooses what to move, given who refers to the clusters from `floor` on.
///
/// A cluster in use that nobody is known to refer to (compressed data that a snapshot shares is in it; an unknown extension may own it) is
/// pinned: the file ends behind the last such cluster at best, and what lies below it need not be moved. Not so if it was not
/// [in use](in_use) `before` the scan: a guest has got it meanwhile, and the next scan will find who refers to it.
pub(crate) fn plan(states: &States, scan: &Scan, floor: u64, before: &ClusterSet, refcounts_per_block: u64) -> Plan {
    let from = floor.max(scan.complete_from);
    let mut pinned = in_use(states, from).intersection(before);
    let movable: ClusterSet = scan.found.iter().map(|(c, _)| *c).chain(scan.shared.iter().map(|s| s.cluster)).collect();
    pinned.remove_all(&movable);
    let limit = pinned.max().map_or(floor, |c| floor.max(c.0 + 1));
    // A refcount block that counts clusters past the limit only will be empty, and is dropped then.
    let needed = |reference: &Reference| match *reference {
        Reference::RefcountTable(index) => index * refcounts_per_block < limit,
        Reference::L1Entry(_) | Reference::L2Entry(_) => true,
    };
    let sources = scan.found.iter().filter(|(c, r)| c.0 >= limit && needed(r)).copied().collect();
    let shared = scan.shared.iter().filter(|s| s.cluster.0 >= limit).copied().collect();
    Plan { limit, sources, shared }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::GuestCluster;

    fn states(end: u64, junk: &[(u64, u64)]) -> States {
        let mut s = States { end, ..States::default() };
        junk.iter().for_each(|&(from, to)| s.junk.insert_range(from..to));
        s
    }

    fn plan_now(states: &States, scan: &Scan, floor: u64, refcounts_per_block: u64) -> Plan {
        plan(states, scan, floor, &in_use(states, floor), refcounts_per_block)
    }

    fn found(clusters: &[u64]) -> Scan {
        let found = clusters.iter().map(|&c| (HostCluster(c), Reference::L2Entry(GuestCluster(c)))).collect();
        Scan { found, ..Scan::default() }
    }

    #[test]
    fn everything_past_the_used_amount_moves() {
        let s = states(10, &[(2, 5), (7, 8)]);
        let floor = floor(&s, 0);
        assert_eq!(floor, 6);
        let plan = plan_now(&s, &found(&[9, 8, 6]), floor, 1 << 20);
        assert_eq!(plan.limit, 6);
        assert_eq!(plan.sources.iter().map(|s| s.0.0).collect::<Vec<_>>(), [9, 8, 6]);
    }

    #[test]
    fn nothing_below_a_pinned_cluster_moves() {
        let s = states(10, &[(2, 5), (7, 8)]);
        // 8 is in use and nobody is known to refer to it.
        let plan = plan_now(&s, &found(&[9, 6]), 6, 1 << 20);
        assert_eq!(plan.limit, 9);
        assert_eq!(plan.sources.iter().map(|s| s.0.0).collect::<Vec<_>>(), [9]);
    }

    #[test]
    fn what_guests_got_during_the_scan_pins_nothing() {
        let (before, s) = (states(10, &[(2, 5), (7, 8)]), states(12, &[(2, 5)]));
        let plan = plan(&s, &found(&[9, 8, 6]), 6, &in_use(&before, 6), 1 << 20);
        assert_eq!(plan.limit, 6);
        assert_eq!(plan.sources.iter().map(|s| s.0.0).collect::<Vec<_>>(), [9, 8, 6]);
    }

    #[test]
    fn what_the_scan_had_no_room_for_pins_nothing() {
        let s = states(10, &[(2, 5), (7, 8)]);
        let scan = Scan { complete_from: 9, ..found(&[9]) };
        assert_eq!(plan_now(&s, &scan, 6, 1 << 20).limit, 6);
    }

    #[test]
    fn blocks_that_will_be_empty_neither_pin_nor_move() {
        let s = states(10, &[(2, 8)]);
        let found = vec![(HostCluster(9), Reference::RefcountTable(0)), (HostCluster(8), Reference::RefcountTable(1))];
        let plan = plan_now(&s, &Scan { found, ..Scan::default() }, floor(&s, 1), 8);
        assert_eq!((plan.limit, plan.sources), (3, vec![(HostCluster(9), Reference::RefcountTable(0))]));
    }
}
