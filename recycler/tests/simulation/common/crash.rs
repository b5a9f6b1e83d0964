//! The images that a power cut can leave.
//!
//! An [`Epoch`] is what a device guarantees at one instant (everything that a completed flush covers) and, in order,
//! all that may or may not have reached the medium since: the sectors of writes and the changes of length. A crash
//! image is the durable state with any subset of these applied in that order. Order needs no permuting: whatever a
//! reordering leaves in a sector is one of the values written to it, and the subset that has only that write leaves
//! the same.

use std::collections::HashMap;
use std::sync::Arc;

use rand::Rng;
use rand::rngs::SmallRng;

use super::content::{SECTOR, is_guest_data};

/// Something that a power cut either undoes entirely or leaves done.
#[derive(Clone, Debug)]
pub enum Atom {
    /// A sector's contents after a write.
    Sector {
        /// The sector's index in the image file.
        index: u64,
        /// What it holds then.
        bytes: Arc<[u8; SECTOR]>,
    },
    /// The device's length in bytes; bytes that appear are zeroes.
    Length(u64),
}

impl Atom {
    /// Applies the change. A sector past the end of `image` is lost with the extension that should have made room for
    /// it.
    pub fn apply(&self, image: &mut Vec<u8>) {
        match self {
            Atom::Length(length) => image.resize(*length as usize, 0),
            Atom::Sector { index, bytes } => {
                let start = *index as usize * SECTOR;
                if let Some(rest) = image.get_mut(start..) {
                    let len = rest.len().min(SECTOR);
                    rest[..len].copy_from_slice(&bytes[..len]);
                }
            }
        }
    }
}

/// What a device holds for certain and perhaps, at one instant.
#[derive(Clone)]
pub struct Epoch {
    /// What the last completed flush made durable.
    pub durable: Arc<Vec<u8>>,
    /// How often the durable state had changed.
    pub generation: u64,
    /// What may have happened since, in order: completed operations, then those in flight.
    pub atoms: Vec<Atom>,
    /// A description of the last event, for reports.
    pub event: String,
}

/// Which atoms of an epoch happened.
pub type Selection = Vec<bool>;

/// How many images of one epoch to try.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Up to so many atoms, every subset is tried.
    pub exhaustive: usize,
    /// Beyond, so many random subsets besides the systematic ones.
    pub random: usize,
    /// Beyond, at most so many of each of "all but one" and "only one".
    pub singles: usize,
}

/// What two devices may hold after a power cut: each has lost what it lost whatever became of the other. All of one with
/// nothing of the other, and `random` more.
pub fn pairs(epochs: [&Epoch; 2], random: usize, rng: &mut SmallRng) -> Vec<(Vec<u8>, Vec<u8>)> {
    let effort = Effort { exhaustive: 2, random: 2, singles: 1 };
    let [first, second] = epochs;
    let (_, firsts) = first.selections(effort, rng);
    let (_, seconds) = second.selections(effort, rng);
    let all = |epoch: &Epoch, happened| vec![happened; epoch.atoms.len()];
    let mut chosen = vec![(all(first, true), all(second, false)), (all(first, false), all(second, true))];
    for _ in 0..random {
        let one = firsts[rng.random_range(0..firsts.len())].clone();
        chosen.push((one, seconds[rng.random_range(0..seconds.len())].clone()));
    }
    chosen.into_iter().map(|(one, other)| (first.image(&one), second.image(&other))).collect()
}

impl Epoch {
    /// The image that is left if exactly the selected atoms happened.
    pub fn image(&self, selection: &[bool]) -> Vec<u8> {
        let mut image = Vec::clone(&self.durable);
        for (atom, _) in self.atoms.iter().zip(selection).filter(|(_, selected)| **selected) {
            atom.apply(&mut image);
        }
        image
    }

    /// The subsets to try: every one of a small epoch, otherwise nothing, all, all but one, only one, metadata only,
    /// data only, lengths only, no lengths, the first write of each sector only, prefixes, suffixes, and random ones.
    /// The first element is false if the selection was sampled.
    pub fn selections(&self, effort: Effort, rng: &mut SmallRng) -> (bool, Vec<Selection>) {
        let n = self.atoms.len();
        if n <= effort.exhaustive {
            let all = (0..1u64 << n).map(|bits| (0..n).map(|i| bits >> i & 1 == 1).collect()).collect();
            return (true, all);
        }
        let mut out: Vec<Selection> = vec![vec![false; n], vec![true; n]];
        let is_length = |a: &Atom| matches!(a, Atom::Length(_));
        let is_data = |a: &Atom| matches!(a, Atom::Sector { bytes, .. } if is_guest_data(&bytes[..]));
        let by = |f: &dyn Fn(&Atom) -> bool| self.atoms.iter().map(f).collect::<Selection>();
        out.push(by(&|a| is_data(a) || is_length(a)));
        out.push(by(&|a| !is_data(a)));
        out.push(by(&|a| is_data(a)));
        out.push(by(&|a| !is_length(a)));
        out.push(by(&|a| is_length(a)));
        out.push(self.first_writes());
        let pick = |count: usize, rng: &mut SmallRng| -> Vec<usize> {
            if n <= count { (0..n).collect() } else { (0..count).map(|_| rng.random_range(0..n)).collect() }
        };
        for i in pick(effort.singles, rng) {
            out.push((0..n).map(|j| j != i).collect());
        }
        for i in pick(effort.singles, rng) {
            out.push((0..n).map(|j| j == i).collect());
        }
        for i in pick(effort.singles.div_ceil(2), rng) {
            out.push((0..n).map(|j| j < i).collect());
            out.push((0..n).map(|j| j >= i).collect());
        }
        for round in 0..effort.random {
            let p = [0.5, 0.1, 0.9][round % 3];
            out.push((0..n).map(|_| rng.random_bool(p)).collect());
        }
        (false, out)
    }

    /// Everything happened, but of several writes to a sector only the first.
    fn first_writes(&self) -> Selection {
        let mut seen: HashMap<u64, ()> = HashMap::new();
        self.atoms
            .iter()
            .map(|a| match a {
                Atom::Length(_) => true,
                Atom::Sector { index, .. } => seen.insert(*index, ()).is_none(),
            })
            .collect()
    }
}
