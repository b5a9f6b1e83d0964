//! Images made to mislead, and what the library must do with them.
//!
//! Used twice: by the targets of cargo-fuzz in `targets/`, and by `recycler/tests/hostile.rs`, which includes this
//! file and runs on any toolchain. Each function below takes one input of the target of its name, and panics if a
//! promise is broken.
#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    clippy::panic,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::missing_panics_doc
)]

pub mod anatomy;
pub mod choices;
pub mod device;
pub mod entries;
pub mod known;
pub mod meet;
pub mod meter;
pub mod mutate;

use choices::Choices;
use known::Disk;
use mutate::File;
use qcow_recycler::format::header::{self, Header, Sector};
use qcow_recycler::format::luks::LuksHeader;
use qcow_recycler::format::snapshot;
use qcow_recycler::{Error, Options};

/// 8 bytes that choose the requests, then an image file.
pub fn image(input: &[u8]) {
    let Some((seed, bytes)) = input.split_first_chunk() else { return };
    let file = File::new(bytes.to_vec());
    if let Err(e) = meet::meet(&file, Disk::default(), &mut Choices::new(u64::from_be_bytes(*seed))) {
        panic!("{e}");
    }
}

/// Damages an input of [`image`]; gives its new length, at most `most` bytes.
pub fn mutate_image(data: &mut [u8], size: usize, most: usize, seed: u32) -> usize {
    let mut choices = Choices::new(seed.into());
    let Some((head, bytes)) = data.get(..size).and_then(|input| input.split_first_chunk::<8>()) else { return size };
    let mut head = *head;
    if choices.chance(20) {
        head[choices.below(8) as usize] = choices.number() as u8;
    }
    let mut file = File::new(bytes.to_vec());
    mutate::once(&mut file, &mut choices);
    // The file may be shorter or longer than the bytes it is known by.
    let length = file.length.min((most.min(data.len()) as u64).saturating_sub(8)) as usize;
    file.bytes.resize(length, 0);
    data[..8].copy_from_slice(&head);
    data[8..8 + length].copy_from_slice(&file.bytes);
    8 + length
}

/// 8 bytes that are the file's length, then its first bytes: what is accepted lies in the file and does not overlap.
pub fn header(input: &[u8]) {
    let Some((length, bytes)) = input.split_first_chunk() else { return };
    // What is read ends where the file does; the rest of the first cluster is zeroes.
    let length = u64::from_be_bytes(*length).max(bytes.len() as u64);
    let mut bytes = bytes.to_vec();
    bytes.resize((length as usize).min(Header::READ_LEN).max(bytes.len()), 0);
    let _ = snapshot::parse_entry(&bytes, 0);
    if let Ok(luks) = LuksHeader::parse(&bytes, 0, length) {
        let ends = luks.slots.iter().map(|s| s.material + luks.cipher.key_bytes as u64 * u64::from(s.stripes));
        assert!(ends.max().is_none_or(|end| end <= length), "key material outside: {luks:?}");
    }
    let parsed = match Header::parse(&bytes, length) {
        Ok(parsed) => parsed,
        Err(e) => {
            assert!(matches!(e, Error::Invalid { .. } | Error::Unsupported { .. }), "{e:?}");
            return;
        }
    };
    let _ = (parsed.unsupported_for_reading(), parsed.unsupported_for_writing());
    let mut ranges = parsed.host_ranges();
    ranges.sort_by_key(|r| r.offset);
    for pair in ranges.windows(2) {
        assert!(pair[0].offset.0 + pair[0].length <= pair[1].offset.0, "{ranges:?} overlap");
    }
    for range in &ranges {
        assert!(range.offset.0 + range.length <= length.min(1 << 56), "{range:?} ends outside the file");
        assert!(range.offset.0.is_multiple_of(parsed.geometry.cluster_size()), "{range:?} is not aligned");
    }
    let mapped = u128::from(parsed.l1_entries) << (2 * parsed.geometry.cluster_bits - 3);
    assert!(u128::from(parsed.virtual_size) <= mapped, "the L1 table is too short for the disk");

    // A patch changes its fields and no other.
    let Some(first) = bytes.first_chunk::<512>() else { return };
    let mut sector: Sector = *first;
    header::patch_virtual_size(&mut sector, parsed.virtual_size);
    header::patch_l1(&mut sector, parsed.l1_offset, parsed.l1_entries);
    header::patch_refcount_table(&mut sector, parsed.refcount_table_offset, parsed.refcount_table_clusters);
    header::patch_incompatible(&mut sector, parsed.incompatible);
    header::patch_autoclear(&mut sector, parsed.autoclear);
    bytes[..512].copy_from_slice(&sector);
    assert_eq!(Header::parse(&bytes, length).ok().as_ref(), Some(&parsed), "patched with what was there");
}

/// A configuration string: an error changes nothing and names the key, and what is accepted is accepted again.
pub fn options(input: &[u8]) {
    let Ok(config) = std::str::from_utf8(input) else { return };
    let fresh = format!("{:?}", Options::default());
    let mut options = Options::default();
    match options.apply_config(config) {
        Ok(()) => {
            let once = format!("{options:?}");
            options.apply_config(config).expect("it was accepted before");
            assert_eq!(format!("{options:?}"), once, "twice is not once");
        }
        Err(e) => {
            assert!(matches!(e, Error::BadOption { .. }), "{e:?}");
            assert!(e.field().is_some_and(|key| config.contains(key)), "{e} does not name a key");
            assert_eq!(format!("{options:?}"), fresh, "an error changed something");
        }
    }
}

/// The shape of an image (4 bytes), then its L2 entries and what else is in it.
pub fn entries(input: &[u8]) {
    entries::meet(input);
}
