//! The memory of slices in memory: their words, and what is noted about them.

use crate::sync::atomic::{AtomicU8, AtomicU64};

use super::words::Words;

/// So many that their tags, and what is known about them and the set, are one cache line.
pub(super) const WAYS: usize = 7;

/// The way was looked at since the hand last came by.
pub(super) const USED: u8 = 1;
/// The slice's runs were looked for.
pub(super) const DESCRIBED: u8 = 2;
/// There may be runs. Exact under the slice's lock; without it, only a hint.
pub(super) const RUNS: u8 = 4;
/// Guests may write through all of its entries: see [`super::slice::Targets`].
pub(super) const CHECKED: u8 = 8;
/// Its table is the disk's alone: it stays so as long as the slice is in memory.
pub(super) const OURS: u8 = 16;

/// log2 of the bytes of the disk that a group is to map: enough for most of a disk's entries to be in few words, and so few
/// that one cluster out of line does not matter much.
const GROUP_BITS: u32 = 22;

/// One way of one set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Way {
    set: usize,
    way: usize,
    /// Where in the memory its slice is.
    pub(super) place: usize,
}

/// What a look-up needs of a set: one cache line.
#[derive(Default)]
#[repr(C, align(64))]
pub(super) struct Tags {
    /// The upper half is the slice's key plus one, or 0; the lower half counts.
    pub(super) tags: [AtomicU64; WAYS],
    /// [`USED`] and those that follow it. Who sees a mark of a slice sees the slice's tag, too, or a later one.
    pub(super) known: [AtomicU8; WAYS],
    /// Which of the slices that belong here was the last that was read past this memory.
    pub(super) passed: AtomicU8,
}

/// The memory of all ways, where the place of each piece is computed.
pub(super) struct Memory {
    pub(super) layout: Layout,
    pub(super) tags: Box<[Tags]>,
    pub(super) words: Words,
    /// See [`super::slice::Targets`].
    pub(super) checked: Words,
    /// The first entry of each group that is a run; else 0. None for extended entries.
    pub(super) runs: Words,
}

impl Memory {
    /// So many sets of so many ways. `None`: the system has not so much.
    pub(super) fn new(sets: usize, ways: usize, layout: Layout) -> Option<Memory> {
        let slices = sets.checked_mul(ways)?;
        let words = Words::new(slices.checked_mul(layout.words())?)?;
        let checked = Words::new(slices.checked_mul(layout.marks())?)?;
        let runs = Words::new(slices.checked_mul(layout.runs())?)?;
        let tags = std::iter::repeat_with(Tags::default).take(sets).collect();
        Some(Memory { layout, tags, words, checked, runs })
    }

    pub(super) fn way(&self, set: usize, way: usize) -> Way {
        Way { set, way, place: self.place(set, way) }
    }

    /// Those of the first ways lie together, as they are all that a small disk needs.
    #[inline]
    pub(super) fn place(&self, set: usize, way: usize) -> usize {
        way * self.tags.len() + set
    }

    /// What is known about the slice in a way.
    pub(super) fn known(&self, way: Way) -> &AtomicU8 {
        &self.tags[way.set].known[way.way]
    }

    #[inline]
    pub(super) fn words(&self, place: usize) -> &[AtomicU64] {
        piece(&self.words, place, self.layout.words())
    }

    #[inline]
    pub(super) fn checked(&self, place: usize) -> &[AtomicU64] {
        piece(&self.checked, place, self.layout.marks())
    }

    #[inline]
    pub(super) fn runs(&self, place: usize) -> &[AtomicU64] {
        piece(&self.runs, place, self.layout.runs())
    }
}

/// What is at a place, if there are `len` words for each.
#[inline]
fn piece(words: &Words, place: usize, len: usize) -> &[AtomicU64] {
    words.get(place * len..(place + 1) * len).unwrap_or_default()
}

/// How slices are laid out. All sizes are powers of two; these are their logarithms.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    /// Words of a slice.
    pub(super) word_bits: u32,
    /// Words of an entry.
    pub(super) entry_bits: u32,
    /// Entries of a group: at least one word of marks.
    pub(super) group_bits: u32,
    /// Bytes of a cluster.
    pub(super) cluster_bits: u32,
    /// What is within its group, of an entry's index: at hand, since every request needs it.
    pub(super) group_mask: usize,
}

impl Layout {
    /// Slices of so many words, at least 64; entries of so many.
    pub(crate) fn new(words: usize, entry_words: usize, cluster_bits: u32) -> Layout {
        let (word_bits, entry_bits) = (words.trailing_zeros(), entry_words.trailing_zeros());
        let group_bits = GROUP_BITS.saturating_sub(cluster_bits).clamp(6, word_bits.max(6));
        Layout { word_bits, entry_bits, group_bits, cluster_bits, group_mask: (1 << group_bits) - 1 }
    }

    /// log2 of the entries of a slice.
    pub(super) fn index_bits(self) -> u32 {
        self.word_bits - self.entry_bits
    }

    #[inline]
    pub(super) fn words(self) -> usize {
        1 << self.word_bits
    }

    /// Words with a bit for each entry.
    fn marks(self) -> usize {
        (self.words() >> self.entry_bits).div_ceil(64)
    }

    /// Whether runs are looked for: entries of one word, which a look without a lock can see whole.
    pub(super) fn has_runs(self) -> bool {
        self.entry_bits == 0
    }

    /// Words with the runs of all groups.
    pub(super) fn runs(self) -> usize {
        if self.has_runs() { self.words() >> self.group_bits } else { 0 }
    }

    /// What follows, so many entries later, from the first entry of a run.
    #[inline]
    pub(super) fn follows(self, first: u64, later: usize) -> u64 {
        first.wrapping_add((later as u64) << self.cluster_bits)
    }
}
