//! Where clusters move to: a pure function of what moves and of the holes there are.
//!
//! Guest clusters that follow one another are a run, and a run is to stay in one piece: the guest reads it in one sweep,
//! and so does the device. Runs are put where they fit best, in the guest's order, so that long holes fill up in that
//! order, too.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::clusters::moves::{Move, Reference};
use crate::units::{GuestCluster, HostCluster};

/// Assigns sources to holes, as far as there are holes. The moves come in the order in which they should be made: those
/// whose destinations follow one another together, in groups of at most `group` clusters, and these in ascending order of
/// what they read first.
pub(crate) fn place(mut sources: Vec<(HostCluster, Reference)>, holes: &[Range<u64>], group: usize) -> Vec<Move> {
    sources.sort_unstable_by_key(|&(_, reference)| reference);
    let mut runs: Vec<Range<usize>> = Vec::new();
    for run in sources.chunk_by(|a, b| follow(a.1, b.1)) {
        let start = runs.last().map_or(0, |r| r.end);
        runs.push(start..start + run.len());
    }
    let mut by_length: Vec<Range<usize>> = runs.clone();
    by_length.sort_by_key(|r| std::cmp::Reverse(r.len()));
    // What is simplest wins a tie: it is what keeps neighbours near.
    let chosen = [in_order(sources.len(), holes), fit(&runs, holes), fit(&by_length, holes)]
        .into_iter()
        .min_by_key(|destinations| breaks(&sources, destinations))
        .unwrap_or_default();
    let mut moves: Vec<Move> = sources
        .iter()
        .zip(chosen)
        .filter_map(|(&(src, reference), dst)| Some(Move { src, dst: HostCluster(dst?), reference }))
        .collect();
    moves.sort_unstable_by_key(|m| m.dst);
    let mut groups: Vec<&[Move]> =
        moves.chunk_by(|a, b| a.dst.0 + 1 == b.dst.0).flat_map(|run| run.chunks(group.max(1))).collect();
    groups.sort_by_key(|group| group.first().map(|m| m.src));
    groups.concat()
}

/// Whether two references are to be in one run.
fn follow(a: Reference, b: Reference) -> bool {
    match (a, b) {
        (Reference::L2Entry(GuestCluster(a)), Reference::L2Entry(GuestCluster(b))) => a + 1 == b,
        _ => false,
    }
}

/// How many runs are cut, each as often as it is.
fn breaks(sources: &[(HostCluster, Reference)], destinations: &[Option<u64>]) -> usize {
    let pairs = sources.windows(2).zip(destinations.windows(2));
    pairs.filter(|(s, d)| matches!((s, d), ([a, b], [x, y]) if follow(a.1, b.1) && x.map(|x| x + 1) != *y)).count()
}

/// One after another into the holes as they come.
fn in_order(count: usize, holes: &[Range<u64>]) -> Vec<Option<u64>> {
    let clusters = holes.iter().cloned().flatten().map(Some);
    clusters.chain(std::iter::repeat(None)).take(count).collect()
}

/// Each run, in the order in which they are given, into the shortest hole that holds it, or, if none does, as much of it as
/// possible into the longest.
fn fit(runs: &[Range<usize>], holes: &[Range<u64>]) -> Vec<Option<u64>> {
    let mut free: BTreeSet<(u64, u64)> = holes.iter().map(|h| (h.end - h.start, h.start)).collect();
    let mut destinations = vec![None; runs.iter().map(|r| r.end).max().unwrap_or(0)];
    for run in runs {
        let mut rest = destinations.get_mut(run.clone()).unwrap_or_default();
        while !rest.is_empty() {
            let wanted = rest.len() as u64;
            let Some(&hole) = free.range((wanted, 0)..).next().or_else(|| free.last()) else { break };
            free.remove(&hole);
            let (length, start) = hole;
            let taken = wanted.min(length);
            let (now, later) = std::mem::take(&mut rest).split_at_mut(taken as usize);
            now.iter_mut().zip(start..).for_each(|(d, c)| *d = Some(c));
            rest = later;
            if taken < length {
                free.insert((length - taken, start + taken));
            }
        }
    }
    destinations
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn data(src: u64, guest: u64) -> (HostCluster, Reference) {
        (HostCluster(src), Reference::L2Entry(GuestCluster(guest)))
    }

    /// Guest cluster → destination.
    fn destinations(moves: &[Move]) -> Vec<(u64, u64)> {
        let mut all: Vec<_> = moves
            .iter()
            .map(|m| match m.reference {
                Reference::L2Entry(g) => (g.0, m.dst.0),
                other => panic!("{other:?}"),
            })
            .collect();
        all.sort_unstable();
        all
    }

    #[test]
    fn a_run_goes_where_it_fits() {
        // Guest clusters 10 and 11 follow one another; in order they would be cut.
        let sources = vec![data(105, 5), data(110, 10), data(111, 11)];
        let moves = place(sources, &[1..3, 7..8], 16);
        assert_eq!(destinations(&moves), [(5, 7), (10, 1), (11, 2)]);
    }

    #[test]
    fn a_long_hole_is_filled_in_the_guests_order() {
        let sources = vec![data(100, 7), data(101, 3), data(102, 4), data(103, 90)];
        let moves = place(sources, &[1..2, 10..20], 16);
        assert_eq!(destinations(&moves), [(3, 10), (4, 11), (7, 1), (90, 12)]);
    }

    #[test]
    fn copies_are_made_in_ascending_groups() {
        let sources: Vec<_> = (0..8).map(|n| data(100 + n, n)).chain([data(50, 100)]).collect();
        let moves = place(sources, &[1..9, 12..13], 4);
        assert_eq!(moves.iter().map(|m| m.src.0).collect::<Vec<_>>(), [50, 100, 101, 102, 103, 104, 105, 106, 107]);
        assert!(moves[1..].windows(2).all(|w| w[0].dst.0 + 1 == w[1].dst.0));
    }

    #[test]
    fn tables_move_too() {
        let sources = vec![(HostCluster(9), Reference::L1Entry(0)), (HostCluster(8), Reference::RefcountTable(1))];
        assert_eq!(place(sources, &[1..2, 3..4], 4).len(), 2);
        assert!(place(Vec::new(), &[], 4).is_empty());
    }

    prop_compose! {
        /// Runs of sources and runs of holes, each by gap and length.
        fn layout()(
            runs in proptest::collection::vec((0u64..3, 1u64..6), 1..40),
            holes in proptest::collection::vec((1u64..4, 1u64..6), 0..60),
        ) -> (Vec<(HostCluster, Reference)>, Vec<Range<u64>>) {
            let (mut at, mut guest) = (10_000, 0);
            let mut sources = Vec::new();
            for (gap, length) in runs {
                at += gap;
                guest += gap;
                for _ in 0..length {
                    sources.push(data(at, guest));
                    (at, guest) = (at + 1, guest + 1);
                }
            }
            let mut end = 0;
            let holes = holes.into_iter().map(|(gap, length)| {
                let start = end + gap;
                end = start + length;
                start..end
            });
            (sources, holes.collect())
        }
    }

    proptest! {
        #[test]
        fn every_hole_is_used_once_and_nothing_is_cut_that_need_not_be((sources, holes) in layout(), group in 1usize..9) {
            let room: u64 = holes.iter().map(|h| h.end - h.start).sum();
            let moves = place(sources.clone(), &holes, group);
            prop_assert_eq!(moves.len() as u64, room.min(sources.len() as u64));
            let mut dst: Vec<u64> = moves.iter().map(|m| m.dst.0).collect();
            dst.sort_unstable();
            prop_assert!(dst.windows(2).all(|w| w[0] < w[1]));
            prop_assert!(dst.iter().all(|d| holes.iter().any(|h| h.contains(d))));
            let mut src: Vec<u64> = moves.iter().map(|m| m.src.0).collect();
            src.sort_unstable();
            prop_assert!(src.windows(2).all(|w| w[0] < w[1]));
            prop_assert!(moves.iter().all(|m| sources.contains(&(m.src, m.reference))));
            // No worse than filling the holes as they come.
            if moves.len() == sources.len() {
                let got: Vec<Option<u64>> = sources
                    .iter()
                    .map(|s| moves.iter().find(|m| m.src == s.0).map(|m| m.dst.0))
                    .collect();
                prop_assert!(breaks(&sources, &got) <= breaks(&sources, &in_order(sources.len(), &holes)));
            }
        }

        /// Holes of the runs' own lengths, in any order: nothing is cut.
        #[test]
        fn what_fits_is_not_cut((sources, _) in layout(), seed in any::<u64>()) {
            let mut lengths: Vec<u64> = sources.chunk_by(|a, b| follow(a.1, b.1)).map(|r| r.len() as u64).collect();
            lengths.sort_unstable_by_key(|&l| (l.wrapping_mul(seed | 1)).rotate_left(17));
            let mut end = 0;
            let holes: Vec<Range<u64>> = lengths
                .into_iter()
                .map(|length| {
                    let start = end + 1;
                    end = start + length;
                    start..end
                })
                .collect();
            let moves = place(sources.clone(), &holes, 16);
            let got: Vec<Option<u64>> =
                sources.iter().map(|s| moves.iter().find(|m| m.src == s.0).map(|m| m.dst.0)).collect();
            prop_assert_eq!(breaks(&sources, &got), 0);
        }
    }
}
