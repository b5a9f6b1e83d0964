//! What guests write: every sector says which guest sector it belongs to and which write made it, all through, so
//! that a torn sector and another cluster's data are recognised wherever they turn up.

use std::fmt;

/// Bytes in a sector, the unit that a device writes atomically.
pub const SECTOR: usize = 512;

const MAGIC: u64 = 0x7163_6f77_2d74_6573;

/// The contents of one guest sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Content {
    /// Zeroes.
    Zero,
    /// What the write with this number put into that sector.
    Data {
        /// The guest sector's index.
        sector: u64,
        /// The number of the write.
        version: u64,
    },
    /// Nothing that was ever written.
    Garbage {
        /// The first word.
        word: u64,
    },
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Content::Zero => write!(f, "zeroes"),
            Content::Data { sector, version } => write!(f, "write {version} of sector {sector}"),
            Content::Garbage { word } => write!(f, "garbage starting {word:#018x}"),
        }
    }
}

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Fills `out`, one sector long, with what write `version` puts into guest sector `sector`.
pub fn fill(out: &mut [u8], sector: u64, version: u64) {
    assert_eq!(out.len(), SECTOR);
    let key = mix(sector.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ version);
    for (i, word) in out.chunks_exact_mut(8).enumerate() {
        let value = match i {
            0 => MAGIC,
            1 => sector,
            2 => version,
            _ => key.wrapping_add((i as u64).wrapping_mul(0x0101_0101_0101_0101)),
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// Data for a write of whole sectors that starts at guest sector `first`.
pub fn data(first: u64, sectors: u64, version: u64) -> Vec<u8> {
    let mut out = vec![0; sectors as usize * SECTOR];
    for (i, sector) in out.chunks_exact_mut(SECTOR).enumerate() {
        fill(sector, first + i as u64, version);
    }
    out
}

/// Whether a sector of the image file holds guest data (for telling data from metadata in a crash image).
pub fn is_guest_data(bytes: &[u8]) -> bool {
    bytes.first_chunk::<8>().is_some_and(|word| u64::from_le_bytes(*word) == MAGIC)
}

/// Recognises the contents of one sector.
pub fn recognise(bytes: &[u8]) -> Content {
    let word = |i: usize| u64::from_le_bytes(bytes[i * 8..i * 8 + 8].try_into().unwrap());
    if word(0) == MAGIC {
        let (sector, version) = (word(1), word(2));
        let mut expected = [0; SECTOR];
        fill(&mut expected, sector, version);
        if bytes == expected {
            return Content::Data { sector, version };
        }
    } else if bytes.iter().all(|&b| b == 0) {
        return Content::Zero;
    }
    Content::Garbage { word: word(0) }
}
