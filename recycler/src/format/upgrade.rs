//! A header of version 2 as one of version 3 (sections "Header" and "Header extensions" of the qcow2 specification).
//!
//! Everything that makes an image version 3 lies in its first sector, which is written at once or not at all. The
//! extensions follow a longer header there. The backing file's name may lie elsewhere in the first cluster: if it does not
//! fit into the first sector any more, a copy of it goes past everything that the old header uses.

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::extension::{self, kind};
use super::header::{RawHeader, RawVersion3, Sector, V2_LENGTH, V3_LENGTH, backing_name};
use crate::error::{Error, Result};

const SECTOR: usize = 512;
/// Version 2 has refcounts of 2^4 bits.
const REFCOUNT_ORDER: u32 = 4;

/// What is to be written, in this order, with a flush in between.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Upgrade {
    /// A copy of the backing file's name, and where it goes: where the old header has nothing.
    pub(crate) name: Option<(u64, Vec<u8>)>,
    /// The new first sector.
    pub(crate) sector: Sector,
}

/// The version 3 header for an image whose first cluster this is, which was found to be valid version 2.
///
/// # Errors
/// [`Error::Unsupported`] if the extensions, or the name, have no room.
pub(crate) fn upgrade(cluster: &[u8]) -> Result<Upgrade> {
    let too_short = |_| Error::invalid("magic", 0, "the file is too short for a qcow2 header");
    let (raw, _) = RawHeader::ref_from_prefix(cluster).map_err(too_short)?;
    let (name_at, name_length) = backing_name(cluster).map_or((cluster.len(), 0), |(at, n)| (at as usize, n as usize));
    let name = cluster.get(name_at..).and_then(|rest| rest.get(..name_length)).filter(|name| !name.is_empty());
    let area_end = name_at;
    let area = cluster.get(V2_LENGTH as usize..area_end).unwrap_or(&[]);

    let mut extensions = Vec::new();
    for extension in extension::walk(area, u64::from(V2_LENGTH)) {
        let extension = extension?;
        extension::append(&mut extensions, extension.kind, extension.data);
    }
    extension::append(&mut extensions, kind::END, &[]);
    let end = V3_LENGTH as usize + extensions.len();
    if end > SECTOR {
        return Err(Error::unsupported("upgrading an image whose header extensions do not fit into its first sector"));
    }

    let mut sector = [0; SECTOR];
    let mut put = |at: usize, from: &[u8]| {
        if let Some(place) = sector.get_mut(at..at + from.len()) {
            place.copy_from_slice(from);
        }
    };
    let mut raw = *raw;
    raw.version = U32::new(3);
    let mut copy = None;
    if let Some(name) = name {
        let at = if end + name.len() <= SECTOR {
            put(end, name);
            end
        } else {
            let at = (name_at + name_length).next_multiple_of(SECTOR);
            if at + name.len() > cluster.len() {
                return Err(Error::unsupported(
                    "upgrading an image whose backing file name has no room in its first cluster",
                ));
            }
            copy = Some((at as u64, name.to_vec()));
            at
        };
        raw.backing_file_offset = U64::new(at as u64);
    }
    put(0, raw.as_bytes());
    let v3 = RawVersion3 {
        incompatible_features: U64::ZERO,
        compatible_features: U64::ZERO,
        autoclear_features: U64::ZERO,
        refcount_order: U32::new(REFCOUNT_ORDER),
        header_length: U32::new(V3_LENGTH),
    };
    put(V2_LENGTH as usize, v3.as_bytes());
    put(V3_LENGTH as usize, &extensions);
    Ok(Upgrade { name: copy, sector })
}
