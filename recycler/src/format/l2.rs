//! L1 and L2 table entries (sections "Cluster mapping" and "Extended L2 Entries" of the qcow2 specification).

use std::ops::Range;

use super::subclusters::Subclusters;
use crate::units::{Geometry, HostCluster, HostOffset};

/// Bit 63: the refcount of the cluster (or L2 table) is exactly one, so it may be written in place.
pub const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: the cluster is compressed. It must be tested before any other bit means anything.
pub const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of a standard L2 entry: the cluster reads as zeroes (version 3 only).
pub const ZERO: u64 = 1;
/// Bits 9 to 55: the host offset of a standard cluster or an L2 table.
pub const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// An L2 entry as it stands in the table: 8 bytes, or 16 in an image with extended L2 entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// The first 8 bytes.
    pub word: u64,
    /// The other 8 bytes of an extended entry, else 0.
    pub subclusters: Subclusters,
}

impl Entry {
    /// A standard cluster that is ours alone, in an image of this geometry.
    #[must_use]
    pub const fn data(host: HostOffset, geometry: Geometry) -> Entry {
        let subclusters = if geometry.extended_l2 { Subclusters::STORED } else { Subclusters(0) };
        Entry { word: Mapping::encode_data(host), subclusters }
    }

    /// What reads as zeroes and keeps the host cluster that `word` names, if any. Version 3 only.
    #[must_use]
    pub const fn zero(word: u64, geometry: Geometry) -> Entry {
        if geometry.extended_l2 {
            Entry { word, subclusters: Subclusters::ZERO }
        } else {
            Entry { word: word | ZERO, subclusters: Subclusters(0) }
        }
    }

    /// The same, in another host cluster.
    #[must_use]
    pub const fn moved_to(self, host: HostOffset) -> Entry {
        Entry { word: self.word & !OFFSET | host.0, ..self }
    }

    /// Whether nothing is in it.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.word == 0 && self.subclusters.0 == 0
    }
}

/// The entries of a table whose 8-byte words these are.
pub fn entries(words: &[u64], geometry: Geometry) -> impl Iterator<Item = Entry> + '_ {
    words.chunks_exact(geometry.l2_entry_words()).map(|entry| Entry {
        word: entry.first().copied().unwrap_or(0),
        subclusters: Subclusters(entry.get(1).copied().unwrap_or(0)),
    })
}

/// What those entries of a table say that say something, and can be.
pub fn mappings(words: &[u64], version: u32, geometry: Geometry) -> impl Iterator<Item = Mapping> + '_ {
    let used = entries(words, geometry).filter(|e| !e.is_empty());
    used.filter_map(move |entry| Mapping::of(entry, version, geometry).ok())
}

/// What an L2 entry says about a guest cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// Not allocated: the backing file shows through, or zeroes.
    Unallocated,
    /// Reads as zeroes; `preallocated` is the host cluster kept for it, and whether it is ours alone to write.
    Zero {
        /// The host cluster kept for it, with its COPIED flag.
        preallocated: Option<(HostOffset, bool)>,
    },
    /// Stored in a host cluster.
    Data {
        /// Where.
        host: HostOffset,
        /// Whether this is the only reference, so that the cluster may be written in place.
        copied: bool,
    },
    /// Stored compressed.
    Compressed {
        /// The raw descriptor, bits 0 to 61.
        descriptor: u64,
    },
    /// Its subclusters are not all alike, or there is a host cluster for them and none is stored.
    Parts {
        /// The host cluster that those that are stored are in, with its COPIED flag.
        host: Option<(HostOffset, bool)>,
        /// How each is stored.
        subclusters: Subclusters,
    },
}

impl Mapping {
    /// Decodes an entry of an image of this version and geometry. The error is the reason why the entry is invalid.
    ///
    /// # Errors
    /// As [`decode`](Self::decode); subclusters that are stored nowhere, or stored and zero at once.
    #[inline]
    pub fn of(entry: Entry, version: u32, geometry: Geometry) -> Result<Mapping, &'static str> {
        let mapping = Mapping::decode(entry.word, version, geometry.cluster_size())?;
        if geometry.extended_l2 { Self::extended(mapping, entry.subclusters) } else { Ok(mapping) }
    }

    fn extended(word: Mapping, subclusters: Subclusters) -> Result<Mapping, &'static str> {
        if subclusters.stored() & subclusters.zero() != 0 {
            return Err("a subcluster is both stored and zero");
        }
        let host = match word {
            Mapping::Compressed { .. } => return Ok(word),
            Mapping::Zero { .. } => return Err("the zero flag is set in an extended entry"),
            Mapping::Data { host, copied } => Some((host, copied)),
            Mapping::Unallocated | Mapping::Parts { .. } => None,
        };
        Ok(match (host, subclusters) {
            (Some((host, copied)), Subclusters::STORED) => Mapping::Data { host, copied },
            (preallocated, Subclusters::ZERO) => Mapping::Zero { preallocated },
            (None, Subclusters(0)) => Mapping::Unallocated,
            (None, _) if subclusters.stored() != 0 => {
                return Err("subclusters are stored, and no host cluster is named");
            }
            (host, subclusters) => Mapping::Parts { host, subclusters },
        })
    }

    /// Decodes the first word of an entry of an image whose version and cluster size are given. The error is the reason
    /// why the entry is invalid.
    ///
    /// # Errors
    /// Reserved bits that are set, an unaligned offset, a zero flag in version 2.
    #[inline]
    pub fn decode(entry: u64, version: u32, cluster_size: u64) -> Result<Mapping, &'static str> {
        if entry & COMPRESSED != 0 {
            return Ok(Mapping::Compressed { descriptor: entry & (COMPRESSED - 1) });
        }
        if entry & !(COPIED | OFFSET | ZERO) != 0 {
            return Err("reserved bits are set");
        }
        let offset = entry & OFFSET;
        if offset & (cluster_size - 1) != 0 {
            return Err("the host offset is not aligned to a cluster");
        }
        let copied = entry & COPIED != 0;
        if entry & ZERO != 0 {
            if version < 3 {
                return Err("the zero flag is set in a version 2 image");
            }
            return Ok(Mapping::Zero { preallocated: (offset != 0).then_some((HostOffset(offset), copied)) });
        }
        if offset == 0 {
            // QEMU's own repair leaves COPIED on empty entries alone, and so do we: the offset decides.
            return Ok(Mapping::Unallocated);
        }
        Ok(Mapping::Data { host: HostOffset(offset), copied })
    }

    /// The host cluster that a standard entry names, whether or not what is in it shows, and its COPIED flag.
    #[must_use]
    pub const fn host(&self) -> Option<(HostOffset, bool)> {
        match *self {
            Mapping::Data { host, copied } => Some((host, copied)),
            Mapping::Zero { preallocated: host } | Mapping::Parts { host, .. } => host,
            Mapping::Unallocated | Mapping::Compressed { .. } => None,
        }
    }

    /// Decodes an entry of an image of this geometry whose guest data is in an external data file, for the guest
    /// cluster that starts at byte `guest` of the disk. There it lies at the same offset, and has one owner, whatever
    /// COPIED says: nothing counts it.
    ///
    /// # Errors
    /// As for [`of`](Self::of); a compressed cluster; any other offset.
    #[inline]
    pub fn of_external(entry: Entry, guest: u64, geometry: Geometry) -> Result<Mapping, &'static str> {
        let mapping = Mapping::decode_external(entry.word, guest)?;
        if geometry.extended_l2 { Self::extended(mapping, entry.subclusters) } else { Ok(mapping) }
    }

    /// Decodes the first word of such an entry.
    ///
    /// # Errors
    /// As for [`decode`](Self::decode); a compressed cluster; any other offset.
    pub fn decode_external(entry: u64, guest: u64) -> Result<Mapping, &'static str> {
        if entry & COMPRESSED != 0 {
            return Err("the cluster is compressed, in an image with an external data file");
        }
        if entry & !(COPIED | OFFSET | ZERO) != 0 {
            return Err("reserved bits are set");
        }
        let (offset, zero) = (entry & OFFSET, entry & ZERO != 0);
        // Where the file starts, COPIED alone tells data from nothing.
        let named = offset != 0 || entry & COPIED != 0 && !zero;
        if named && offset != guest {
            return Err("the offset in the external data file is not that of the guest cluster");
        }
        Ok(match (zero, named) {
            (true, named) => Mapping::Zero { preallocated: named.then_some((HostOffset(offset), true)) },
            (false, true) => Mapping::Data { host: HostOffset(offset), copied: true },
            (false, false) => Mapping::Unallocated,
        })
    }

    /// The host clusters that the entry names, in clusters of the file; `None` if it names none.
    #[must_use]
    pub fn host_clusters(&self, geometry: Geometry) -> Option<Range<u64>> {
        let (first, count) = match *self {
            Mapping::Compressed { descriptor } => compressed_clusters(descriptor, geometry),
            _ => (geometry.host_cluster(self.host()?.0), 1),
        };
        Some(first.0..first.0 + count)
    }

    /// The entry for a standard cluster that is ours alone.
    #[must_use]
    pub const fn encode_data(host: HostOffset) -> u64 {
        host.0 | COPIED
    }
}

/// What [`Mapping::decode`] says of an entry if it says `Data`, for those who want nothing else.
#[inline]
pub(crate) fn plain_data(entry: u64, cluster_size: u64) -> Option<(HostOffset, bool)> {
    let offset = entry & OFFSET;
    let plain = entry & (!(COPIED | OFFSET) | (cluster_size - 1)) == 0 && offset != 0;
    plain.then_some((HostOffset(offset), entry & COPIED != 0))
}

/// Where a compressed cluster's data starts in the file, and how many bytes it may take at most. (Section "Compressed
/// Clusters Descriptor": the offset takes the low `62 - (cluster_bits - 8)` bits, then the number of further 512-byte
/// sectors.)
#[must_use]
pub fn compressed_extent(descriptor: u64, geometry: Geometry) -> (u64, u64) {
    let bits = 62 - (geometry.cluster_bits - 8);
    let offset = descriptor & ((1 << bits) - 1);
    let sectors = (descriptor >> bits) + 1;
    (offset, sectors * 512 - (offset & 511))
}

/// The descriptor of the same data in another place, whose offset within its 512-byte sector must be the same: then the data
/// touches as many sectors.
#[must_use]
pub(crate) fn compressed_at(descriptor: u64, offset: u64, geometry: Geometry) -> u64 {
    let bits = 62 - (geometry.cluster_bits - 8);
    descriptor >> bits << bits | offset
}

/// The descriptor of compressed data that starts with a sector and takes so many bytes, whole sectors.
#[must_use]
pub(crate) fn compressed_descriptor(offset: u64, length: u64, geometry: Geometry) -> u64 {
    let bits = 62 - (geometry.cluster_bits - 8);
    (length / 512 - 1) << bits | offset
}

/// The host clusters that a compressed cluster's data touches: the first, and how many.
#[must_use]
pub fn compressed_clusters(descriptor: u64, geometry: Geometry) -> (HostCluster, u64) {
    let (offset, length) = compressed_extent(descriptor, geometry);
    let first = geometry.host_cluster(HostOffset(offset));
    let last = geometry.host_cluster(HostOffset(offset + length - 1));
    (first, last.0 - first.0 + 1)
}

/// Decodes an L1 entry: where the L2 table is and whether it is ours alone; `None` if there is none.
///
/// # Errors
/// Reserved bits that are set, or an unaligned offset: the reason.
pub fn decode_l1(entry: u64, cluster_size: u64) -> Result<Option<(HostOffset, bool)>, &'static str> {
    if entry & !(COPIED | OFFSET) != 0 {
        return Err("reserved bits are set");
    }
    let offset = entry & OFFSET;
    if offset & (cluster_size - 1) != 0 {
        return Err("the L2 table's offset is not aligned to a cluster");
    }
    Ok((offset != 0).then_some((HostOffset(offset), entry & COPIED != 0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_compressed_flag_is_tested_first() {
        assert_eq!(Mapping::decode(COMPRESSED | 1, 3, 65536), Ok(Mapping::Compressed { descriptor: 1 }));
    }

    #[test]
    fn hostile_entries_are_refused() {
        assert!(Mapping::decode(2, 3, 65536).is_err());
        assert!(Mapping::decode(1 << 56 | 65536, 3, 65536).is_err());
        assert!(Mapping::decode(512, 3, 65536).is_err());
        assert!(Mapping::decode(1, 2, 65536).is_err());
        assert!(decode_l1(COMPRESSED | 65536, 65536).is_err());
        assert!(decode_l1(512, 1024).is_err());
    }

    #[test]
    fn plain_data_is_what_decodes_as_data() {
        let bits = [0, 1, 2, 9, 12, 16, 40, 55, 56, 62, 63];
        for chosen in 0u32..1 << bits.len() {
            let entry = (0..bits.len()).filter(|i| chosen >> i & 1 == 1).fold(0u64, |e, i| e | 1 << bits[i]);
            for cluster_size in [512, 65536] {
                let decoded = match Mapping::decode(entry, 3, cluster_size) {
                    Ok(Mapping::Data { host, copied }) => Some((host, copied)),
                    _ => None,
                };
                assert_eq!(plain_data(entry, cluster_size), decoded, "{entry:#x}");
            }
        }
    }

    #[test]
    fn extended_entries_decode() {
        let geometry = Geometry { cluster_bits: 16, refcount_order: 4, extended_l2: true };
        let of = |word, bitmap| Mapping::of(Entry { word, subclusters: Subclusters(bitmap) }, 3, geometry);
        let host = HostOffset(0x50000);
        assert_eq!(of(0, 0), Ok(Mapping::Unallocated));
        assert_eq!(of(0x50000 | COPIED, 0xffff_ffff), Ok(Mapping::Data { host, copied: true }));
        assert_eq!(of(0, 0xffff_ffff << 32), Ok(Mapping::Zero { preallocated: None }));
        assert_eq!(of(0x50000, 0xffff_ffff << 32), Ok(Mapping::Zero { preallocated: Some((host, false)) }));
        let parts = |host, bitmap| Ok(Mapping::Parts { host, subclusters: Subclusters(bitmap) });
        assert_eq!(of(0x50000, 1 << 33 | 1), parts(Some((host, false)), 1 << 33 | 1));
        assert_eq!(of(0x50000, 0), parts(Some((host, false)), 0));
        assert_eq!(of(0, 1 << 33), parts(None, 1 << 33));
        assert!(of(0, 1).is_err() && of(0x50000, 1 << 32 | 1).is_err() && of(0x50001, 1).is_err());
        assert_eq!(of(COMPRESSED | 5, 0), Ok(Mapping::Compressed { descriptor: 5 }));
        let words = [0x50000, 7, COMPRESSED, 0];
        assert_eq!(entries(&words, geometry).map(|e| e.subclusters.0).collect::<Vec<_>>(), [7, 0]);
        assert_eq!(entries(&words, Geometry { extended_l2: false, ..geometry }).count(), 4);
    }

    #[test]
    fn entries_of_an_external_data_file_name_their_own_offset() {
        let external = Mapping::decode_external;
        let data = |at| Ok(Mapping::Data { host: HostOffset(at), copied: true });
        assert_eq!(external(0x50000 | COPIED, 0x50000), data(0x50000));
        assert_eq!(external(0x50000, 0x50000), data(0x50000));
        assert_eq!(external(COPIED, 0), data(0));
        assert_eq!(external(0, 0), Ok(Mapping::Unallocated));
        assert_eq!(external(0, 0x50000), Ok(Mapping::Unallocated));
        for zero in [ZERO, COPIED | ZERO] {
            assert_eq!(external(zero, 0), Ok(Mapping::Zero { preallocated: None }));
            assert_eq!(external(zero, 0x50000), Ok(Mapping::Zero { preallocated: None }));
        }
        let kept = Some((HostOffset(0x50000), true));
        assert_eq!(external(0x50001 | COPIED, 0x50000), Ok(Mapping::Zero { preallocated: kept }));
        for wrong in [0x40000 | COPIED, 0x40001 | COPIED, 0x40000, COPIED, COMPRESSED | 0x50000, 0x50002, 1 << 56] {
            assert!(external(wrong, 0x50000).is_err(), "{wrong:#x}");
        }
    }

    #[test]
    fn extended_entries_of_an_external_data_file_name_their_own_offset() {
        let geometry = Geometry { cluster_bits: 16, refcount_order: 4, extended_l2: true };
        let of = |word, bitmap, guest| {
            Mapping::of_external(Entry { word, subclusters: Subclusters(bitmap) }, guest, geometry)
        };
        let (first, other) = (Some((HostOffset(0), true)), Some((HostOffset(0x50000), true)));
        let parts = |host, bitmap| Ok(Mapping::Parts { host, subclusters: Subclusters(bitmap) });
        assert_eq!(of(COPIED, 1, 0), parts(first, 1));
        assert_eq!(of(COPIED, 0, 0), parts(first, 0));
        assert_eq!(of(COPIED, 0xffff_ffff << 32, 0), Ok(Mapping::Zero { preallocated: first }));
        assert_eq!(of(0x50000 | COPIED, 1 << 33 | 1, 0x50000), parts(other, 1 << 33 | 1));
        assert_eq!(of(0, 1 << 33, 0x50000), parts(None, 1 << 33));
        assert_eq!(of(0, 0, 0x50000), Ok(Mapping::Unallocated));
        for (word, bitmap) in [(0, 1), (COPIED, 1), (0x50000, 1 << 32 | 1), (0x50001, 1), (COMPRESSED | 0x50000, 0)] {
            assert!(of(word, bitmap, 0x50000).is_err(), "{word:#x} {bitmap:#x}");
        }
    }

    #[test]
    fn entries_decode() {
        let host = HostOffset(0x50000);
        assert_eq!(Mapping::decode(0, 3, 65536), Ok(Mapping::Unallocated));
        assert_eq!(Mapping::decode(1, 3, 65536), Ok(Mapping::Zero { preallocated: None }));
        assert_eq!(Mapping::decode(0x50001 | COPIED, 3, 65536), Ok(Mapping::Zero { preallocated: Some((host, true)) }));
        assert_eq!(Mapping::decode(Mapping::encode_data(host), 2, 65536), Ok(Mapping::Data { host, copied: true }));
        assert_eq!(decode_l1(0x50000, 65536), Ok(Some((host, false))));
    }
}
