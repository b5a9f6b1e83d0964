//! How often each host cluster is referred to, in a few bits per cluster.

use std::iter::Peekable;

use roaring::RoaringTreemap;
use roaring::treemap::Iter;

/// One counter per host cluster, sliced into bits: plane `k` holds the clusters whose count has bit `k` set.
///
/// Almost every cluster of an image is counted once, so almost everything is in the first plane, whose compressed
/// bitmap takes about a bit per cluster; clusters that are never counted take nothing. Counts stop at the highest value
/// that a refcount of the image can hold.
#[derive(Clone, Debug)]
pub(crate) struct Counts {
    planes: Vec<RoaringTreemap>,
    bits: usize,
}

impl Counts {
    /// Counters as wide as refcounts of `1 << order` bits.
    pub(crate) fn new(order: u32) -> Self {
        Counts { planes: Vec::new(), bits: 1 << order.min(6) }
    }

    fn max(&self) -> u64 {
        u64::MAX >> (64 - self.bits)
    }

    /// The count of a cluster.
    pub(crate) fn get(&self, cluster: u64) -> u64 {
        self.planes.iter().enumerate().filter(|(_, p)| p.contains(cluster)).fold(0, |n, (k, _)| n | 1 << k)
    }

    fn set(&mut self, cluster: u64, value: u64) {
        for k in 0..self.bits {
            if value >> k == 0 && k >= self.planes.len() {
                return;
            }
            if k >= self.planes.len() {
                self.planes.push(RoaringTreemap::new());
            }
            if let Some(plane) = self.planes.get_mut(k) {
                if value >> k & 1 == 1 {
                    plane.insert(cluster)
                } else {
                    plane.remove(cluster)
                };
            }
        }
    }

    /// Counts a cluster `n` times more; returns how many of them the counter could not hold.
    pub(crate) fn add(&mut self, cluster: u64, n: u64) -> u64 {
        // Counted once, and not before: the first plane alone changes.
        if n == 1
            && let Some((first, others)) = self.planes.split_first_mut()
            && others.iter().all(|p| !p.contains(cluster))
            && first.insert(cluster)
        {
            return 0;
        }
        let old = self.get(cluster);
        let room = self.max() - old;
        self.set(cluster, old + n.min(room));
        n.saturating_sub(room)
    }

    /// Counts a cluster once less.
    pub(crate) fn subtract(&mut self, cluster: u64) {
        let old = self.get(cluster);
        self.set(cluster, old.saturating_sub(1));
    }

    /// Counts each of the `length` clusters from `first` on `n` times more; returns how many times a counter was full.
    pub(crate) fn add_run(&mut self, first: u64, length: u64, n: u64) -> u64 {
        let range = first..first.saturating_add(length);
        if n == 1 && length > 1 && self.planes.iter().all(|p| p.range_cardinality(range.clone()) == 0) {
            if self.planes.is_empty() {
                self.planes.push(RoaringTreemap::new());
            }
            if let Some(plane) = self.planes.first_mut() {
                plane.insert_range(range);
            }
            return 0;
        }
        range.fold(0u64, |excess, cluster| excess.saturating_add(self.add(cluster, n)))
    }

    /// The highest cluster that is counted at all.
    pub(crate) fn highest(&self) -> Option<u64> {
        self.planes.iter().filter_map(RoaringTreemap::max).max()
    }

    /// The clusters in `from..to` that are counted, ascending, each with its count.
    pub(crate) fn range(&self, from: u64, to: u64) -> Walk<'_> {
        let planes = self
            .planes
            .iter()
            .map(|p| {
                let mut iter = p.iter();
                iter.advance_to(from);
                iter.peekable()
            })
            .collect();
        Walk { planes, to }
    }
}

/// Ascending walk over counted clusters.
pub(crate) struct Walk<'a> {
    planes: Vec<Peekable<Iter<'a>>>,
    to: u64,
}

impl Iterator for Walk<'_> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        let cluster = self.planes.iter_mut().filter_map(|p| p.peek().copied()).min()?;
        if cluster >= self.to {
            return None;
        }
        let mut count = 0;
        for (k, plane) in self.planes.iter_mut().enumerate() {
            if plane.next_if_eq(&cluster).is_some() {
                count |= 1 << k;
            }
        }
        Some((cluster, count))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn counts_as_a_map_does(
            order in 0u32..=6,
            adds in prop::collection::vec((0u64..200, 1u64..40, 1u64..5, any::<bool>()), 0..60),
        ) {
            let mut counts = Counts::new(order);
            let mut model = BTreeMap::<u64, u64>::new();
            let max = counts.max();
            for (first, length, n, sparse) in adds {
                let first = if sparse { first << 36 } else { first };
                let mut excess = 0;
                for c in first..first + length {
                    let old = model.get(&c).copied().unwrap_or(0);
                    let new = old.saturating_add(n).min(max);
                    excess += n - (new - old);
                    model.insert(c, new);
                }
                prop_assert_eq!(counts.add_run(first, length, n), excess);
            }
            prop_assert_eq!(counts.range(0, u64::MAX).collect::<BTreeMap<_, _>>(), model.clone());
            prop_assert_eq!(counts.highest(), model.keys().next_back().copied());
            let some: Vec<_> = model.range(50..120).map(|(&c, &n)| (c, n)).collect();
            prop_assert_eq!(counts.range(50, 120).collect::<Vec<_>>(), some);
            if let Some((&c, &n)) = model.iter().next() {
                counts.subtract(c);
                prop_assert_eq!(counts.get(c), n - 1);
            }
        }
    }
}
