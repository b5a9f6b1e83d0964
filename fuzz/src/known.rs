//! What the guest must still see when an image is damaged: everything that the damage did not touch.

use std::ops::Range;

use qcow_recycler::blocking::block_on;
use qcow_recycler::buf::IoBufMut;
use qcow_recycler::device::Features;
use qcow_recycler::format::header::crypt;
use qcow_recycler::{BackingPolicy, Image, Options, Passphrase};

use super::anatomy::{Anatomy, Stored};
use super::device::Sparse;
use super::mutate::File;

/// The guest's disk is looked at up to here.
pub const MOST_BYTES: u64 = 8 << 20;
/// Requests are multiples of this many bytes.
pub const SECTOR: u64 = 512;

/// A disk as far as its contents are known.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    pub data: Vec<u8>,
    /// Of each sector, whether it must read as `data` says.
    pub known: Vec<bool>,
}

impl Disk {
    /// A disk of so many bytes of which nothing is known.
    pub fn unknown(size: u64) -> Self {
        Disk { data: vec![0; size as usize], known: vec![false; (size / SECTOR) as usize] }
    }

    /// The length in bytes.
    pub fn size(&self) -> u64 {
        self.data.len() as u64
    }

    /// A range of bytes has these contents from now on; `None`: nobody knows. What lies past the end is left out.
    pub fn set(&mut self, range: Range<u64>, contents: Option<&[u8]>) {
        let range = range.start as usize..range.end.min(self.size()) as usize;
        if range.is_empty() {
            return;
        }
        if let Some(bytes) = contents {
            let count = range.len();
            self.data[range.clone()].copy_from_slice(&bytes[..count]);
        }
        self.known[range.start / SECTOR as usize..range.end / SECTOR as usize].fill(contents.is_some());
    }

    /// Forgets what is not known of another disk.
    pub fn forget_unknown(&mut self, other: &Disk) {
        for (n, known) in self.known.iter_mut().enumerate() {
            *known &= other.known.get(n) == Some(&true);
        }
    }

    /// Whether every sector of a range is known.
    pub fn is_known(&self, range: Range<u64>) -> bool {
        let sectors = (range.start / SECTOR) as usize..(range.end / SECTOR) as usize;
        self.known.get(sectors).is_some_and(|known| known.iter().all(|&k| k))
    }

    /// Compares what was read at `offset`.
    pub fn compare(&self, offset: u64, read: &[u8]) -> Result<(), String> {
        for (n, sector) in read.chunks(SECTOR as usize).enumerate() {
            let at = offset as usize + n * SECTOR as usize;
            let expected = self.data.get(at..at + sector.len());
            if self.known.get(at / SECTOR as usize) == Some(&true) && expected != Some(sector) {
                let start = |bytes: &[u8]| String::from_utf8_lossy(&bytes[..32]).into_owned();
                let (found, wanted) = (start(sector), expected.map(start).unwrap_or_default());
                return Err(format!("the sector at {at:#x} of the disk reads {found:?}, not {wanted:?}"));
            }
        }
        Ok(())
    }
}

/// For an image with QEMU's first encryption, which any passphrase opens. LUKS headers are for the target `header`, since
/// they decide how long deriving a key takes.
pub fn passphrase(image: &[u8]) -> Option<Passphrase> {
    let aes = image.get(32..36).is_some_and(|method| method == crypt::AES.to_be_bytes());
    aes.then(|| Passphrase::new("secret"))
}

/// A sound image, what its disk holds, and where in the file that is.
pub struct Original {
    pub name: String,
    pub bytes: Vec<u8>,
    disk: Disk,
    stored: Vec<Stored>,
    cluster_size: u64,
}

/// What is written in one sector, unlike any other.
pub fn stamp(offset: u64, version: u64) -> [u8; SECTOR as usize] {
    let mut sector = [0; SECTOR as usize];
    let text = format!("disk {offset:#x} version {version};");
    for (to, from) in sector.iter_mut().zip(text.bytes().cycle()) {
        *to = from;
    }
    sector
}

impl Original {
    /// Puts a stamp into every sector of the disk that is stored plainly, and reads the disk.
    pub fn new(name: &str, mut bytes: Vec<u8>) -> Self {
        let Some(anatomy) = Anatomy::of(&bytes) else {
            return Original {
                name: name.to_owned(),
                bytes,
                disk: Disk::default(),
                stored: Vec::new(),
                cluster_size: 512,
            };
        };
        let cluster_size = anatomy.cluster_size();
        let size = (anatomy.size & !(SECTOR - 1)).min(MOST_BYTES);
        let stored = anatomy.stored(MOST_BYTES / cluster_size);
        for (guest, stored) in (0..).zip(&stored) {
            // Compressed data starts at any byte, and is left as it is.
            let plain =
                |data: &&Range<u64>| data.start.is_multiple_of(cluster_size) && data.end - data.start == cluster_size;
            let Some(data) = stored.data.as_ref().filter(plain) else { continue };
            for n in (0..cluster_size).step_by(SECTOR as usize) {
                let at = (data.start + n) as usize;
                if let Some(sector) = bytes.get_mut(at..at + SECTOR as usize) {
                    sector.copy_from_slice(&stamp(guest * cluster_size + n, 0));
                }
            }
        }
        let mut disk = Disk::unknown(size);
        let device = Sparse::new(&File::new(bytes.clone()), Features::default(), u64::MAX);
        let passphrase = passphrase(&bytes);
        let options = Options { read_only: true, backing: BackingPolicy::Skip, passphrase, ..Options::default() };
        if let Ok(image) = block_on(Image::open(device, options)) {
            for at in (0..size).step_by(cluster_size as usize) {
                let end = size.min(at + cluster_size);
                let mut cluster = vec![0; (end - at) as usize];
                if block_on(image.read(at, IoBufMut::new(&mut cluster))).is_ok() {
                    disk.set(at..end, Some(&cluster));
                }
            }
        }
        Original { name: name.to_owned(), bytes, disk, stored, cluster_size }
    }

    /// Sectors of the disk that are known.
    pub fn known_sectors(&self) -> usize {
        self.disk.known.iter().filter(|&&k| k).count()
    }

    /// What a damaged copy must still show: clusters of which neither the data nor an entry on the way to it differs.
    pub fn survives(&self, file: &File) -> Disk {
        let same = |range: Range<u64>| {
            let in_file = range.end.min(self.bytes.len() as u64) <= file.length;
            let byte = |bytes: &[u8], at: u64| bytes.get(at as usize).copied().unwrap_or(0);
            in_file && range.clone().all(|at| byte(&self.bytes, at) == byte(&file.bytes, at))
        };
        let Some(anatomy) = Anatomy::of(&file.bytes) else { return Disk::default() };
        // What gives entries their meaning (the version, and whether they are extended), the geometry, the encryption,
        // and where the L1 table is.
        let features = |bytes: &[u8], bits: u8| bytes.get(79).map(|features| features & bits);
        let same_bits = |bits| features(&self.bytes, bits) == features(&file.bytes, bits);
        let readable = same(4..8) && same(20..24) && same(32..36) && same(40..48) && same_bits(16);
        // What is compressed needs the way in which it is, too.
        let unpackable = same_bits(8) && same(104..105);
        let backing_is_same = same(8..20);
        let mut disk = self.disk.clone();
        for (guest, stored) in (0..).zip(&self.stored) {
            let l2_entry = stored.l2.as_ref().map(|(_, entry)| entry.clone());
            let entries = std::iter::once(stored.l1_entry..stored.l1_entry + 8).chain(l2_entry);
            let mut untouched = readable && entries.into_iter().all(same);
            untouched &= match &stored.data {
                Some(data) if stored.compressed => unpackable && same(data.clone()),
                Some(data) => same(data.clone()),
                None => backing_is_same,
            };
            if !untouched {
                disk.set(guest * self.cluster_size..(guest + 1) * self.cluster_size, None);
            }
        }
        let size = (anatomy.size & !(SECTOR - 1)).min(disk.size());
        disk.data.truncate(size as usize);
        disk.known.truncate((size / SECTOR) as usize);
        disk
    }
}

/// Whether the file's refcounts account for every reference, and every entry that claims to be the only one is: then
/// nothing that is done to one cluster can reach another.
pub fn is_accounted_for(file: &File) -> bool {
    let Some(anatomy) = Anatomy::of(&file.bytes) else { return false };
    anatomy.uses().iter().all(|(&cluster, uses)| uses.are_accounted_for(anatomy.refcount(cluster)))
}

/// Of a disk of `size` bytes in a file whose refcounts do not account for everything: the part that has nothing to do
/// with that. Nothing, if a table is among what is not accounted for.
pub fn bystanders(file: &File, size: u64) -> Disk {
    let mut disk = Disk::unknown(size);
    let Some(anatomy) = Anatomy::of(&file.bytes) else { return disk };
    let uses = anatomy.uses();
    let sound = |cluster: &u64| uses.get(cluster).is_none_or(|uses| uses.are_accounted_for(anatomy.refcount(*cluster)));
    if uses.iter().any(|(cluster, uses)| uses.tables > 0 && !sound(cluster)) {
        return disk;
    }
    let bits = anatomy.cluster_bits;
    for (guest, stored) in (0..).zip(anatomy.stored((size >> bits) + 1)) {
        if stored.data.is_none_or(|data| (data.start >> bits..=(data.end - 1) >> bits).take(8).all(|c| sound(&c))) {
            disk.set(guest << bits..(guest + 1) << bits, Some(&vec![0; 1 << bits]));
        }
    }
    disk
}

/// Whether one plain cluster is two of the disk's. No sound writer makes that, but a repair may have to leave it; once
/// one of the two is gone, the other's entry does not claim to be the only one, which a check finds wrong (as QEMU's
/// does after QEMU).
pub fn is_shared_with_itself(file: &File) -> bool {
    let Some(anatomy) = Anatomy::of(&file.bytes) else { return false };
    anatomy.uses().values().any(|uses| uses.active > 1 && uses.packed < uses.active)
}
