//! Storing bitmaps when the image is closed, and giving their clusters back while they are in memory.
//!
//! Durable steps: `data, new tables, a new directory, all counted` → **B** → `tables that stay at their place` → **B** → `the
//! directory, or the extension that names it, says that nobody uses the bitmaps` → **B** → what is not used any more is freed.
//!
//! - Cut before the last of these steps: the directory says that the bitmaps are in use, so nobody believes them. A table
//!   that is half rewritten names, for each of its entries, the old cluster or the new one, and both are counted; an entry
//!   keeps its cluster as long as it needs one, so no two entries ever name the same.
//! - Cut after it: tables and data are durable, and right.

use super::load::{Part, directory};
use super::{Bitmap, Place, State};
use crate::buf::IoBuf;
use crate::clusters::allocator::Allocation;
use crate::clusters::set::ClusterSet;
use crate::device::BlockDevice;
use crate::error::Result;
use crate::format::bitmap::{self, TableEntry};
use crate::image::Image;
use crate::metadata::commit::HeaderInDoubt;
use crate::units::{Geometry, HostOffset};

/// What storing has taken, and what it leaves behind.
#[derive(Default)]
struct Ledger<'a> {
    taken: Vec<Allocation<'a>>,
    freed: ClusterSet,
    /// Tables at places that the directory on disk names already.
    in_place: Vec<(HostOffset, Vec<u8>)>,
    /// Whether some table is at a place that the directory on disk does not name.
    moved: bool,
}

impl<D: BlockDevice> Image<D> {
    /// At closing: stores the bitmaps, and marks them as not in use. After an error they stay marked, and nobody will believe
    /// them. Nobody else is at work.
    pub(in crate::image) async fn store_bitmaps(&self) -> Result<()> {
        let (mut bitmaps, stale) = {
            let mut state = self.bitmaps.state.lock();
            if state.directory.is_none() && state.bitmaps.is_empty() {
                return Ok(());
            }
            (std::mem::take(&mut state.bitmaps), state.directory_stale)
        };
        if stale || bitmaps.iter().any(|b| b.changed) {
            self.prepare_changes().await?;
        }
        let mut ledger = Ledger { moved: stale, ..Ledger::default() };
        for bitmap in &mut bitmaps {
            self.store_bitmap(bitmap, &mut ledger).await?;
        }
        self.publish_bitmaps(bitmaps, false, ledger).await
    }

    /// While the bitmaps are in memory, what is stored of them is of no use to anybody: if any of it lies at or past cluster
    /// `limit`, and there is room below, it is replaced by the little that says that there are bitmaps in use.
    pub(crate) async fn release_bitmaps(&self, limit: u64) -> Result<()> {
        let geometry = self.meta.geometry;
        let mut bitmaps: Vec<Bitmap> = {
            let state = self.bitmaps.state.lock();
            if !state.bitmaps.iter().filter_map(|b| b.place.as_ref()).any(|p| p.reaches(limit, geometry)) {
                return Ok(());
            }
            state.bitmaps.iter().map(Bitmap::without_marks).collect()
        };
        let mut ledger = Ledger { moved: true, ..Ledger::default() };
        for bitmap in &mut bitmaps {
            let hole = self.clusters.allocate_hole(&self.volume, &self.meta, 1, limit).await?;
            let Some(table) = hole else { return Ok(()) };
            if let Some(old) = bitmap.place.take() {
                ledger.freed.add_all(&old.clusters(geometry));
            }
            let at = geometry.host_offset(table.first());
            bitmap.place = Some(Place { table: at, entries: vec![TableEntry::Zeroes] });
            ledger.taken.push(table);
        }
        self.publish_bitmaps(bitmaps, true, ledger).await
    }

    /// Writes what has changed of a bitmap, as far as that may be done while the directory on disk is as it is.
    async fn store_bitmap<'a>(&'a self, bitmap: &mut Bitmap, ledger: &mut Ledger<'a>) -> Result<()> {
        let geometry = self.meta.geometry;
        let units = self.virtual_size().div_ceil(1 << bitmap.granularity_bits);
        let needed = bitmap::data_clusters(self.virtual_size(), bitmap.granularity_bits, geometry);
        if bitmap
            .place
            .as_ref()
            .is_some_and(|p| !bitmap.changed && (p.entries.len() as u64 == needed || bitmap.inconsistent))
        {
            return Ok(());
        }
        let old = bitmap.place.take();
        let (same, other) = match old {
            Some(place) if place.entries.len() as u64 == needed => (Some(place), None),
            other => (None, other),
        };
        if let Some(place) = other {
            ledger.freed.add_all(&place.clusters(geometry));
        }
        let table = same.as_ref().map(|p| p.table);
        let mut entries = same.map_or_else(|| vec![TableEntry::Zeroes; needed as usize], |p| p.entries);
        for (index, entry) in (0..).zip(&mut entries) {
            let had = if let TableEntry::Data(at) = *entry { Some(at) } else { None };
            let (new, kept) = match bitmap.part(index, units, geometry) {
                Part::Zeroes => (TableEntry::Zeroes, false),
                Part::Ones => (TableEntry::Ones, false),
                Part::Mixed(bytes) => {
                    let at = match had {
                        Some(at) => at,
                        None => self.take_for_bitmaps(1, ledger).await?,
                    };
                    self.volume.write("writing a bitmap", at.0, IoBuf::new(&bytes)).await?;
                    (TableEntry::Data(at), true)
                }
            };
            if let (Some(at), false) = (had, kept) {
                ledger.freed.insert(geometry.host_cluster(at));
            }
            *entry = new;
        }
        let mut bytes: Vec<u8> = entries.iter().flat_map(|e| e.encode().to_be_bytes()).collect();
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        let table = match table {
            Some(table) => {
                ledger.in_place.push((table, bytes));
                table
            }
            None => {
                let table = self.take_for_bitmaps(geometry.clusters_for(bytes.len() as u64), ledger).await?;
                self.volume.write("writing a bitmap table", table.0, IoBuf::new(&bytes)).await?;
                ledger.moved = true;
                table
            }
        };
        bitmap.place = Some(Place { table, entries });
        Ok(())
    }

    /// Takes consecutive clusters, as low in the file as possible.
    async fn take_for_bitmaps<'a>(&'a self, count: u64, ledger: &mut Ledger<'a>) -> Result<HostOffset> {
        let end = self.clusters.lock().end;
        let hole = self.clusters.allocate_hole(&self.volume, &self.meta, count, end).await?;
        let taken = match hole {
            Some(hole) => hole,
            None => self.clusters.allocate_at_end(&self.volume, &self.meta, count).await?,
        };
        let at = self.meta.geometry.host_offset(taken.first());
        ledger.taken.push(taken);
        Ok(at)
    }

    /// Makes durable what was stored, and lets the image name it; with `in_use` the memory then has the bitmaps at their new
    /// places. Dropped before the header is written, it has changed nothing.
    async fn publish_bitmaps<'a>(&'a self, bitmaps: Vec<Bitmap>, in_use: bool, mut ledger: Ledger<'a>) -> Result<()> {
        let geometry = self.meta.geometry;
        let old = self.bitmaps.state.lock().directory;
        let new = directory(&bitmaps, in_use);
        let keep = old.filter(|&(_, size)| !ledger.moved && size.next_multiple_of(8) == new.size);
        let mut at = keep.map(|(at, _)| at);
        if at.is_none() && !bitmaps.is_empty() {
            let place = self.take_for_bitmaps(geometry.clusters_for(new.padded.len() as u64), &mut ledger).await?;
            self.volume.write("writing the bitmap directory", place.0, IoBuf::new(&new.padded)).await?;
            at = Some(place);
        }
        if !ledger.taken.is_empty() || !ledger.in_place.is_empty() {
            self.commit().await?;
        }
        let slot = if keep.is_none() { Some(self.find_slot().await?) } else { None };
        // From here on what is on disk may name what was taken: whatever fails, it is not given to anybody else.
        for taken in ledger.taken {
            self.meta.tables.lock().insert_range(taken.first().0..taken.first().0 + taken.len());
            taken.linked();
        }
        if !ledger.in_place.is_empty() {
            for (table, bytes) in &ledger.in_place {
                self.volume.write("writing a bitmap table", table.0, IoBuf::new(bytes)).await?;
            }
            self.volume.flush().await?;
        }
        // If the header names another directory than the memory does, closing would store the bitmaps where nobody finds them.
        let mut doubt = HeaderInDoubt { volume: &self.volume, settled: slot.is_none() };
        match (slot, at) {
            (Some(slot), Some(at)) => {
                self.name_directory(slot, bitmaps.len() as u32, (at, new.size), old.is_some()).await?;
            }
            (Some(slot), None) => self.name_no_directory(slot).await?,
            // Where it was: each of its sectors says what it said, or that nobody uses the bitmaps, and both are right now.
            (None, Some(at)) => {
                self.volume.write("writing the bitmap directory", at.0, IoBuf::new(&new.padded)).await?;
                self.volume.flush().await?;
            }
            (None, None) => {}
        }
        // No await from here on: the memory follows the header. Nothing durable names these any more.
        let mut freed = ledger.freed;
        {
            let mut state = self.bitmaps.state.lock();
            freed.add_all(&std::mem::take(&mut state.abandoned));
            state.directory = at.map(|at| (at, new.size));
            state.directory_stale = false;
            if in_use {
                // Together: a bitmap that is removed gives back the places that it has, and each must be given back once.
                state.move_bitmaps(bitmaps, geometry);
            }
        }
        doubt.settled = true;
        if let (Some((old, size)), None) = (old, keep) {
            let first = geometry.host_cluster(old).0;
            freed.insert_range(first..first + geometry.clusters_for(size));
        }
        self.meta.tables.lock().remove_all(&freed);
        self.clusters.lock().unlinked.clusters.add_all(&freed);
        Ok(())
    }
}

impl State {
    /// The directory on disk names these bitmaps, at these places.
    fn move_bitmaps(&mut self, placed: Vec<Bitmap>, geometry: Geometry) {
        // Some may have been removed or added meanwhile.
        self.directory_stale = !self.bitmaps.iter().map(|b| &b.name).eq(placed.iter().map(|b| &b.name));
        for placed in placed {
            match self.bitmaps.iter_mut().find(|b| b.name == placed.name) {
                Some(bitmap) => {
                    bitmap.place = placed.place;
                    // What was stored is gone.
                    bitmap.changed = true;
                }
                None => {
                    if let Some(place) = placed.place {
                        self.abandoned.add_all(&place.clusters(geometry));
                    }
                }
            }
        }
    }
}
