//! Sectors in and out of AES.

use aes::cipher::{
    Array, BlockCipherEncrypt as _, BlockModeDecrypt as _, BlockModeEncrypt as _, InnerIvInit as _, KeyInit,
};
use aes::{Aes128, Aes192, Aes256};
use sha2::{Digest as _, Sha256};
use xts_mode::Xts128;
use zeroize::Zeroize as _;

use crate::format::luks::{CipherSpec, IvKind, Mode};

/// Encryption works on sectors of so many bytes: each is encrypted by itself, so any of them may be written alone.
pub(crate) const SECTOR: usize = 512;

/// A block of AES, as a tweak or an initialisation vector.
type Block = [u8; 16];

#[expect(clippy::large_enum_variant, reason = "there is one for each image, in a box")]
enum Keyed {
    Cbc128(Aes128),
    Cbc192(Aes192),
    Cbc256(Aes256),
    Xts128(Xts128<Aes128>),
    Xts256(Xts128<Aes256>),
}

#[expect(clippy::large_enum_variant, reason = "the same")]
enum Iv {
    Plain,
    Plain64,
    Essiv(Aes256),
}

/// A cipher with its key, which is wiped when this is dropped.
pub(crate) struct SectorCipher {
    keyed: Keyed,
    iv: Iv,
}

/// Which way.
#[derive(Clone, Copy)]
enum Way {
    Encrypt,
    Decrypt,
}

impl SectorCipher {
    /// `None` if the key's length is none that the cipher has.
    pub(crate) fn new(spec: CipherSpec, key: &[u8]) -> Option<Self> {
        let keyed = match (spec.mode, key.len()) {
            (Mode::Cbc, 16) => Keyed::Cbc128(Aes128::new_from_slice(key).ok()?),
            (Mode::Cbc, 24) => Keyed::Cbc192(Aes192::new_from_slice(key).ok()?),
            (Mode::Cbc, 32) => Keyed::Cbc256(Aes256::new_from_slice(key).ok()?),
            (Mode::Xts, 32) => Keyed::Xts128(xts(key)?),
            (Mode::Xts, 64) => Keyed::Xts256(xts(key)?),
            _ => return None,
        };
        let iv = match spec.iv {
            IvKind::Plain => Iv::Plain,
            IvKind::Plain64 => Iv::Plain64,
            IvKind::EssivSha256 => {
                let mut salt = Sha256::digest(key);
                let cipher = Aes256::new(&salt);
                salt.as_mut_slice().zeroize();
                Iv::Essiv(cipher)
            }
        };
        Some(SectorCipher { keyed, iv })
    }

    /// Encrypts whole sectors in place, the first of which has the number `first`.
    pub(crate) fn encrypt(&self, bytes: &mut [u8], first: u64) {
        self.each(bytes, first, Way::Encrypt);
    }

    /// The other way.
    pub(crate) fn decrypt(&self, bytes: &mut [u8], first: u64) {
        self.each(bytes, first, Way::Decrypt);
    }

    fn each(&self, bytes: &mut [u8], first: u64, way: Way) {
        assert!(bytes.len().is_multiple_of(SECTOR), "only whole sectors can be encrypted");
        for (number, sector) in (first..).zip(bytes.chunks_exact_mut(SECTOR)) {
            let iv = self.iv(number);
            match &self.keyed {
                Keyed::Cbc128(key) => cbc(key, sector, iv, way),
                Keyed::Cbc192(key) => cbc(key, sector, iv, way),
                Keyed::Cbc256(key) => cbc(key, sector, iv, way),
                Keyed::Xts128(xts) => match way {
                    Way::Encrypt => xts.encrypt_sector(sector, Array(iv)),
                    Way::Decrypt => xts.decrypt_sector(sector, Array(iv)),
                },
                Keyed::Xts256(xts) => match way {
                    Way::Encrypt => xts.encrypt_sector(sector, Array(iv)),
                    Way::Decrypt => xts.decrypt_sector(sector, Array(iv)),
                },
            }
        }
    }

    fn iv(&self, sector: u64) -> Block {
        let number = match self.iv {
            Iv::Plain => sector & u64::from(u32::MAX),
            Iv::Plain64 | Iv::Essiv(_) => sector,
        };
        let mut iv = Array(u128::from(number).to_le_bytes());
        if let Iv::Essiv(cipher) = &self.iv {
            cipher.encrypt_block(&mut iv);
        }
        iv.0
    }
}

fn xts<C: KeyInit + aes::cipher::BlockSizeUser<BlockSize = aes::cipher::consts::U16>>(key: &[u8]) -> Option<Xts128<C>> {
    let (data, tweak) = key.split_at(key.len() / 2);
    Some(Xts128::new(C::new_from_slice(data).ok()?, C::new_from_slice(tweak).ok()?))
}

fn cbc<C>(key: &C, sector: &mut [u8], iv: Block, way: Way)
where
    C: aes::cipher::BlockCipherEncrypt
        + aes::cipher::BlockCipherDecrypt
        + aes::cipher::BlockSizeUser<BlockSize = aes::cipher::consts::U16>,
{
    let (blocks, _) = Array::slice_as_chunks_mut(sector);
    match way {
        Way::Encrypt => ::cbc::Encryptor::<&C>::inner_iv_init(key, &Array(iv)).encrypt_blocks(blocks),
        Way::Decrypt => ::cbc::Decryptor::<&C>::inner_iv_init(key, &Array(iv)).decrypt_blocks(blocks),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sectors_come_back_and_differ_by_their_number() {
        for (mode, lengths) in [(Mode::Cbc, &[16, 24, 32][..]), (Mode::Xts, &[32, 64])] {
            for iv in [IvKind::Plain, IvKind::Plain64, IvKind::EssivSha256] {
                for &key_bytes in lengths {
                    let key: Vec<u8> = (0..key_bytes as u8).collect();
                    let cipher = SectorCipher::new(CipherSpec { mode, iv, key_bytes }, &key).unwrap();
                    let mut bytes = [7; 3 * SECTOR];
                    cipher.encrypt(&mut bytes, 41);
                    assert_ne!(bytes[..SECTOR], bytes[SECTOR..2 * SECTOR], "{mode:?} {iv:?}");
                    cipher.decrypt(&mut bytes[SECTOR..], 42);
                    assert_eq!(bytes[SECTOR..], [7; 2 * SECTOR], "{mode:?} {iv:?}");
                    // 32 bits are all that "plain" knows of a number.
                    let (mut low, mut high) = ([1; SECTOR], [1; SECTOR]);
                    cipher.encrypt(&mut low, 5);
                    cipher.encrypt(&mut high, (1 << 32) + 5);
                    assert_eq!(low == high, iv == IvKind::Plain, "{mode:?} {iv:?}");
                }
            }
        }
    }

    #[test]
    fn keys_of_other_lengths_are_none() {
        for (mode, key_bytes) in [(Mode::Cbc, 64), (Mode::Xts, 16), (Mode::Xts, 48), (Mode::Cbc, 0)] {
            let spec = CipherSpec { mode, iv: IvKind::Plain64, key_bytes };
            assert!(SectorCipher::new(spec, &vec![0; key_bytes]).is_none());
        }
    }

    #[test]
    fn aes_xts_is_that_of_the_standard() {
        // IEEE 1619, vector 10: 256-bit keys, sector 0xff; its first bytes.
        let hex = |text: &str| -> Vec<u8> {
            (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
        };
        let key = hex(
            "27182818284590452353602874713526624977572470936999595749669676273141592653589793238462643383279502884197169399375105820974944592",
        );
        let spec = CipherSpec { mode: Mode::Xts, iv: IvKind::Plain64, key_bytes: 64 };
        let cipher = SectorCipher::new(spec, &key).unwrap();
        let mut bytes: Vec<u8> = (0..SECTOR).map(|i| i as u8).collect();
        cipher.encrypt(&mut bytes, 0xff);
        assert_eq!(bytes[..16], hex("1c3b3a102f770386e4836c99e370cf9b"));
    }
}
