//! From a passphrase to a key: what a LUKS header's slots, and the old AES encryption, make of it.

use pbkdf2::pbkdf2_hmac;
use sha1::Sha1;
use sha2::{Digest, Sha256, Sha512};
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

use super::cipher::SectorCipher;
use crate::format::luks::{CipherSpec, Hash, IvKind, KeySlot, LuksHeader, Mode};

/// A key, or what is on the way to one: wiped when dropped.
type Secret = Zeroizing<Vec<u8>>;

/// The cipher of the image's data, if the passphrase opens this slot. `material` is the slot's key material, in whole
/// sectors, as it is in the file; it is decrypted in place, so the caller wipes it.
pub(crate) fn open_slot(
    header: &LuksHeader,
    slot: &KeySlot,
    passphrase: &[u8],
    material: &mut [u8],
) -> Option<SectorCipher> {
    let length = header.cipher.key_bytes;
    let slot_key = derive(header.hash, passphrase, &slot.salt, slot.iterations, length);
    SectorCipher::new(header.cipher, &slot_key)?.decrypt(material, 0);
    let key = merge(header.hash, material.get(..length * slot.stripes as usize)?, length);
    let digest = derive(header.hash, &key, &header.digest_salt, header.digest_iterations, header.digest.len());
    bool::from(digest.ct_eq(&header.digest)).then(|| SectorCipher::new(header.cipher, &key)).flatten()
}

/// The cipher of an image with QEMU's first encryption: the passphrase is the key, so nothing tells whether it is right.
pub(crate) fn legacy_aes(passphrase: &[u8]) -> Option<SectorCipher> {
    let mut key = Zeroizing::new([0; 16]);
    key.iter_mut().zip(passphrase).for_each(|(to, from)| *to = *from);
    SectorCipher::new(CipherSpec { mode: Mode::Cbc, iv: IvKind::Plain64, key_bytes: key.len() }, &*key)
}

/// PBKDF2 with HMAC.
fn derive(hash: Hash, secret: &[u8], salt: &[u8], iterations: u32, length: usize) -> Secret {
    let mut out = Zeroizing::new(vec![0; length]);
    match hash {
        Hash::Sha1 => pbkdf2_hmac::<Sha1>(secret, salt, iterations, &mut out),
        Hash::Sha256 => pbkdf2_hmac::<Sha256>(secret, salt, iterations, &mut out),
        Hash::Sha512 => pbkdf2_hmac::<Sha512>(secret, salt, iterations, &mut out),
    }
    out
}

/// Puts the stripes of an anti-forensically split key together: every bit of the material is needed.
fn merge(hash: Hash, stripes: &[u8], length: usize) -> Secret {
    let mut key = Zeroizing::new(vec![0; length]);
    let mut stripes = stripes.chunks_exact(length).peekable();
    while let Some(stripe) = stripes.next() {
        key.iter_mut().zip(stripe).for_each(|(k, s)| *k ^= s);
        if stripes.peek().is_some() {
            match hash {
                Hash::Sha1 => diffuse::<Sha1>(&mut key),
                Hash::Sha256 => diffuse::<Sha256>(&mut key),
                Hash::Sha512 => diffuse::<Sha512>(&mut key),
            }
        }
    }
    key
}

/// Replaces each piece of the length of a digest by the digest of its number and itself; the last may be shorter.
fn diffuse<D: Digest>(key: &mut [u8]) {
    for (number, piece) in (0u32..).zip(key.chunks_mut(<D as Digest>::output_size())) {
        let mut digest = D::new().chain_update(number.to_be_bytes()).chain_update(&*piece).finalize();
        piece.iter_mut().zip(digest.iter()).for_each(|(to, from)| *to = *from);
        zeroize::Zeroize::zeroize(digest.as_mut_slice());
    }
}
