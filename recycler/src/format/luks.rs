//! The LUKS header that an encrypted image carries (LUKS On-Disk Format Specification 1.2.3): parsed and validated
//! before any key is derived.

use zerocopy::byteorder::big_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::error::{Error, Result};

/// `magic`.
pub const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
/// Length of the header in bytes: what is before the key material.
pub const HEADER_LENGTH: usize = 592;
/// Key slots in a header.
pub const SLOTS: usize = 8;
/// The unit of offsets in the header, and of encryption, in bytes.
pub const SECTOR: u64 = 512;
/// Stripes that a key is split into, as everybody writes it; fewer are accepted.
pub const MAX_STRIPES: u32 = 4000;
/// The most iterations that a header may ask for, those of all active slots and of the digest taken together. What QEMU and
/// cryptsetup choose for a slot takes two seconds at most.
pub const MAX_ITERATIONS: u64 = 1 << 26;
/// And the most that trying a passphrase on all of them may take: seconds to a minute. A slot's are made for each piece of its key
/// that is as long as the hash, and the digest's once for each slot.
pub const MAX_WORK: u64 = 1 << 27;

/// `active` of a key slot.
const ENABLED: u32 = 0x00ac_71f3;
const DISABLED: u32 = 0x0000_dead;

#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 6],
    version: U16,
    cipher_name: [u8; 32],
    cipher_mode: [u8; 32],
    hash_spec: [u8; 32],
    _payload_offset: U32,
    key_bytes: U32,
    mk_digest: [u8; 20],
    mk_digest_salt: [u8; 32],
    mk_digest_iterations: U32,
    _uuid: [u8; 40],
    slots: [RawSlot; SLOTS],
}

#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawSlot {
    active: U32,
    iterations: U32,
    salt: [u8; 32],
    key_material_offset: U32,
    stripes: U32,
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_LENGTH);

/// Where the fields are, in bytes from the start of the header.
mod at {
    pub(super) const VERSION: u64 = 6;
    pub(super) const KEY_BYTES: u64 = 108;
    pub(super) const MK_DIGEST_ITERATIONS: u64 = 164;
    pub(super) const SLOTS: u64 = 208;
    pub(super) const SLOT_LENGTH: u64 = 48;
    pub(super) const SLOT_ITERATIONS: u64 = 4;
    pub(super) const SLOT_OFFSET: u64 = 40;
    pub(super) const SLOT_STRIPES: u64 = 44;
}

/// How blocks of 16 bytes are made sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Cipher block chaining.
    Cbc,
    /// XTS, with a key for the data and one for the tweak.
    Xts,
}

/// How a sector's initialisation vector follows from its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IvKind {
    /// Its lower 32 bits.
    Plain,
    /// All of it.
    Plain64,
    /// All of it, encrypted with the SHA-256 of the key.
    EssivSha256,
}

/// AES in one of the ways that images use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CipherSpec {
    /// What makes sectors of blocks.
    pub mode: Mode,
    /// What makes sectors differ.
    pub iv: IvKind,
    /// Length of the whole key in bytes: 16, 24 or 32 with CBC, 32 or 64 with XTS.
    pub key_bytes: usize,
}

/// The hash that keys are derived and mixed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hash {
    /// SHA-1.
    Sha1,
    /// SHA-256.
    Sha256,
    /// SHA-512.
    Sha512,
}

impl Hash {
    /// Its length in bytes.
    fn length(self) -> usize {
        match self {
            Hash::Sha1 => 20,
            Hash::Sha256 => 32,
            Hash::Sha512 => 64,
        }
    }
}

/// A validated header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LuksHeader {
    /// How the data, and the key material, is encrypted.
    pub cipher: CipherSpec,
    /// The hash that everything is derived with.
    pub hash: Hash,
    /// By which the right key is recognised.
    pub digest: [u8; 20],
    /// Salt of that.
    pub digest_salt: [u8; 32],
    /// Iterations of that.
    pub digest_iterations: u32,
    /// The slots in use.
    pub slots: Vec<KeySlot>,
}

/// A key slot in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeySlot {
    /// Iterations of the derivation of the slot's key.
    pub iterations: u32,
    /// Salt of that.
    pub salt: [u8; 32],
    /// Where the key material is in the image file, in bytes.
    pub material: u64,
    /// Stripes that the key is split into.
    pub stripes: u32,
}

impl LuksHeader {
    /// Parses the first bytes of the encryption header, which is at byte `start` of the image file and `length` bytes long, key
    /// material included.
    ///
    /// # Errors
    /// [`Error::Invalid`] names the field and its offset; [`Error::Unsupported`] names the cipher, the hash or the version.
    pub fn parse(bytes: &[u8], start: u64, length: u64) -> Result<LuksHeader> {
        let invalid = |field, at: u64, reason: String| Error::invalid(field, start + at, reason);
        let (raw, _) = RawHeader::ref_from_prefix(bytes)
            .ok()
            .filter(|_| length >= HEADER_LENGTH as u64)
            .ok_or_else(|| invalid("LUKS header", 0, format!("has {length} bytes, not {HEADER_LENGTH} at least")))?;
        if raw.magic != MAGIC {
            return Err(invalid("LUKS magic", 0, "this is no LUKS header".to_owned()));
        }
        match raw.version.get() {
            1 => {}
            2 => return Err(Error::unsupported("LUKS version 2 inside an image")),
            other => return Err(invalid("LUKS version", at::VERSION, format!("is {other}, not 1"))),
        }
        let hash = hash(&raw.hash_spec)?;
        let cipher = cipher(raw, start)?;
        let digest_iterations = raw.mk_digest_iterations.get();
        let mut iterations = u64::from(digest_iterations);
        if digest_iterations == 0 || iterations > MAX_ITERATIONS {
            let reason = format!("is {digest_iterations}, not 1 to {MAX_ITERATIONS}");
            return Err(invalid("LUKS mk-digest-iter", at::MK_DIGEST_ITERATIONS, reason));
        }
        let mut slots = Vec::new();
        // The digest is as long as the shortest hash: one piece.
        let pieces = cipher.key_bytes.div_ceil(hash.length()) as u64;
        let mut work = 0;
        let mut areas: Vec<_> = std::iter::once(0..HEADER_LENGTH as u64).collect();
        for (slot, i) in raw.slots.iter().zip(0..) {
            let base = at::SLOTS + i * at::SLOT_LENGTH;
            match slot.active.get() {
                ENABLED => {}
                DISABLED => continue,
                other => return Err(invalid("LUKS key slot active", base, format!("is {other:#x}"))),
            }
            iterations += u64::from(slot.iterations.get());
            work += u64::from(slot.iterations.get()) * pieces + u64::from(digest_iterations);
            if slot.iterations.get() == 0 || iterations > MAX_ITERATIONS || work > MAX_WORK {
                let reason = format!(
                    "is {}, for each of {pieces} pieces of the key, and {digest_iterations} for the digest: all slots together \
                     may ask for {MAX_ITERATIONS}, and need {MAX_WORK}",
                    slot.iterations.get()
                );
                return Err(invalid("LUKS key slot iterations", base + at::SLOT_ITERATIONS, reason));
            }
            let stripes = slot.stripes.get();
            if stripes == 0 || stripes > MAX_STRIPES {
                let reason = format!("is {stripes}, not 1 to {MAX_STRIPES}");
                return Err(invalid("LUKS key slot stripes", base + at::SLOT_STRIPES, reason));
            }
            // No overflow: 32 bits in sectors, and a product of two small numbers.
            let first = u64::from(slot.key_material_offset.get()) * SECTOR;
            let end = first + (cipher.key_bytes as u64 * u64::from(stripes)).next_multiple_of(SECTOR);
            if end > length || areas.iter().any(|a| first < a.end && a.start < end) {
                let reason = format!(
                    "the key material at {first:#x} to {end:#x} overlaps the header or another slot's, or reaches past \
                     the encryption header of {length} bytes"
                );
                return Err(invalid("LUKS key slot key-material-offset", base + at::SLOT_OFFSET, reason));
            }
            areas.push(first..end);
            let (iterations, salt) = (slot.iterations.get(), slot.salt);
            slots.push(KeySlot { iterations, salt, material: start + first, stripes });
        }
        Ok(LuksHeader {
            cipher,
            hash,
            digest: raw.mk_digest,
            digest_salt: raw.mk_digest_salt,
            digest_iterations,
            slots,
        })
    }
}

/// A name, which ends with its first zero byte.
fn name(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
}

fn hash(bytes: &[u8]) -> Result<Hash> {
    match name(bytes).as_str() {
        "sha1" => Ok(Hash::Sha1),
        "sha256" => Ok(Hash::Sha256),
        "sha512" => Ok(Hash::Sha512),
        other => Err(Error::unsupported(format!("LUKS with the hash {other:?} (known: sha1, sha256, sha512)"))),
    }
}

fn cipher(raw: &RawHeader, start: u64) -> Result<CipherSpec> {
    let (cipher, mode) = (name(&raw.cipher_name), name(&raw.cipher_mode));
    let (chaining, vector) = mode.split_once('-').unwrap_or((&mode, ""));
    let known = match (chaining, vector) {
        _ if cipher != "aes" => None,
        ("cbc", "plain") => Some((Mode::Cbc, IvKind::Plain)),
        ("cbc", "plain64") => Some((Mode::Cbc, IvKind::Plain64)),
        ("cbc", "essiv:sha256") => Some((Mode::Cbc, IvKind::EssivSha256)),
        ("xts", "plain") => Some((Mode::Xts, IvKind::Plain)),
        ("xts", "plain64") => Some((Mode::Xts, IvKind::Plain64)),
        ("xts", "essiv:sha256") => Some((Mode::Xts, IvKind::EssivSha256)),
        _ => None,
    };
    let (mode, iv) = known.ok_or_else(|| {
        let known = "aes with xts or cbc, and plain, plain64 or essiv:sha256";
        Error::unsupported(format!("LUKS with the cipher {:?} (known: {known})", format!("{cipher}-{mode}")))
    })?;
    let key_bytes = raw.key_bytes.get();
    let fits = match mode {
        Mode::Cbc => matches!(key_bytes, 16 | 24 | 32),
        Mode::Xts => matches!(key_bytes, 32 | 64),
    };
    if !fits {
        let reason = format!("is {key_bytes}, which is no length of a key of this cipher");
        return Err(Error::invalid("LUKS key-bytes", start + at::KEY_BYTES, reason));
    }
    Ok(CipherSpec { mode, iv, key_bytes: key_bytes as usize })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where the header is in the file, and how long it is with its key material.
    const START: u64 = 0x20000;
    const LENGTH: u64 = 1 << 20;

    fn header() -> Vec<u8> {
        let mut bytes = vec![0; HEADER_LENGTH];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &MAGIC);
        put(6, &[0, 1]);
        put(8, b"aes");
        put(40, b"xts-plain64");
        put(72, b"sha256");
        put(108, &64u32.to_be_bytes());
        put(164, &1000u32.to_be_bytes());
        for slot in 0..SLOTS as u32 {
            let base = 208 + 48 * slot as usize;
            put(base, &(if slot == 1 { ENABLED } else { DISABLED }).to_be_bytes());
            put(base + 4, &2000u32.to_be_bytes());
            put(base + 40, &(8 + 504 * slot).to_be_bytes());
            put(base + 44, &MAX_STRIPES.to_be_bytes());
        }
        bytes
    }

    /// Where, and what.
    type Change<'a> = (usize, &'a [u8]);

    fn with(changes: &[Change<'_>]) -> Result<LuksHeader> {
        let mut bytes = header();
        for (at, value) in changes {
            bytes[*at..at + value.len()].copy_from_slice(value);
        }
        LuksHeader::parse(&bytes, START, LENGTH)
    }

    #[test]
    fn slots_in_use_are_found() {
        let header = with(&[]).unwrap();
        assert_eq!(header.cipher, CipherSpec { mode: Mode::Xts, iv: IvKind::Plain64, key_bytes: 64 });
        let [slot] = &header.slots[..] else { panic!("{header:?}") };
        assert_eq!((slot.iterations, slot.material, slot.stripes), (2000, START + 512 * 512, MAX_STRIPES));
    }

    #[test]
    fn what_cannot_be_is_named_with_its_place() {
        let first = 208 + 48;
        let cases: [(&[Change<'_>], &str, u64); 13] = [
            (&[(0, b"LUKX")], "LUKS magic", 0),
            (&[(6, &[0, 3])], "LUKS version", 6),
            (&[(108, &[0, 0, 0, 65])], "LUKS key-bytes", 108),
            (&[(108, &[0xff; 4])], "LUKS key-bytes", 108),
            (&[(164, &[0; 4])], "LUKS mk-digest-iter", 164),
            (&[(164, &[0xff; 4])], "LUKS mk-digest-iter", 164),
            (&[(first, &[1; 4])], "LUKS key slot active", 256),
            (&[(first + 4, &[0; 4])], "LUKS key slot iterations", 260),
            (&[(first + 4, &[4, 0, 0, 0])], "LUKS key slot iterations", 260),
            (&[(first + 44, &[0; 4])], "LUKS key slot stripes", 300),
            (&[(first + 44, &[0, 0, 15, 161])], "LUKS key slot stripes", 300),
            (&[(first + 40, &[0xff; 4])], "LUKS key slot key-material-offset", 296),
            (&[(first + 40, &[0, 0, 0, 1])], "LUKS key slot key-material-offset", 296),
        ];
        for (changes, field, at) in cases {
            let error = with(changes).unwrap_err();
            assert_eq!((error.field(), error.offset()), (Some(field), Some(START + at)), "{error}");
        }
        // The second slot's material over the first's.
        let enabled = ENABLED.to_be_bytes();
        let error = with(&[(208, &enabled), (first + 40, &[0, 0, 0, 9])]).unwrap_err();
        assert_eq!(error.field(), Some("LUKS key slot key-material-offset"), "{error}");
        let error = LuksHeader::parse(&header()[..591], START, LENGTH).unwrap_err();
        assert_eq!(error.field(), Some("LUKS header"), "{error}");
        assert!(LuksHeader::parse(&header(), START, 512 * (512 + 500)).is_ok());
        assert!(LuksHeader::parse(&header(), START, 512 * (512 + 500) - 1).is_err());
    }

    /// A header with so many slots in use, each with as little key material as possible.
    fn with_slots(hash: &[u8; 6], digest: u64, count: u32, iterations: u64) -> Result<LuksHeader> {
        let mut bytes = header();
        let mut put = |at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
        put(164, digest as u32);
        for slot in 0..SLOTS as u32 {
            let base = 208 + 48 * slot as usize;
            put(base, if slot < count { ENABLED } else { DISABLED });
            put(base + 4, iterations as u32);
            put(base + 40, 8 + slot);
            put(base + 44, 1);
        }
        bytes[72..78].copy_from_slice(hash);
        LuksHeader::parse(&bytes, START, LENGTH)
    }

    #[test]
    fn all_that_a_wrong_passphrase_costs_is_counted() {
        // The key has 64 bytes.
        for (hash, pieces) in [(b"sha1\0\0", 4), (b"sha256", 2), (b"sha512", 1)] {
            for count in [1, SLOTS as u32] {
                let needed = MAX_WORK / u64::from(count);
                let refused = |digest, iterations| {
                    let error = with_slots(hash, digest, count, iterations).unwrap_err();
                    assert_eq!(error.field(), Some("LUKS key slot iterations"), "{error}");
                };
                let most = ((needed - 1000) / pieces).min((MAX_ITERATIONS - 1000) / u64::from(count));
                assert!(with_slots(hash, 1000, count, most).is_ok());
                refused(1000, most + 1);
                // The digest's are asked for once, and needed for each slot.
                let most = (needed - 1000 * pieces).min(MAX_ITERATIONS - 1000 * u64::from(count));
                assert!(with_slots(hash, most, count, 1000).is_ok());
                refused(most + 1, 1000);
            }
        }
    }

    #[test]
    fn what_is_not_supported_is_named() {
        let cases: [(usize, &[u8], &str); 5] = [
            (6, &[0, 2], "version 2"),
            (8, b"serpent", "serpent-xts-plain64"),
            (40, b"ctr-plain64", "aes-ctr-plain64"),
            (40, b"xts-plain64be", "aes-xts-plain64be"),
            (72, b"ripemd160", "ripemd160"),
        ];
        for (at, value, words) in cases {
            let error = with(&[(at, value)]).unwrap_err();
            assert!(matches!(&error, Error::Unsupported { what } if what.contains(words)), "{error}");
        }
    }
}
