//! Slices of tables in memory, found without a lock and without a write to memory that others write, too.
//!
//! A slice has its place in one of the seven ways of a set. The memory of a way is never freed, but filled anew. So a look-up
//! that takes no part in any counting reads memory that is there, and has only to make sure that it read what it was looking
//! for. Each way has a *tag*, which names the slice in it and counts how often it was filled:
//!
//! - a reader loads the tag, loads entries, and loads the tag again: if it has not changed, the entries are of that slice;
//! - who fills a way first gives it a tag that nobody looks for, then stores the entries, then the new tag. A reader that
//!   has seen one of those entries sees the first of these tags or a later one, too, since it loaded the entry with
//!   *acquire*, and there is a *release* fence between tag and entries.
//!
//! An entry that a look-up found was therefore in the slice at some moment of the look-up. What keeps its meaning until the
//! request has ended is the request's being in flight: see `Epochs`.
//!
//! A look-up that follows pointers waits for memory once for each of them, if requests are as far apart as random ones of a
//! guest are. So where the words of a way are is computed: the tags of a set are one cache line, the entry is another, and
//! neither waits for the other.
//!
//! Even so the entry is one that no cache near the processor has: a disk of 4 GiB has half a MiB of them, and eight MiB where
//! its clusters are small. But guests fill their disks in order, more or less, so that most of a table says that each cluster
//! follows the one before. Where all entries of a group (some MiB of the disk) do, one word says it for all of them, their
//! *run*, and a look-up has the entry from there. A run is only ever there while each of the entries is what follows from it:
//! who changes an entry takes the run away first, under the slice's lock, and a reader who has seen the new entry does not
//! find the old run after it.
//!
//! To change a slice, or to see several of its entries at one moment, take it ([`Slices::get`]) and lock it. A slice that
//! somebody holds keeps its way. If all ways of a set are held, as they may be by changes that wait to be written back, a
//! slice has to go into a table on the side until one is free; look-ups without a lock do not find it there.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use crate::format::l2::{self, Entry};
use crate::format::subclusters::Subclusters;
use crate::mutation::{Mutation, broken};
use crate::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering, fence};
use crate::sync::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
use crate::units::HostOffset;

use super::words::Words;

/// So many that their tags, and what is known about them, are one cache line.
const WAYS: usize = 7;
/// More than this is never of use, and the sets themselves take memory: so many hold the L2 tables of 14 TiB at the usual
/// cluster size.
const MAX_SETS: usize = 1 << 16;
/// Words in 512 bytes.
const PER_SECTOR: usize = 64;
/// log2 of the bytes of the disk that a group is to map: enough for most of a disk's entries to be in few words, and so few
/// that one cluster out of line does not matter much.
const GROUP_BITS: u32 = 22;
/// In a run, which is its first entry: guests may write through all of its entries. No entry of data has this bit.
const ALL_CHECKED: u64 = 1 << 1;

/// The way was looked at since the hand last came by.
const USED: u8 = 1;
/// Its runs were looked for; from then on they are kept as entries change.
const DESCRIBED: u8 = 2;

/// Part of an L2 table. Its words are big-endian, as on disk, and decoded on use.
pub(crate) struct Slice {
    /// Which one it is. Changes only while nobody holds the slice.
    key: AtomicU64,
    memory: Arc<Memory>,
    /// Its place there.
    place: usize,
    lock: RwLock<()>,
    /// Whether it is in the list of slices to be written back.
    pub(super) listed: AtomicBool,
    /// The 512-byte sectors that changed, as bits. Changed under the lock.
    pub(super) sectors: AtomicU8,
}

/// What is in a number of slices.
struct Memory {
    layout: Layout,
    words: Words,
    /// See [`Targets`].
    checked: Words,
    /// The first entry of each group that is a run, perhaps with [`ALL_CHECKED`]; else 0. None for extended entries.
    runs: Words,
}

impl Memory {
    /// `None`: the system has not so much.
    fn new(slices: usize, layout: Layout) -> Option<Memory> {
        let words = Words::new(slices.checked_mul(layout.words())?)?;
        let checked = Words::new(slices.checked_mul(layout.marks())?)?;
        let runs = Words::new(slices.checked_mul(layout.runs())?)?;
        Some(Memory { layout, words, checked, runs })
    }

    #[inline]
    fn words(&self, place: usize) -> &[AtomicU64] {
        let first = place << self.layout.word_bits;
        self.words.get(first..first + self.layout.words()).unwrap_or_default()
    }

    #[inline]
    fn targets(&self, place: usize) -> Targets<'_> {
        let first = place * self.layout.marks();
        Targets { checked: self.checked.get(first..first + self.layout.marks()).unwrap_or_default() }
    }

    fn runs(&self, place: usize) -> &[AtomicU64] {
        let first = place * self.layout.runs();
        self.runs.get(first..first + self.layout.runs()).unwrap_or_default()
    }
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
    fn new(memory: Arc<Memory>, place: usize) -> Self {
        Slice {
            key: AtomicU64::new(0),
            memory,
            place,
            lock: RwLock::new(()),
            listed: AtomicBool::new(false),
            sectors: AtomicU8::new(0),
        }
    }

    fn words(&self) -> &[AtomicU64] {
        self.memory.words(self.place)
    }

    /// Which entries guests may write through.
    pub(crate) fn targets(&self) -> Targets<'_> {
        self.memory.targets(self.place)
    }

    /// log2 of the words of an entry.
    fn entry_bits(&self) -> u32 {
        self.memory.layout.entry_bits
    }

    pub(super) fn key(&self) -> u64 {
        self.key.load(Ordering::Relaxed)
    }

    /// Locks the slice against changes.
    pub(crate) fn read(&self) -> Locked<'_, RwLockReadGuard<'_, ()>> {
        Locked { slice: self, _guard: self.lock.read() }
    }

    /// Locks the slice to change it.
    pub(crate) fn write(&self) -> Locked<'_, RwLockWriteGuard<'_, ()>> {
        Locked { slice: self, _guard: self.lock.write() }
    }

    fn fill(&self, key: u64, words: &[u64]) {
        self.key.store(key, Ordering::Relaxed);
        for (to, &from) in self.words().iter().zip(words) {
            to.store(from, Ordering::Relaxed);
        }
        self.sectors.store(0, Ordering::Relaxed);
        let marks = self.targets().checked.iter().chain(self.memory.runs(self.place));
        marks.for_each(|word| word.store(0, Ordering::Relaxed));
    }
}

/// How slices are laid out. All sizes are powers of two; these are their logarithms.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    /// Words of a slice.
    word_bits: u32,
    /// Words of an entry.
    entry_bits: u32,
    /// Entries of a group: at least one word of marks.
    group_bits: u32,
    /// Bytes of a cluster.
    cluster_bits: u32,
    /// What is within its group, of an entry's index.
    group_mask: usize,
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
    fn words(self) -> usize {
        1 << self.word_bits
    }

    /// Words with a bit for each entry.
    fn marks(self) -> usize {
        (self.words() >> self.entry_bits).div_ceil(64)
    }

    /// Words with the runs of all groups.
    fn runs(self) -> usize {
        if self.entry_bits == 0 { self.words() >> self.group_bits } else { 0 }
    }

    /// What follows, so many entries later, from the first entry of a run.
    #[inline]
    fn follows(self, first: u64, later: usize) -> u64 {
        first.wrapping_add((later as u64) << self.cluster_bits)
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

    /// A sector's bytes as on disk.
    pub(super) fn sector(&self, sector: usize, out: &mut Vec<u8>) {
        let start = sector * PER_SECTOR;
        let words = self.slice.words().get(start..start + PER_SECTOR).unwrap_or_default();
        out.extend(words.iter().flat_map(|e| e.load(Ordering::Relaxed).to_ne_bytes()));
    }

    /// Guests may write through an entry: see [`Targets`].
    pub(crate) fn set_checked(&self, index: usize) {
        self.set_all_checked(index, 1);
    }

    /// The same for so many from `index` on.
    pub(crate) fn set_all_checked(&self, index: usize, count: u64) {
        let targets = self.slice.targets();
        targets.marks(index, count).for_each(|(word, marks)| _ = word.fetch_or(marks, Ordering::AcqRel));
        let bits = self.slice.memory.layout.group_bits;
        let groups = index >> bits..index.saturating_add(count as usize).div_ceil(1 << bits);
        for (group, run) in self.slice.memory.runs(self.slice.place).iter().enumerate() {
            // Under the lock a run that is there stays.
            let is_run = groups.contains(&group) && run.load(Ordering::Relaxed) != 0;
            if is_run && targets.are_checked(group << bits, 1 << bits) {
                run.fetch_or(ALL_CHECKED, Ordering::AcqRel);
            }
        }
    }
}

impl Locked<'_, RwLockWriteGuard<'_, ()>> {
    /// Changes an entry. Both words of an extended one are in one sector, so on disk it is the old or the new one.
    pub(crate) fn set(&mut self, index: usize, entry: Entry) {
        let at = index << self.slice.entry_bits();
        let words = [entry.word, entry.subclusters.0];
        let stored = self.slice.words().get(at..at + (1 << self.slice.entry_bits())).unwrap_or_default();
        let layout = self.slice.memory.layout;
        let run = self.slice.memory.runs(self.slice.place).get(index >> layout.group_bits);
        if let Some(run) = run {
            run.store(0, Ordering::Relaxed);
        }
        for (to, word) in stored.iter().zip(words) {
            // Who sees the entry without the lock sees what was done before it was made.
            to.store(word.to_be(), Ordering::Release);
            self.slice.sectors.fetch_or(1 << (at / PER_SECTOR), Ordering::Relaxed);
        }
        // One look at a neighbour tells of most changes that they leave no run.
        let pair = index & !1;
        if run.is_some() && layout.follows(self.word(pair), 1) == self.word(pair + 1) {
            self.describe(index >> layout.group_bits);
        }
    }

    /// Looks for the run of a group.
    fn describe(&self, group: usize) {
        let layout = self.slice.memory.layout;
        let Some(run) = self.slice.memory.runs(self.slice.place).get(group) else { return };
        let (at, len) = (group << layout.group_bits, 1 << layout.group_bits);
        let [first, others @ ..] = self.slice.words().get(at..at + len).unwrap_or_default() else { return };
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
            let all_checked = self.slice.targets().are_checked(at, len as u64);
            run.store(first | if all_checked { ALL_CHECKED } else { 0 }, Ordering::Release);
        }
    }
}

/// A slice as a look-up without a lock sees it. It is for entries of one word: of two words, the lock alone keeps one from
/// seeing the first of an old entry and the second of a new one.
pub(crate) struct View<'a> {
    memory: &'a Memory,
    place: usize,
    tag: &'a AtomicU64,
    seen: u64,
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
        let Memory { layout, words, runs, .. } = self.memory;
        let at = self.at(index & ((1 << layout.word_bits) - 1));
        match runs.get(at >> layout.group_bits).map_or(0, |run| run.load(Ordering::Acquire)) {
            0 => words.get(at).map_or(0, |word| u64::from_be(word.load(Ordering::Acquire))),
            run => layout.follows(run & !ALL_CHECKED, at & layout.group_mask),
        }
    }

    /// Where the cluster of data is that an entry names, if it is no more than that, and whether it is the disk's alone. To
    /// write, `None` unless guests may write through the entry: see [`Targets`]. The index must be within the slice.
    #[inline(always)]
    pub(crate) fn data_for(&self, write: bool, index: usize) -> Option<(HostOffset, bool)> {
        let Memory { layout, words, checked, runs } = self.memory;
        let at = self.at(index);
        let run = runs.get(at >> layout.group_bits)?.load(Ordering::Acquire);
        if run != 0 && (!write || run & ALL_CHECKED != 0) {
            let host = layout.follows(run & l2::OFFSET, at & layout.group_mask);
            return Some((HostOffset(host), run & l2::COPIED != 0));
        }
        if write && checked.get(at / 64)?.load(Ordering::Acquire) >> (at % 64) & 1 == 0 {
            return None;
        }
        let word = u64::from_be(words.get(at)?.load(Ordering::Acquire));
        l2::plain_data(word, 1 << layout.cluster_bits)
    }

    /// Where an entry's word is.
    #[inline]
    fn at(&self, index: usize) -> usize {
        (self.place << self.memory.layout.word_bits) + index
    }

    /// Whether all that was seen so far was the slice that was looked up.
    #[inline]
    pub(crate) fn still(&self) -> bool {
        // After the entries: they were loaded with acquire.
        self.tag.load(Ordering::Relaxed) == self.seen
    }

    #[inline]
    pub(crate) fn targets(&self) -> Targets<'_> {
        self.memory.targets(self.place)
    }
}

/// What a look-up needs of a set: one cache line.
#[derive(Default)]
#[repr(C, align(64))]
struct Tags {
    /// The upper half is the slice's key plus one, or 0; the lower half counts.
    tags: [AtomicU64; WAYS],
    /// [`USED`] and [`DESCRIBED`].
    known: [AtomicU8; WAYS],
}

/// The rest of a set.
#[derive(Default)]
struct Set {
    slices: [OnceLock<Arc<Slice>>; WAYS],
    /// Who has it may give slices to holders, and fill ways; it holds the way to be considered next.
    hand: Mutex<usize>,
}

/// The slices in memory.
pub(crate) struct Slices {
    tags: Box<[Tags]>,
    sets: Box<[Set]>,
    memory: Arc<Memory>,
    /// 2^64 divided by their number and rounded up, so that a remainder takes two multiplications.
    reciprocal: u64,
    aside: Mutex<HashMap<u64, Arc<Slice>>>,
    aside_len: AtomicUsize,
}

/// The upper half of a slice's tag.
#[inline]
fn name(key: u64) -> u64 {
    key + 1
}

impl Slices {
    /// Room for about `capacity` slices, or fewer if the system has not so much memory. It is taken when it is first used.
    pub(crate) fn new(capacity: usize, layout: Layout) -> Option<Self> {
        let mut sets = capacity.div_ceil(WAYS).clamp(1, MAX_SETS);
        let memory = loop {
            match Memory::new(sets * WAYS, layout) {
                Some(memory) => break memory,
                None if sets > 1 => sets /= 2,
                None => return None,
            }
        };
        Some(Slices {
            tags: std::iter::repeat_with(Tags::default).take(sets).collect(),
            sets: std::iter::repeat_with(Set::default).take(sets).collect(),
            memory: Arc::new(memory),
            reciprocal: (u64::MAX / sets as u64).wrapping_add(1),
            aside: Mutex::default(),
            aside_len: AtomicUsize::new(0),
        })
    }

    pub(super) fn capacity(&self) -> usize {
        self.sets.len() * WAYS
    }

    /// The set that a slice belongs to, if there can be such a slice: an L1 table has at most 2^22 entries and an L2 table at
    /// most 2^9 slices, so keys fit a tag.
    ///
    /// It is the remainder of the key and the number of sets, so that neighbours are in different sets. A division would be the
    /// slowest instruction of a request. The fraction of key / n, in units of 2^-64, is as exact as 32-bit numbers need (Lemire,
    /// Kaser, Kurz: Faster remainder by direct computation, 2019).
    #[inline]
    fn set_of(&self, key: u64) -> Option<usize> {
        let key = u32::try_from(key).ok().filter(|&key| key < u32::MAX)?;
        let fraction = self.reciprocal.wrapping_mul(u64::from(key));
        Some(((u128::from(fraction) * self.tags.len() as u128) >> 64) as usize)
    }

    /// Where in memory the slice of a way is: those of the first ways lie together, as they are all that a small disk needs.
    #[inline]
    fn place(&self, set: usize, way: usize) -> usize {
        way * self.tags.len() + set
    }

    /// A look at a slice without a lock; `None` if it is not found so.
    #[inline]
    pub(crate) fn view(&self, key: u64) -> Option<View<'_>> {
        let set = self.set_of(key)?;
        let Tags { tags, known } = self.tags.get(set)?;
        let name = name(key);
        for (way, (tag, known)) in tags.iter().zip(known).enumerate() {
            let seen = tag.load(Ordering::Acquire);
            if seen >> 32 == name {
                if known.load(Ordering::Relaxed) != USED | DESCRIBED {
                    self.get_to_know(key, self.place(set, way), known);
                }
                return Some(View { memory: &self.memory, place: self.place(set, way), tag, seen });
            }
        }
        None
    }

    /// A slice is looked at that was not lately, or for the second time: one that is of lasting use is worth being described.
    #[cold]
    fn get_to_know(&self, key: u64, place: usize, known: &AtomicU8) {
        let before = known.load(Ordering::Relaxed);
        // If another thread's mark gets lost, this is done again.
        known.store(before | USED, Ordering::Relaxed);
        if before != USED {
            return;
        }
        // Held, it keeps its way, unless it had lost it already. Whoever has its lock now need not be waited for.
        let Some(slice) = self.get(key).filter(|slice| slice.place == place) else { return };
        let Some(_guard) = slice.lock.try_write() else { return };
        let locked = Locked { slice: &slice, _guard };
        (0..self.memory.layout.runs()).for_each(|group| locked.describe(group));
        known.store(USED | DESCRIBED, Ordering::Relaxed);
    }

    /// The slice if it is in memory. It keeps its place as long as somebody has it.
    pub(crate) fn get(&self, key: u64) -> Option<Arc<Slice>> {
        let set = self.set_of(key)?;
        let (tags, Set { slices, hand }) = (self.tags.get(set)?, self.sets.get(set)?);
        let _hand = hand.lock();
        let name = name(key);
        for (tag, slice) in tags.tags.iter().zip(slices) {
            if tag.load(Ordering::Relaxed) >> 32 == name {
                return slice.get().cloned();
            }
        }
        if self.aside_len.load(Ordering::Relaxed) == 0 {
            return None;
        }
        self.aside.lock().get(&key).cloned()
    }

    /// Puts a slice into memory that is not there: one at a time does so for each key.
    pub(crate) fn insert(&self, key: u64, words: &[u64]) -> Option<Arc<Slice>> {
        let index = self.set_of(key)?;
        let (tags, set) = (self.tags.get(index)?, self.sets.get(index)?);
        let mut hand = set.hand.lock();
        let Some(way) = self.find_way(index, &mut hand) else {
            let slice = Slice::new(Arc::new(Memory::new(1, self.memory.layout)?), 0);
            slice.fill(key, words);
            let slice = Arc::new(slice);
            let mut aside = self.aside.lock();
            aside.retain(|_, slice| Arc::strong_count(slice) > 1);
            aside.insert(key, slice.clone());
            self.aside_len.store(aside.len(), Ordering::Relaxed);
            return Some(slice);
        };
        let (tag, slice) = (tags.tags.get(way)?, set.slices.get(way)?.get()?);
        // Only who has the hand changes tags.
        let count = tag.load(Ordering::Relaxed).wrapping_add(1) & 0xffff_ffff;
        if broken(Mutation::TagAfterEntries) {
            slice.fill(key, words);
        }
        tag.store(count, Ordering::Relaxed);
        tags.known.get(way)?.store(0, Ordering::Relaxed);
        fence(Ordering::Release);
        slice.fill(key, words);
        tag.store(name(key) << 32 | count, Ordering::Release);
        if self.aside_len.load(Ordering::Relaxed) > 0 {
            let mut aside = self.aside.lock();
            aside.retain(|_, slice| Arc::strong_count(slice) > 1);
            self.aside_len.store(aside.len(), Ordering::Relaxed);
        }
        Some(slice.clone())
    }

    /// Forgets slices, which nobody must be using.
    pub(super) fn forget(&self, keys: std::ops::Range<u64>) {
        for (set, tags) in self.sets.iter().zip(&self.tags) {
            let _hand = set.hand.lock();
            for tag in &tags.tags {
                let seen = tag.load(Ordering::Relaxed);
                if (seen >> 32).checked_sub(1).is_some_and(|key| keys.contains(&key)) {
                    tag.store(seen & 0xffff_ffff, Ordering::Relaxed);
                }
            }
        }
        let mut aside = self.aside.lock();
        aside.retain(|key, _| !keys.contains(key));
        self.aside_len.store(aside.len(), Ordering::Relaxed);
    }

    /// A way that can be filled: an empty one, else the next that nobody holds and nobody looked at lately.
    fn find_way(&self, index: usize, hand: &mut usize) -> Option<usize> {
        let (Tags { tags, known }, Set { slices, .. }) = (self.tags.get(index)?, self.sets.get(index)?);
        let free = |way: usize| {
            let new = || Arc::new(Slice::new(self.memory.clone(), self.place(index, way)));
            let slice = slices.get(way)?.get_or_init(new);
            // Another holder can only come from here or from a holder, so one reference is the way's own and stays the only
            // one. The fence is for what the last holder did.
            let free = Arc::strong_count(slice) == 1;
            fence(Ordering::Acquire);
            free.then_some(way)
        };
        let empty = |way: &usize| tags.get(*way).is_some_and(|tag| tag.load(Ordering::Relaxed) >> 32 == 0);
        if let Some(way) = (0..WAYS).filter(empty).find_map(free) {
            return Some(way);
        }
        for _ in 0..2 * WAYS {
            let way = *hand;
            *hand = (way + 1) % WAYS;
            if free(way).is_some() && known.get(way)?.fetch_and(!USED, Ordering::Relaxed) & USED == 0 {
                return Some(way);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> Layout {
        Layout::new(64, 1, 16)
    }

    #[test]
    fn a_slice_that_is_held_stays_and_the_others_give_way() {
        let slices = Slices::new(WAYS, small()).unwrap();
        let held: Vec<_> = (0..3).map(|key| slices.insert(key, &[key; 64]).unwrap()).collect();
        for key in 3..100 {
            slices.insert(key, &[key; 64]);
        }
        for (key, slice) in held.iter().enumerate() {
            assert!(Arc::ptr_eq(slice, &slices.get(key as u64).unwrap()));
            assert_eq!(slice.read().get(5).word, (key as u64).to_be());
        }
        assert_eq!((3..100).filter(|&key| slices.get(key).is_some()).count(), WAYS - 3);
    }

    #[test]
    fn when_all_ways_are_held_there_is_room_on_the_side() {
        let slices = Slices::new(WAYS, small()).unwrap();
        let held: Vec<_> = (0..20).map(|key| slices.insert(key, &[key; 64]).unwrap()).collect();
        assert!((0..20).all(|key| Arc::ptr_eq(&held[key as usize], &slices.get(key).unwrap())));
        assert_eq!((0..20).filter(|&key| slices.view(key).is_some()).count(), WAYS);
        drop(held);
        slices.insert(20, &[20; 64]);
        assert_eq!((0..20).filter(|&key| slices.get(key).is_some()).count(), WAYS - 1);
        slices.forget(0..20);
        assert!((0..20).all(|key| slices.get(key).is_none() && slices.view(key).is_none()));
        assert!(slices.view(20).is_some());
    }

    #[test]
    fn targets_are_checked_one_by_one_and_in_runs() {
        let slices = Slices::new(WAYS, Layout::new(512, 1, 16)).unwrap();
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
        (7..7 + WAYS as u64).for_each(|key| assert!(!slices.insert(key, &[0; 512]).unwrap().targets().is_checked(100)));
    }

    #[test]
    #[cfg_attr(miri, ignore = "so much memory takes miri minutes")]
    fn a_boundless_cache_takes_no_boundless_memory() {
        assert_eq!(Slices::new(usize::MAX, small()).unwrap().capacity(), MAX_SETS * WAYS);
    }

    /// Every entry of slice `k` is `k`: a look-up that finds anything else in it has read another slice's entries.
    #[test]
    fn a_look_without_a_lock_never_shows_another_slice() {
        let slices = Slices::new(WAYS, small()).unwrap();
        let stop = AtomicBool::new(false);
        let (mut seen, mut changed) = (0u64, 0u64);
        std::thread::scope(|scope| {
            for first in 0..2 {
                let (slices, stop) = (&slices, &stop);
                scope.spawn(move || {
                    for key in (first..if cfg!(miri) { 200 } else { 40_000 }).step_by(2) {
                        slices.insert(key % 20, &[(key % 20).to_be(); 64]);
                    }
                    stop.store(true, Ordering::Relaxed);
                });
            }
            let mut key = 0;
            while !stop.load(Ordering::Relaxed) {
                key = (key + 7) % 20;
                if let Some(view) = slices.view(key) {
                    let (first, last) = (view.word(0), view.word(63));
                    if view.still() {
                        assert_eq!((first, last), (key, key));
                        seen += 1;
                    } else {
                        changed += 1;
                    }
                }
            }
        });
        println!("{seen} looks, and {changed} that came too late");
    }
}
