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
//! guest are. So where the words of a way are is computed: the tags of a set are one cache line, the entry (or what says it for
//! many: see [`super::slice`]) is another, and neither waits for the other.
//!
//! To change a slice, or to see several of its entries at one moment, take it ([`Slices::get`]) and lock it; or lock it where it
//! is ([`Slices::lock`]). A slice that somebody holds, or has locked, keeps its way. If all ways of a set are held, as they may be
//! by changes that wait to be written back, a slice has to go into a table on the side until one is free; look-ups without a lock
//! do not find it there.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use crate::mutation::{Mutation, broken};
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};

use super::slice::{Changing, Slice, View};
use super::ways::{DESCRIBED, Layout, Memory, Tags, USED, WAYS};

/// More than this is never of use, and the sets themselves take memory: so many hold the L2 tables of 14 TiB at the usual
/// cluster size.
const MAX_SETS: usize = 1 << 16;

/// One in so many of the slices that could be read past the others is not.
const ADMITTED: usize = 8;

/// The rest of a set.
#[derive(Default)]
struct Set {
    slices: [OnceLock<Arc<Slice>>; WAYS],
    /// Who has it may give slices to holders, and fill ways; it holds the way to be considered next.
    hand: Mutex<usize>,
}

/// The slices in memory.
pub(crate) struct Slices {
    sets: Box<[Set]>,
    memory: Arc<Memory>,
    /// 2^64 divided by their number and rounded up, so that a remainder takes two multiplications.
    reciprocal: u64,
    /// How often a slice was read past all this.
    passes: AtomicUsize,
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
            match Memory::new(sets, WAYS, layout) {
                Some(memory) => break memory,
                None if sets > 1 => sets /= 2,
                None => return None,
            }
        };
        Some(Slices {
            sets: std::iter::repeat_with(Set::default).take(sets).collect(),
            memory: Arc::new(memory),
            reciprocal: (u64::MAX / sets as u64).wrapping_add(1),
            passes: AtomicUsize::new(0),
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
        Some(((u128::from(fraction) * self.sets.len() as u128) >> 64) as usize)
    }

    /// A look at a slice without a lock; `None` if it is not found so.
    #[inline]
    pub(crate) fn view(&self, key: u64) -> Option<View<'_>> {
        let set = self.set_of(key)?;
        let Tags { tags, known, .. } = self.memory.tags.get(set)?;
        let name = name(key);
        for (way, (tag, known)) in tags.iter().zip(known).enumerate() {
            let seen = tag.load(Ordering::Acquire);
            if seen >> 32 == name {
                // Like an entry, with acquire: nobody takes a mark of another slice for one of this.
                let known = known.load(Ordering::Acquire);
                if known & (USED | DESCRIBED) != USED | DESCRIBED {
                    self.get_to_know(key, set, way);
                }
                return Some(View { memory: &self.memory, place: self.memory.place(set, way), tag, seen, known });
            }
        }
        None
    }

    /// A slice is looked at that was not lately, or for the second time: one that is of lasting use is worth being described.
    /// This takes its lock for a moment, if it is free.
    #[cold]
    fn get_to_know(&self, key: u64, set: usize, way: usize) {
        let way = self.memory.way(set, way);
        if self.memory.known(way).fetch_or(USED, Ordering::AcqRel) & (USED | DESCRIBED) != USED {
            return;
        }
        // Held, it keeps its way, unless it had lost it already (and may be on the side now).
        let Some(slice) = self.get(key).filter(|slice| slice.is_in(&self.memory, way)) else { return };
        if slice.describe_all() {
            self.memory.known(way).fetch_or(DESCRIBED, Ordering::AcqRel);
        }
    }

    /// The slice if it is in memory. It keeps its place as long as somebody has it.
    pub(crate) fn get(&self, key: u64) -> Option<Arc<Slice>> {
        let set = self.set_of(key)?;
        let (tags, Set { slices, hand }) = (self.memory.tags.get(set)?, self.sets.get(set)?);
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

    /// The slice if it is in memory and not on the side, locked to change it: as [`get`](Self::get), but without counting who
    /// has it. `None` also if `may`, which is asked under the lock, does not allow it.
    pub(crate) fn lock(&self, key: u64, may: impl FnOnce() -> bool) -> Option<(&Arc<Slice>, Changing<'_>)> {
        let set = self.set_of(key)?;
        let (tags, set) = (self.memory.tags.get(set)?, self.sets.get(set)?);
        let is_named = |tag: &AtomicU64| tag.load(Ordering::Acquire) >> 32 == name(key);
        let way = tags.tags.iter().position(is_named)?;
        let slice = set.slices.get(way)?.get()?;
        let entries = slice.write();
        // Who fills a way has its lock, so it has this slice from now on, if it does now. Asked last: who forgets slices sees to it
        // that `may` was false before and is true afterwards.
        (may() && is_named(tags.tags.get(way)?)).then_some((slice, entries))
    }

    /// Takes, and releases, the lock of every slice that [`lock`](Self::lock) could find.
    pub(super) fn pass_locks(&self) {
        for Set { slices, hand } in &self.sets {
            // Under the hand, since a way that is used for the first time is so under it. Then without: whoever has a slice's lock
            // may take the hand.
            let slices: Vec<_> = {
                let _hand = hand.lock();
                slices.iter().filter_map(OnceLock::get).cloned().collect()
            };
            slices.iter().for_each(|slice| drop(slice.write()));
        }
    }

    /// Whether a slice that is not in memory belongs there, or is to be read past it for once: it would push another one out, and
    /// was not the last that was read past its set. Some belong there anyway, so that what is asked for often is there soon.
    pub(super) fn admits(&self, key: u64) -> bool {
        let Some(Tags { tags, passed, .. }) = self.set_of(key).and_then(|set| self.memory.tags.get(set)) else {
            return false;
        };
        // Those of one set differ in this. If two are taken for one, it is admitted early.
        let mark = (key / self.sets.len() as u64 + 1) as u8;
        tags.iter().any(|tag| tag.load(Ordering::Relaxed) >> 32 == 0)
            || passed.swap(mark, Ordering::Relaxed) == mark
            || self.passes.fetch_add(1, Ordering::Relaxed) % ADMITTED == ADMITTED - 1
    }

    /// Puts a slice into memory that is not there: one at a time does so for each key.
    pub(crate) fn insert(&self, key: u64, words: &[u64]) -> Option<Arc<Slice>> {
        let index = self.set_of(key)?;
        let (tags, set) = (self.memory.tags.get(index)?, self.sets.get(index)?);
        let mut hand = set.hand.lock();
        let Some((way, slice, _locked)) = self.find_way(index, &mut hand) else {
            let memory = Arc::new(Memory::new(1, 1, self.memory.layout)?);
            let slice = Slice::new(memory.clone(), memory.way(0, 0));
            slice.fill(key, words);
            let slice = Arc::new(slice);
            let mut aside = self.aside.lock();
            aside.retain(|_, slice| Arc::strong_count(slice) > 1);
            aside.insert(key, slice.clone());
            self.aside_len.store(aside.len(), Ordering::Relaxed);
            return Some(slice);
        };
        let tag = tags.tags.get(way)?;
        // Only who has the hand, and the slice's lock, changes a tag.
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
        for (set, tags) in self.sets.iter().zip(&self.memory.tags) {
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

    /// A way that can be filled, its slice locked: an empty one, else the next that nobody holds and nobody looked at lately.
    fn find_way(&self, index: usize, hand: &mut usize) -> Option<(usize, &Arc<Slice>, Option<Changing<'_>>)> {
        let (Tags { tags, known, .. }, Set { slices, .. }) = (self.memory.tags.get(index)?, self.sets.get(index)?);
        let free = |way: usize| {
            let new = || Arc::new(Slice::new(self.memory.clone(), self.memory.way(index, way)));
            let slice = slices.get(way)?.get_or_init(new);
            let locked = slice.try_write();
            if locked.is_none() && !broken(Mutation::FillLocked) {
                return None;
            }
            // Another holder can only come from here, from who has the lock, or from a holder, so one reference is the way's own
            // and stays the only one. The fence is for what the last holder did.
            let free = Arc::strong_count(slice) == 1;
            fence(Ordering::Acquire);
            free.then_some((way, slice, locked))
        };
        let empty = |way: &usize| tags.get(*way).is_some_and(|tag| tag.load(Ordering::Relaxed) >> 32 == 0);
        if let Some(way) = (0..WAYS).filter(empty).find_map(free) {
            return Some(way);
        }
        for _ in 0..2 * WAYS {
            let way = *hand;
            *hand = (way + 1) % WAYS;
            if known.get(way)?.fetch_and(!USED, Ordering::Relaxed) & USED == 0
                && let Some(found) = free(way)
            {
                return Some(found);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::slice::Entries as _;
    use crate::sync::atomic::AtomicBool;

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
    fn a_slice_is_read_past_the_others_until_it_is_asked_for_again() {
        let slices = Slices::new(WAYS, small()).unwrap();
        (0..WAYS as u64).for_each(|key| {
            assert!(slices.admits(key), "there is room");
            slices.insert(key, &[key; 64]);
        });
        assert_eq!([10, 11, 11, 10].map(|key| slices.admits(key)), [false, false, true, false]);
        // Two that are asked for in turns do not keep one another out for ever.
        let admitted = (0..2 * ADMITTED as u64).filter(|n| slices.admits(10 + n % 2)).count();
        assert!((1..4).contains(&admitted), "{admitted}");
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
