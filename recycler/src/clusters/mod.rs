//! The state of every host cluster, the pool that guest writes allocate from, and the moves in progress.
//!
//! | state | refcount in the cache | where it is |
//! |---|---|---|
//! | Used | ≥ 1 | in no set |
//! | Freed | ≥ 1 | `unlinked`, then in a [`FreedBatch`] on its way to Junk |
//! | Junk | 0 | `junk` |
//! | Erased | 1 | `erased` |
//! | Available | 1 | `available` |
//! | Roots | 1 | `roots` |
//! | Copies | 1 | `copies` |
//!
//! Free clusters that may be handed out are *counted ahead*: their refcount is 1 before anybody asks for them, so a guest
//! write that takes an Available cluster changes no refcount, and its L2 entry may be written with the next flush without
//! one before it. After a crash such clusters are leaks, which the next opening reclaims.

pub(crate) mod allocator;
pub(crate) mod counts;
pub(crate) mod epochs;
pub(crate) mod moves;
pub(crate) mod packed;
pub(crate) mod scan;
pub(crate) mod set;
pub(crate) mod snapshots;
pub(crate) mod stragglers;

use std::ops::Range;

use crate::sync::{AsyncMutex, Mutex, MutexGuard};
use crate::units::HostCluster;
use epochs::Ticket;
use set::ClusterSet;

/// Clusters that lost a reference: nothing may overwrite them before the unlinking is durable and every request that
/// could still use them has ended.
#[derive(Debug, Default)]
pub(crate) struct FreedBatch {
    /// Clusters that had one reference.
    pub(crate) clusters: ClusterSet,
    /// Clusters shared with snapshots: each loses one of its references (one may stand here more than once).
    pub(crate) shared: Vec<HostCluster>,
    /// Refcount blocks whose own count went with them: Junk as soon as the table is durable, since only the engine used
    /// them.
    pub(crate) uncounted: ClusterSet,
}

impl FreedBatch {
    pub(crate) fn is_empty(&self) -> bool {
        self.clusters.is_empty() && self.shared.is_empty() && self.uncounted.is_empty()
    }

    pub(crate) fn merge(&mut self, other: FreedBatch) {
        self.clusters.add_all(&other.clusters);
        self.shared.extend(other.shared);
        self.uncounted.add_all(&other.uncounted);
    }
}

/// The sets behind the lock. Every cluster below `end` is in at most one of them.
#[derive(Debug, Default)]
pub(crate) struct States {
    /// The first cluster that was never used: clusters from here on do not exist.
    pub(crate) end: u64,
    pub(crate) junk: ClusterSet,
    pub(crate) erased: ClusterSet,
    /// Those of Erased that were it when the commit under way began, and have been since: its flush makes them Available. A cluster
    /// that was handed out or cut off meanwhile, and erased anew, is not among them.
    pub(crate) promoting: ClusterSet,
    pub(crate) available: ClusterSet,
    pub(crate) roots: ClusterSet,
    pub(crate) copies: ClusterSet,
    /// Whether somebody took clusters of the pool since the last commit.
    pub(crate) taken: bool,
    /// Freed, and the unlinking not written back yet.
    pub(crate) unlinked: FreedBatch,
    /// Freed, being written back by the commit under way.
    pub(crate) committing: FreedBatch,
    /// Freed, the unlinking durable; waiting for older requests to end.
    pub(crate) grace: Vec<(Ticket, FreedBatch)>,
    /// Clusters that have become Junk since the image was opened and whose space was not given back since, as far as they
    /// are Junk still. (What was free before is not among them: only its count says so, and on a damaged image that may be
    /// wrong.)
    pub(crate) occupied: ClusterSet,
    /// Whether the refcounts were searched for clusters that were free when the image was opened.
    pub(crate) junk_is_complete: bool,
}

impl States {
    /// Clusters in the state Freed.
    pub(crate) fn freed_len(&self) -> u64 {
        self.unlinked.clusters.len()
            + self.committing.clusters.len()
            + self.grace.iter().map(|(_, b)| b.clusters.len()).sum::<u64>()
    }

    /// References to shared clusters that are gone, and still counted.
    pub(crate) fn shared_len(&self) -> u64 {
        let waiting = self.grace.iter().map(|(_, b)| b.shared.len()).sum::<usize>();
        (self.unlinked.shared.len() + self.committing.shared.len() + waiting) as u64
    }

    /// Clusters that nothing refers to, whatever state they are in.
    pub(crate) fn unused_len(&self) -> u64 {
        self.junk.len()
            + self.erased.len()
            + self.available.len()
            + self.roots.len()
            + self.copies.len()
            + self.freed_len()
    }

    /// Clusters that are counted, and that nothing refers to.
    pub(crate) fn counted_ahead(&self) -> ClusterSet {
        let mut all = self.unlinked.clusters.clone();
        [&self.erased, &self.available, &self.roots, &self.copies, &self.committing.clusters]
            .into_iter()
            .chain(self.grace.iter().map(|(_, batch)| &batch.clusters))
            .for_each(|set| all.add_all(set));
        all
    }

    /// Whether a cluster of the range is free, or was handed out and not linked yet: then an entry that names it is none of
    /// the engine's.
    pub(crate) fn any_free(&self, range: &Range<u64>) -> bool {
        [&self.junk, &self.erased, &self.available, &self.roots].iter().any(|set| set.meets(range))
    }

    /// The end of the last cluster that is neither Junk nor in the pool: what a truncation could leave.
    pub(crate) fn last_needed(&self) -> u64 {
        self.tail_of(&[&self.junk, &self.available, &self.erased])
    }

    /// Where the Junk at the end of the file begins.
    pub(crate) fn junk_tail(&self) -> u64 {
        self.tail_of(&[&self.junk])
    }

    /// From which cluster on all are in one of these sets, of which no two have a cluster in common. A tail may be of any
    /// length, and guests wait for the lock: so it is not walked through.
    fn tail_of(&self, sets: &[&ClusterSet]) -> u64 {
        let (mut low, mut high) = (0, self.end);
        while low < high {
            let middle = low + (high - low) / 2;
            let members: u64 = sets.iter().map(|set| set.count_in(middle..self.end)).sum();
            if members == self.end - middle {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        high
    }

    /// These read as zeroes and are counted, neither of it durably: they are Erased.
    pub(crate) fn erase(&mut self, range: Range<u64>) {
        self.promoting.remove_range(range.clone());
        self.erased.insert_range(range);
    }

    /// A commit begins.
    pub(crate) fn promotion_begins(&mut self) {
        self.promoting = self.erased.clone();
    }

    /// It has ended, with a flush: Erased → Available.
    pub(crate) fn promote(&mut self) {
        let durable = std::mem::take(&mut self.promoting).intersection(&self.erased);
        self.erased.remove_all(&durable);
        self.available.add_all(&durable);
    }

    /// A cluster lost a reference; `sole` says that it was the only one.
    pub(crate) fn unlink(&mut self, c: HostCluster, sole: bool) {
        if sole {
            self.unlinked.clusters.insert(c);
        } else {
            self.unlinked.shared.push(c);
        }
    }

    /// Freed → Junk.
    pub(crate) fn freed(&mut self, range: Range<u64>) {
        self.junk.insert_range(range.clone());
        self.occupied.insert_range(range);
    }

    fn is_junk(&self, range: Range<u64>) -> bool {
        self.junk.count_in(range.clone()) == range.end - range.start
    }

    /// Takes the lowest Junk from cluster `from` on whose space can be given back out of Junk, at most `max` clusters: it is in
    /// Roots until it is put back, so that nobody takes it meanwhile. What lies between in Junk goes with it: two holes with a hole
    /// between them are one.
    pub(crate) fn take_occupied(&mut self, from: u64, max: u64) -> ClusterSet {
        let occupied = self.occupied.intersection(&self.junk);
        let mut taken = ClusterSet::default();
        let mut count = 0;
        for run in occupied.runs_from(from) {
            if count >= max {
                break;
            }
            let run = run.start..run.end.min(run.start + (max - count));
            count += run.end - run.start;
            let start = match taken.max() {
                Some(HostCluster(last))
                    if count + (run.start - last - 1) <= max && self.is_junk(last + 1..run.start) =>
                {
                    count += run.start - last - 1;
                    last + 1
                }
                _ => run.start,
            };
            taken.insert_range(start..run.end);
        }
        self.occupied = occupied;
        self.occupied.remove_all(&taken);
        self.junk.remove_all(&taken);
        self.roots.add_all(&taken);
        taken
    }

    /// That the sets are disjoint and end where the file does. The first violation, in words.
    pub(crate) fn violation(&self) -> Option<String> {
        let mut sets: Vec<(&str, &ClusterSet)> = vec![
            ("junk", &self.junk),
            ("erased", &self.erased),
            ("available", &self.available),
            ("roots", &self.roots),
            ("copies", &self.copies),
            ("unlinked", &self.unlinked.clusters),
            ("committing", &self.committing.clusters),
        ];
        sets.extend(self.grace.iter().map(|(_, b)| ("in grace", &b.clusters)));
        for (i, (name, set)) in sets.iter().enumerate() {
            if let Some((other, _)) = sets[i + 1..].iter().find(|(_, s)| !set.is_disjoint(s)) {
                return Some(format!("a cluster is both {name} and {other}"));
            }
            if set.meets(&(self.end..u64::MAX)) {
                return Some(format!("a cluster that is {name} lies past the end, {}", self.end));
            }
        }
        None
    }
}

/// The state of every host cluster of one image. The lock guards memory only and is never held across an await.
#[derive(Debug, Default)]
pub(crate) struct Clusters {
    states: Mutex<States>,
    /// One at a time grows or shortens the file.
    pub(crate) length_turn: AsyncMutex<()>,
}

impl Clusters {
    pub(crate) fn new(end: u64) -> Self {
        Clusters { states: Mutex::new(States { end, ..States::default() }), length_turn: AsyncMutex::default() }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, States> {
        self.states.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tails_begin_behind_the_last_cluster_of_another_sort() {
        let mut s = States { end: 1 << 26, ..States::default() };
        assert_eq!((s.last_needed(), s.junk_tail()), (1 << 26, 1 << 26));
        s.junk.insert_range(5..7);
        s.junk.insert_range(9..1 << 26);
        assert_eq!((s.last_needed(), s.junk_tail()), (9, 9));
        s.erased.insert(HostCluster(8));
        s.available.insert(HostCluster(7));
        assert_eq!((s.last_needed(), s.junk_tail()), (5, 9));
        s.junk.insert_range(0..5);
        assert_eq!((s.last_needed(), s.junk_tail()), (0, 9));
        s.junk.remove(HostCluster((1 << 26) - 1));
        assert_eq!(s.last_needed(), 1 << 26);
        assert_eq!(States::default().last_needed(), 0);
    }

    #[test]
    fn a_commit_promotes_what_was_erased_all_the_time() {
        let mut s = States { end: 100, ..States::default() };
        s.erase(10..20);
        s.promotion_begins();
        s.erase(20..22);
        // Handed out, and put back; cut off with the end of the file, which grew again.
        s.erased.remove_range(12..13);
        s.erase(12..13);
        s.erased.remove_range(18..22);
        s.erase(18..30);
        s.promote();
        assert_eq!(s.available.runs().collect::<Vec<_>>(), [10..12, 13..18]);
        assert_eq!(s.erased.runs().collect::<Vec<_>>(), [12..13, 18..30]);
        s.promotion_begins();
        s.promote();
        assert!(s.erased.is_empty());
    }

    #[test]
    fn space_is_given_back_in_runs_across_what_was_given_back_before() {
        let mut s = States { end: 100, ..States::default() };
        s.freed(10..20);
        assert_eq!(s.take_occupied(0, 6).runs().next(), Some(10..16));
        s.roots.remove_range(10..16);
        s.junk.insert_range(10..16);
        // 16 to 19 are left; 10 and 12 became Junk anew, 14 and 15 are in use again.
        s.junk.remove_range(14..16);
        s.freed(10..11);
        s.freed(12..13);
        assert_eq!(s.take_occupied(0, 100).runs().collect::<Vec<_>>(), [10..13, 16..20]);
        assert_eq!((s.roots.len(), s.junk.len(), s.junk.contains(HostCluster(13))), (7, 1, true));
        assert!(s.take_occupied(0, 100).is_empty());
    }
}
