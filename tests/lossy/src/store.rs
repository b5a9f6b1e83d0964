//! The file's bytes: what is durable for certain, what a reader sees, and in between everything that a power cut may undo.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// A sector is old or new after a power cut, never a mixture.
const SECTOR: usize = 512;

/// Something that a power cut undoes entirely or not at all.
enum Change {
    /// A sector's contents after a write.
    Sector { index: usize, bytes: Box<[u8; SECTOR]> },
    /// The file's length; bytes that appear are zeroes.
    Length(usize),
}

impl Change {
    /// A sector past the end is lost with the change of length that should have made room for it.
    fn apply(&self, file: &mut Vec<u8>) {
        match self {
            Change::Length(length) => file.resize(*length, 0),
            Change::Sector { index, bytes } => {
                if let Some(rest) = file.get_mut(index * SECTOR..) {
                    let there = rest.len().min(SECTOR);
                    rest[..there].copy_from_slice(&bytes[..there]);
                }
            }
        }
    }
}

/// A file with a write-back cache that has no battery.
#[derive(Default)]
pub(crate) struct Store {
    durable: Vec<u8>,
    now: Vec<u8>,
    /// What was changed since the last flush, in order.
    changes: Vec<Change>,
    /// How many changes were made durable before those.
    settled: u64,
    /// The power is off.
    pub(crate) off: bool,
}

impl Store {
    /// A file that durably holds `bytes`; the power is on.
    pub(crate) fn holding(bytes: Vec<u8>) -> Self {
        Store { durable: bytes.clone(), now: bytes, ..Store::default() }
    }

    pub(crate) fn length(&self) -> u64 {
        self.now.len() as u64
    }

    /// At most `length` bytes from `offset` on.
    pub(crate) fn read(&self, offset: u64, length: usize) -> &[u8] {
        let rest = usize::try_from(offset).ok().and_then(|at| self.now.get(at..)).unwrap_or_default();
        &rest[..rest.len().min(length)]
    }

    /// Stores bytes; the file becomes longer if it must.
    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) {
        let start = offset as usize;
        let end = start + bytes.len();
        if end > self.now.len() {
            self.set_length(end as u64);
        }
        if let Some(there) = self.now.get_mut(start..end) {
            there.copy_from_slice(bytes);
        }
        self.note(start, end);
    }

    /// Makes a range read as zeroes as far as the file reaches.
    pub(crate) fn zero(&mut self, offset: u64, length: u64) {
        let start = (offset as usize).min(self.now.len());
        let end = (start + length as usize).min(self.now.len());
        self.now[start..end].fill(0);
        self.note(start, end);
    }

    pub(crate) fn set_length(&mut self, length: u64) {
        self.now.resize(length as usize, 0);
        self.changes.push(Change::Length(length as usize));
    }

    /// The sectors of a range have changed.
    fn note(&mut self, start: usize, end: usize) {
        for index in start / SECTOR..end.div_ceil(SECTOR) {
            let rest = self.now.get(index * SECTOR..).unwrap_or_default();
            let there = rest.len().min(SECTOR);
            let mut bytes = Box::new([0; SECTOR]);
            bytes[..there].copy_from_slice(&rest[..there]);
            self.changes.push(Change::Sector { index, bytes });
        }
    }

    /// What a flush that begins now covers: everything changed so far.
    pub(crate) fn so_far(&self) -> u64 {
        self.settled + self.changes.len() as u64
    }

    /// A flush that covers so much is done.
    pub(crate) fn settle(&mut self, covered: u64) {
        let count = covered.saturating_sub(self.settled) as usize;
        for change in self.changes.drain(..count) {
            change.apply(&mut self.durable);
        }
        self.settled += count as u64;
    }

    /// How many changes are in doubt.
    pub(crate) fn uncertain(&self) -> usize {
        self.changes.len()
    }

    /// What a power cut leaves: the durable state, and of the changes since a subset that `seed` decides. Returns also how
    /// many are lost.
    pub(crate) fn after_cut(&self, seed: u64) -> (Vec<u8>, usize) {
        let mut rng = SmallRng::seed_from_u64(seed);
        // From nothing over all but a few to everything; lengths have a fate of their own.
        let sectors = [0.0, 0.02, 0.2, 0.5, 0.8, 0.98, 1.0][rng.random_range(0..7)];
        let lengths = [0.0, 0.5, 1.0, sectors][rng.random_range(0..4)];
        let mut file = self.durable.clone();
        let mut lost = 0;
        for change in &self.changes {
            let survives = match change {
                Change::Sector { .. } => sectors,
                Change::Length(_) => lengths,
            };
            if rng.random_bool(survives) {
                change.apply(&mut file);
            } else {
                lost += 1;
            }
        }
        (file, lost)
    }
}
