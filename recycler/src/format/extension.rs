//! Header extensions (section "Header extensions" of the qcow2 specification).
//!
//! They lie between the header and the backing file name (or the end of the first cluster), so all of them together are
//! never more than one cluster, and what is kept of them is bounded by that.

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::header::BitmapsExtension;
use crate::error::{Error, Result};
use crate::units::HostOffset;

/// Types of header extensions.
pub mod kind {
    /// End of the header extension area.
    pub const END: u32 = 0;
    /// Backing file format name.
    pub const BACKING_FORMAT: u32 = 0xe279_2aca;
    /// Feature name table.
    pub const FEATURE_NAMES: u32 = 0x6803_f857;
    /// Bitmaps.
    pub const BITMAPS: u32 = 0x2385_2875;
    /// Full disk encryption header pointer.
    pub const CRYPTO_HEADER: u32 = 0x0537_be77;
    /// External data file name.
    pub const DATA_FILE: u32 = 0x4441_5441;
}

/// The most bitmaps that QEMU accepts in an image.
pub const MAX_BITMAPS: u32 = 65535;
/// The longest bitmap directory that QEMU accepts, in bytes.
pub const MAX_BITMAP_DIRECTORY: u64 = 1024 * MAX_BITMAPS as u64;
/// The shortest bitmap directory entry: 24 bytes and a name of one byte, padded to 8.
const MIN_BITMAP_ENTRY: u64 = 32;
/// The longest backing format name that QEMU accepts, in bytes.
pub const MAX_BACKING_FORMAT: usize = 15;
/// The longest external data file name that is accepted, in bytes: a path.
pub const MAX_DATA_FILE: usize = 4096;

#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawExtension {
    kind: U32,
    length: U32,
}

#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawFeatureName {
    bitmap: u8,
    bit: u8,
    name: [u8; 46],
}

#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawBitmaps {
    count: U32,
    reserved: U32,
    directory_size: U64,
    directory_offset: U64,
}

#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawCryptoHeader {
    offset: U64,
    length: U64,
}

/// One extension as it lies in the file.
pub(super) struct Raw<'a> {
    pub(super) kind: u32,
    /// Where its type field is in the file.
    pub(super) at: u64,
    pub(super) data: &'a [u8],
}

/// Walks the extensions in `area`, which starts at byte `start` of the file.
pub(super) fn walk(area: &[u8], start: u64) -> impl Iterator<Item = Result<Raw<'_>>> {
    let mut rest = area;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let at = start + (area.len() - rest.len()) as u64;
        let step = take(rest, at);
        // Each step takes 8 bytes at least, and an error is the last one: the walk ends.
        rest = step.as_ref().map_or(&[], |(_, rest)| rest);
        match step {
            Ok((raw, _)) if raw.kind == kind::END => {
                rest = &[];
                None
            }
            Ok((raw, _)) => Some(Ok(raw)),
            Err(e) => Some(Err(e)),
        }
    })
}

fn take(bytes: &[u8], at: u64) -> Result<(Raw<'_>, &[u8])> {
    let field = "Header extension";
    let too_long = |at, what: &str| Error::invalid(field, at, format!("{what} reaches past the header extension area"));
    let (raw, rest) = RawExtension::ref_from_prefix(bytes).map_err(|_| too_long(at, "its type and length"))?;
    let length = raw.length.get() as usize;
    let data = rest.get(..length).ok_or_else(|| too_long(at + 4, &format!("its data ({length} bytes)")))?;
    // The padding of the last one may be cut off by the end of the area.
    let rest = length.checked_next_multiple_of(8).and_then(|padded| rest.get(padded..)).unwrap_or(&[]);
    Ok((Raw { kind: raw.kind.get(), at, data }, rest))
}

/// Where an extension of the bitmaps is in a header's first cluster, or could go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slot {
    /// Its data is at this byte. `last`: nothing but the end mark follows.
    Existing { at: u64, last: bool },
    /// There is none; the end mark is at this byte.
    Missing { end: u64 },
}

/// Finds the bitmaps extension in `area`, which starts at byte `start` of the file; `None` if no end mark shows where another
/// one could go.
///
/// # Errors
/// As for parsing.
pub(crate) fn bitmaps_slot(area: &[u8], start: u64) -> Result<Option<Slot>> {
    let (mut found, mut end) = (None, start);
    for extension in walk(area, start) {
        let Raw { kind, at, data } = extension?;
        end = at + 8 + (data.len() as u64).next_multiple_of(8);
        if kind == kind::BITMAPS {
            found = Some((at + 8, end));
        }
    }
    let mark = (end - start) as usize;
    let ends = area.get(mark..mark + 8).is_some_and(|bytes| bytes == [0; 8]);
    Ok(match found {
        Some((at, after)) => Some(Slot::Existing { at, last: ends && after == end }),
        None => Some(Slot::Missing { end }).filter(|_| ends),
    })
}

/// What the extensions of an image say.
#[derive(Default)]
pub(super) struct Extensions {
    pub(super) backing_format: Option<String>,
    /// With the place of its data in the file.
    pub(super) bitmaps: Option<(BitmapsExtension, u64)>,
    /// With the place of its data in the file.
    pub(super) crypto_header: Option<(HostOffset, u64, u64)>,
    pub(super) data_file: Option<String>,
    pub(super) unknown: Vec<(u32, Vec<u8>)>,
}

impl Extensions {
    pub(super) fn parse(area: &[u8], start: u64, cluster_size: u64) -> Result<Extensions> {
        let mut all = Extensions::default();
        let mut feature_names = false;
        for extension in walk(area, start) {
            let Raw { kind, at, data } = extension?;
            let seen = match kind {
                kind::BACKING_FORMAT => all.backing_format.replace(backing_format(data, at + 8)?).is_some(),
                kind::BITMAPS => all.bitmaps.replace((bitmaps(data, at + 8, cluster_size)?, at + 8)).is_some(),
                kind::CRYPTO_HEADER => {
                    let (offset, length) = crypto_header(data, at + 8, cluster_size)?;
                    all.crypto_header.replace((offset, length, at + 8)).is_some()
                }
                kind::DATA_FILE => {
                    let name = string("External data file name", data, at + 8, MAX_DATA_FILE)?;
                    all.data_file.replace(name).is_some()
                }
                kind::FEATURE_NAMES => std::mem::replace(&mut feature_names, true),
                _ => {
                    all.unknown.push((kind, data.to_vec()));
                    false
                }
            };
            if seen {
                return Err(Error::invalid("Header extension", at, format!("type {kind:#010x} appears twice")));
            }
        }
        // An empty name is no name.
        all.backing_format = all.backing_format.filter(|f| !f.is_empty());
        all.data_file = all.data_file.filter(|f| !f.is_empty());
        Ok(all)
    }
}

/// Appends an extension as it lies in the file, padded.
pub(crate) fn append(area: &mut Vec<u8>, kind: u32, data: &[u8]) {
    area.extend(kind.to_be_bytes());
    area.extend((data.len() as u32).to_be_bytes());
    area.extend(data);
    area.resize(area.len().next_multiple_of(8), 0);
}

/// The names of all features that the specification knows, as QEMU writes them: bitmap (0 incompatible, 1 compatible,
/// 2 autoclear), bit, name.
const FEATURES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

/// The data of a feature name table.
pub(crate) fn feature_name_table() -> Vec<u8> {
    let mut table = Vec::with_capacity(FEATURES.len() * size_of::<RawFeatureName>());
    for (bitmap, bit, name) in FEATURES {
        let end = table.len() + size_of::<RawFeatureName>();
        table.extend([bitmap, bit]);
        table.extend(name.as_bytes());
        table.resize(end, 0);
    }
    table
}

/// Names the bits of `unknown`, a subset of `incompatible_features`, by the image's own feature name table as far as it
/// is intact.
pub(super) fn name_features(area: &[u8], start: u64, unknown: u64) -> String {
    let table = walk(area, start).map_while(Result::ok).find(|e| e.kind == kind::FEATURE_NAMES);
    let entries = table.map_or(&[][..], |e| e.data).chunks_exact(size_of::<RawFeatureName>());
    let names: Vec<(u8, String)> = entries
        .filter_map(|entry| RawFeatureName::ref_from_bytes(entry).ok())
        .filter(|entry| entry.bitmap == 0)
        .map(|entry| {
            let name = entry.name.split(|&b| b == 0).next().unwrap_or(&[]);
            (entry.bit, String::from_utf8_lossy(name).escape_debug().to_string())
        })
        .collect();
    let mut bits = (0u8..64).filter(|bit| unknown & (1 << bit) != 0).map(|bit| {
        match names.iter().find(|(b, name)| *b == bit && !name.is_empty()) {
            Some((_, name)) => format!("incompatible feature \"{name}\" (bit {bit})"),
            None => format!("unknown incompatible feature (bit {bit})"),
        }
    });
    let mut text = bits.next().unwrap_or_default();
    for bit in bits {
        text.push_str(", ");
        text.push_str(&bit);
    }
    text
}

/// Bytes of the file that are a name: UTF-8, of at most `max` bytes, without NUL.
pub(super) fn string(field: &'static str, bytes: &[u8], at: u64, max: usize) -> Result<String> {
    if bytes.len() > max {
        return Err(Error::invalid(field, at, format!("is {} bytes long; at most {max} are allowed", bytes.len())));
    }
    // C programs would see another name than we do.
    if bytes.contains(&0) {
        return Err(Error::invalid(field, at, "contains a NUL byte"));
    }
    match std::str::from_utf8(bytes) {
        Ok(name) => Ok(name.to_owned()),
        Err(_) => Err(Error::invalid(field, at, "is not UTF-8")),
    }
}

fn backing_format(data: &[u8], at: u64) -> Result<String> {
    string("Backing file format name", data, at, MAX_BACKING_FORMAT)
}

fn bitmaps(data: &[u8], at: u64, cluster_size: u64) -> Result<BitmapsExtension> {
    let raw = RawBitmaps::ref_from_bytes(data)
        .map_err(|_| Error::invalid("Bitmaps extension", at - 4, format!("is {} bytes long, not 24", data.len())))?;
    let (count, size, offset) = (raw.count.get(), raw.directory_size.get(), raw.directory_offset.get());
    if count == 0 || count > MAX_BITMAPS {
        return Err(Error::invalid("nb_bitmaps", at, format!("is {count}; 1 to {MAX_BITMAPS} are allowed")));
    }
    if raw.reserved.get() != 0 {
        return Err(Error::invalid("Bitmaps extension", at + 4, "its reserved field is not zero"));
    }
    let least = u64::from(count) * MIN_BITMAP_ENTRY;
    if size < least || size > MAX_BITMAP_DIRECTORY {
        let reason = format!("is {size}; {count} bitmaps need {least} to {MAX_BITMAP_DIRECTORY} bytes");
        return Err(Error::invalid("bitmap_directory_size", at + 8, reason));
    }
    if offset == 0 || !offset.is_multiple_of(cluster_size) {
        return Err(Error::invalid("bitmap_directory_offset", at + 16, format!("{offset:#x} is zero or not aligned")));
    }
    Ok(BitmapsExtension { count, directory_size: size, directory_offset: HostOffset(offset) })
}

fn crypto_header(data: &[u8], at: u64, cluster_size: u64) -> Result<(HostOffset, u64)> {
    let field = "Full disk encryption header pointer";
    let raw = RawCryptoHeader::ref_from_bytes(data)
        .map_err(|_| Error::invalid(field, at - 4, format!("is {} bytes long, not 16", data.len())))?;
    let (offset, length) = (raw.offset.get(), raw.length.get());
    if offset == 0 || !offset.is_multiple_of(cluster_size) {
        return Err(Error::invalid(field, at, format!("the offset {offset:#x} is zero or not aligned")));
    }
    if length == 0 {
        return Err(Error::invalid(field, at + 8, "the length is zero"));
    }
    Ok((HostOffset(offset), length))
}
