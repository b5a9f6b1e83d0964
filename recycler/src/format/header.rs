//! The image header and its extensions (sections "Header" and "Header extensions" of the qcow2 specification).

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::extension::{self, Extensions};
use crate::error::{Error, Result};
use crate::units::{Geometry, HostOffset};

/// `magic`: "QFI" and 0xfb.
pub const MAGIC: u32 = 0x5146_49fb;
/// The longest L1 table that is accepted, in bytes (QEMU's limit).
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// The longest refcount table that is accepted, in bytes (QEMU's limit).
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// The most internal snapshots that are accepted (QEMU's limit).
pub const MAX_SNAPSHOTS: u32 = 65536;
/// Host offsets have 56 bits.
pub const MAX_HOST_OFFSET: u64 = 1 << 56;
/// The longest backing file name, in bytes.
pub const MAX_BACKING_NAME: u32 = 1023;
/// Length of a version 2 header in bytes.
pub const V2_LENGTH: u32 = 72;
/// Length in bytes of the version 3 headers that are written here, as by QEMU: up to `compression_type` with its
/// padding.
pub const V3_LENGTH: u32 = 112;
/// The shortest version 3 header in bytes.
pub const V3_MIN_LENGTH: u32 = 104;
/// Bytes of a snapshot table entry before its variable part.
pub const SNAPSHOT_ENTRY_MIN: u64 = 40;

/// The fields that versions 2 and 3 share, as they lie in the file.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
pub(crate) struct RawHeader {
    pub(crate) magic: U32,
    pub(crate) version: U32,
    pub(crate) backing_file_offset: U64,
    pub(crate) backing_file_size: U32,
    pub(crate) cluster_bits: U32,
    pub(crate) size: U64,
    pub(crate) crypt_method: U32,
    pub(crate) l1_size: U32,
    pub(crate) l1_table_offset: U64,
    pub(crate) refcount_table_offset: U64,
    pub(crate) refcount_table_clusters: U32,
    pub(crate) nb_snapshots: U32,
    pub(crate) snapshots_offset: U64,
}

/// The fields that follow in version 3.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
pub(crate) struct RawVersion3 {
    pub(crate) incompatible_features: U64,
    pub(crate) compatible_features: U64,
    pub(crate) autoclear_features: U64,
    pub(crate) refcount_order: U32,
    pub(crate) header_length: U32,
}

/// Where the fields are that are patched or named in errors, in bytes from the start of the file.
mod at {
    pub(super) const VERSION: u64 = 4;
    pub(super) const BACKING_FILE_OFFSET: u64 = 8;
    pub(super) const BACKING_FILE_SIZE: u64 = 16;
    pub(super) const CLUSTER_BITS: u64 = 20;
    pub(super) const SIZE: u64 = 24;
    pub(super) const CRYPT_METHOD: u64 = 32;
    pub(super) const L1_SIZE: u64 = 36;
    pub(super) const L1_TABLE_OFFSET: u64 = 40;
    pub(super) const REFCOUNT_TABLE_OFFSET: u64 = 48;
    pub(super) const REFCOUNT_TABLE_CLUSTERS: u64 = 56;
    pub(super) const NB_SNAPSHOTS: u64 = 60;
    pub(super) const SNAPSHOTS_OFFSET: u64 = 64;
    pub(super) const INCOMPATIBLE_FEATURES: u64 = 72;
    pub(super) const AUTOCLEAR_FEATURES: u64 = 88;
    pub(super) const REFCOUNT_ORDER: u64 = 96;
    pub(super) const HEADER_LENGTH: u64 = 100;
    pub(super) const COMPRESSION_TYPE: u64 = 104;
}

/// Bits of `incompatible_features`.
pub mod incompatible {
    /// Refcounts may be inconsistent.
    pub const DIRTY: u64 = 1 << 0;
    /// The image is corrupt and must not be written to.
    pub const CORRUPT: u64 = 1 << 1;
    /// Guest data is in an external data file.
    pub const DATA_FILE: u64 = 1 << 2;
    /// `compression_type` is not deflate.
    pub const COMPRESSION_TYPE: u64 = 1 << 3;
    /// L2 entries are extended.
    pub const EXTENDED_L2: u64 = 1 << 4;
    /// All that this library knows.
    pub const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2;
}

/// Bit of `compatible_features`: refcount updates may be postponed while the dirty bit is set.
pub const COMPATIBLE_LAZY_REFCOUNTS: u64 = 1;
/// Bit of `autoclear_features`: the bitmaps extension is consistent.
pub const AUTOCLEAR_BITMAPS: u64 = 1;

/// Bit of `autoclear_features`: the external data file can be read as a raw image.
pub const AUTOCLEAR_RAW_DATA_FILE: u64 = 2;

/// Values of `crypt_method`.
pub mod crypt {
    /// No encryption.
    pub const NONE: u32 = 0;
    /// AES-CBC, as QEMU once had it.
    pub const AES: u32 = 1;
    /// LUKS.
    pub const LUKS: u32 = 2;
}

/// A validated header. Offsets and sizes in it are checked against the format's and the file's limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Cluster and refcount sizes.
    pub geometry: Geometry,
    /// Size of the virtual disk in bytes.
    pub virtual_size: u64,
    /// 0 none, 1 AES, 2 LUKS.
    pub crypt_method: u32,
    /// Entries in the active L1 table.
    pub l1_entries: u32,
    /// Where the active L1 table starts.
    pub l1_offset: HostOffset,
    /// Where the refcount table starts.
    pub refcount_table_offset: HostOffset,
    /// Clusters that the refcount table occupies.
    pub refcount_table_clusters: u32,
    /// Number of internal snapshots.
    pub snapshot_count: u32,
    /// Where the snapshot table starts.
    pub snapshots_offset: HostOffset,
    /// `incompatible_features` (0 in version 2).
    pub incompatible: u64,
    /// `compatible_features` (0 in version 2).
    pub compatible: u64,
    /// `autoclear_features` (0 in version 2).
    pub autoclear: u64,
    /// Length of the header in bytes: 72 in version 2.
    pub header_length: u32,
    /// 0 deflate, 1 zstd.
    pub compression_type: u8,
    /// Name of the backing file as the image records it.
    pub backing_file: Option<String>,
    /// Format of the backing file as the image records it.
    pub backing_format: Option<String>,
    /// Extensions that this library does not interpret: type and data, in the file's order.
    pub unknown_extensions: Vec<(u32, Vec<u8>)>,
    /// Bitmaps extension: number of bitmaps, directory offset and size in bytes.
    pub bitmaps: Option<BitmapsExtension>,
    /// Full disk encryption header: offset and length in bytes.
    pub crypto_header: Option<(HostOffset, u64)>,
    /// Name of the external data file.
    pub data_file: Option<String>,
}

/// The bitmaps extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// Number of bitmaps.
    pub count: u32,
    /// Size of the bitmap directory in bytes.
    pub directory_size: u64,
    /// Where the bitmap directory starts.
    pub directory_offset: HostOffset,
}

/// A range of the file that the header itself describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostRange {
    /// What is there, by the specification's name.
    pub what: &'static str,
    /// Where it starts, in bytes; aligned to a cluster.
    pub offset: HostOffset,
    /// Its length in bytes, not rounded up to clusters; never zero.
    pub length: u64,
}

impl HostRange {
    fn end(&self) -> u64 {
        self.offset.0.saturating_add(self.length)
    }
}

impl Header {
    /// Bytes from the start of the file that [`parse`](Self::parse) needs to see, if the file has them.
    pub const READ_LEN: usize = 2 << 20;

    /// Parses the first bytes of a file (as many as it has, up to its first cluster at least).
    ///
    /// `file_length` is in bytes. A virtual size that is no multiple of 512 is rounded down, as QEMU does. What the
    /// header points at is only checked to be a place where it may be; nothing of it has been read.
    ///
    /// # Errors
    /// [`Error::Invalid`] names the field and its offset; [`Error::Unsupported`] names an unknown incompatible feature.
    pub fn parse(bytes: &[u8], file_length: u64) -> Result<Header> {
        let (raw, after) = RawHeader::ref_from_prefix(bytes)
            .map_err(|_| Error::invalid("magic", 0, "the file is too short for a qcow2 header"))?;
        if raw.magic.get() != MAGIC {
            return Err(Error::invalid("magic", 0, "this is not a qcow2 image"));
        }
        let version = raw.version.get();
        let v3 = match version {
            2 => RawVersion3::version_2(),
            3 => {
                *RawVersion3::ref_from_prefix(after)
                    .map_err(|_| Error::invalid("header_length", at::HEADER_LENGTH, "the file ends inside the header"))?
                    .0
            }
            _ => return Err(Error::invalid("version", at::VERSION, format!("is {version}, neither 2 nor 3"))),
        };
        let cluster_bits = raw.cluster_bits.get();
        if !(9..=21).contains(&cluster_bits) {
            return Err(Error::invalid("cluster_bits", at::CLUSTER_BITS, format!("is {cluster_bits}, not 9 to 21")));
        }
        let cluster = usize::try_from(1u64 << cluster_bits)
            .ok()
            .filter(|&size| size as u64 <= file_length)
            .and_then(|size| bytes.get(..size))
            .ok_or_else(|| Error::invalid("cluster_bits", at::CLUSTER_BITS, "the file is shorter than one cluster"))?;

        let header_length = if version == 2 { V2_LENGTH } else { v3.header_length(cluster.len() as u64)? };
        let (area, backing_file) = extension_area(raw, header_length, cluster)?;
        let start = u64::from(header_length);
        let incompatible = v3.incompatible_features.get();
        // An unknown feature may give any field another meaning, so nothing more is judged before this.
        if incompatible & !incompatible::KNOWN != 0 {
            return Err(Error::unsupported(extension::name_features(area, start, incompatible & !incompatible::KNOWN)));
        }
        let compression_type = compression_type(incompatible, header_length, cluster)?;
        let refcount_order = v3.refcount_order.get();
        if refcount_order > 6 {
            let reason = format!("is {refcount_order}; refcounts have at most 64 bits (6)");
            return Err(Error::invalid("refcount_order", at::REFCOUNT_ORDER, reason));
        }
        if incompatible & incompatible::EXTENDED_L2 != 0 && cluster_bits < 14 {
            let reason = format!("is {cluster_bits}; extended L2 entries need 14 at least");
            return Err(Error::invalid("cluster_bits", at::CLUSTER_BITS, reason));
        }
        let extensions = Extensions::parse(area, start, 1 << cluster_bits)?;
        let header = Header {
            version,
            geometry: Geometry {
                cluster_bits,
                refcount_order,
                extended_l2: incompatible & incompatible::EXTENDED_L2 != 0,
            },
            virtual_size: raw.size.get() & !511,
            crypt_method: raw.crypt_method.get(),
            l1_entries: raw.l1_size.get(),
            l1_offset: HostOffset(raw.l1_table_offset.get()),
            refcount_table_offset: HostOffset(raw.refcount_table_offset.get()),
            refcount_table_clusters: raw.refcount_table_clusters.get(),
            snapshot_count: raw.nb_snapshots.get(),
            snapshots_offset: HostOffset(raw.snapshots_offset.get()),
            incompatible,
            compatible: v3.compatible_features.get(),
            autoclear: v3.autoclear_features.get(),
            header_length,
            compression_type,
            backing_file,
            backing_format: extensions.backing_format,
            unknown_extensions: extensions.unknown,
            bitmaps: extensions.bitmaps.map(|(bitmaps, _)| bitmaps),
            crypto_header: extensions.crypto_header.map(|(offset, length, _)| (offset, length)),
            data_file: extensions.data_file,
        };
        header.check_features(extensions.crypto_header.map(|(_, _, at)| at))?;
        header.check_l1(raw.size.get(), file_length)?;
        header.check_refcount_table(file_length)?;
        header.check_snapshots(file_length)?;
        header.check_extension_ranges(
            file_length,
            extensions.bitmaps.map(|(_, at)| at),
            extensions.crypto_header.map(|(_, _, at)| at),
        )?;
        header.check_overlaps()?;
        Ok(header)
    }

    /// Why the image's contents cannot be read, if so.
    #[must_use]
    pub fn unsupported_for_reading(&self) -> Option<String> {
        let hidden = self.has_raw_data_file() && self.backing_file.is_some();
        hidden.then(|| "a backing file behind a raw external data file".to_owned())
    }

    /// Why the image cannot be changed, if so. Compressed clusters are not seen from here.
    #[must_use]
    pub fn unsupported_for_writing(&self) -> Option<String> {
        self.unsupported_for_reading().or_else(|| {
            let what = if self.incompatible & incompatible::CORRUPT != 0 {
                "the corrupt bit is set"
            } else if self.has_data_file() && self.snapshot_count > 0 {
                "internal snapshots of an image with an external data file"
            } else {
                return None;
            };
            Some(what.to_owned())
        })
    }

    /// Whether guest data is in an external data file.
    #[must_use]
    pub fn has_data_file(&self) -> bool {
        self.incompatible & incompatible::DATA_FILE != 0
    }

    /// Whether there is an external data file that reads as the disk does, without this image; unless it is encrypted.
    #[must_use]
    pub fn has_raw_data_file(&self) -> bool {
        self.has_data_file() && self.autoclear & AUTOCLEAR_RAW_DATA_FILE != 0
    }

    /// Whether the bitmaps extension is there and its data consistent.
    #[must_use]
    pub fn bitmaps_consistent(&self) -> bool {
        self.bitmaps.is_some() && self.autoclear & AUTOCLEAR_BITMAPS != 0
    }

    /// The ranges of the file that the header describes, without overlaps: the header's cluster, the L1 table, the
    /// refcount table, the snapshot table (the fixed parts of its entries only: the rest is known once it is read), the
    /// bitmap directory if it is consistent, the encryption header.
    #[must_use]
    pub fn host_ranges(&self) -> Vec<HostRange> {
        let cluster_size = self.geometry.cluster_size();
        let mut ranges = vec![HostRange { what: "header", offset: HostOffset(0), length: cluster_size }];
        let mut add = |what, offset, length| {
            if length > 0 {
                ranges.push(HostRange { what, offset, length });
            }
        };
        add("L1 table", self.l1_offset, u64::from(self.l1_entries) * 8);
        add(
            "refcount table",
            self.refcount_table_offset,
            u64::from(self.refcount_table_clusters) << self.geometry.cluster_bits,
        );
        add("snapshot table", self.snapshots_offset, u64::from(self.snapshot_count) * SNAPSHOT_ENTRY_MIN);
        if let Some(bitmaps) = self.bitmaps.filter(|_| self.bitmaps_consistent()) {
            add("bitmap directory", bitmaps.directory_offset, bitmaps.directory_size);
        }
        if let Some((offset, length)) = self.crypto_header {
            add("encryption header", offset, length);
        }
        ranges
    }

    fn check_features(&self, crypto_header_at: Option<u64>) -> Result<()> {
        let method = self.crypt_method;
        if method > crypt::LUKS {
            return Err(Error::invalid("crypt_method", at::CRYPT_METHOD, format!("is {method}, not 0 to 2")));
        }
        match (method == crypt::LUKS, crypto_header_at) {
            (true, None) => {
                let reason = "is LUKS, but there is no full disk encryption header pointer";
                return Err(Error::invalid("crypt_method", at::CRYPT_METHOD, reason));
            }
            (false, Some(at)) => {
                let reason = "is there, but the encryption method is not LUKS";
                return Err(Error::invalid("Full disk encryption header pointer", at, reason));
            }
            _ => {}
        }
        if self.autoclear & AUTOCLEAR_BITMAPS != 0 && self.bitmaps.is_none() {
            let reason = "the bitmaps extension bit is set, but there is no bitmaps extension";
            return Err(Error::invalid("autoclear_features", at::AUTOCLEAR_FEATURES, reason));
        }
        if self.autoclear & AUTOCLEAR_RAW_DATA_FILE != 0 && !self.has_data_file() {
            let reason = "the raw external data bit is set, but there is no external data file";
            return Err(Error::invalid("autoclear_features", at::AUTOCLEAR_FEATURES, reason));
        }
        if self.data_file.is_some() && !self.has_data_file() {
            // Whoever made it meant the data to be in that file; here it would be looked for in this one.
            let reason = "an external data file is named, but the external data file bit is not set";
            return Err(Error::invalid("incompatible_features", at::INCOMPATIBLE_FEATURES, reason));
        }
        Ok(())
    }

    fn check_l1(&self, size: u64, file_length: u64) -> Result<()> {
        let entries = u64::from(self.l1_entries);
        if entries * 8 > MAX_L1_BYTES {
            let reason = format!("is {entries}; at most {} are supported", MAX_L1_BYTES / 8);
            return Err(Error::invalid("l1_size", at::L1_SIZE, reason));
        }
        if size > i64::MAX as u64 {
            return Err(Error::invalid("size", at::SIZE, format!("{size} is larger than any disk can be")));
        }
        let extended = u32::from(self.incompatible & incompatible::EXTENDED_L2 != 0);
        let needed = size.div_ceil(1 << (2 * self.geometry.cluster_bits - 3 - extended));
        if needed > entries {
            let reason = format!("is {entries}; a disk of {size} bytes needs {needed}");
            return Err(Error::invalid("l1_size", at::L1_SIZE, reason));
        }
        self.check_table("l1_table_offset", at::L1_TABLE_OFFSET, self.l1_offset, entries * 8, file_length)
    }

    fn check_refcount_table(&self, file_length: u64) -> Result<()> {
        let clusters = u64::from(self.refcount_table_clusters);
        let length = clusters << self.geometry.cluster_bits;
        if clusters == 0 || length > MAX_REFCOUNT_TABLE_BYTES {
            let most = MAX_REFCOUNT_TABLE_BYTES >> self.geometry.cluster_bits;
            let reason = format!("is {clusters}; 1 to {most} clusters are supported");
            return Err(Error::invalid("refcount_table_clusters", at::REFCOUNT_TABLE_CLUSTERS, reason));
        }
        let offset = self.refcount_table_offset;
        self.check_table("refcount_table_offset", at::REFCOUNT_TABLE_OFFSET, offset, length, file_length)
    }

    fn check_snapshots(&self, file_length: u64) -> Result<()> {
        let count = self.snapshot_count;
        if count > MAX_SNAPSHOTS {
            let reason = format!("is {count}; at most {MAX_SNAPSHOTS} are supported");
            return Err(Error::invalid("nb_snapshots", at::NB_SNAPSHOTS, reason));
        }
        let length = u64::from(count) * SNAPSHOT_ENTRY_MIN;
        self.check_table("snapshots_offset", at::SNAPSHOTS_OFFSET, self.snapshots_offset, length, file_length)
    }

    fn check_extension_ranges(&self, file_length: u64, bitmaps_at: Option<u64>, crypto_at: Option<u64>) -> Result<()> {
        // Stale bitmaps describe nothing: whoever left them behind may have reused or cut off their clusters.
        if let (Some(bitmaps), Some(at), true) = (self.bitmaps, bitmaps_at, self.bitmaps_consistent()) {
            let (offset, length) = (bitmaps.directory_offset, bitmaps.directory_size);
            self.check_table("bitmap_directory_offset", at + 16, offset, length, file_length)?;
        }
        if let (Some((offset, length)), Some(at)) = (self.crypto_header, crypto_at) {
            self.check_table("Full disk encryption header pointer", at, offset, length, file_length)?;
        }
        Ok(())
    }

    /// A table of `length` bytes is aligned, is not the header, and ends inside the file. An empty one only has to be
    /// aligned, as in QEMU.
    fn check_table(&self, field: &'static str, at: u64, offset: HostOffset, length: u64, file: u64) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        if !offset.0.is_multiple_of(cluster_size) {
            return Err(Error::invalid(
                field,
                at,
                format!("{offset} is not aligned to clusters of {cluster_size} bytes"),
            ));
        }
        if length == 0 {
            return Ok(());
        }
        if offset.0 == 0 {
            return Err(Error::invalid(field, at, "is zero, where the header is"));
        }
        match offset.0.checked_add(length) {
            Some(end) if end <= MAX_HOST_OFFSET && end <= file => Ok(()),
            _ => {
                let reason = format!("{length} bytes at {offset} reach past the end of the file ({file} bytes)");
                Err(Error::invalid(field, at, reason))
            }
        }
    }

    fn check_overlaps(&self) -> Result<()> {
        let mut ranges = self.host_ranges();
        ranges.sort_by_key(|r| r.offset);
        for (a, b) in ranges.iter().zip(ranges.iter().skip(1)) {
            if a.end() > b.offset.0 {
                let (field, at) = match b.what {
                    "L1 table" => ("l1_table_offset", at::L1_TABLE_OFFSET),
                    "refcount table" => ("refcount_table_offset", at::REFCOUNT_TABLE_OFFSET),
                    "snapshot table" => ("snapshots_offset", at::SNAPSHOTS_OFFSET),
                    _ => ("Header extension", u64::from(self.header_length)),
                };
                return Err(Error::invalid(field, at, format!("the {} overlaps the {}", b.what, a.what)));
            }
        }
        Ok(())
    }
}

impl RawVersion3 {
    /// What version 2 implies.
    fn version_2() -> Self {
        RawVersion3 {
            incompatible_features: U64::ZERO,
            compatible_features: U64::ZERO,
            autoclear_features: U64::ZERO,
            refcount_order: U32::new(4),
            header_length: U32::new(V2_LENGTH),
        }
    }

    fn header_length(&self, cluster_size: u64) -> Result<u32> {
        let length = self.header_length.get();
        let refuse = |reason| Err(Error::invalid("header_length", at::HEADER_LENGTH, reason));
        match length {
            _ if length < V3_MIN_LENGTH => refuse(format!("is {length}; version 3 needs {V3_MIN_LENGTH} at least")),
            _ if !length.is_multiple_of(8) => refuse(format!("{length} is not a multiple of 8")),
            _ if u64::from(length) > cluster_size => refuse(format!("{length} is more than a cluster")),
            _ => Ok(length),
        }
    }
}

/// The bytes of the first cluster that may hold extensions, and the backing file's name.
fn extension_area<'a>(raw: &RawHeader, header_length: u32, cluster: &'a [u8]) -> Result<(&'a [u8], Option<String>)> {
    let start = header_length as usize;
    let offset = raw.backing_file_offset.get();
    if offset == 0 {
        return Ok((cluster.get(start..).unwrap_or(&[]), None));
    }
    let bad_offset = |reason: &str| Error::invalid("backing_file_offset", at::BACKING_FILE_OFFSET, reason);
    let from = usize::try_from(offset).map_err(|_| bad_offset("is outside the first cluster"))?;
    if from < start {
        return Err(bad_offset("is inside the header"));
    }
    let area = cluster.get(start..from).ok_or_else(|| bad_offset("is outside the first cluster"))?;
    let length = raw.backing_file_size.get();
    let bad_size = |reason: String| Error::invalid("backing_file_size", at::BACKING_FILE_SIZE, reason);
    if length > MAX_BACKING_NAME {
        return Err(bad_size(format!("is {length}; at most {MAX_BACKING_NAME} bytes are allowed")));
    }
    let name = cluster
        .get(from..)
        .and_then(|rest| rest.get(..length as usize))
        .ok_or_else(|| bad_size(format!("{length} bytes do not fit into the first cluster")))?;
    let name = extension::string("backing_file_name", name, offset, MAX_BACKING_NAME as usize)?;
    Ok((area, Some(name).filter(|n| !n.is_empty())))
}

fn compression_type(incompatible: u64, header_length: u32, cluster: &[u8]) -> Result<u8> {
    let present = u64::from(header_length) > at::COMPRESSION_TYPE;
    let value = cluster.get(at::COMPRESSION_TYPE as usize).copied().filter(|_| present).unwrap_or(0);
    let refuse = |reason| Err(Error::invalid("compression_type", at::COMPRESSION_TYPE, reason));
    match (value, incompatible & incompatible::COMPRESSION_TYPE != 0) {
        (0, false) | (1, true) => Ok(value),
        (0, true) => refuse("is deflate, but the compression type bit is set".to_owned()),
        (1, false) => refuse("is zstd, but the compression type bit is not set".to_owned()),
        _ => refuse(format!("is {value}, neither deflate (0) nor zstd (1)")),
    }
}

/// The header's first sector. It is kept whole, since writing a sector is atomic and everything that is ever changed
/// lies in it.
pub type Sector = [u8; 512];

fn patch<const N: usize>(sector: &mut Sector, at: u64, bytes: [u8; N]) {
    let at = at as usize;
    if let Some(field) = sector.get_mut(at..at + N) {
        field.copy_from_slice(&bytes);
    }
}

fn is_version_2(sector: &Sector) -> bool {
    RawHeader::ref_from_prefix(sector).is_ok_and(|(raw, _)| raw.version.get() == 2)
}

/// Lets the active L1 table be at `offset`, with `entries` entries.
pub fn patch_l1(sector: &mut Sector, offset: HostOffset, entries: u32) {
    patch(sector, at::L1_SIZE, entries.to_be_bytes());
    patch(sector, at::L1_TABLE_OFFSET, offset.0.to_be_bytes());
}

/// Lets the refcount table be at `offset`, `clusters` clusters long.
pub fn patch_refcount_table(sector: &mut Sector, offset: HostOffset, clusters: u32) {
    patch(sector, at::REFCOUNT_TABLE_OFFSET, offset.0.to_be_bytes());
    patch(sector, at::REFCOUNT_TABLE_CLUSTERS, clusters.to_be_bytes());
}

/// Lets the snapshot table be at `offset`, with `count` entries.
pub fn patch_snapshots(sector: &mut Sector, offset: HostOffset, count: u32) {
    patch(sector, at::NB_SNAPSHOTS, count.to_be_bytes());
    patch(sector, at::SNAPSHOTS_OFFSET, offset.0.to_be_bytes());
}

/// Sets the size of the virtual disk, in bytes.
pub fn patch_virtual_size(sector: &mut Sector, bytes: u64) {
    patch(sector, at::SIZE, bytes.to_be_bytes());
}

/// Sets `incompatible_features`. Version 2 has no such field: nothing happens there.
pub fn patch_incompatible(sector: &mut Sector, bits: u64) {
    if !is_version_2(sector) {
        patch(sector, at::INCOMPATIBLE_FEATURES, bits.to_be_bytes());
    }
}

/// Sets `autoclear_features`. Version 2 has no such field: nothing happens there.
pub fn patch_autoclear(sector: &mut Sector, bits: u64) {
    if !is_version_2(sector) {
        patch(sector, at::AUTOCLEAR_FEATURES, bits.to_be_bytes());
    }
}

/// Moves the backing file's name to byte `offset` of the file.
pub(crate) fn patch_backing_offset(sector: &mut Sector, offset: u64) {
    patch(sector, at::BACKING_FILE_OFFSET, offset.to_be_bytes());
}

/// Stores `bytes` at byte `from`, as far as they lie in the first sector.
pub(crate) fn patch_bytes(sector: &mut Sector, from: u64, bytes: &[u8]) {
    for (i, &byte) in (from..).zip(bytes) {
        if let Some(place) = usize::try_from(i).ok().and_then(|i| sector.get_mut(i)) {
            *place = byte;
        }
    }
}

/// Where the backing file's name is in the first cluster of a valid image, and its length in bytes.
pub(crate) fn backing_name(cluster: &[u8]) -> Option<(u64, u64)> {
    let (raw, _) = RawHeader::ref_from_prefix(cluster).ok()?;
    let at = raw.backing_file_offset.get();
    (at != 0).then_some((at, raw.backing_file_size.get().into()))
}
