//! L2 tables of the active L1 table, cached in slices.
//!
//! A slice is the unit of reading, caching and writing back. Its entries stay big-endian and are decoded on use. There is
//! never more than one copy of a slice: a slice that somebody holds, or that is dirty (the dirty list holds it), is not
//! evicted.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use foldhash::fast::RandomState;
use parking_lot::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
use quick_cache::sync::{Cache, DefaultLifecycle};
use quick_cache::{Lifecycle, OptionsBuilder, UnitWeighter};
use zerocopy::IntoBytes;

use super::Writes;
use super::l1::L1Table;
use super::mirror::Mirrors;
use super::patches::{self, Patches};
use crate::buf::IoBufMut;
use crate::device::BlockDevice;
use crate::device::volume::Volume;
use crate::error::{Error, Result};
use crate::units::{Geometry, GuestCluster, HostOffset};

/// L2 tables are read, cached and written back in pieces of at most this many bytes.
const SLICE: u64 = 4096;
/// The cache holds at least this many slices, whatever the option says.
const MIN_SLICES: usize = 8;

/// Part of an L2 table.
pub(crate) struct Slice {
    index: u64,
    entries: RwLock<Box<[u64]>>,
    dirty: AtomicBool,
    /// Which entries guests may write through: see `Image::check_targets`.
    pub(crate) targets: Targets,
}

/// Which entries of a slice were found to point at clusters that guests may write to. What the engine itself sets later is
/// right by construction.
pub(crate) struct Targets {
    /// All were, so that nothing else needs to be looked at.
    all: AtomicBool,
    /// One bit for each entry.
    checked: Box<[AtomicU64]>,
}

impl Targets {
    fn new(entries: usize) -> Self {
        Targets { all: AtomicBool::new(false), checked: (0..entries.div_ceil(64)).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Whether the `count` entries from `index` on were, as far as the slice has them.
    #[inline]
    pub(crate) fn are_checked(&self, index: usize, count: u64) -> bool {
        let end = index.saturating_add(count as usize).min(self.checked.len() * 64);
        self.all.load(Ordering::Acquire) || (index..end).all(|i| self.is_checked(i))
    }

    pub(crate) fn is_checked(&self, index: usize) -> bool {
        self.checked.get(index / 64).is_none_or(|word| word.load(Ordering::Acquire) >> (index % 64) & 1 != 0)
    }

    pub(crate) fn set_checked(&self, index: usize) {
        if let Some(word) = self.checked.get(index / 64) {
            word.fetch_or(1 << (index % 64), Ordering::AcqRel);
        }
    }

    pub(crate) fn set_all_checked(&self) {
        self.all.store(true, Ordering::Release);
    }
}

impl Slice {
    pub(crate) fn read(&self) -> Entries<RwLockReadGuard<'_, Box<[u64]>>> {
        Entries(self.entries.read())
    }
}

/// A slice's entries under its lock.
pub(crate) struct Entries<G>(G);

impl<G: std::ops::Deref<Target = Box<[u64]>>> Entries<G> {
    /// The raw entry at `index` of the slice.
    pub(crate) fn get(&self, index: usize) -> u64 {
        self.0.get(index).map_or(0, |&e| u64::from_be(e))
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

impl Entries<RwLockWriteGuard<'_, Box<[u64]>>> {
    pub(crate) fn set(&mut self, index: usize, entry: u64) {
        if let Some(e) = self.0.get_mut(index) {
            *e = entry.to_be();
        }
    }
}

/// Slices that somebody holds stay in the cache.
#[derive(Clone, Default)]
struct PinHeld(DefaultLifecycle<u64, Arc<Slice>>);

impl Lifecycle<u64, Arc<Slice>> for PinHeld {
    type RequestState = <DefaultLifecycle<u64, Arc<Slice>> as Lifecycle<u64, Arc<Slice>>>::RequestState;

    fn is_pinned(&self, _: &u64, slice: &Arc<Slice>) -> bool {
        // The cache asks under its lock, and handing out another reference needs that lock: one reference is its own.
        Arc::strong_count(slice) > 1
    }

    fn on_evict(&self, state: &mut Self::RequestState, key: u64, slice: Arc<Slice>) {
        self.0.on_evict(state, key, slice);
    }
}

/// The slices in memory.
pub(crate) struct L2Cache {
    geometry: Geometry,
    slice_size: u64,
    cache: Cache<u64, Arc<Slice>, UnitWeighter, RandomState, PinHeld>,
    capacity: usize,
    patches: Arc<Patches>,
    dirty: Mutex<BTreeMap<u64, Arc<Slice>>>,
    /// Bytes read from the device, for the statistics.
    pub(crate) read_bytes: AtomicU64,
}

/// Dirty slices that a commit is writing back.
pub(super) struct Captured(Vec<Arc<Slice>>);

impl L2Cache {
    pub(crate) fn new(geometry: Geometry, size: u64, patches: Arc<Patches>) -> Self {
        let slice_size = SLICE.min(geometry.cluster_size());
        let capacity = ((size / slice_size) as usize).max(MIN_SLICES);
        let options = OptionsBuilder::new()
            .estimated_items_capacity(capacity)
            .weight_capacity(capacity as u64)
            .shards(if capacity < 512 { 1 } else { 8 })
            .build();
        let cache = match options {
            Ok(options) => Cache::with_options(options, UnitWeighter, RandomState::default(), PinHeld::default()),
            // Unreachable: both required options are set. The same cache without the choice of shards.
            Err(_) => Cache::with(capacity, capacity as u64, UnitWeighter, RandomState::default(), PinHeld::default()),
        };
        L2Cache {
            geometry,
            slice_size,
            cache,
            capacity,
            patches,
            dirty: Mutex::default(),
            read_bytes: AtomicU64::new(0),
        }
    }

    /// Guest clusters that one slice maps.
    pub(crate) fn per_slice(&self) -> u64 {
        self.slice_size / 8
    }

    /// Whether so much is dirty that a commit is due, lest memory grow.
    pub(crate) fn wants_commit(&self) -> bool {
        self.dirty.lock().len() * 2 >= self.capacity
    }

    pub(crate) fn is_dirty(&self) -> bool {
        !self.dirty.lock().is_empty()
    }

    /// The slice that maps a guest cluster, and the cluster's index in it; `None` if there is no L2 table.
    pub(crate) async fn slice<D: BlockDevice>(
        &self,
        volume: &Volume<D>,
        l1: &L1Table,
        guest: GuestCluster,
    ) -> Result<Option<(Arc<Slice>, usize)>> {
        let key = guest.0 / self.per_slice();
        let index = (guest.0 % self.per_slice()) as usize;
        if let Some(slice) = self.cache.get(&key) {
            return Ok(Some((slice, index)));
        }
        match self.cache.get_value_or_guard_async(&key).await {
            Ok(slice) => Ok(Some((slice, index))),
            Err(guard) => {
                // The L1 entry is read, and the slice read from the disk, by one task at a time (the guard's holder). A
                // slice that is not cached is clean, so the table's place on disk has its newest contents; if the table
                // moves meanwhile, both places have them, and the old one is not reused while this request is in flight.
                let Some(place) = self.place(l1, key, volume.length())? else { return Ok(None) };
                let mut entries = vec![0u64; (self.slice_size / 8) as usize].into_boxed_slice();
                // If a snapshot shares the table, the recycler may have changed it. It does so for a slice that is in memory
                // only, and keeps it there, so nothing is added meanwhile.
                let changed = self.patches.within(place.0..place.0 + self.slice_size);
                volume.read("reading an L2 table", place.0, IoBufMut::new(entries.as_mut_bytes())).await?;
                patches::lay_over(entries.as_mut_bytes(), place.0, &changed);
                self.read_bytes.fetch_add(self.slice_size, Ordering::Relaxed);
                let slice = Arc::new(Slice {
                    index: key,
                    targets: Targets::new(entries.len()),
                    entries: RwLock::new(entries),
                    dirty: AtomicBool::new(false),
                });
                let _ = guard.insert(slice.clone());
                Ok(Some((slice, index)))
            }
        }
    }

    /// As [`slice`](Self::slice), if the slice is in memory.
    pub(crate) fn cached(&self, guest: GuestCluster) -> Option<(Arc<Slice>, usize)> {
        let slice = self.cache.get(&(guest.0 / self.per_slice()))?;
        Some((slice, (guest.0 % self.per_slice()) as usize))
    }

    /// The slice if it is in memory; does not count as a use.
    pub(crate) fn peek(&self, key: u64) -> Option<Arc<Slice>> {
        self.cache.peek(&key)
    }

    /// Where a slice is on disk.
    fn place(&self, l1: &L1Table, key: u64, file_length: u64) -> Result<Option<HostOffset>> {
        let first = key * self.per_slice();
        let per_table = self.geometry.entries_per_cluster();
        let table = l1.get(first / per_table, file_length)?;
        Ok(table.map(|t| HostOffset(t.host.0 + first % per_table * 8)))
    }

    /// Locks a slice for changes, which will be written back by the next commit.
    pub(crate) fn modify<'a>(&self, slice: &'a Arc<Slice>) -> Entries<RwLockWriteGuard<'a, Box<[u64]>>> {
        let entries = slice.entries.write();
        self.mark_dirty(slice);
        Entries(entries)
    }

    /// Changes an entry of a table that a snapshot shares: it is not written back with the slice, but as a patch.
    pub(crate) fn amend(&self, slice: &Arc<Slice>, index: usize, entry: u64) {
        Entries(slice.entries.write()).set(index, entry);
    }

    fn mark_dirty(&self, slice: &Arc<Slice>) {
        if !slice.dirty.swap(true, Ordering::AcqRel) {
            self.dirty.lock().insert(slice.index, slice.clone());
        }
    }

    /// Forgets slices from guest cluster `from` on: the disk was made smaller. Nobody may be using them.
    pub(crate) fn forget(&self, guest: Range<u64>) {
        let keys = guest.start / self.per_slice()..guest.end.div_ceil(self.per_slice());
        let mut dirty = self.dirty.lock();
        let gone: Vec<u64> = dirty.range(keys.clone()).map(|(&k, _)| k).collect();
        for key in gone {
            dirty.remove(&key);
        }
        drop(dirty);
        self.cache.retain(|key, _| !keys.contains(key));
    }

    /// Copies every dirty slice, to be written; they count as clean from now on, but are held until the commit is done.
    pub(super) fn capture(&self, l1: &L1Table, mirrors: &Mirrors, file_length: u64) -> Result<(Writes, Captured)> {
        let captured = Captured(std::mem::take(&mut *self.dirty.lock()).into_values().collect());
        let mut writes = Writes::default();
        for slice in &captured.0 {
            let place = match self.place(l1, slice.index, file_length) {
                Ok(place) => place,
                Err(e) => {
                    self.restore(captured);
                    return Err(e);
                }
            };
            let entries = slice.entries.read();
            // Under the lock: a change is either in the copy, or marks the slice dirty again.
            slice.dirty.store(false, Ordering::Release);
            let Some(place) = place else { continue };
            let in_table = place.0 & (self.geometry.cluster_size() - 1);
            for table in mirrors.places(HostOffset(place.0 - in_table)) {
                writes.push(table.0 + in_table, entries.as_bytes());
            }
        }
        Ok((writes, captured))
    }

    /// The captured slices could not be written.
    pub(super) fn restore(&self, captured: Captured) {
        for slice in captured.0 {
            let _entries = slice.entries.read();
            slice.dirty.store(true, Ordering::Release);
            self.dirty.lock().insert(slice.index, slice.clone());
        }
    }

    /// The entries of a whole L2 table as they are now, from memory where they are cached. They may change at once: for
    /// planning only.
    pub(crate) async fn survey<D: BlockDevice>(
        &self,
        volume: &Volume<D>,
        table: HostOffset,
        l1_index: u64,
        entries: &mut Vec<u64>,
    ) -> Result<()> {
        let per_table = self.geometry.entries_per_cluster();
        entries.resize(per_table as usize, 0);
        volume.read("reading an L2 table", table.0, IoBufMut::new(entries.as_mut_bytes())).await?;
        self.read_bytes.fetch_add(self.geometry.cluster_size(), Ordering::Relaxed);
        for e in entries.iter_mut() {
            *e = u64::from_be(*e);
        }
        let first = l1_index * per_table / self.per_slice();
        for (n, part) in entries.chunks_mut(self.per_slice() as usize).enumerate() {
            if let Some(slice) = self.peek(first + n as u64) {
                let cached = slice.read();
                for (i, e) in part.iter_mut().enumerate() {
                    *e = cached.get(i);
                }
            }
        }
        Ok(())
    }

    /// An error about the entry of a guest cluster, placed in the file.
    pub(crate) fn invalid_entry<D: BlockDevice>(
        &self,
        volume: &Volume<D>,
        l1: &L1Table,
        guest: GuestCluster,
        entry: u64,
        reason: &str,
    ) -> Error {
        let slice = self.place(l1, guest.0 / self.per_slice(), volume.length()).ok().flatten();
        let at = slice.map_or(0, |s| s.0 + guest.0 % self.per_slice() * 8);
        Error::invalid("L2 table entry", at, format!("{entry:#x}: {reason}"))
    }
}
