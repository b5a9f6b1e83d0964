//! The second half of an extended L2 entry: which parts of a cluster are stored, and which read as zeroes (section "Extended
//! L2 Entries" of the qcow2 specification). A cluster has 32 subclusters.

use std::ops::Range;

/// How a subcluster is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// In the entry's host cluster, at its own place in it.
    Stored,
    /// It reads as zeroes.
    Zero,
    /// Neither: the backing file shows through.
    Unallocated,
}

/// The bitmap of a cluster: bits 0 to 31 say which subclusters are stored, bits 32 to 63 which read as zeroes. In an image
/// without subclusters it is 0 and means nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Subclusters(pub u64);

impl Subclusters {
    /// How many a cluster has.
    pub const COUNT: u64 = 32;
    /// All are stored.
    pub const STORED: Subclusters = Subclusters(0xffff_ffff);
    /// All read as zeroes.
    pub const ZERO: Subclusters = Subclusters(0xffff_ffff << 32);

    /// Those that are stored, one bit each.
    #[must_use]
    pub const fn stored(self) -> u32 {
        self.0 as u32
    }

    /// Those that read as zeroes, one bit each.
    #[must_use]
    pub const fn zero(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// How subcluster `index` is stored.
    #[must_use]
    pub const fn part(self, index: u64) -> Part {
        if self.stored() >> index & 1 != 0 {
            Part::Stored
        } else if self.zero() >> index & 1 != 0 {
            Part::Zero
        } else {
            Part::Unallocated
        }
    }

    /// The first subcluster after `index` that is stored in another way; [`COUNT`](Self::COUNT) if there is none.
    #[must_use]
    pub fn end_of(self, index: u64) -> u64 {
        let part = self.part(index);
        (index..Self::COUNT).find(|&i| self.part(i) != part).unwrap_or(Self::COUNT)
    }

    /// The same, with these subclusters stored.
    #[must_use]
    pub const fn with_stored(self, mask: u32) -> Self {
        Subclusters((self.0 | mask as u64) & !((mask as u64) << 32))
    }

    /// The same, with these subclusters reading as zeroes.
    #[must_use]
    pub const fn with_zero(self, mask: u32) -> Self {
        Subclusters((self.0 | (mask as u64) << 32) & !(mask as u64))
    }
}

/// One bit for each of the subclusters in a range.
#[must_use]
pub fn mask(range: Range<u64>) -> u32 {
    let below = |n: u64| ((1u64 << n) - 1) as u32;
    below(range.end) & !below(range.start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_subcluster_has_one_state() {
        let s = Subclusters::default().with_stored(mask(0..2)).with_zero(mask(1..5));
        assert_eq!(
            (0..6).map(|i| s.part(i)).collect::<Vec<_>>(),
            [Part::Stored, Part::Zero, Part::Zero, Part::Zero, Part::Zero, Part::Unallocated]
        );
        assert_eq!((s.end_of(0), s.end_of(2), s.end_of(5)), (1, 5, 32));
        assert_eq!(Subclusters::default().with_stored(mask(0..32)), Subclusters::STORED);
        assert_eq!(Subclusters::STORED.with_zero(mask(0..32)), Subclusters::ZERO);
        assert_eq!(mask(31..32), 1 << 31);
    }
}
