//! Images whose guest data is encrypted: every transfer of data passes a buffer in which sectors are en- or decrypted.
//!
//! Only guest data is encrypted; the tables, bitmaps and all else are as in any image. A sector's encryption depends on
//! its number: with LUKS that of its place in the image file, with QEMU's first encryption (AES) that of its place on
//! the virtual disk. So a cluster that moves is encrypted anew with LUKS, and copied as it is with AES. In an external
//! data file the two places are one, and nothing moves. The key is in the image in any case.
//!
//! Each sector is encrypted by itself, and written atomically, so what a power cut leaves of a write is old or new,
//! sector by sector, as in any image. What differs is that zeroes in the file do not read as zeroes: see `write_new`.

use std::ops::Range;

use zeroize::Zeroizing;

use super::Image;
use crate::buf::{IoBuf, IoBufMut};
use crate::crypto::cipher::{SECTOR, SectorCipher};
use crate::crypto::keys;
use crate::device::BlockDevice;
use crate::device::volume::{Copier, PIECE, Volume};
use crate::error::{Error, Result};
use crate::format::header::{Header, crypt};
use crate::format::luks::{self, LuksHeader};
use crate::passphrase::Passphrase;
use crate::units::{GuestOffset, HostOffset};

/// By what sectors are numbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    /// QEMU's first encryption: by their place on the virtual disk.
    Aes,
    /// LUKS: by their place in the file.
    Luks,
}

impl Method {
    /// Its name in QEMU's options.
    pub(super) fn name(self) -> &'static str {
        match self {
            Method::Aes => "aes",
            Method::Luks => "luks",
        }
    }
}

/// How an image's data is encrypted, and whether this handle can read it.
pub(crate) enum Encryption {
    None,
    /// There was no passphrase.
    Locked(Method),
    Open(Method, Box<SectorCipher>),
}

/// What clusters hold that are copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Contents {
    /// Guest data.
    Data,
    /// Tables, which are never encrypted.
    Tables,
}

impl Encryption {
    /// Finds the key, if there is a passphrase. Nothing is changed.
    ///
    /// # Errors
    /// [`Error::WrongPassphrase`]; [`Error::Invalid`] and [`Error::Unsupported`] for a LUKS header that cannot be, or that nobody
    /// here understands; [`Error::Io`].
    pub(super) async fn open<D: BlockDevice>(
        volume: &Volume<D>,
        header: &Header,
        passphrase: Option<&Passphrase>,
    ) -> Result<Encryption> {
        let method = match header.crypt_method {
            crypt::NONE => return Ok(Encryption::None),
            crypt::AES => Method::Aes,
            _ => Method::Luks,
        };
        let Some(passphrase) = passphrase else { return Ok(Encryption::Locked(method)) };
        let cipher = match (method, header.crypto_header) {
            (Method::Luks, Some((offset, length))) => unlock(volume, offset.0, length, passphrase).await?,
            _ => keys::legacy_aes(passphrase.bytes()).ok_or(Error::WrongPassphrase)?,
        };
        Ok(Encryption::Open(method, Box::new(cipher)))
    }

    /// Whether data is encrypted.
    pub(crate) fn is_on(&self) -> bool {
        !matches!(self, Encryption::None)
    }

    /// How, if it is.
    pub(super) fn method(&self) -> Option<Method> {
        match self {
            Encryption::None => None,
            Encryption::Locked(method) | Encryption::Open(method, _) => Some(*method),
        }
    }

    /// Whether contents can be read and written.
    pub(super) fn ensure_open(&self) -> Result<()> {
        if matches!(self, Encryption::Locked(_)) { Err(Error::PassphraseNeeded) } else { Ok(()) }
    }

    /// Whether data can be moved: without the key not if its encryption depends on its place.
    pub(crate) fn lets_data_move(&self) -> bool {
        !matches!(self, Encryption::Locked(Method::Luks))
    }
}

/// Tries the passphrase on each key slot of the LUKS header in `length` bytes of the file from `offset` on.
async fn unlock<D: BlockDevice>(
    volume: &Volume<D>,
    offset: u64,
    length: u64,
    passphrase: &Passphrase,
) -> Result<SectorCipher> {
    let mut bytes = vec![0; length.min(luks::HEADER_LENGTH as u64) as usize];
    volume.read("reading the encryption header", offset, IoBufMut::new(&mut bytes)).await?;
    let header = LuksHeader::parse(&bytes, offset, length)?;
    for slot in &header.slots {
        let length = (header.cipher.key_bytes * slot.stripes as usize).next_multiple_of(SECTOR);
        let mut material = Zeroizing::new(vec![0; length]);
        volume.read("reading key material", slot.material, IoBufMut::new(&mut material)).await?;
        if let Some(cipher) = keys::open_slot(&header, slot, passphrase.bytes(), &mut material) {
            return Ok(cipher);
        }
    }
    Err(Error::WrongPassphrase)
}

impl<D: BlockDevice> Image<D> {
    /// Whether this image, or one behind it, is encrypted: whether there is something for a passphrase to open.
    pub(super) fn uses_passphrase(&self) -> bool {
        self.encryption.is_on() || self.backing.uses_passphrase()
    }

    /// Reads guest data that is at `host` in the file, and at `at` on the disk.
    pub(super) async fn read_data(&self, host: HostOffset, at: GuestOffset, buf: IoBufMut<'_>) -> Result<()> {
        match &self.encryption {
            Encryption::None => self.guest_volume().read("reading guest data", host.0, buf).await,
            // In a box, lest the future of every request be as large as this one.
            Encryption::Open(method, cipher) => Box::pin(self.read_encrypted((*method, cipher), host, at, buf)).await,
            Encryption::Locked(_) => Err(Error::PassphraseNeeded),
        }
    }

    /// Writes guest data to `host` in the file, which is at `at` on the disk.
    pub(super) async fn write_data(
        &self,
        action: &'static str,
        host: HostOffset,
        at: GuestOffset,
        buf: IoBuf<'_>,
    ) -> Result<()> {
        match &self.encryption {
            Encryption::None => self.guest_volume().write(action, host.0, buf).await,
            Encryption::Open(method, cipher) => {
                Box::pin(self.write_encrypted(action, (*method, cipher), host, at, buf)).await
            }
            Encryption::Locked(_) => Err(Error::PassphraseNeeded),
        }
    }

    async fn read_encrypted(
        &self,
        key: (Method, &SectorCipher),
        host: HostOffset,
        at: GuestOffset,
        mut buf: IoBufMut<'_>,
    ) -> Result<()> {
        let mut bytes = vec![0; buf.len().min(PIECE)];
        let mut done = 0;
        while done < buf.len() {
            let end = buf.len().min(done + PIECE);
            let piece = bytes.get_mut(..end - done).unwrap_or_default();
            let place = host.0 + done as u64;
            self.guest_volume().read("reading guest data", place, IoBufMut::new(piece)).await?;
            key.1.decrypt(piece, number(key.0, place, at.0 + done as u64));
            buf.slice(done..end).copy_from(piece);
            done = end;
        }
        Ok(())
    }

    async fn write_encrypted(
        &self,
        action: &'static str,
        key: (Method, &SectorCipher),
        host: HostOffset,
        at: GuestOffset,
        buf: IoBuf<'_>,
    ) -> Result<()> {
        let mut bytes = vec![0; buf.len().min(PIECE)];
        let mut done = 0;
        while done < buf.len() {
            let end = buf.len().min(done + PIECE);
            let piece = bytes.get_mut(..end - done).unwrap_or_default();
            let place = host.0 + done as u64;
            // The guest may change its memory meanwhile: what is encrypted is the copy.
            buf.slice(done..end).copy_to(piece);
            key.1.encrypt(piece, number(key.0, place, at.0 + done as u64));
            self.guest_volume().write(action, place, IoBuf::new(piece)).await?;
            done = end;
        }
        Ok(())
    }

    /// Copies whole clusters, at most [`PIECE`] bytes in all, to one place in the file, where they follow one another.
    pub(super) async fn gather(
        &self,
        contents: Contents,
        sources: &[Range<u64>],
        to: u64,
        copier: &mut Copier,
    ) -> Result<()> {
        match (&self.encryption, contents) {
            (Encryption::Open(Method::Luks, cipher), Contents::Data) => {
                self.gather_encrypted(cipher, sources, to, &mut copier.scratch).await
            }
            (Encryption::Locked(Method::Luks), Contents::Data) => Err(Error::PassphraseNeeded),
            _ => self.volume.gather(sources, to, copier).await,
        }
    }

    async fn gather_encrypted(
        &self,
        cipher: &SectorCipher,
        sources: &[Range<u64>],
        to: u64,
        scratch: &mut Vec<u8>,
    ) -> Result<()> {
        scratch.clear();
        for source in sources {
            let start = scratch.len();
            scratch.resize(start + (source.end - source.start) as usize, 0);
            let bytes = scratch.get_mut(start..).unwrap_or_default();
            self.volume.read("reading a cluster to move", source.start, IoBufMut::new(bytes)).await?;
            cipher.decrypt(bytes, source.start / SECTOR as u64);
        }
        cipher.encrypt(scratch, to / SECTOR as u64);
        self.volume.write("writing a moved cluster", to, IoBuf::new(scratch)).await
    }
}

/// The number by which the sector at `host` in the file, and at `at` on the disk, is encrypted.
fn number(method: Method, host: u64, at: u64) -> u64 {
    let place = match method {
        Method::Aes => at,
        Method::Luks => host,
    };
    place / SECTOR as u64
}
