//! Persistent bitmaps on disk (section "Bitmaps" of the qcow2 specification): the directory, the tables, the data.

use std::collections::HashSet;

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{Error, Result};
use crate::units::{Geometry, HostOffset};

/// The longest bitmap table that QEMU accepts, in entries.
pub(crate) const MAX_TABLE_ENTRIES: u64 = 0x800_0000;
/// The most bytes of data that QEMU accepts in a bitmap.
pub(crate) const MAX_DATA: u64 = 512 << 20;
/// The longest name, in bytes.
pub(crate) const MAX_NAME: usize = 1023;
/// log2 of the smallest and of the largest granularity that QEMU accepts, in bytes.
pub(crate) const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// Bytes of a directory entry before its variable part.
pub(crate) const ENTRY: u64 = size_of::<RawEntry>() as u64;

/// Bits of an entry's flags.
pub(crate) mod flags {
    /// Somebody has the bitmap open, or had and did not store it: its data is not to be believed.
    pub(crate) const IN_USE: u32 = 1 << 0;
    /// The bitmap records writes from the moment when the image is opened.
    pub(crate) const AUTO: u32 = 1 << 1;
    /// The bitmap may be used by somebody who does not know its extra data.
    pub(crate) const EXTRA_DATA_COMPATIBLE: u32 = 1 << 2;
    pub(crate) const KNOWN: u32 = IN_USE | AUTO | EXTRA_DATA_COMPATIBLE;
}

/// The one type of bitmap that there is: dirty tracking.
const DIRTY_TRACKING: u8 = 1;

/// A bitmap table entry: the cluster stands for this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TableEntry {
    Zeroes,
    Ones,
    /// The data is there.
    Data(HostOffset),
}

/// Bits of a bitmap table entry that must be zero.
const RESERVED: u64 = 0xff00_0000_0000_01fe;
/// Bits of a bitmap table entry that hold the offset of a cluster of bitmap data.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

impl TableEntry {
    /// `None` for an entry that cannot be.
    pub(crate) fn decode(entry: u64, cluster_size: u64) -> Option<Self> {
        let offset = entry & OFFSET;
        match (offset, entry & 1) {
            _ if entry & RESERVED != 0 => None,
            (0, 0) => Some(TableEntry::Zeroes),
            (0, _) => Some(TableEntry::Ones),
            (_, 0) if offset & (cluster_size - 1) == 0 => Some(TableEntry::Data(HostOffset(offset))),
            _ => None,
        }
    }

    pub(crate) fn encode(self) -> u64 {
        match self {
            TableEntry::Zeroes => 0,
            TableEntry::Ones => 1,
            TableEntry::Data(offset) => offset.0,
        }
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawEntry {
    bitmap_table_offset: U64,
    bitmap_table_size: U32,
    flags: U32,
    kind: u8,
    granularity_bits: u8,
    name_size: U16,
    extra_data_size: U32,
}

/// An entry of the bitmap directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Where the bitmap table is, and how many entries it has.
    pub(crate) table: HostOffset,
    pub(crate) table_entries: u32,
    pub(crate) flags: u32,
    /// log2 of the bytes of the disk that one bit stands for.
    pub(crate) granularity_bits: u8,
    pub(crate) name: Vec<u8>,
    /// What we do not understand and keep.
    pub(crate) extra: Vec<u8>,
}

impl Entry {
    /// Parses a whole directory of `count` entries, which starts at byte `start` of the file.
    ///
    /// # Errors
    /// [`Error::Invalid`] names the field; [`Error::Unsupported`] for a bitmap that means something unknown.
    pub(crate) fn parse_all(directory: &[u8], start: u64, count: u32, geometry: Geometry) -> Result<Vec<Entry>> {
        let mut all = Vec::new();
        // Tens of thousands of names fit into a few MiB: too many to compare each with all others.
        let mut names = HashSet::new();
        let mut rest = directory;
        for _ in 0..count {
            let at = start + (directory.len() - rest.len()) as u64;
            let (entry, name, length) = Self::parse(rest, at, geometry)?;
            rest = rest.get(length..).unwrap_or(&[]);
            if !names.insert(name) {
                return Err(Error::invalid("bitmap name", at, "two bitmaps have the same"));
            }
            all.push(entry);
        }
        if !rest.is_empty() {
            let reason = format!("its {count} entries end {} bytes before it", rest.len());
            return Err(Error::invalid("bitmap_directory_size", start, reason));
        }
        Ok(all)
    }

    /// Also returns the name as it stands in `bytes`, and how many of them the entry takes.
    fn parse(bytes: &[u8], at: u64, geometry: Geometry) -> Result<(Entry, &[u8], usize)> {
        let short = || Error::invalid("Bitmap directory entry", at, "it reaches past the end of the directory");
        let (raw, rest) = RawEntry::ref_from_prefix(bytes).map_err(|_| short())?;
        let (extra, rest) = rest.split_at_checked(raw.extra_data_size.get() as usize).ok_or_else(short)?;
        let name = rest.get(..raw.name_size.get().into()).ok_or_else(short)?;
        let entry = Entry {
            table: HostOffset(raw.bitmap_table_offset.get()),
            table_entries: raw.bitmap_table_size.get(),
            flags: raw.flags.get(),
            granularity_bits: raw.granularity_bits,
            name: name.to_vec(),
            extra: extra.to_vec(),
        };
        let length = (ENTRY as usize + extra.len() + name.len()).next_multiple_of(8);
        let invalid = |field, offset, reason: String| Err(Error::invalid(field, at + offset, reason));
        let cluster_size = geometry.cluster_size();
        let entries = u64::from(entry.table_entries);
        if raw.kind != DIRTY_TRACKING {
            return Err(Error::unsupported(format!("a bitmap of type {}", raw.kind)));
        }
        if !extra.is_empty() && entry.flags & flags::EXTRA_DATA_COMPATIBLE == 0 {
            return Err(Error::unsupported("a bitmap with extra data that must be understood"));
        }
        if entry.table.0 == 0 || !entry.table.0.is_multiple_of(cluster_size) {
            return invalid("bitmap_table_offset", 0, format!("{} is zero or not aligned", entry.table));
        }
        if entries == 0 || entries > MAX_TABLE_ENTRIES || entries * cluster_size > MAX_DATA.max(cluster_size) {
            return invalid("bitmap_table_size", 8, format!("is {entries}: no bitmap has that many clusters"));
        }
        if entry.flags & !flags::KNOWN != 0 {
            return invalid("bitmap flags", 12, format!("{:#x} has reserved bits", entry.flags));
        }
        if !GRANULARITY_BITS.contains(&entry.granularity_bits) {
            return invalid("granularity_bits", 17, format!("is {}, not 9 to 31", entry.granularity_bits));
        }
        if name.is_empty() || name.len() > MAX_NAME {
            return invalid("name_size", 18, format!("is {}; 1 to {MAX_NAME} bytes are allowed", name.len()));
        }
        Ok((entry, name, length.min(bytes.len())))
    }

    /// Appends the entry as it lies in the file, padded.
    pub(crate) fn append(&self, directory: &mut Vec<u8>) {
        let raw = RawEntry {
            bitmap_table_offset: U64::new(self.table.0),
            bitmap_table_size: U32::new(self.table_entries),
            flags: U32::new(self.flags),
            kind: DIRTY_TRACKING,
            granularity_bits: self.granularity_bits,
            name_size: U16::new(self.name.len() as u16),
            extra_data_size: U32::new(self.extra.len() as u32),
        };
        directory.extend(raw.as_bytes());
        directory.extend(&self.extra);
        directory.extend(&self.name);
        directory.resize(directory.len().next_multiple_of(8), 0);
    }
}

/// Clusters of data that a bitmap of this granularity has for a disk of so many bytes: entries of its table, one at least.
pub(crate) fn data_clusters(virtual_size: u64, granularity_bits: u8, geometry: Geometry) -> u64 {
    let bits = virtual_size.div_ceil(1 << granularity_bits);
    bits.div_ceil(8).div_ceil(geometry.cluster_size()).max(1)
}

/// The data of the bitmaps extension of the header.
pub(crate) fn extension(count: u32, directory: HostOffset, size: u64) -> [u8; 24] {
    let mut data = [0; 24];
    let (head, tail) = data.split_at_mut(8);
    head[..4].copy_from_slice(&count.to_be_bytes());
    tail[..8].copy_from_slice(&size.to_be_bytes());
    tail[8..].copy_from_slice(&directory.0.to_be_bytes());
    data
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::extension::MAX_BITMAPS;

    const GEOMETRY: Geometry = Geometry { cluster_bits: 16, refcount_order: 4, extended_l2: false };

    /// A directory of bitmaps with these names.
    fn directory(names: impl Iterator<Item = String>) -> Vec<u8> {
        let mut bytes = Vec::new();
        for name in names {
            let name = name.into_bytes();
            let (table, extra) = (HostOffset(0x10000), Vec::new());
            let entry = Entry { table, table_entries: 1, flags: 0, granularity_bits: 16, name, extra };
            entry.append(&mut bytes);
        }
        bytes
    }

    #[test]
    fn as_many_bitmaps_as_there_may_be_are_parsed_at_once() {
        let count = MAX_BITMAPS;
        let names = |last: u32| directory((0..count - 1).chain([last]).map(|n| format!("{n:06}")));
        let all = Entry::parse_all(&names(count), 0, count, GEOMETRY).unwrap();
        assert_eq!(all.len(), count as usize);
        let error = Entry::parse_all(&names(7), 0x50000, count, GEOMETRY).unwrap_err();
        let at = 0x50000 + u64::from(count - 1) * 32;
        assert_eq!((error.field(), error.offset()), (Some("bitmap name"), Some(at)), "{error}");
    }
}
