//! L2 tables of the active L1 table, cached in slices.
//!
//! A slice is the unit of reading and caching (but a look may be content with a sector); what changed of it is written back by the
//! sector. There is never more than one copy of a slice: one that somebody holds or has locked, or that is dirty (the dirty list
//! holds it), is not evicted.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use zerocopy::IntoBytes;

use super::Writes;
use super::l1::L1Table;
use super::mirror::Mirrors;
use super::patches::{self, Patches};
use super::slice::{Changing, Entries as _, Sector, View};
use super::slices::Slices;
use super::ways::Layout;
use crate::buf::IoBufMut;
use crate::device::BlockDevice;
use crate::device::volume::Volume;
use crate::error::{Error, Result};
use crate::format::l2::Entry;
use crate::mutation::{Mutation, broken};
use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use crate::sync::{AsyncMutex, AsyncMutexGuard, Mutex};
use crate::units::{Geometry, GuestCluster, HostOffset};

pub(crate) use super::slice::Slice;

/// L2 tables are read and cached in pieces of at most this many bytes.
const SLICE: u64 = 4096;
/// The cache holds at least this many slices, whatever the option says.
const MIN_SLICES: usize = 7;
/// So many slices can be read from the device at once.
const LOADING: usize = 64;
/// A survey reads at most so many slices in one piece: fewer than can be [loaded](LOADING) at once, since each has a lock of
/// its own then.
const SURVEYED: usize = 16;
const SECTOR: usize = 512;

/// The slices in memory.
pub(crate) struct L2Cache {
    geometry: Geometry,
    slice_size: u64,
    /// log2 of the entries of a slice.
    slice_bits: u32,
    /// What is within its slice, of a guest cluster's number: at hand, since every request needs it.
    index_mask: u64,
    slices: Slices,
    /// Who reads a slice from the device has the lock that its key leads to.
    loading: [AsyncMutex<()>; LOADING],
    /// Buffers for that.
    buffers: Mutex<Vec<Box<[u64]>>>,
    patches: Arc<Patches>,
    dirty: Mutex<BTreeMap<u64, Arc<Slice>>>,
    /// How many these are, for those who ask after each request.
    dirty_len: AtomicUsize,
    /// Bytes read from the device, for the statistics.
    pub(crate) read_bytes: AtomicU64,
}

/// A slice that is locked for changes, and the index in it of the guest cluster that was asked for.
pub(crate) type LockedSlice<'a> = (&'a Arc<Slice>, Changing<'a>, usize);

/// Dirty slices that a commit is writing back, with their sectors.
pub(super) struct Captured(Vec<(Arc<Slice>, u8)>);

/// Where a slice that is not in memory can be read.
enum Absent {
    At(HostOffset),
    /// There is no L2 table.
    NoTable,
}

/// What [`L2Cache::load_now`] found.
pub(crate) enum Loaded {
    /// The slice is in memory (perhaps on the side, where a look without a lock does not find it).
    Slice,
    /// The sector of it that the guest cluster's entry is in, at this index of the slice. The slice is in memory no more than
    /// before.
    Sector(usize),
    /// There is no L2 table.
    NoTable,
}

impl L2Cache {
    pub(crate) fn new(geometry: Geometry, size: u64, patches: Arc<Patches>) -> Result<Self> {
        let slice_size = SLICE.min(geometry.cluster_size());
        let layout = Layout::new((slice_size / 8) as usize, geometry.l2_entry_words(), geometry.cluster_bits);
        let capacity = ((size / slice_size) as usize).max(MIN_SLICES);
        let slices = Slices::new(capacity, layout)
            .ok_or_else(|| Error::io("reserving memory for the L2 cache", 0)(io::ErrorKind::OutOfMemory.into()))?;
        Ok(L2Cache {
            geometry,
            slice_size,
            slice_bits: layout.index_bits(),
            index_mask: (1 << layout.index_bits()) - 1,
            slices,
            loading: [(); LOADING].map(AsyncMutex::new),
            buffers: Mutex::default(),
            patches,
            dirty: Mutex::default(),
            dirty_len: AtomicUsize::new(0),
            read_bytes: AtomicU64::new(0),
        })
    }

    /// Guest clusters that one slice maps.
    pub(crate) fn per_slice(&self) -> u64 {
        1 << self.slice_bits
    }

    /// Bytes of an entry.
    fn entry_size(&self) -> u64 {
        self.geometry.l2_entry_words() as u64 * 8
    }

    /// Whether so much is dirty that a commit is due, lest memory grow.
    pub(crate) fn wants_commit(&self) -> bool {
        self.dirty_len.load(Ordering::Relaxed) * 2 >= self.slices.capacity()
    }

    pub(crate) fn is_dirty(&self) -> bool {
        !self.dirty.lock().is_empty()
    }

    /// The key of the slice that maps a guest cluster, and the cluster's index in it.
    #[inline]
    fn locate(&self, guest: GuestCluster) -> (u64, usize) {
        (guest.0 >> self.slice_bits, (guest.0 & self.index_mask) as usize)
    }

    /// The slice that maps a guest cluster, and the cluster's index in it; `None` if there is no L2 table.
    pub(crate) async fn slice<D: BlockDevice>(
        &self,
        volume: &Volume<D>,
        l1: &L1Table,
        guest: GuestCluster,
    ) -> Result<Option<(Arc<Slice>, usize)>> {
        let (key, index) = self.locate(guest);
        if let Some(slice) = self.slices.get(key) {
            return Ok(Some((slice, index)));
        }
        // The L1 entry is read, and the slice read from the disk, by one task at a time. A slice that is not cached is
        // clean, so the table's place on disk has its newest contents; if the table moves meanwhile, both places have
        // them, and the old one is not reused while this request is in flight.
        let _loading = self.loading[key as usize % LOADING].lock().await;
        if let Some(slice) = self.slices.get(key) {
            return Ok(Some((slice, index)));
        }
        let Absent::At(place) = self.absent(l1, key, volume)? else { return Ok(None) };
        let mut entries = self.buffer();
        // If a snapshot shares the table, the recycler may have changed it. It does so for a slice that is in memory only,
        // and keeps it there, so nothing is added meanwhile.
        let changed = self.patches.within(place.0..place.0 + self.slice_size);
        volume.read("reading an L2 table", place.0, IoBufMut::new(entries.as_mut_bytes())).await?;
        patches::lay_over(entries.as_mut_bytes(), place.0, &changed);
        self.read_bytes.fetch_add(self.slice_size, Ordering::Relaxed);
        Ok(self.loaded(key, entries).map(|slice| (slice, index)))
    }

    /// As [`slice`](Self::slice), for a look without a lock, if the device reads at once. With `once`, the look is all that it
    /// is for: then the slice need not be put into memory, but its sector there. `None`: not so, and nothing was done.
    pub(crate) fn load_now<D: BlockDevice>(
        &self,
        volume: &Volume<D>,
        l1: &L1Table,
        guest: GuestCluster,
        once: Option<&mut Sector>,
    ) -> Option<Result<Loaded>> {
        let (key, index) = self.locate(guest);
        let _loading = self.loading[key as usize % LOADING].try_lock().ok()?;
        if self.slices.get(key).is_some() {
            return Some(Ok(Loaded::Slice));
        }
        let place = match self.absent(l1, key, volume) {
            Ok(Absent::At(place)) => place,
            Ok(Absent::NoTable) => return Some(Ok(Loaded::NoTable)),
            Err(e) => return Some(Err(e)),
        };
        if place.0 + self.slice_size > volume.length() {
            return None;
        }
        let read = |at: u64, bytes: &mut [u8]| {
            // As in `slice`.
            let changed = self.patches.within(at..at + bytes.len() as u64);
            let read = volume.read_now("reading an L2 table", at, IoBufMut::new(bytes))?;
            Some(read.map(|()| {
                patches::lay_over(bytes, at, &changed);
                self.read_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            }))
        };
        if let Some(sector) = once
            && !self.geometry.extended_l2
            && !self.slices.admits(key)
        {
            let (within, bytes) = sector.turn_to(index);
            return Some(read(place.0 + within, bytes)?.map(|()| Loaded::Sector(index)));
        }
        let mut entries = self.buffer();
        Some(read(place.0, entries.as_mut_bytes())?.map(|()| {
            self.loaded(key, entries);
            Loaded::Slice
        }))
    }

    fn absent<D: BlockDevice>(&self, l1: &L1Table, key: u64, volume: &Volume<D>) -> Result<Absent> {
        Ok(self.place(l1, key, volume)?.map_or(Absent::NoTable, Absent::At))
    }

    fn buffer(&self) -> Box<[u64]> {
        let buffer = self.buffers.lock().pop();
        buffer.unwrap_or_else(|| vec![0; (self.slice_size / 8) as usize].into_boxed_slice())
    }

    fn loaded(&self, key: u64, entries: Box<[u64]>) -> Option<Arc<Slice>> {
        let slice = self.slices.insert(key, &entries);
        let mut buffers = self.buffers.lock();
        if buffers.len() < LOADING {
            buffers.push(entries);
        }
        slice
    }

    /// A look, without a lock, at the slice that maps a guest cluster, and the cluster's index in it; `None` if it is not in
    /// memory, and always if entries are extended. The caller must be in flight.
    #[inline]
    pub(crate) fn view(&self, guest: GuestCluster) -> Option<(View<'_>, usize)> {
        if self.geometry.extended_l2 {
            return None;
        }
        let (key, index) = self.locate(guest);
        Some((self.slices.view(key)?, index))
    }

    /// Whether a look finds the slice that maps a guest cluster.
    pub(crate) fn is_seen(&self, guest: GuestCluster) -> bool {
        if self.geometry.extended_l2 { self.cached(guest).is_some() } else { self.view(guest).is_some() }
    }

    /// As [`slice`](Self::slice), if the slice is in memory.
    pub(crate) fn cached(&self, guest: GuestCluster) -> Option<(Arc<Slice>, usize)> {
        let (key, index) = self.locate(guest);
        Some((self.slices.get(key)?, index))
    }

    /// As [`cached`](Self::cached), locked for changes, which [`will_change`](Self::will_change) is to be told of. `None` also
    /// for a slice on the side, and if `may`, which is asked under the lock, does not allow it.
    pub(crate) fn lock(&self, guest: GuestCluster, may: impl FnOnce() -> bool) -> Option<LockedSlice<'_>> {
        let (key, index) = self.locate(guest);
        let (slice, entries) = self.slices.lock(key, may)?;
        Some((slice, entries, index))
    }

    /// Waits for each who has locked a slice where it is, or was about to.
    pub(crate) fn pass_locks(&self) {
        self.slices.pass_locks();
    }

    /// The slice if it is in memory; does not count as a use.
    pub(crate) fn peek(&self, key: u64) -> Option<Arc<Slice>> {
        self.slices.get(key)
    }

    /// Where a slice is on disk.
    fn place<D: BlockDevice>(&self, l1: &L1Table, key: u64, volume: &Volume<D>) -> Result<Option<HostOffset>> {
        let first = key * self.per_slice();
        let per_table = self.geometry.l2_entries();
        let table = l1.get(first / per_table, volume)?;
        Ok(table.map(|t| HostOffset(t.host.0 + first % per_table * self.entry_size())))
    }

    /// Locks a slice for changes, which will be written back by the next commit.
    pub(crate) fn modify<'a>(&self, slice: &'a Arc<Slice>) -> Changing<'a> {
        let entries = slice.write();
        self.will_change(slice);
        entries
    }

    /// Changes an entry of a table that a snapshot shares: it is not written back with the slice, but as a patch.
    pub(crate) fn amend(&self, slice: &Arc<Slice>, index: usize, change: impl FnOnce(Entry) -> Entry) {
        let mut entries = slice.write();
        let entry = entries.get(index);
        entries.set(index, change(entry));
    }

    /// Puts a slice on the dirty list, which the next commit writes back. To be called before a change, under the slice's lock.
    pub(crate) fn will_change(&self, slice: &Arc<Slice>) {
        // It is taken off the list under the lock, too, so that a look tells.
        if !slice.listed.load(Ordering::Acquire) && !slice.listed.swap(true, Ordering::AcqRel) {
            let mut dirty = self.dirty.lock();
            dirty.insert(slice.key(), slice.clone());
            self.dirty_len.store(dirty.len(), Ordering::Relaxed);
        }
    }

    /// Keeps everybody from reading slices into memory. What was read before is there to be forgotten.
    pub(crate) async fn keep_out(&self) -> Vec<AsyncMutexGuard<'_, ()>> {
        let mut held = Vec::with_capacity(LOADING);
        // In the order in which a survey takes them.
        for lock in &self.loading {
            held.push(lock.lock().await);
        }
        held
    }

    /// Forgets the slices of these guest clusters: the disk was made smaller, or its tables were exchanged. Nobody may be
    /// changing them.
    pub(crate) fn forget(&self, guest: Range<u64>) {
        let keys = guest.start / self.per_slice()..guest.end.div_ceil(self.per_slice());
        let mut dirty = self.dirty.lock();
        let gone: Vec<u64> = dirty.range(keys.clone()).map(|(&k, _)| k).collect();
        for slice in gone.iter().filter_map(|key| dirty.remove(key)) {
            slice.listed.store(false, Ordering::Release);
            slice.sectors.store(0, Ordering::Relaxed);
        }
        self.dirty_len.store(dirty.len(), Ordering::Relaxed);
        drop(dirty);
        self.slices.forget(keys);
    }

    /// Copies what changed of every dirty slice, to be written; they count as clean from now on, but are held until the
    /// commit is done.
    pub(super) fn capture<D: BlockDevice>(
        &self,
        l1: &L1Table,
        mirrors: &Mirrors,
        volume: &Volume<D>,
    ) -> Result<(Writes, Captured)> {
        let listed = {
            let mut dirty = self.dirty.lock();
            self.dirty_len.store(0, Ordering::Relaxed);
            std::mem::take(&mut *dirty)
        };
        let mut captured = Captured(Vec::with_capacity(listed.len()));
        let mut writes = Writes::default();
        let mut failure = None;
        let listed: Vec<_> = listed.into_values().collect();
        // Slices of one table that follow one another.
        let follows = |before: &Arc<Slice>, slice: &Arc<Slice>| {
            slice.key() == before.key() + 1 && !slice.key().is_multiple_of(self.slices_per_table())
        };
        for run in listed.chunk_by(follows) {
            for (i, slice) in run.iter().enumerate() {
                let place = match self.place(l1, slice.key(), volume) {
                    Ok(place) => place,
                    Err(e) => {
                        failure.get_or_insert(e);
                        None
                    }
                };
                let sectors = {
                    let entries = slice.read();
                    // Under the lock: a change is either in the copy, or puts the slice on the list again.
                    slice.listed.store(false, Ordering::Release);
                    let sectors = slice.sectors.swap(0, Ordering::Relaxed);
                    if let (Some(place), Some(range)) = (place, self.range_of(sectors, (i > 0, i + 1 < run.len()))) {
                        let in_table = place.0 & (self.geometry.cluster_size() - 1);
                        let tables: Vec<_> = mirrors.places(HostOffset(place.0 - in_table)).collect();
                        // What goes to two places is written slice by slice.
                        let slices = if tables.len() == 1 { run.len() - i } else { 1 };
                        let room = slices * range.len() * SECTOR;
                        for table in tables {
                            let place = table.0 + in_table + (range.start * SECTOR) as u64;
                            writes.at(place, room).extend(entries.sectors(range.clone()));
                        }
                    }
                    sectors
                };
                if broken(Mutation::CleanAfterCopy) {
                    slice.sectors.store(0, Ordering::Relaxed);
                    slice.listed.store(false, Ordering::Release);
                }
                captured.0.push((slice.clone(), sectors));
            }
        }
        match failure {
            None => Ok((writes, captured)),
            Some(e) => {
                self.restore(captured);
                Err(e)
            }
        }
    }

    /// The sectors to be written where those whose bits are set have changed. What is between them is what the disk has, so it
    /// may be written again; and so may what is between them and a neighbour that is on the list, before or after: fewer,
    /// longer writes.
    fn range_of(&self, changed: u8, (before, after): (bool, bool)) -> Option<Range<usize>> {
        let all = self.slice_size as usize / SECTOR;
        let first = if before { 0 } else { changed.trailing_zeros() as usize };
        let end = if after { all } else { (u8::BITS - changed.leading_zeros()) as usize };
        (changed != 0).then_some(first..end)
    }

    fn slices_per_table(&self) -> u64 {
        self.geometry.cluster_size() / self.slice_size
    }

    /// The captured slices could not be written.
    pub(super) fn restore(&self, captured: Captured) {
        for (slice, sectors) in captured.0 {
            let _entries = slice.write();
            // One that was forgotten meanwhile is not to come back.
            if self.slices.get(slice.key()).is_some_and(|s| Arc::ptr_eq(&s, &slice)) {
                slice.sectors.fetch_or(sectors, Ordering::Relaxed);
                self.will_change(&slice);
            }
        }
    }

    /// The words of a whole L2 table as they are now, from memory where they are cached. They may change at once: for
    /// planning only.
    pub(crate) async fn survey<D: BlockDevice>(
        &self,
        volume: &Volume<D>,
        table: HostOffset,
        l1_index: u64,
        words: &mut Vec<u64>,
    ) -> Result<()> {
        let per_slice = (self.slice_size / 8) as usize;
        words.resize(self.geometry.entries_per_cluster() as usize, 0);
        let (mut key, mut at) = (l1_index * self.geometry.l2_entries() / self.per_slice(), table.0);
        for part in words.chunks_mut(per_slice * SURVEYED) {
            let keys = key..key + part.len().div_ceil(per_slice) as u64;
            (key, at) = (keys.end, self.survey_some(volume, keys, at, part).await?);
        }
        Ok(())
    }

    /// The words of at most [`SURVEYED`] slices, the first of which is on disk at `at`. Returns where the next one is.
    async fn survey_some<D: BlockDevice>(
        &self,
        volume: &Volume<D>,
        keys: Range<u64>,
        mut at: u64,
        words: &mut [u64],
    ) -> Result<u64> {
        let per_slice = (self.slice_size / 8) as usize;
        // Nobody reads these slices into memory meanwhile. So one that is not there stays clean, and no commit writes what is
        // read here. Whoever else takes one of these locks takes no second one.
        let mut locks: Vec<_> = keys.clone().map(|key| key as usize % LOADING).collect();
        locks.sort_unstable();
        let mut held = Vec::with_capacity(locks.len());
        for lock in locks {
            held.push(self.loading[lock].lock().await);
        }
        let slices: Vec<_> = keys.map(|key| self.peek(key)).collect();
        let mut words = words;
        for run in slices.chunk_by(|a, b| a.is_none() && b.is_none()) {
            let len = (run.len() * per_slice).min(words.len());
            let (part, rest) = std::mem::take(&mut words).split_at_mut(len);
            match run {
                [Some(slice)] => {
                    let cached = slice.read();
                    part.iter_mut().enumerate().for_each(|(i, w)| *w = cached.word(i));
                }
                _ => {
                    volume.read("reading an L2 table", at, IoBufMut::new(part.as_mut_bytes())).await?;
                    self.read_bytes.fetch_add(size_of_val(part) as u64, Ordering::Relaxed);
                    part.iter_mut().for_each(|w| *w = u64::from_be(*w));
                }
            }
            (words, at) = (rest, at + size_of_val(part) as u64);
        }
        Ok(at)
    }

    /// An error about the entry of a guest cluster, placed in the file.
    pub(crate) fn invalid_entry<D: BlockDevice>(
        &self,
        volume: &Volume<D>,
        l1: &L1Table,
        guest: GuestCluster,
        entry: Entry,
        reason: &str,
    ) -> Error {
        let slice = self.place(l1, guest.0 / self.per_slice(), volume).ok().flatten();
        let at = slice.map_or(0, |s| s.0 + guest.0 % self.per_slice() * self.entry_size());
        Error::invalid("L2 table entry", at, format!("{}: {reason}", named(entry)))
    }
}

/// An entry, for a message.
fn named(entry: Entry) -> String {
    match entry.subclusters.0 {
        0 => format!("{:#x}", entry.word),
        bitmap => format!("{:#x} with subclusters {bitmap:#x}", entry.word),
    }
}
