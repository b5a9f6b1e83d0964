//! One slice: part of an L2 table in memory, and what is noted beside its entries.
//!
//! Random requests find the entry that they need in no cache near the processor: a disk of 4 GiB has half a MiB of them, and
//! eight MiB where its clusters are small. But guests fill their disks in order, more or less, so that most of a table says
//! that each cluster follows the one before. Where all entries of a group (4 MiB of a usual disk) do, one word says it for all
//! of them, their *run*, and a look-up has the entry from there. A run is only ever there while each of the entries is what
//! follows from it: who changes an entry takes the run away first, under the slice's lock, and a reader who has seen the new
//! entry does not find the old run after it.

use std::ops::Range;
use std::sync::Arc;

use zerocopy::IntoBytes;

use crate::format::l2::{self, Entry};
use crate::format::subclusters::Subclusters;
use crate::mutation::{Mutation, broken};
use crate::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use crate::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use crate::units::HostOffset;

use super::ways::{CHECKED, Memory, OURS, RUNS, Way};

/// Words in 512 bytes.
const PER_SECTOR: usize = 64;

/// Part of an L2 table. Its words are big-endian, as on disk, and decoded on use.
pub(crate) struct Slice {
    /// Which one it is. Changes only while nobody holds the slice or has its lock.
    key: AtomicU64,
    memory: Arc<Memory>,
    pub(super) way: Way,
    lock: RwLock<()>,
    /// Whether it is in the list of slices to be written back.
    pub(super) listed: AtomicBool,
    /// The 512-byte sectors that changed, as bits. Changed under the lock for changes, and cleared under it for reading.
    pub(super) sectors: AtomicU8,
}

/// Which entries of a slice were found to point at clusters that guests may write to: see `Image::check_targets`. What the
/// engine itself sets later is right by construction.
#[derive(Clone, Copy)]
pub(crate) struct Targets<'a> {
    /// One bit for each entry.
    checked: &'a [AtomicU64],
}

impl Targets<'_> {
    /// Whether the `count` entries from `index` on were, as far as the slice has them.
    #[inline]
    pub(crate) fn are_checked(self, index: usize, count: u64) -> bool {
        self.marks(index, count).all(|(word, marks)| word.load(Ordering::Acquire) & marks == marks)
    }

    /// The words of `count` entries from `index` on, each with their marks in it.
    fn marks(&self, index: usize, count: u64) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let end = index.saturating_add(count as usize);
        (index / 64..end.div_ceil(64)).map_while(move |at| {
            let (first, last) = (index.max(at * 64) % 64, (end - at * 64).min(64));
            Some((self.checked.get(at)?, (u64::MAX >> (64 - last)) & (u64::MAX << first)))
        })
    }

    #[inline]
    pub(crate) fn is_checked(self, index: usize) -> bool {
        self.checked.get(index / 64).is_none_or(|word| word.load(Ordering::Acquire) >> (index % 64) & 1 != 0)
    }
}

impl Slice {
    pub(super) fn new(memory: Arc<Memory>, way: Way) -> Self {
        Slice {
            key: AtomicU64::new(0),
            memory,
            way,
            lock: RwLock::new(()),
            listed: AtomicBool::new(false),
            sectors: AtomicU8::new(0),
        }
    }

    /// Whether this is its place, and not one on the side.
    pub(super) fn is_in(&self, memory: &Arc<Memory>, way: Way) -> bool {
        self.way == way && Arc::ptr_eq(&self.memory, memory)
    }

    fn words(&self) -> &[AtomicU64] {
        self.memory.words(self.way.place)
    }

    /// The run of each group; exact under the lock.
    fn runs(&self) -> &[AtomicU64] {
        self.memory.runs(self.way.place)
    }

    /// Which entries guests may write through.
    pub(crate) fn targets(&self) -> Targets<'_> {
        Targets { checked: self.memory.checked(self.way.place) }
    }

    /// log2 of the words of an entry.
    fn entry_bits(&self) -> u32 {
        self.memory.layout.entry_bits
    }

    pub(crate) fn key(&self) -> u64 {
        self.key.load(Ordering::Relaxed)
    }

    /// Locks the slice against changes.
    pub(crate) fn read(&self) -> Locked<'_, RwLockReadGuard<'_, ()>> {
        Locked { slice: self, _guard: self.lock.read() }
    }

    /// Locks the slice to change it.
    pub(crate) fn write(&self) -> Changing<'_> {
        Locked { slice: self, _guard: self.lock.write() }
    }

    /// The same, unless somebody has the lock.
    pub(super) fn try_write(&self) -> Option<Changing<'_>> {
        Some(Locked { slice: self, _guard: self.lock.try_write()? })
    }

    /// Looks for the runs of all groups, unless somebody has the lock. Returns whether it did.
    pub(super) fn describe_all(&self) -> bool {
        let guard = self.lock.try_write();
        if guard.is_none() && !broken(Mutation::RunsWithoutLock) {
            return false;
        }
        (0..self.memory.layout.runs()).for_each(|group| self.describe(group));
        true
    }

    /// Looks for the run of a group; under the lock for changes.
    fn describe(&self, group: usize) {
        let layout = self.memory.layout;
        let Some(run) = self.runs().get(group) else { return };
        let (at, len) = (group << layout.group_bits, 1 << layout.group_bits);
        let [first, others @ ..] = self.words().get(at..at + len).unwrap_or_default() else { return };
        let entry = |word: &AtomicU64| u64::from_be(word.load(Ordering::Acquire));
        let first = entry(first);
        let is_data = |entry| l2::plain_data(entry, 1 << layout.cluster_bits).is_some();
        let is_run = || {
            let mut expected = layout.follows(first, len);
            // From the end: the last one tells most often.
            others.iter().rev().all(|word| {
                expected = expected.wrapping_sub(1 << layout.cluster_bits);
                entry(word) == expected
            })
        };
        // If the first and the last are data and no more, so are those between.
        if is_data(first) && is_data(layout.follows(first, len - 1)) && is_run() {
            self.memory.known(self.way).fetch_or(RUNS, Ordering::AcqRel);
            run.store(first, Ordering::Release);
        }
    }

    /// Another slice takes this one's place. Nobody must hold it; the caller has its lock.
    pub(super) fn fill(&self, key: u64, words: &[u64]) {
        self.key.store(key, Ordering::Relaxed);
        for (to, &from) in self.words().iter().zip(words) {
            to.store(from, Ordering::Relaxed);
        }
        self.sectors.store(0, Ordering::Relaxed);
        let marks = self.targets().checked.iter().chain(self.runs());
        marks.for_each(|word| word.store(0, Ordering::Relaxed));
    }
}

/// Entries of one slice, decoded from big-endian. Past its end there are zeroes.
pub(crate) trait Entries {
    fn get(&self, index: usize) -> Entry;
    fn len(&self) -> usize;
}

/// A slice's entries under its lock.
pub(crate) struct Locked<'a, G> {
    slice: &'a Slice,
    _guard: G,
}

/// A slice's entries under its lock for changes.
pub(crate) type Changing<'a> = Locked<'a, RwLockWriteGuard<'a, ()>>;

impl<G> Entries for Locked<'_, G> {
    fn get(&self, index: usize) -> Entry {
        let at = index << self.slice.entry_bits();
        let subclusters = if self.slice.entry_bits() > 0 { self.word(at + 1) } else { 0 };
        Entry { word: self.word(at), subclusters: Subclusters(subclusters) }
    }

    fn len(&self) -> usize {
        self.slice.words().len() >> self.slice.entry_bits()
    }
}

impl<G> Locked<'_, G> {
    /// A word of the table.
    pub(super) fn word(&self, at: usize) -> u64 {
        self.slice.words().get(at).map_or(0, |w| u64::from_be(w.load(Ordering::Acquire)))
    }

    /// The words of so many 512-byte sectors as on disk.
    pub(super) fn sectors(&self, sectors: Range<usize>) -> impl Iterator<Item = u64> + '_ {
        let words = sectors.start * PER_SECTOR..sectors.end * PER_SECTOR;
        self.slice.words().get(words).unwrap_or_default().iter().map(|word| word.load(Ordering::Relaxed))
    }

    /// Guests may write through all entries of which this is true; not asked for those which they may already.
    pub(crate) fn set_checked_where(&self, is_right: impl Fn(Entry) -> bool) {
        for first in (0..self.len()).step_by(64) {
            let unchecked = (first..self.len().min(first + 64)).filter(|&i| !self.slice.targets().is_checked(i));
            let marks = unchecked.filter(|&i| is_right(self.get(i))).fold(0, |marks, i| marks | 1u64 << (i % 64));
            if let Some(word) = self.slice.targets().checked.get(first / 64).filter(|_| marks != 0) {
                word.fetch_or(marks, Ordering::AcqRel);
            }
        }
        self.were_checked();
    }

    /// Which entries guests may write through.
    pub(crate) fn targets(&self) -> Targets<'_> {
        self.slice.targets()
    }

    /// Whether the slice's table is known to be the disk's alone.
    pub(crate) fn is_ours(&self) -> bool {
        self.slice.memory.known(self.slice.way).load(Ordering::Relaxed) & OURS != 0
    }

    /// It is. The caller is in flight and has the lock, and the mapping is not frozen: what makes a table anybody else's forgets its
    /// slices.
    pub(crate) fn set_ours(&self) {
        self.slice.memory.known(self.slice.way).fetch_or(OURS, Ordering::AcqRel);
    }

    /// Guests may write through an entry: see [`Targets`].
    pub(crate) fn set_checked(&self, index: usize) {
        self.set_all_checked(index, 1);
    }

    /// The same for so many from `index` on.
    pub(crate) fn set_all_checked(&self, index: usize, count: u64) {
        let targets = self.slice.targets();
        targets.marks(index, count).for_each(|(word, marks)| _ = word.fetch_or(marks, Ordering::AcqRel));
        self.were_checked();
    }

    /// If all entries are, this is said in one place.
    fn were_checked(&self) {
        if self.slice.targets().are_checked(0, self.len() as u64) {
            self.slice.memory.known(self.slice.way).fetch_or(CHECKED, Ordering::AcqRel);
        }
    }
}

impl Changing<'_> {
    /// Changes an entry. Both words of an extended one are in one sector, so on disk it is the old or the new one.
    pub(crate) fn set(&mut self, index: usize, entry: Entry) {
        let at = index << self.slice.entry_bits();
        let words = [entry.word, entry.subclusters.0];
        let stored = self.slice.words().get(at..at + (1 << self.slice.entry_bits())).unwrap_or_default();
        let layout = self.slice.memory.layout;
        self.end_run(index >> layout.group_bits);
        for (to, word) in stored.iter().zip(words) {
            // Who sees the entry without the lock sees what was done before it was made.
            to.store(word.to_be(), Ordering::Release);
            let sectors = self.slice.sectors.load(Ordering::Relaxed);
            self.slice.sectors.store(sectors | 1 << (at / PER_SECTOR), Ordering::Relaxed);
        }
        // One look at a neighbour tells of most changes that they leave no run.
        let pair = index & !1;
        if layout.has_runs() && layout.follows(self.word(pair), 1) == self.word(pair + 1) {
            self.slice.describe(index >> layout.group_bits);
        }
    }

    /// Takes the run of a group away, if there is one.
    fn end_run(&self, group: usize) {
        let (known, runs) = (self.slice.memory.known(self.slice.way), self.slice.runs());
        // Under the lock this is exact, and most slices that change have none.
        if known.load(Ordering::Relaxed) & RUNS == 0 {
            return;
        }
        if let Some(run) = runs.get(group) {
            run.store(0, Ordering::Relaxed);
        }
        if runs.iter().all(|run| run.load(Ordering::Relaxed) == 0) {
            known.fetch_and(!RUNS, Ordering::AcqRel);
        }
    }
}

/// One sector of a slice that was read past the slices in memory. It is for entries of one word.
pub(crate) struct Sector {
    /// The index in the slice of the first of its entries.
    first: usize,
    /// Big-endian, as on disk.
    words: [u64; PER_SECTOR],
}

impl Default for Sector {
    fn default() -> Self {
        Sector { first: 0, words: [0; PER_SECTOR] }
    }
}

impl Sector {
    /// Makes it that with the entry at `index`: its bytes, to be filled, and where in the slice they are.
    pub(super) fn turn_to(&mut self, index: usize) -> (u64, &mut [u8]) {
        self.first = index & !(PER_SECTOR - 1);
        (self.first as u64 * 8, self.words.as_mut_bytes())
    }
}

impl Entries for Sector {
    fn get(&self, index: usize) -> Entry {
        let word =
            index.checked_sub(self.first).and_then(|at| self.words.get(at)).map_or(0, |&word| u64::from_be(word));
        Entry { word, subclusters: Subclusters(0) }
    }

    fn len(&self) -> usize {
        self.first + PER_SECTOR
    }
}

/// A slice as a look-up without a lock sees it. It is for entries of one word: of two words, the lock alone keeps one from
/// seeing the first of an old entry and the second of a new one.
pub(crate) struct View<'a> {
    pub(super) memory: &'a Memory,
    pub(super) place: usize,
    pub(super) tag: &'a AtomicU64,
    /// The tag when the look-up began.
    pub(super) seen: u64,
    /// What was known about it then: if there are no runs, they need not be looked for.
    pub(super) known: u8,
}

impl Entries for View<'_> {
    #[inline]
    fn get(&self, index: usize) -> Entry {
        Entry { word: self.word(index), subclusters: Subclusters(0) }
    }

    fn len(&self) -> usize {
        self.memory.layout.words()
    }
}

impl View<'_> {
    #[inline]
    pub(crate) fn word(&self, index: usize) -> u64 {
        let Memory { layout, words, .. } = self.memory;
        let at = self.at(index & ((1 << layout.word_bits) - 1));
        match self.run_of(at) {
            0 => words.get(at).map_or(0, |word| u64::from_be(word.load(Ordering::Acquire))),
            run => layout.follows(run, at & layout.group_mask),
        }
    }

    /// Where the cluster of data is that an entry names, if it is no more than that, and whether it is the disk's alone. To
    /// write, `None` unless guests may write through the entry: see [`Targets`]. The index must be within the slice.
    #[inline(always)]
    pub(crate) fn data_for(&self, write: bool, index: usize) -> Option<(HostOffset, bool)> {
        let Memory { layout, words, checked, .. } = self.memory;
        let at = self.at(index);
        let unknown = write && self.known & CHECKED == 0;
        if unknown && checked.get(at / 64)?.load(Ordering::Acquire) >> (at % 64) & 1 == 0 {
            return None;
        }
        let run = self.run_of(at);
        if run != 0 {
            let host = layout.follows(run & l2::OFFSET, at & layout.group_mask);
            return Some((HostOffset(host), run & l2::COPIED != 0));
        }
        let word = u64::from_be(words.get(at)?.load(Ordering::Acquire));
        l2::plain_data(word, 1 << layout.cluster_bits)
    }

    /// The run that the word at `at` belongs to, or 0.
    #[inline(always)]
    fn run_of(&self, at: usize) -> u64 {
        if self.known & RUNS == 0 {
            return 0;
        }
        self.memory.runs.get(at >> self.memory.layout.group_bits).map_or(0, |run| run.load(Ordering::Acquire))
    }

    /// Where an entry's word is.
    #[inline]
    fn at(&self, index: usize) -> usize {
        (self.place << self.memory.layout.word_bits) + index
    }

    /// Whether the slice was known to be of a table that is the disk's alone, and guests may write through an entry.
    pub(crate) fn may_link(&self, index: usize) -> bool {
        self.known & OURS != 0 && (self.known & CHECKED != 0 || self.targets().is_checked(index))
    }

    /// Whether all that was seen so far was the slice that was looked up.
    #[inline]
    pub(crate) fn still(&self) -> bool {
        // After the entries: they were loaded with acquire.
        self.tag.load(Ordering::Relaxed) == self.seen
    }

    #[inline]
    pub(crate) fn targets(&self) -> Targets<'_> {
        Targets { checked: self.memory.checked(self.place) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::slices::Slices;
    use crate::metadata::ways::Layout;
    use proptest::prelude::*;

    const CLUSTER: u64 = 64 << 10;

    fn follower(first: u64, index: usize) -> Entry {
        Entry { word: (first + index as u64 * CLUSTER) | l2::COPIED, subclusters: Subclusters(0) }
    }

    fn in_order(first: u64) -> Vec<u64> {
        (0..512).map(|i| follower(first, i).word.to_be()).collect()
    }

    fn runs(slice: &Slice) -> Vec<bool> {
        slice.runs().iter().map(|run| run.load(Ordering::Relaxed) != 0).collect()
    }

    #[test]
    fn a_slice_that_is_looked_at_twice_has_runs_which_end_and_come_back_as_entries_change() {
        let slices = Slices::new(7, Layout::new(512, 1, 16)).unwrap();
        let slice = slices.insert(3, &in_order(1 << 30)).unwrap();
        assert!(slices.view(3).is_some());
        assert_eq!(runs(&slice), [false; 8], "one look is no reason");
        assert!(slices.view(3).is_some());
        assert_eq!(runs(&slice), [true; 8]);
        for (index, entry) in [(70, follower(0, 0)), (511, Entry::default()), (0, follower(1 << 40, 0))] {
            slice.write().set(index, entry);
            assert_eq!(slices.view(3).unwrap().word(index), entry.word);
        }
        assert_eq!(runs(&slice), [false, false, true, true, true, true, true, false]);
        [511, 0, 70].into_iter().for_each(|index| slice.write().set(index, follower(1 << 30, index)));
        assert_eq!(runs(&slice), [true; 8]);
    }

    #[test]
    fn what_looks_like_a_run_and_is_no_data_is_none() {
        let slices = Slices::new(7, Layout::new(512, 1, 16)).unwrap();
        // Compressed; at 0; with reserved bits; out of the bits that an offset has.
        for first in [1 << 62, 0, 1 << 30 | 2, 1 << 30 | 1, l2::OFFSET & !(CLUSTER - 1)] {
            let words: Vec<u64> = (0..512).map(|i| (first + i * CLUSTER).to_be()).collect();
            let slice = slices.insert(3, &words).unwrap();
            (0..3).for_each(|_| assert!(slices.view(3).is_some()));
            assert!(!runs(&slice)[0], "{first:#x}");
            slices.forget(3..4);
        }
    }

    #[test]
    fn guests_write_through_entries_that_are_checked_in_runs_or_not() {
        let slices = Slices::new(7, Layout::new(512, 1, 12)).unwrap();
        let words: Vec<u64> = (0..512).map(|i| (((1 << 30) + (i << 12)) | l2::COPIED).to_be()).collect();
        let slice = slices.insert(3, &words).unwrap();
        let look = |write, index| slices.view(3).unwrap().data_for(write, index).map(|(host, _)| host.0);
        slice.read().set_all_checked(0, 100);
        assert_eq!((look(true, 99), look(true, 100)), (Some((1 << 30) + (99 << 12)), None));
        // Described by now, and one group of 512.
        assert_eq!(runs(&slice), [true]);
        assert_eq!(
            (look(true, 99), look(true, 100), look(false, 100)),
            (look(false, 99), None, Some((1 << 30) + (100 << 12)))
        );
        slice.read().set_all_checked(100, 412);
        assert_eq!(look(true, 100), look(false, 100));
        // What the engine sets is right, and a run that comes back is checked as it was.
        slice.write().set(7, Entry::default());
        assert_eq!(look(true, 7), None);
        slice.write().set(7, Entry { word: u64::from_be(words[7]), subclusters: Subclusters(0) });
        assert_eq!((runs(&slice), look(true, 7)), (vec![true], Some((1 << 30) + (7 << 12))));
    }

    #[test]
    fn targets_are_checked_one_by_one_and_in_runs() {
        let slices = Slices::new(7, Layout::new(512, 1, 16)).unwrap();
        let slice = slices.insert(5, &[0; 512]).unwrap();
        let targets = slice.targets();
        (60..200).for_each(|i| slice.read().set_checked(i));
        for (first, count, checked) in [
            (60, 140, true),
            (60, 141, false),
            (59, 2, false),
            (64, 64, true),
            (130, 1, true),
            (200, 1, false),
            (7, 0, true),
        ] {
            assert_eq!(targets.are_checked(first, count), checked, "{count} from {first}");
        }
        // What another slice has is not there yet.
        (200..512).chain(0..60).for_each(|i| slice.read().set_checked(i));
        assert!(targets.are_checked(0, 512) && targets.are_checked(500, u64::MAX));
        assert!(!slices.insert(6, &[0; 512]).unwrap().targets().is_checked(100));
        drop(slice);
        (7..14).for_each(|key| assert!(!slices.insert(key, &[0; 512]).unwrap().targets().is_checked(100)));
    }

    proptest! {
        /// Whatever was changed and looked at: a look without the lock says what the entries say.
        #[test]
        fn a_look_says_what_the_entries_say(
            cluster_bits in 9u32..=21,
            steps in prop::collection::vec((0usize..64, 0u64..3, any::<bool>()), 1..200),
        ) {
            let slices = Slices::new(7, Layout::new(64, 1, cluster_bits)).unwrap();
            let entry = |base: u64, index: usize| base << 40 | (index as u64) << cluster_bits | l2::COPIED;
            let words: Vec<u64> = (0..64).map(|i| entry(1, i).to_be()).collect();
            let slice = slices.insert(0, &words).unwrap();
            for (index, base, look) in steps {
                slice.write().set(index, Entry { word: entry(base, index), subclusters: Subclusters(0) });
                if base == 2 {
                    slice.read().set_checked(index);
                    (0..64).for_each(|i| slice.write().set(i, Entry { word: entry(1, i), subclusters: Subclusters(0) }));
                }
                if look {
                    let view = slices.view(0).unwrap();
                    for i in 0..64 {
                        let word = slice.read().get(i).word;
                        prop_assert_eq!(view.word(i), word);
                        let data = l2::plain_data(word, 1 << cluster_bits);
                        prop_assert_eq!(view.data_for(false, i), data);
                        prop_assert_eq!(view.data_for(true, i), data.filter(|_| slice.targets().is_checked(i)));
                    }
                }
            }
        }
    }
}
