//! Reading bitmaps, and marking them as in use.

use roaring::{RoaringBitmap, RoaringTreemap};

use super::{Bitmap, Place};
use crate::buf::{IoBuf, IoBufMut};
use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::format::bitmap::{self, Entry, TableEntry, flags};
use crate::format::header::BitmapsExtension;
use crate::image::Image;
use crate::units::{Geometry, HostOffset};

impl<D: BlockDevice> Image<D> {
    /// At opening for writing: reads the bitmaps, takes note of where they are, and marks them as in use.
    ///
    /// Cut while they are being marked: some are, some are not, and nothing has changed yet, so both are right.
    pub(in crate::image) async fn load_bitmaps(&self) -> Result<()> {
        let Some(extension) = self.header.bitmaps.filter(|_| self.header.bitmaps_consistent()) else { return Ok(()) };
        let bitmaps = self.read_bitmaps().await?;
        self.note_bitmaps(&bitmaps)?;
        let marked = directory(&bitmaps, true);
        let at = extension.directory_offset.0;
        self.volume.write("marking the bitmaps as in use", at, IoBuf::new(&marked.padded)).await?;
        self.volume.flush().await?;
        let mut state = self.bitmaps.state.lock();
        state.bitmaps = bitmaps;
        state.directory = Some((extension.directory_offset, extension.directory_size));
        self.note_recording(&state);
        Ok(())
    }

    /// Reads the bitmaps, with their data.
    pub(super) async fn read_bitmaps(&self) -> Result<Vec<Bitmap>> {
        let Some(extension) = self.header.bitmaps.filter(|_| self.header.bitmaps_consistent()) else {
            return Ok(Vec::new());
        };
        let mut bitmaps = Vec::new();
        for entry in self.read_directory(extension).await? {
            bitmaps.push(self.read_bitmap(entry).await?);
        }
        Ok(bitmaps)
    }

    async fn read_directory(&self, extension: BitmapsExtension) -> Result<Vec<Entry>> {
        // The header was refused if the directory is not in the file whole, so this is bounded by the file.
        let mut bytes = vec![0; extension.directory_size as usize];
        let at = extension.directory_offset.0;
        self.volume.read("reading the bitmap directory", at, IoBufMut::new(&mut bytes)).await?;
        Entry::parse_all(&bytes, at, extension.count, self.meta.geometry)
    }

    async fn read_bitmap(&self, entry: Entry) -> Result<Bitmap> {
        let geometry = self.meta.geometry;
        let cluster_size = geometry.cluster_size();
        let at = entry.table.0;
        let end = at + u64::from(entry.table_entries) * 8;
        if end > self.volume.length().next_multiple_of(cluster_size) {
            return Err(Error::invalid("bitmap_table_offset", at, "the bitmap table lies outside the file"));
        }
        let mut bytes = vec![0; (end - at) as usize];
        self.volume.read("reading a bitmap table", at, IoBufMut::new(&mut bytes)).await?;
        let mut entries = Vec::with_capacity(entry.table_entries as usize);
        for (index, raw) in bytes.chunks_exact(8).enumerate() {
            let raw = raw.first_chunk().map_or(0, |b| u64::from_be_bytes(*b));
            let invalid = |reason: &str| {
                Error::invalid("bitmap table entry", at + index as u64 * 8, format!("{raw:#x}: {reason}"))
            };
            let decoded = TableEntry::decode(raw, cluster_size).ok_or_else(|| invalid("it cannot be"))?;
            if let TableEntry::Data(data) = decoded
                && data.0 + cluster_size > self.volume.length().next_multiple_of(cluster_size)
            {
                return Err(invalid("the data lies outside the file"));
            }
            entries.push(decoded);
        }
        let inconsistent = entry.flags & flags::IN_USE != 0;
        let mut marks = RoaringTreemap::new();
        if !inconsistent {
            let needed = bitmap::data_clusters(self.virtual_size(), entry.granularity_bits, geometry);
            if entries.len() as u64 != needed {
                let reason = format!("is {}; for a disk of this size it must be {needed}", entries.len());
                return Err(Error::invalid("bitmap_table_size", at, reason));
            }
            marks = self.read_marks(&entries).await?;
            marks.remove_range(self.virtual_size().div_ceil(1 << entry.granularity_bits)..);
        }
        Ok(Bitmap {
            name: entry.name,
            granularity_bits: entry.granularity_bits,
            recording: entry.flags & flags::AUTO != 0 && !inconsistent,
            inconsistent,
            marks,
            changed: false,
            kept_flags: entry.flags & !(flags::IN_USE | flags::AUTO),
            extra: entry.extra,
            place: Some(Place { table: entry.table, entries }),
        })
    }

    async fn read_marks(&self, entries: &[TableEntry]) -> Result<RoaringTreemap> {
        let cluster_size = self.meta.geometry.cluster_size();
        // Bits that one cluster of data holds: a power of two of at most 2^24.
        let bits = cluster_size * 8;
        let mut marks = RoaringTreemap::new();
        let mut bytes = vec![0; cluster_size as usize];
        for (first, entry) in (0..).step_by(bits as usize).zip(entries) {
            match entry {
                TableEntry::Zeroes => {}
                TableEntry::Ones => {
                    marks.insert_range(first..first + bits);
                }
                TableEntry::Data(at) => {
                    self.volume.read("reading a bitmap", at.0, IoBufMut::new(&mut bytes)).await?;
                    let part = RoaringBitmap::from_lsb0_bytes(first as u32, &bytes);
                    marks |= RoaringTreemap::from_bitmaps([((first >> 32) as u32, part)]);
                }
            }
        }
        Ok(marks)
    }

    /// Takes note of where the tables and the data are. No two of them, and none of the image's other tables, may be at one
    /// place.
    fn note_bitmaps(&self, bitmaps: &[Bitmap]) -> Result<()> {
        let geometry = self.meta.geometry;
        let mut tables = self.meta.tables.lock();
        let mut claim = |what: &'static str, at: HostOffset, length: u64| {
            let first = geometry.host_cluster(at).0;
            let clusters = first..first + geometry.clusters_for(length);
            if tables.meets(&clusters) {
                return Err(Error::invalid(what, at.0, "it is at the place of another table"));
            }
            tables.insert_range(clusters);
            Ok(())
        };
        for place in bitmaps.iter().filter_map(|b| b.place.as_ref()) {
            claim("bitmap table", place.table, place.entries.len() as u64 * 8)?;
            for entry in &place.entries {
                if let TableEntry::Data(at) = entry {
                    claim("bitmap data", *at, geometry.cluster_size())?;
                }
            }
        }
        Ok(())
    }
}

/// What a cluster of data holds.
pub(super) enum Part {
    Zeroes,
    Ones,
    Mixed(Vec<u8>),
}

/// A directory as it lies in the file.
pub(super) struct Directory {
    /// Filled up to whole sectors: nothing else is in its clusters.
    pub(super) padded: Vec<u8>,
    /// Its size without that.
    pub(super) size: u64,
}

/// The directory of these bitmaps, which must have places.
pub(super) fn directory(bitmaps: &[Bitmap], in_use: bool) -> Directory {
    let mut padded = Vec::new();
    for bitmap in bitmaps {
        bitmap.entry(in_use).append(&mut padded);
    }
    let size = padded.len() as u64;
    padded.resize(padded.len().next_multiple_of(512), 0);
    Directory { padded, size }
}

impl Bitmap {
    /// Its directory entry. The bitmap must have a place.
    pub(super) fn entry(&self, in_use: bool) -> Entry {
        let (table, entries) = self.place.as_ref().map_or((HostOffset(0), 0), |p| (p.table, p.entries.len()));
        let mut bits = self.kept_flags;
        if self.recording {
            bits |= flags::AUTO;
        }
        if in_use || self.inconsistent {
            bits |= flags::IN_USE;
        }
        Entry {
            table,
            table_entries: entries as u32,
            flags: bits,
            granularity_bits: self.granularity_bits,
            name: self.name.clone(),
            extra: self.extra.clone(),
        }
    }

    /// What the data cluster `index` of a disk of so many units is to hold.
    pub(super) fn part(&self, index: u64, units: u64, geometry: Geometry) -> Part {
        let bits = geometry.cluster_size() * 8;
        let range = index * bits..((index + 1) * bits).min(units.max(index * bits));
        let count = self.marks.range_cardinality(range.clone());
        if count == 0 {
            return Part::Zeroes;
        }
        if count == range.end - range.start {
            return Part::Ones;
        }
        let mut bytes = vec![0u8; geometry.cluster_size() as usize];
        let mut marks = self.marks.iter();
        marks.advance_to(range.start);
        for mark in marks.take_while(|m| *m < range.end) {
            let bit = mark - range.start;
            if let Some(byte) = bytes.get_mut((bit / 8) as usize) {
                *byte |= 1 << (bit % 8);
            }
        }
        Part::Mixed(bytes)
    }
}
