//! Persistent dirty bitmaps: which parts of the disk were written since somebody last looked, for incremental backups.
//!
//! While an image is open for writing its bitmaps are in memory, and marked as in use in the file: whatever happens, nobody
//! believes what the file says of them. Closing the image stores them and takes the mark away. Moving clusters changes no
//! contents, so it marks nothing.

mod load;
mod slot;
mod store;

use std::ops::Range;

use roaring::RoaringTreemap;

use super::Image;
use super::obstacles::Obstacle;
use crate::clusters::set::ClusterSet;
use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::format::bitmap::{self, TableEntry};
use crate::format::extension::MAX_BITMAPS;
use crate::sync::{Mutex, MutexGuard};
use crate::units::{Geometry, HostOffset};

/// What a bitmap is. Sizes are in bytes of the virtual disk.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BitmapInfo {
    /// Its name; bytes that are not UTF-8 are replaced.
    pub name: String,
    /// How much of the disk one bit stands for.
    pub granularity: u64,
    /// Whether writes are recorded.
    pub recording: bool,
    /// Whether it was left behind by somebody who did not store it: it says nothing, and can only be removed.
    pub inconsistent: bool,
    /// How much of the disk is marked, in whole units of the granularity.
    pub dirty: u64,
}

/// The bitmaps of an open image.
#[derive(Default)]
pub(crate) struct Bitmaps {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    bitmaps: Vec<Bitmap>,
    /// Where the directory is, and its size in bytes; `None` if the image has none.
    directory: Option<(HostOffset, u64)>,
    /// Whether the directory on disk names other bitmaps, or other tables, than those in memory.
    directory_stale: bool,
    /// Clusters that were part of bitmaps which are gone: free when the directory is rewritten.
    abandoned: ClusterSet,
    /// How large the disk is about to become; 0 if it is not.
    coming_size: u64,
}

/// The disk is about to become larger: until this is dropped, no bitmap is added that would be too fine for it then.
#[must_use]
pub(super) struct Coming<'a>(&'a Bitmaps);

impl Drop for Coming<'_> {
    fn drop(&mut self) {
        self.0.state.lock().coming_size = 0;
    }
}

struct Bitmap {
    name: Vec<u8>,
    granularity_bits: u8,
    recording: bool,
    inconsistent: bool,
    /// Units of the granularity that are marked.
    marks: RoaringTreemap,
    /// Whether the marks, or what the entry says, have changed since the bitmap was loaded.
    changed: bool,
    /// Flags and extra data that mean nothing to us.
    kept_flags: u32,
    extra: Vec<u8>,
    /// Where it is stored.
    place: Option<Place>,
}

/// Where a bitmap is stored. While the image is open, the directory says that it is in use.
#[derive(Clone, Debug)]
struct Place {
    table: HostOffset,
    entries: Vec<TableEntry>,
}

impl Place {
    /// Whether any of it lies at or past cluster `limit`.
    fn reaches(&self, limit: u64, geometry: Geometry) -> bool {
        self.clusters(geometry).max().is_some_and(|last| last.0 >= limit)
    }

    /// The clusters of the table and of the data.
    fn clusters(&self, geometry: Geometry) -> ClusterSet {
        let mut all: ClusterSet = self
            .entries
            .iter()
            .filter_map(|e| if let TableEntry::Data(at) = e { Some(geometry.host_cluster(*at)) } else { None })
            .collect();
        let first = geometry.host_cluster(self.table).0;
        all.insert_range(first..first + geometry.clusters_for(self.entries.len() as u64 * 8));
        all
    }
}

impl Bitmap {
    /// All but the marks.
    fn without_marks(&self) -> Bitmap {
        Bitmap {
            name: self.name.clone(),
            granularity_bits: self.granularity_bits,
            recording: self.recording,
            inconsistent: self.inconsistent,
            marks: RoaringTreemap::new(),
            changed: self.changed,
            kept_flags: self.kept_flags,
            extra: self.extra.clone(),
            place: self.place.clone(),
        }
    }

    /// The end of the run of marks that `first` begins. A run may be of any length, and every write that is recorded waits for the
    /// lock: so it is not walked through.
    fn run_end(&self, first: u64) -> u64 {
        // All of `first..low` is marked; of `low..low + step`, when the loop ends, not all.
        let (mut low, mut step) = (first + 1, 1);
        while self.marks.contains_range(low..low + step) {
            low += step;
            step *= 2;
        }
        let mut high = low + step;
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if self.marks.contains_range(low..middle) {
                low = middle;
            } else {
                high = middle;
            }
        }
        low
    }

    /// The units of the granularity that bytes `offset..offset + length` of the disk touch.
    fn units(&self, offset: u64, length: u64) -> Range<u64> {
        offset >> self.granularity_bits..offset.saturating_add(length).div_ceil(1 << self.granularity_bits)
    }

    fn mark(&mut self, units: Range<u64>) {
        self.changed |= self.marks.insert_range(units) > 0;
    }

    fn info(&self) -> BitmapInfo {
        BitmapInfo {
            name: String::from_utf8_lossy(&self.name).into_owned(),
            granularity: 1 << self.granularity_bits,
            recording: self.recording,
            inconsistent: self.inconsistent,
            dirty: self.marks.len() << self.granularity_bits,
        }
    }
}

impl State {
    fn find(&mut self, name: &str) -> Result<&mut Bitmap> {
        let found = self.bitmaps.iter_mut().find(|b| b.name == name.as_bytes());
        found.ok_or_else(|| bad("name", format!("there is no bitmap {name:?}")))
    }

    /// The bitmap if it says something.
    fn usable(&mut self, name: &str) -> Result<&mut Bitmap> {
        let bitmap = self.find(name)?;
        if bitmap.inconsistent {
            return Err(bad(
                "name",
                format!("the bitmap {name:?} was not stored by its last user: it can only be removed"),
            ));
        }
        Ok(bitmap)
    }
}

fn bad(name: &str, reason: String) -> Error {
    Error::BadOption { name: name.to_owned(), reason }
}

/// Whether a bitmap of this granularity may exist on a disk of so many bytes.
fn fits(size: u64, granularity_bits: u8, geometry: Geometry) -> bool {
    let clusters = bitmap::data_clusters(size, granularity_bits, geometry);
    clusters << geometry.cluster_bits <= bitmap::MAX_DATA
}

impl Bitmaps {
    /// The disk is to have `size` bytes. One at a time says so: the one who has the recycler's turn.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if there is a bitmap too fine for that: neither we nor QEMU would open the image.
    pub(super) fn will_reach(&self, size: u64, geometry: Geometry) -> Result<Coming<'_>> {
        let mut state = self.state.lock();
        if let Some(b) = state.bitmaps.iter().find(|b| !fits(size, b.granularity_bits, geometry)) {
            let (name, unit) = (String::from_utf8_lossy(&b.name), 1u64 << b.granularity_bits);
            let what = format!("a disk of {size} bytes with the bitmap {name:?} of one bit for each {unit}");
            return Err(Error::unsupported(what));
        }
        state.coming_size = size;
        Ok(Coming(self))
    }

    /// The guest is about to change bytes `offset..offset + length` of the disk. To be called before they change, unless no
    /// bitmap records changes.
    pub(crate) fn will_change(&self, offset: u64, length: u64) {
        for bitmap in self.state.lock().bitmaps.iter_mut().filter(|b| b.recording) {
            bitmap.mark(bitmap.units(offset, length));
        }
    }

    /// The disk has `size` bytes from now on. What is new was not written.
    pub(super) fn resized(&self, size: u64) {
        for bitmap in &mut self.state.lock().bitmaps {
            let end = size.div_ceil(1 << bitmap.granularity_bits);
            bitmap.marks.remove_range(end..);
            bitmap.changed = true;
        }
    }
}

/// Calls for whoever makes incremental backups. When one that adds, clears or turns on a bitmap returns, the requests that were
/// under way when it was made have ended: what they wrote is there to be backed up, and what comes later is marked. What they change becomes durable when the image is closed; after a crash the
/// bitmaps of an image that was open for writing are inconsistent.
impl<D: BlockDevice> Image<D> {
    /// After a change of the bitmaps, under their lock.
    fn note_recording(&self, state: &State) {
        if state.bitmaps.iter().any(|b| b.recording) {
            self.obstacles.put(Obstacle::Recording);
        } else {
            self.obstacles.take(Obstacle::Recording);
        }
    }

    /// The persistent bitmaps, in the order of the image's directory.
    ///
    /// # Errors
    /// [`Error::Closed`]; on a read-only handle [`Error::Io`] and [`Error::Invalid`], since they are read from the file.
    pub async fn bitmaps(&self) -> Result<Vec<BitmapInfo>> {
        if self.is_closed() {
            return Err(Error::Closed);
        }
        if self.options.read_only {
            return Ok(self.read_bitmaps().await?.iter().map(Bitmap::info).collect());
        }
        Ok(self.bitmaps.state.lock().bitmaps.iter().map(Bitmap::info).collect())
    }

    /// The first part of the disk from byte `from` on that a bitmap marks: a range of bytes, or `None`. Only on a handle that
    /// may write, whose bitmaps are in memory.
    ///
    /// # Errors
    /// As [`add_bitmap`](Self::add_bitmap).
    pub fn next_dirty(&self, name: &str, from: u64) -> Result<Option<Range<u64>>> {
        let mut state = self.writable_bitmaps()?;
        let bitmap = state.usable(name)?;
        let bits = bitmap.granularity_bits;
        let size = self.virtual_size();
        let mut marks = bitmap.marks.iter();
        marks.advance_to(from >> bits);
        let Some(first) = marks.next() else { return Ok(None) };
        let start = (first << bits).max(from);
        // The last unit may reach past the end; while the disk becomes smaller, there are marks past it.
        if start >= size {
            return Ok(None);
        }
        Ok(Some(start..(bitmap.run_end(first) << bits).min(size)))
    }

    /// Adds an empty bitmap. `granularity` is how much of the disk one bit stands for, a power of two from 512 bytes to
    /// 2 GiB; `recording`: it marks what is written from now on, now and whenever the image is opened.
    ///
    /// # Errors
    /// [`Error::BadOption`] for a name that is taken, empty or longer than 1023 bytes, or an unusable granularity;
    /// [`Error::Unsupported`] in version 2, or beyond 65,535 bitmaps; [`Error::ReadOnly`], [`Error::Closed`].
    pub async fn add_bitmap(&self, name: &str, granularity: u64, recording: bool) -> Result<()> {
        if self.meta.version < 3 {
            return Err(Error::unsupported("bitmaps in a version 2 image"));
        }
        if name.is_empty() || name.len() > bitmap::MAX_NAME {
            return Err(bad("name", format!("is {} bytes long; 1 to {} are allowed", name.len(), bitmap::MAX_NAME)));
        }
        let bits = granularity.trailing_zeros() as u8;
        if !granularity.is_power_of_two() || !bitmap::GRANULARITY_BITS.contains(&bits) {
            return Err(bad("granularity", format!("is {granularity}, not a power of two from 512 bytes to 2 GiB")));
        }
        // Fails now rather than when the image is closed.
        self.ensure_slot().await?;
        {
            let mut state = self.writable_bitmaps()?;
            if state.bitmaps.len() as u64 >= u64::from(MAX_BITMAPS) {
                return Err(Error::unsupported(format!("more than {MAX_BITMAPS} bitmaps")));
            }
            if state.bitmaps.iter().any(|b| b.name == name.as_bytes()) {
                return Err(bad("name", format!("there is a bitmap {name:?} already")));
            }
            if !fits(self.virtual_size().max(state.coming_size), bits, self.meta.geometry) {
                return Err(bad("granularity", format!("{granularity} is too fine for a disk of this size")));
            }
            state.bitmaps.push(Bitmap {
                name: name.as_bytes().to_vec(),
                granularity_bits: bits,
                recording,
                inconsistent: false,
                marks: RoaringTreemap::new(),
                changed: true,
                kept_flags: 0,
                extra: Vec::new(),
                place: None,
            });
            state.directory_stale = true;
            self.note_recording(&state);
        }
        self.epochs.grace().await;
        Ok(())
    }

    /// Removes a bitmap, also an inconsistent one.
    ///
    /// # Errors
    /// [`Error::BadOption`] if there is none; [`Error::ReadOnly`], [`Error::Closed`].
    pub fn remove_bitmap(&self, name: &str) -> Result<()> {
        let mut state = self.writable_bitmaps()?;
        state.find(name)?;
        let geometry = self.meta.geometry;
        let State { bitmaps, abandoned, directory_stale, .. } = &mut *state;
        bitmaps.retain(|b| {
            let gone = b.name == name.as_bytes();
            if let (true, Some(place)) = (gone, &b.place) {
                abandoned.add_all(&place.clusters(geometry));
            }
            !gone
        });
        *directory_stale = true;
        self.note_recording(&state);
        Ok(())
    }

    /// Takes all marks off a bitmap.
    ///
    /// # Errors
    /// As [`remove_bitmap`](Self::remove_bitmap); [`Error::BadOption`] for an inconsistent bitmap.
    pub async fn clear_bitmap(&self, name: &str) -> Result<()> {
        {
            let mut state = self.writable_bitmaps()?;
            let bitmap = state.usable(name)?;
            bitmap.marks.clear();
            bitmap.changed = true;
        }
        self.epochs.grace().await;
        Ok(())
    }

    /// Lets a bitmap record writes from now on, or stop to.
    ///
    /// # Errors
    /// As [`clear_bitmap`](Self::clear_bitmap).
    pub async fn record_bitmap(&self, name: &str, recording: bool) -> Result<()> {
        {
            let mut state = self.writable_bitmaps()?;
            let bitmap = state.usable(name)?;
            bitmap.changed |= bitmap.recording != recording;
            bitmap.recording = recording;
            self.note_recording(&state);
        }
        self.epochs.grace().await;
        Ok(())
    }

    /// Marks in `target` whatever `source` marks; their granularities may differ.
    ///
    /// # Errors
    /// As [`clear_bitmap`](Self::clear_bitmap).
    pub fn merge_bitmap(&self, target: &str, source: &str) -> Result<()> {
        let mut state = self.writable_bitmaps()?;
        let from = state.usable(source)?;
        let (bits, marks) = (from.granularity_bits, from.marks.clone());
        let size = self.virtual_size();
        let target = state.usable(target)?;
        if target.granularity_bits == bits {
            target.marks |= marks;
        } else {
            for mark in marks {
                let offset = mark << bits;
                target.mark(target.units(offset, (1 << bits).min(size.saturating_sub(offset))));
            }
        }
        target.changed = true;
        Ok(())
    }

    fn writable_bitmaps(&self) -> Result<MutexGuard<'_, State>> {
        self.ensure_writable()?;
        Ok(self.bitmaps.state.lock())
    }
}
