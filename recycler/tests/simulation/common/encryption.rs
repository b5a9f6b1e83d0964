//! Encrypted images of a kind that can be opened thousands of times: made from new ones, whose data is still to come.

use aes::Aes128;
use aes::cipher::{Array, KeyInit};
use pbkdf2::pbkdf2_hmac;
use qcow_recycler::check::check;
use qcow_recycler::format::extension::kind;
use qcow_recycler::format::header::{Header, crypt};
use qcow_recycler::format::luks;
use qcow_recycler::{Passphrase, Repair};
use sha2::Sha256;
use xts_mode::{Xts128, get_tweak_default};

use super::content::SECTOR;
use super::memory::MemoryDevice;
use super::verify::at_once;

/// How the data of an image is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Encryption {
    None,
    /// As QEMU once had it: QEMU's tools read it.
    Aes,
    /// LUKS with a key of one stripe, which is quick to open, and which QEMU refuses.
    Luks,
}

/// What opens all of them.
pub const PASSPHRASE: &str = "sesame";

impl Encryption {
    /// For the options that an image is opened with.
    pub fn passphrase(self) -> Option<Passphrase> {
        (self != Encryption::None).then(|| Passphrase::new(PASSPHRASE))
    }

    /// Encrypts a new image.
    pub fn apply(self, image: Vec<u8>) -> Vec<u8> {
        match self {
            Encryption::None => image,
            Encryption::Aes => with_method(image, crypt::AES),
            Encryption::Luks => with_luks(with_method(image, crypt::LUKS)),
        }
    }
}

fn with_method(mut image: Vec<u8>, method: u32) -> Vec<u8> {
    image[32..36].copy_from_slice(&method.to_be_bytes());
    image
}

/// Appends a LUKS header in clusters of its own, and lets the image's header name it.
fn with_luks(mut image: Vec<u8>) -> Vec<u8> {
    let cluster = 1usize << u32::from_be_bytes(image[20..24].try_into().unwrap());
    let luks = luks_header();
    let offset = image.len().next_multiple_of(cluster);
    image.resize(offset, 0);
    image.extend(&luks);
    image.resize(image.len().next_multiple_of(cluster), 0);
    // In the place of the names of features, for which small clusters have no room besides. What names a data file is
    // kept.
    let mut at = u32::from_be_bytes(image[100..104].try_into().unwrap()) as usize;
    if image[at..at + 4] == kind::DATA_FILE.to_be_bytes() {
        let length = u32::from_be_bytes(image[at + 4..at + 8].try_into().unwrap()) as usize;
        at += 8 + length.next_multiple_of(8);
    }
    let mut extensions = Vec::new();
    extensions.extend(0x0537_be77u32.to_be_bytes());
    extensions.extend(16u32.to_be_bytes());
    extensions.extend((offset as u64).to_be_bytes());
    extensions.extend((luks.len() as u64).to_be_bytes());
    image[at..512].fill(0);
    image[at..at + extensions.len()].copy_from_slice(&extensions);
    Header::parse(&image, image.len() as u64).expect("a valid header");
    let device = MemoryDevice::new(image);
    let report = at_once(check(&device, Repair::All)).expect("a check in memory").expect("a check");
    assert_eq!(report.corruptions, report.corruptions_fixed, "{report:?}");
    device.contents()
}

/// A header with one slot and, behind it, its key material.
fn luks_header() -> Vec<u8> {
    let material = luks::HEADER_LENGTH.next_multiple_of(SECTOR);
    let key: [u8; 32] = std::array::from_fn(|i| (i * 7 + 1) as u8);
    let (slot_salt, digest_salt) = ([3; 32], [5; 32]);
    let (mut slot_key, mut digest) = ([0; 32], [0; 20]);
    pbkdf2_hmac::<Sha256>(PASSPHRASE.as_bytes(), &slot_salt, 2, &mut slot_key);
    pbkdf2_hmac::<Sha256>(&key, &digest_salt, 2, &mut digest);
    let mut bytes = vec![0; material + SECTOR];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &luks::MAGIC);
    put(6, &[0, 1]);
    put(8, b"aes");
    put(40, b"xts-plain64");
    put(72, b"sha256");
    put(104, &((material / SECTOR + 1) as u32).to_be_bytes());
    put(108, &32u32.to_be_bytes());
    put(112, &digest);
    put(132, &digest_salt);
    put(164, &2u32.to_be_bytes());
    for slot in 0..luks::SLOTS {
        let base = 208 + 48 * slot;
        put(base, &if slot == 3 { 0x00ac_71f3u32 } else { 0x0000_dead }.to_be_bytes());
        put(base + 4, &2u32.to_be_bytes());
        put(base + 8, &slot_salt);
        put(base + 40, &((material / SECTOR) as u32).to_be_bytes());
        put(base + 44, &1u32.to_be_bytes());
    }
    put(material, &key);
    let half = |range: std::ops::Range<usize>| Aes128::new(&Array(slot_key[range].try_into().unwrap()));
    Xts128::new(half(0..16), half(16..32)).encrypt_area(&mut bytes[material..], SECTOR, 0, get_tweak_default);
    bytes
}
