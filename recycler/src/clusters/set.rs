//! A set of host clusters, held as one run or a compressed bitmap.

use std::borrow::Cow;
use std::ops::Range;

use roaring::RoaringTreemap;

use crate::units::HostCluster;

/// A set of host clusters.
///
/// Sets of one run of clusters are frequent: what the file grew by, taken from its front one by one; what a request has in hand. They
/// change with every request, so that costs nothing.
#[derive(Clone, Debug, Default)]
pub(crate) struct ClusterSet(Members);

#[derive(Clone, Debug, Default)]
enum Members {
    #[default]
    None,
    /// Not empty.
    Run(Range<u64>),
    /// Not empty.
    Many(RoaringTreemap),
}

impl PartialEq for ClusterSet {
    fn eq(&self, other: &ClusterSet) -> bool {
        self.bitmap() == other.bitmap()
    }
}

impl From<Range<u64>> for ClusterSet {
    fn from(run: Range<u64>) -> Self {
        let mut set = ClusterSet::default();
        set.insert_range(run);
        set
    }
}

fn bitmap_of(run: &Range<u64>) -> RoaringTreemap {
    let mut bitmap = RoaringTreemap::new();
    bitmap.insert_range(run.clone());
    bitmap
}

impl ClusterSet {
    /// The members as a bitmap.
    fn bitmap(&self) -> Cow<'_, RoaringTreemap> {
        match &self.0 {
            Members::None => Cow::Owned(RoaringTreemap::new()),
            Members::Run(run) => Cow::Owned(bitmap_of(run)),
            Members::Many(bitmap) => Cow::Borrowed(bitmap),
        }
    }

    /// Changes the members as a bitmap.
    fn change<T>(&mut self, change: impl FnOnce(&mut RoaringTreemap) -> T) -> T {
        let mut bitmap = match std::mem::take(&mut self.0) {
            Members::None => RoaringTreemap::new(),
            Members::Run(run) => bitmap_of(&run),
            Members::Many(bitmap) => bitmap,
        };
        let result = change(&mut bitmap);
        if !bitmap.is_empty() {
            self.0 = Members::Many(bitmap);
        }
        result
    }

    pub(crate) fn len(&self) -> u64 {
        match &self.0 {
            Members::None => 0,
            Members::Run(run) => run.end - run.start,
            Members::Many(bitmap) => bitmap.len(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        matches!(self.0, Members::None)
    }

    pub(crate) fn contains(&self, c: HostCluster) -> bool {
        match &self.0 {
            Members::None => false,
            Members::Run(run) => run.contains(&c.0),
            Members::Many(bitmap) => bitmap.contains(c.0),
        }
    }

    /// Adds a cluster; `false` if it was there.
    pub(crate) fn insert(&mut self, c: HostCluster) -> bool {
        match &mut self.0 {
            Members::Many(bitmap) => bitmap.insert(c.0),
            Members::None | Members::Run(_) => {
                !self.contains(c) && {
                    self.insert_range(c.0..c.0 + 1);
                    true
                }
            }
        }
    }

    /// Removes a cluster; `false` if it was not there.
    pub(crate) fn remove(&mut self, c: HostCluster) -> bool {
        match &mut self.0 {
            Members::Many(_) => self.change(|bitmap| bitmap.remove(c.0)),
            Members::None | Members::Run(_) => {
                self.contains(c) && {
                    self.remove_range(c.0..c.0 + 1);
                    true
                }
            }
        }
    }

    pub(crate) fn insert_range(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        match &mut self.0 {
            Members::None => self.0 = Members::Run(range),
            // They overlap, or one follows the other.
            Members::Run(run) if range.start <= run.end && run.start <= range.end => {
                *run = run.start.min(range.start)..run.end.max(range.end);
            }
            // One is much the cheaper to change.
            Members::Many(bitmap) if range.start + 1 == range.end => _ = bitmap.insert(range.start),
            Members::Run(_) | Members::Many(_) => _ = self.change(|bitmap| bitmap.insert_range(range)),
        }
    }

    pub(crate) fn remove_range(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        match &mut self.0 {
            Members::None => {}
            Members::Run(run) if range.end <= run.start || run.end <= range.start => {}
            Members::Run(run) if range.start <= run.start => {
                run.start = range.end.min(run.end);
                if run.is_empty() {
                    self.0 = Members::None;
                }
            }
            Members::Run(run) if run.end <= range.end => run.end = range.start,
            Members::Many(_) if range.start + 1 == range.end => _ = self.change(|bitmap| bitmap.remove(range.start)),
            Members::Run(_) | Members::Many(_) => _ = self.change(|bitmap| bitmap.remove_range(range)),
        }
    }

    /// Whether there are members within the range. Costs much less than to count them, above all for one cluster.
    pub(crate) fn meets(&self, range: &Range<u64>) -> bool {
        match &self.0 {
            Members::None => false,
            Members::Run(run) => run.start.max(range.start) < run.end.min(range.end),
            Members::Many(bitmap) if range.start + 1 == range.end => bitmap.contains(range.start),
            Members::Many(bitmap) => {
                let mut members = bitmap.iter();
                members.advance_to(range.start);
                members.next().is_some_and(|c| c < range.end)
            }
        }
    }

    /// Members within the range.
    pub(crate) fn count_in(&self, range: Range<u64>) -> u64 {
        match &self.0 {
            Members::None => 0,
            Members::Run(run) => range.end.min(run.end).saturating_sub(range.start.max(run.start)),
            Members::Many(bitmap) => bitmap.range_cardinality(range),
        }
    }

    pub(crate) fn add_all(&mut self, other: &ClusterSet) {
        match &other.0 {
            Members::None => {}
            Members::Run(run) => self.insert_range(run.clone()),
            Members::Many(others) => self.change(|bitmap| *bitmap |= others),
        }
    }

    pub(crate) fn remove_all(&mut self, other: &ClusterSet) {
        match &other.0 {
            Members::None => {}
            Members::Run(run) => self.remove_range(run.clone()),
            Members::Many(others) => self.change(|bitmap| *bitmap -= others),
        }
    }

    pub(crate) fn intersection(&self, other: &ClusterSet) -> ClusterSet {
        if let (Members::Run(a), Members::Run(b)) = (&self.0, &other.0) {
            let mut both = ClusterSet::default();
            both.insert_range(a.start.max(b.start)..a.end.min(b.end));
            return both;
        }
        let both = &*self.bitmap() & &*other.bitmap();
        ClusterSet(if both.is_empty() { Members::None } else { Members::Many(both) })
    }

    pub(crate) fn is_disjoint(&self, other: &ClusterSet) -> bool {
        match (&self.0, &other.0) {
            (Members::None, _) | (_, Members::None) => true,
            (Members::Run(run), _) => !other.meets(run),
            (_, Members::Run(run)) => !self.meets(run),
            (Members::Many(a), Members::Many(b)) => a.is_disjoint(b),
        }
    }

    fn members(&self) -> (Range<u64>, Option<&RoaringTreemap>) {
        match &self.0 {
            Members::None => (0..0, None),
            Members::Run(run) => (run.clone(), None),
            Members::Many(bitmap) => (0..0, Some(bitmap)),
        }
    }

    /// The members in ascending order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        let (run, many) = self.members();
        run.chain(many.into_iter().flat_map(RoaringTreemap::iter))
    }

    /// The members in ascending order, as ranges of consecutive clusters.
    pub(crate) fn runs(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        runs(self.iter())
    }

    /// The members from `start` on, as ranges of consecutive clusters.
    pub(crate) fn runs_from(&self, start: u64) -> impl Iterator<Item = Range<u64>> + '_ {
        let (run, many) = self.members();
        // Not by skipping: the set may be large below `start`.
        let many = many.map(|bitmap| {
            let mut members = bitmap.iter();
            members.advance_to(start);
            members
        });
        runs((run.start.max(start)..run.end).chain(many.into_iter().flatten()))
    }

    /// The lowest members below `limit`, at most `max` of them.
    pub(crate) fn lowest(&self, max: u64, limit: u64) -> ClusterSet {
        let mut found = ClusterSet::default();
        // Not run by run: the first may be as long as the file.
        for run in runs(self.iter().take_while(|&c| c < limit).take(usize::try_from(max).unwrap_or(usize::MAX))) {
            found.insert_range(run);
        }
        found
    }

    /// The highest member.
    pub(crate) fn max(&self) -> Option<HostCluster> {
        match &self.0 {
            Members::None => None,
            Members::Run(run) => Some(HostCluster(run.end - 1)),
            Members::Many(bitmap) => bitmap.max().map(HostCluster),
        }
    }

    /// Takes the lowest run of consecutive members out of the set, at most `max` of them (but one at least).
    pub(crate) fn take_run(&mut self, max: u64) -> Option<Range<u64>> {
        let taken = match &self.0 {
            Members::None => return None,
            Members::Run(run) => run.start..run.end.min(run.start.saturating_add(max.max(1))),
            Members::Many(bitmap) => {
                let start = bitmap.min()?;
                let mut end = start + 1;
                while end - start < max && bitmap.contains(end) {
                    end += 1;
                }
                start..end
            }
        };
        self.remove_range(taken.clone());
        Some(taken)
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
        let mut set = ClusterSet::default();
        set.change(|bitmap| bitmap.extend(members.into_iter().map(|c| c.0)));
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(members: &[u64]) -> ClusterSet {
        members.iter().copied().map(HostCluster).collect()
    }

    fn run(members: Range<u64>) -> ClusterSet {
        let mut set = ClusterSet::default();
        set.insert_range(members);
        set
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

    /// Whatever is done to a set of few members, it holds what a plain set would.
    #[test]
    fn sets_of_one_run_are_sets() {
        let (mut s, mut plain) = (ClusterSet::default(), std::collections::BTreeSet::new());
        let mut number = 1u64;
        for _ in 0..if cfg!(miri) { 30 } else { 10_000 } {
            number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (c, d, what) = ((number >> 40) % 6, (number >> 45) % 6, (number >> 50) % 8);
            match what {
                0 => assert_eq!(s.insert(HostCluster(c)), plain.insert(c)),
                1 => assert_eq!(s.remove(HostCluster(c)), plain.remove(&c)),
                2 => {
                    s.insert_range(c..d);
                    plain.extend(c..d);
                }
                5 => {
                    s.remove_range(c..d);
                    plain.retain(|m| !(c..d).contains(m));
                }
                6 => {
                    let two = set(&[c, d]);
                    s.add_all(&two);
                    plain.extend([c, d]);
                    assert!(s.is_disjoint(&two.intersection(&set(&[6]))) && !s.is_disjoint(&two));
                }
                3 => {
                    s.remove_range(c..7);
                    plain.retain(|&m| m < c);
                }
                4 => {
                    s.remove_all(&set(&[c]));
                    plain.remove(&c);
                    s.remove_all(&run(c..d));
                    plain.retain(|m| !(c..d).contains(m));
                }
                _ => assert_eq!(s.take_run(1), plain.pop_first().map(|c| c..c + 1)),
            }
            assert_eq!(s.meets(&(c..d)), plain.iter().any(|m| (c..d).contains(m)));
            let members: Vec<_> = plain.iter().copied().collect();
            assert_eq!(s, set(&members));
            assert_eq!(s.runs().flatten().collect::<Vec<_>>(), members);
            assert_eq!(s.runs_from(2).flatten().collect::<Vec<_>>(), plain.range(2..).copied().collect::<Vec<_>>());
            assert_eq!((s.len(), s.is_empty()), (members.len() as u64, members.is_empty()));
            assert_eq!(s.count_in(1..3), plain.range(1..3).count() as u64);
            s.insert_range(c..c);
            s.remove_range(5..c);
            assert_eq!(s.max().map(|c| c.0), members.last().copied());
            let (others, count) = (run(c..d), plain.range(c..d.max(c)).count() as u64);
            assert_eq!((s.is_disjoint(&others), others.is_disjoint(&s)), (count == 0, count == 0));
            assert_eq!(s.intersection(&others).len(), count);
            s.add_all(&others);
            plain.extend(c..d);
            assert_eq!(s.is_disjoint(&set(&[c])), !plain.contains(&c));
            assert_eq!(s.intersection(&set(&[c])).len(), u64::from(s.contains(HostCluster(c))));
        }
    }

    #[test]
    fn a_run_must_end_below_the_limit() {
        let s = set(&[1, 4, 5, 6, 9, 10, 11, 12]);
        assert_eq!(s.find_run(3, 100), Some(4..7));
        assert_eq!(s.find_run(4, 13), Some(9..13));
        assert_eq!(s.find_run(4, 12), None);
    }
}
