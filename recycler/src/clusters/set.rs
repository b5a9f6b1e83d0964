//! A set of host clusters, held as a compressed bitmap.

use std::ops::Range;

use roaring::RoaringTreemap;

use crate::units::HostCluster;

/// A set of host clusters.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct ClusterSet(RoaringTreemap);

impl ClusterSet {
    pub(crate) fn len(&self) -> u64 {
        self.0.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn contains(&self, c: HostCluster) -> bool {
        self.0.contains(c.0)
    }

    /// Adds a cluster; `false` if it was there.
    pub(crate) fn insert(&mut self, c: HostCluster) -> bool {
        self.0.insert(c.0)
    }

    /// Removes a cluster; `false` if it was not there.
    pub(crate) fn remove(&mut self, c: HostCluster) -> bool {
        self.0.remove(c.0)
    }

    pub(crate) fn insert_range(&mut self, range: Range<u64>) {
        // One is most of what guests' writes take, and much the cheaper to change.
        if range.end - range.start == 1 {
            self.0.insert(range.start);
        } else {
            self.0.insert_range(range);
        }
    }

    pub(crate) fn remove_range(&mut self, range: Range<u64>) {
        if range.end - range.start == 1 {
            self.0.remove(range.start);
        } else {
            self.0.remove_range(range);
        }
    }

    /// Members within the range.
    pub(crate) fn count_in(&self, range: Range<u64>) -> u64 {
        self.0.range_cardinality(range)
    }

    pub(crate) fn add_all(&mut self, other: &ClusterSet) {
        self.0 |= &other.0;
    }

    pub(crate) fn remove_all(&mut self, other: &ClusterSet) {
        self.0 -= &other.0;
    }

    pub(crate) fn intersection(&self, other: &ClusterSet) -> ClusterSet {
        ClusterSet(&self.0 & &other.0)
    }

    pub(crate) fn is_disjoint(&self, other: &ClusterSet) -> bool {
        self.0.is_disjoint(&other.0)
    }

    /// The members in ascending order, as ranges of consecutive clusters.
    pub(crate) fn runs(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        runs(self.0.iter())
    }

    /// The members from `start` on, as ranges of consecutive clusters.
    pub(crate) fn runs_from(&self, start: u64) -> impl Iterator<Item = Range<u64>> + '_ {
        // Not by skipping: the set may be large below `start`.
        let mut members = self.0.iter();
        members.advance_to(start);
        runs(members)
    }

    /// The lowest members below `limit`, at most `max` of them.
    pub(crate) fn lowest(&self, max: u64, limit: u64) -> ClusterSet {
        let mut found = ClusterSet::default();
        let mut left = max;
        for run in self.runs() {
            let end = run.end.min(run.start + left).min(limit);
            if run.start >= end {
                break;
            }
            left -= end - run.start;
            found.insert_range(run.start..end);
        }
        found
    }

    /// The highest member.
    pub(crate) fn max(&self) -> Option<HostCluster> {
        self.0.max().map(HostCluster)
    }

    /// Takes the lowest run of consecutive members out of the set, at most `max` of them.
    pub(crate) fn take_run(&mut self, max: u64) -> Option<Range<u64>> {
        let start = self.0.min()?;
        let mut end = start + 1;
        while end - start < max && self.0.contains(end) {
            end += 1;
        }
        self.remove_range(start..end);
        Some(start..end)
    }

    /// The lowest run of `count` consecutive members that ends below `limit`.
    pub(crate) fn find_run(&self, count: u64, limit: u64) -> Option<Range<u64>> {
        self.runs()
            .take_while(|r| r.start + count <= limit)
            .find(|r| r.end - r.start >= count)
            .map(|r| r.start..r.start + count)
    }
}

/// Ascending numbers as ranges of consecutive ones.
fn runs(members: impl Iterator<Item = u64>) -> impl Iterator<Item = Range<u64>> {
    let mut members = members.peekable();
    std::iter::from_fn(move || {
        let start = members.next()?;
        let mut end = start + 1;
        while members.next_if_eq(&end).is_some() {
            end += 1;
        }
        Some(start..end)
    })
}

impl FromIterator<HostCluster> for ClusterSet {
    fn from_iter<I: IntoIterator<Item = HostCluster>>(members: I) -> Self {
        ClusterSet(members.into_iter().map(|c| c.0).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(members: &[u64]) -> ClusterSet {
        members.iter().copied().map(HostCluster).collect()
    }

    #[test]
    fn runs_are_taken_from_the_low_end() {
        let mut s = set(&[3, 4, 5, 9, 20, 21]);
        assert_eq!(s.runs().collect::<Vec<_>>(), [3..6, 9..10, 20..22]);
        assert_eq!(s.take_run(2), Some(3..5));
        assert_eq!(s.lowest(3, 100), set(&[5, 9, 20]));
        assert_eq!(s.lowest(3, 20), set(&[5, 9]));
        assert_eq!(s.runs_from(9).collect::<Vec<_>>(), [9..10, 20..22]);
        assert_eq!(s.take_run(9), Some(5..6));
        assert_eq!(ClusterSet::default().take_run(1), None);
    }

    #[test]
    fn a_run_must_end_below_the_limit() {
        let s = set(&[1, 4, 5, 6, 9, 10, 11, 12]);
        assert_eq!(s.find_run(3, 100), Some(4..7));
        assert_eq!(s.find_run(4, 13), Some(9..13));
        assert_eq!(s.find_run(4, 12), None);
    }
}
