//! The image header and its extensions (sections "Header" and "Header extensions" of the qcow2 specification).

use crate::error::{Error, Result};
use crate::units::{Geometry, HostOffset};

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

impl Header {
    /// Bytes from the start of the file that [`parse`](Self::parse) needs to see, if the file has them.
    pub const READ_LEN: usize = 2 << 20;

    /// Parses the first bytes of a file (as many as it has, up to its first cluster at least).
    ///
    /// # Errors
    /// [`Error::Invalid`] names the field and its offset; [`Error::Unsupported`] names an unknown incompatible feature.
    pub fn parse(bytes: &[u8], file_length: u64) -> Result<Header> {
        let _ = (bytes, file_length);
        Err(Error::unsupported("parse"))
    }
}
